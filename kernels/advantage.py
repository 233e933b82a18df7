"""Generalised advantage estimates and discounted returns over packed sequences.

GAE (arXiv:1506.02438) over the *actions* of a sequence, k = 1..K, with V_{K+1} = bootstrap:

    delta_k = r_k + gamma V_{k+1} - V_k
    A_k     = delta_k + gamma lam A_{k+1},  A_{K+1} = 0
    G_k     = A_k + V_k

An action is a token, or, given `steps`, all of a step's tokens (macro actions, arXiv:2410.02743;
turns, arXiv:2410.02089): V_k is the value at its first token, r_k is the *sum* of its rewards, and
its tokens share A_k and G_k. Tokens with mask False are observations (tool output, prompt). They
are no actions and take no time: the next action's V and A reach the previous action undiscounted,
as in verl. A reward at an observation counts, undiscounted, for the action before it (verl drops
it): r_k sums the rewards from the first token of action k up to the first token of action k+1. A
reward before the first action was earned by none and reaches none. Observations get A = G = 0;
their values do not matter.

The kernels fold V, A and G into one number, what an action sees after itself:

    c = gamma ((1 - lam) V_{k+1} + lam G_{k+1}) + rewards at observations in between
    G = r + c,  A = G - V

and c one token earlier is affine in c: gamma lam (r + c) + gamma (1 - lam) V at an action, r + c
at an observation. Affine maps compose associatively, so a sequence is a reverse scan of
(slope, offset), with slope 0 where it ends. Bytes a token: r, V, mask read, A, G written = 17;
`steps` adds a few passes that spread the results over each step's tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import _C, choose_impl, device_guard, expect, stream_of, tl, triton
from .segments import check_boundaries, segment_ids, segment_sum


def reference(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """gae(), action by action, in the dtype of `rewards`."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    acts = [True] * len(rewards) if mask is None else mask.tolist()
    step_bounds = range(len(rewards) + 1) if steps is None else steps.tolist()
    step_tokens = [[t for t in range(*bounds) if acts[t]] for bounds in pairwise(step_bounds)]
    actions = [tokens for tokens in step_tokens if tokens]
    bounds = cu_seqlens.tolist()
    for sequence in reversed(range(len(bounds) - 1)):
        next_first = bounds[sequence + 1]
        next_value = rewards.new_zeros(()) if bootstrap is None else bootstrap[sequence]
        next_advantage = rewards.new_zeros(())
        while actions and actions[-1][0] >= bounds[sequence]:
            tokens = actions.pop()
            first = tokens[0]
            reward = rewards[first:next_first].sum()
            delta = reward + gamma * next_value - values[first]
            advantages[tokens] = delta + gamma * lam * next_advantage
            returns[tokens] = advantages[first] + values[first]
            next_first, next_value, next_advantage = first, values[first], advantages[first]
    return advantages, returns


@triton.jit
def _compose(later_slope, later_offset, slope, offset):
    # Slope 0, a sequence's end, lets nothing through: not even a NaN, which 0 * NaN would.
    return slope * later_slope, tl.where(slope == 0, offset, slope * later_offset + offset)


