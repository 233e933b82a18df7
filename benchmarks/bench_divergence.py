"""Divergences of two heads: time, TFLOP/s, error and peak memory, beside naive logits and others.

python benchmarks/bench_divergence.py            time and error
python benchmarks/bench_divergence.py --memory   peak memory, one process a case

Forward and backward, with another random factor for every token. The floor is four vocabulary GEMMs
at the measured rate, two of them forward; six for the mode that recomputes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import device, extra_mb, peak_memory_mb, reset_peak_memory
from exact import Exact, exact_head, head_errors
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.divergence import linear_divergence, reference

# (N, H, V), student and teacher alike: GPT-2's vocabulary, Qwen2-0.5B's and an 8B model's head
SHAPES = {
    "tiny": [(48, 32, 384)],
    "cpu": [(512, 384, 50257), (1024, 896, 151936)],
    "cuda": [(8192, 4096, 128256), (8192, 896, 151936)],
}
MEMORY_SHAPE = (1024, 896, 151936)
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as the peers name the kinds
LIMITS = {
    torch.float32: {"relative error": 1e-4, "d hidden off": 1e-4, "d weight off": 1e-4},
    torch.bfloat16: {"relative error": 1e-3, "d hidden off": 1e-2, "d weight off": 1e-2},
}
PEER_LIMITS = {
    "relative error": 0.25, "error of the sum": 0.05, "d hidden off": 0.1, "d weight off": 0.1,
}  # fmt: skip
Heads = tuple[Tensor, Tensor, Tensor, Tensor]


class Divergence(NamedTuple):
    name: str
    value: Callable[..., Tensor]  # of the heads: [N], or where it can give no more, a sum
    gemms: int
    upstream: str = "any"
    ours: bool = False


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Heads:
    """Hidden states and weights of a student, then of a teacher near it."""
    n, h, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device(), dtype=dtype)
    weight = torch.randn(v, h, device=device(), dtype=dtype) * h**-0.5
    near = (
        hidden + 0.3 * torch.randn_like(hidden),
        weight + 0.3 * h**-0.5 * torch.randn_like(weight),
    )
    return hidden.requires_grad_(), weight.requires_grad_(), *near


def divergences(kind: str, compiles: bool | None = None) -> list[Divergence]:
    """compiles: whether what a compiler has to make is among them, which takes long on a GPU; None
    where nothing is compiled."""
    plain = partial(_naive, BETAS[kind])
    found = [
        Divergence("prefuse stash", partial(linear_divergence, kind=kind, mode="stash"), 4),
        Divergence("prefuse recompute", partial(linear_divergence, kind=kind, mode="recompute"), 6),
    ]
    found = [x._replace(ours=True) for x in found]
    found.append(Divergence("naive logits", plain, 4))
    if importlib.util.find_spec("trl"):
        found.append(Divergence("TRL chunked", _trl(BETAS[kind]), 8 if kind == "jsd" else 6))
    if compiles:
        found.append(Divergence("torch.compile of it", torch.compile(plain, dynamic=False), 4))
    if compiles is not False and importlib.util.find_spec("liger_kernel"):
        found.append(Divergence("Liger, sum only", _liger(BETAS[kind]), 4, "ones"))
    return found


def _naive(beta: float, hidden, weight, teacher_hidden, teacher_weight) -> Tensor:
    logp = F.log_softmax((hidden @ weight.t()).float(), -1)
    with torch.no_grad():
        teacher_logp = F.log_softmax((teacher_hidden @ teacher_weight.t()).float(), -1)
    if beta == 0:
        return F.kl_div(logp, teacher_logp, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(teacher_logp, logp, reduction="none", log_target=True).sum(-1)
    mixture = torch.logaddexp(logp, teacher_logp) - torch.log(logp.new_tensor(2.0))
    student, teacher = (
        F.kl_div(mixture, p, reduction="none", log_target=True).sum(-1)
        for p in (logp, teacher_logp)
    )
    return 0.5 * (student + teacher)


def _trl(beta: float) -> Callable[..., Tensor]:
    def value(hidden, weight, teacher_hidden, teacher_weight):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = (hidden, weight, None, teacher_hidden, teacher_weight, None)
        return ChunkedDivergenceFunction.apply(*heads, beta)[0]

    return value


def _liger(beta: float) -> Callable[..., Tensor]:
    def value(hidden, weight, teacher_hidden, teacher_weight):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=device().type == "cuda")
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        total: Any = loss(hidden, weight, teacher_hidden, teacher_weight, targets)
        return total * len(hidden)

    return value


def exact_of(kind: str, heads: Heads, upstreams: dict[str, Tensor]) -> Exact:
    hidden, weight, teacher_hidden, teacher_weight = heads
    teacher = teacher_weight.double()

    def value(logits: Tensor, part: slice) -> Tensor:
        other = teacher_hidden[part].double() @ teacher.t()
        return reference(logits, other, kind="jsd", beta=BETAS[kind])

    targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return exact_head(value, hidden, weight, targets, upstreams)


def run(divergence: Divergence, heads: Heads, upstream: Tensor) -> tuple:
    value = divergence.value(*heads)
    given = upstream if value.dim() else None
    return value.detach(), *torch.autograd.grad(value, heads[:2], given)


def errors(exact: Exact, upstream: str, out: tuple) -> dict[str, float]:
    return head_errors(exact, upstream, *out, relative=True)


def methods(shape: tuple[int, int, int], kind: str, compiles: bool | None) -> list[Method]:
    dtype = dtype_of()
    heads = inputs(shape, dtype)
    factors = torch.randn(shape[0], device=device())
    upstreams = {"any": factors, "ones": torch.ones_like(factors)}
    exact = exact_of(kind, heads, upstreams)
    gemm = 2.0 * shape[0] * shape[1] * shape[2]
    return [
        Method(
            x.name, partial(run, x, heads, factors), partial(errors, exact, x.upstream),
            LIMITS[dtype] if x.ours else PEER_LIMITS, x.ours, flops=x.gemms * gemm,
            floor_flops=x.gemms * gemm if x.ours else None,
            columns={"token gradients": x.upstream},
        )
        for x in divergences(kind, compiles)
    ]  # fmt: skip


def dtype_of() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def cases(size: str) -> list[Case]:
    found = []
    for n, h, v in SHAPES[size]:
        # the two KLs cost the same
        for kind in ("forward_kl", "jsd") if v == 151936 or size == "tiny" else ("forward_kl",):
            columns: dict[str, Any] = {"kind": kind, "N": n, "H": h, "V": v}
            columns["dtype"] = str(dtype_of()).removeprefix("torch.")
            make = partial(methods, (n, h, v), kind, not found if size == "cuda" else None)
            flops = 4 * 2.0 * n * h * v
            found.append(Case(f"{kind} H={h}", make, columns, flops))
    return found


def memory_case(name: str, shape: tuple[int, int, int]) -> float:
    """MB at the peak of one step beyond its inputs and gradients."""
    heads = inputs(shape, torch.float32)
    function = next(x for x in divergences("jsd") if x.name == name).value
    warm = [x[:256].detach() for x in heads]
    for leaf in warm[:2]:
        leaf.requires_grad_()
    function(*warm).sum().backward()  # the libraries' own buffers
    before = reset_peak_memory()
    function(*heads).sum().backward()
    gradients = sum(x.numel() * x.element_size() for x in heads[:2]) / 1e6
    return peak_memory_mb() - before - gradients - 4 * shape[0] / 1e6


def memory_rows(shape: tuple[int, int, int] = MEMORY_SHAPE) -> list[dict]:
    out = []
    for name in (x.name for x in divergences("jsd")):
        extra = extra_mb(__file__, name, shape)
        n, h, v = shape
        case = {"kind": "jsd", "method": name, "N": n, "H": h, "V": v, "dtype": "float32"}
        out.append(case | {"extra MB": extra})
    return out


if __name__ == "__main__":
    main(
        __doc__, cases,
        SimpleNamespace(rows=memory_rows, case=memory_case, shape=MEMORY_SHAPE),
    )  # fmt: skip
