# Addresses are tensor.data_ptr(); the Python wrapper beside each op makes every check.
has_cuda: bool

def segment_sum_cpu(
    x: int, cu_seqlens: int, segments: int, sums: int, is_double: bool, threads: int
) -> None: ...
def segment_spread_cpu(
    x: int, cu_seqlens: int, segments: int, out: int, is_double: bool, threads: int
) -> None: ...
def pack_cpu(lengths: int, items: int, capacity: int, bin_of: int) -> int: ...

class PolicyArguments:
    def __init__(
        self,
        logp: int,
        old_logp: int,
        log_ratio: int,
        advantages: int,
        mask: int,
        weight: int,
        ref_logp: int,
        loss: int,
        d_logp: int,
        d_ratio: int,
        sums: int,
        tokens: int,
        rule: int,
        low: float,
        high: float,
        cap: float,
        kl: int,
        kl_coef: float,
    ) -> None: ...

def policy_cpu(args: PolicyArguments, threads: int) -> None: ...

class GaeArguments:
    def __init__(
        self,
        rewards: int,
        values: int,
        mask: int,
        bootstrap: int,
        cu_seqlens: int,
        logp: int,
        ref_logp: int,
        lams: int,
        critic_lams: int,
        advantages: int,
        returns: int,
        statistics: int,
        tokens: int,
        sequences: int,
        gamma: float,
        lam: float,
        critic_lam: float,
        kl_coef: float,
    ) -> None: ...

def gae_cpu(args: GaeArguments, threads: int) -> None: ...
def gae_cuda_scratch(tokens: int) -> int: ...
def gae_cuda(args: GaeArguments, scratch: int, stream: int) -> None: ...

class DivergenceTile:
    def __init__(
        self,
        student: int,
        student_stride: int,
        student_bias: int,
        student_scale: float,
        student_softcap: float,
        teacher: int,
        teacher_stride: int,
        teacher_bias: int,
        teacher_scale: float,
        teacher_softcap: float,
        rows: int,
        cols: int,
        inverse_temp: int,
        kind: int,
        weight: float,
    ) -> None: ...

def divergence_statistics_cpu(tile: DivergenceTile, stats: int, threads: int) -> None: ...
def divergence_gradient_cpu(
    tile: DivergenceTile, stats: int, out: int, out_stride: int, threads: int
) -> None: ...