@triton.jit
def _gae_kernel(
    rewards,
    values,
    mask,
    bootstrap,
    cu_seqlens,
    advantages,
    returns,
    gamma,
    lam,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence: blocks from its end, each a reverse scan of G = slope G' + offset."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    decay = gamma * lam
    keep = gamma - decay
    at_end = 0.0
    if HAS_BOOTSTRAP:
        at_end = gamma * tl.load(bootstrap + sequence)
    lane = tl.arange(0, BLOCK)
    carried = 0.0
    for done in range(0, end - begin, BLOCK):
        token = end - done - BLOCK + lane
        here = token >= begin
        has_next = here & (token + 1 < end)
        acts = here
        next_acts = has_next
        if HAS_MASK:
            acts = tl.load(mask + token, mask=here, other=0) != 0
            next_acts = tl.load(mask + token + 1, mask=has_next, other=0) != 0
        offset = tl.load(rewards + token, mask=here, other=0.0)
        if HAS_VALUES:
            next_value = tl.load(values + token + 1, mask=next_acts, other=0.0)
            offset += tl.where(next_acts, keep * next_value, 0.0)
        offset += tl.where(token + 1 == end, at_end, 0.0)
        slope = tl.where(token + 1 == end, 0.0, tl.where(next_acts, decay, 1.0))
        slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
        total = tl.where(slope == 0, offset, slope * carried + offset)
        carried = tl.sum(tl.where(lane == 0, total, 0.0), 0)
        tl.store(returns + token, tl.where(acts, total, 0.0), mask=here)
        if HAS_VALUES:
            value = tl.load(values + token, mask=acts, other=0.0)
            tl.store(advantages + token, tl.where(acts, total - value, 0.0), mask=here)


class _Packed(NamedTuple):
    """Checked inputs, of one floating-point dtype. Values None: only returns are wanted."""

    rewards: Tensor
    values: Tensor | None
    mask: Tensor | None
    bootstrap: Tensor | None
    cu_seqlens: Tensor
    gamma: float
    lam: float


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _arguments(p: _Packed, advantages: Tensor | None, returns: Tensor) -> _C.GaeArguments:
    return _C.GaeArguments(
        _address(p.rewards),
        _address(p.values),
        _address(p.mask),
        _address(p.bootstrap),
        _address(p.cu_seqlens),
        _address(advantages),
        _address(returns),
        len(p.rewards),
        len(p.cu_seqlens) - 1,
        p.gamma,
        p.lam,
    )


def _launch_cpu(p: _Packed, advantages: Tensor | None, returns: Tensor) -> None:
    _C.gae_cpu(_arguments(p, advantages, returns), torch.get_num_threads())


def _launch_cuda(p: _Packed, advantages: Tensor | None, returns: Tensor) -> None:
    words = _C.gae_cuda_scratch(len(returns))
    scratch = torch.empty(words, dtype=torch.int64, device=returns.device)
    with device_guard(returns):
        arguments = _arguments(p, advantages, returns)
        _C.gae_cuda(arguments, scratch.data_ptr(), stream_of(returns))


def _launch_triton(p: _Packed, advantages: Tensor | None, returns: Tensor) -> None:
    with device_guard(returns):
        _gae_kernel[(len(p.cu_seqlens) - 1,)](
            p.rewards,
            p.values,
            p.mask,
            p.bootstrap,
            p.cu_seqlens,
            advantages,
            returns,
            p.gamma,
            p.lam,
            HAS_VALUES=p.values is not None,
            HAS_MASK=p.mask is not None,
            HAS_BOOTSTRAP=p.bootstrap is not None,
            BLOCK=1024,
        )


_LAUNCH = {"cpu": _launch_cpu, "cuda": _launch_cuda, "triton": _launch_triton}


def _scan(packed: _Packed, impl: str) -> tuple[Tensor | None, Tensor]:
    """Advantages (None without values) and returns of token actions; float32."""
    tensors = {name: _aligned(x) for name, x in packed._asdict().items() if isinstance(x, Tensor)}
    packed = packed._replace(**tensors)
    returns = torch.empty_like(packed.rewards)
    advantages = None if packed.values is None else torch.empty_like(returns)
    if len(returns):
        _LAUNCH[impl](packed, advantages, returns)
    return advantages, returns


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous from a 16-byte boundary, as the wide loads want it; floats as float32."""
    x = (x.float() if x.is_floating_point() else x).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    steps: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed sequences, each [T], float32 and detached.

    Args:
        rewards: [T].
        values: [T], the critic's value before each token.
        cu_seqlens: [S+1] int32; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
        gamma, lam: in [0, 1].
        mask: [T] bool, False at observations; all True if omitted.
        bootstrap: [S], V of the state after each sequence: the critic's where it was truncated,
            0 where it terminated; all 0 if omitted.
        steps: [N+1] int32, boundaries of the steps (macro actions, turns) in the packed tokens;
            every token is in one step and no step crosses a sequence. Checking that waits for
            the GPU.
        impl: "cuda", "triton", "cpu" (C++) or "reference", which keeps float64.
    """
    packed = _check(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam)
    if steps is not None:
        _check_steps(steps, packed)
    impl = choose_impl(impl, rewards.device, ("cuda", "triton", "cpu"))
    with torch.no_grad():
        if impl == "reference":
            return reference(**packed._asdict(), steps=steps)
        if steps is None:
            advantages, returns = _scan(packed, impl)
        else:
            advantages, returns = _scan_steps(packed, steps, impl)
    assert advantages is not None  # there are values
    return advantages, returns


def discounted_returns(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """G_k = r_k + gamma G_{k+1}, [T], float32 and detached: GAE's returns at lam = 1.

    Arguments and the treatment of observations are those of `gae`; G_{K+1} = bootstrap.
    """
    packed = _check(rewards, None, mask, bootstrap, cu_seqlens, gamma, 1.0)
    impl = choose_impl(impl, rewards.device, ("cuda", "triton", "cpu"))
    with torch.no_grad():
        if impl == "reference":
            zeros = torch.zeros_like(packed.rewards)
            return reference(**packed._replace(values=zeros)._asdict())[1]
        return _scan(packed, impl)[1]


def _scan_steps(packed: _Packed, steps: Tensor, impl: str) -> tuple[Tensor | None, Tensor]:
    """As `_scan`, over steps: to a step's first action its later tokens are like observations."""
    ids = segment_ids(steps, len(packed.rewards))
    acts = torch.ones_like(ids, dtype=torch.bool) if packed.mask is None else packed.mask
    before = acts.cumsum(0) - acts.long()  # actions before each token
    first = acts & (before == before[steps[ids]])

    def spread(x: Tensor) -> Tensor:  # only the step's first action is not 0: the sum is that
        return segment_sum(x, steps)[ids].where(acts, 0.0)

    advantages, returns = _scan(packed._replace(mask=first), impl)
    return None if advantages is None else spread(advantages), spread(returns)


def _check(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
) -> _Packed:
    """Every check but that of steps; floats come back as float64 or float32, as `rewards` is."""
    expect(
        rewards.dim() == 1 and rewards.is_floating_point(),
        "rewards",
        "a 1-D floating-point tensor",
        f"{rewards.dtype} of shape {tuple(rewards.shape)}",
        "Pack the sequences end to end",
    )
    for name, factor in (("gamma", gamma), ("lam", lam)):
        expect(0 <= factor <= 1, name, "a number in [0, 1]", factor)
    check_boundaries("cu_seqlens", cu_seqlens, len(rewards), rewards.device)
    for name, x, length in (
        ("values", values, len(rewards)),
        ("mask", mask, len(rewards)),
        ("bootstrap", bootstrap, len(cu_seqlens) - 1),
    ):
        if x is None:
            continue
        expect(tuple(x.shape) == (length,), name, f"shape ({length},)", tuple(x.shape))
        expect(x.device == rewards.device, name, f"a tensor on {rewards.device}", x.device)
        kind = x.dtype == torch.bool if name == "mask" else x.is_floating_point()
        expect(kind, name, "bool" if name == "mask" else "a floating-point dtype", x.dtype)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards = rewards.detach().to(dtype)
    values = None if values is None else values.detach().to(dtype)
    bootstrap = None if bootstrap is None else bootstrap.detach().to(dtype)
    return _Packed(rewards, values, mask, bootstrap, cu_seqlens, float(gamma), float(lam))


def _check_steps(steps: Tensor, packed: _Packed) -> None:
    rewards, cu_seqlens = packed.rewards, packed.cu_seqlens
    check_boundaries("steps", steps, len(rewards), rewards.device, wait=True)
    missing = cu_seqlens[~torch.isin(cu_seqlens, steps)].tolist()
    expect(
        not missing,
        "steps",
        "steps that each lie inside one sequence",
        f"one that crosses the sequence boundary at token {missing[0]}" if missing else "",
        "Every entry of cu_seqlens must be one of steps",
    )


AOT = [
    (
        _gae_kernel,
        {
            "rewards": "*fp32",
            "values": "*fp32",
            "mask": "*i1",
            "bootstrap": "*fp32",
            "cu_seqlens": "*i32",
            "advantages": "*fp32",
            "returns": "*fp32",
            "gamma": "fp32",
            "lam": "fp32",
            "HAS_VALUES": "constexpr",
            "HAS_MASK": "constexpr",
            "HAS_BOOTSTRAP": "constexpr",
            "BLOCK": "constexpr",
        },
        {"HAS_VALUES": True, "HAS_MASK": True, "HAS_BOOTSTRAP": True, "BLOCK": 1024},
        4,
    )
]
