"""The fused head: time, TFLOP/s, error and peak memory, beside naive logits and other heads.

python benchmarks/bench_linear_logp.py            time and error
python benchmarks/bench_linear_logp.py --memory   peak memory, one process a case

Passes: forward + backward, with another random factor for every token; forward alone, without
gradients; forward + backward with a frozen weight. "weight" is its dtype, and so d weight's: with
bfloat16 hidden states a float32 weight holds bfloat16 values, so that all methods compute the same
function, and is cast on the way. "token gradients" says which factors a method can have: heads with
losses of their own are measured with those they can.

The floor is three vocabulary GEMMs at the measured rate, two with a frozen weight, one forward;
four for the mode that recomputes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import device, extra_mb, peak_memory_mb, reset_peak_memory
from exact import Exact, exact_logp, head_errors
from head_peers import Head, naive, peers, per_sequence
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.launch import choose_impl
from prefuse.kernels.linear_logp import linear_logp, linear_token_loss

# (N, H, V): a small model with GPT-2's vocabulary, Qwen2-0.5B's head, an 8B model's head
SHAPES = {
    "tiny": [(64, 64, 512)],
    "cpu": [(1024, 384, 50257), (1024, 896, 151936)],
    "cuda": [(8192, 4096, 128256), (8192, 896, 151936)],
}
MEMORY_SHAPE = (4096, 896, 151936)
BOTH, FORWARD, FROZEN = "forward + backward", "forward", "frozen weight"
# of log-probs of float32 sums, of gradients rounded once; for peers: is it this function at all?
LIMITS = {
    torch.float32: {"max error": 2e-5, "d hidden off": 1e-4, "d weight off": 1e-4},
    torch.bfloat16: {"max error": 1e-4, "d hidden off": 1e-2, "d weight off": 1e-2},
}
PEER_LIMITS = {
    "max error": 0.25,
    "error of the sum": 0.01,
    "d hidden off": 0.1,
    "d weight off": 0.1,
}


class Inputs(NamedTuple):
    hidden: Tensor
    weights: dict[str, Tensor]  # "same" dtype as hidden, "float32"
    targets: Tensor
    upstream: Tensor  # a factor per token
    exact: Exact


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, h, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device(), dtype=dtype).requires_grad_()
    weight = (torch.randn(v, h, device=device(), dtype=dtype) * h**-0.5).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), device=device())


def upstreams(factors: Tensor) -> dict[str, Tensor]:
    return {
        "any": factors,
        "ones": torch.ones_like(factors),
        "per sequence": per_sequence(factors),
    }


def checked_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    hidden, weight, targets = inputs(shape, dtype)
    factors = torch.randn(len(targets), device=targets.device)
    exact = exact_logp(hidden, weight, targets, upstreams(factors))
    weights = {"same": weight}
    if dtype != torch.float32:
        weights["float32"] = weight.detach().float().requires_grad_()
    return Inputs(hidden, weights, targets, factors, exact)


def fused_products() -> bool:
    """Whether impl="fused" runs here."""
    try:
        return device().type == "cuda" and choose_impl("fused", device(), ("fused",)) == "fused"
    except ValueError:
        return False


def ours() -> list[Head]:
    def mode(name: str, impl: str = "auto") -> Callable[..., Tensor]:
        return lambda h, w, y, _: linear_logp(h, w, y, mode=name, impl=impl).logp

    def token_loss(h, w, y, factors):
        return linear_token_loss(h, w, y, lambda stats, c: c * stats.logp, factors)[0].sum()

    every = ("float32", "same")
    fused = [
        Head("prefuse stash, fused", mode("stash", "fused"), 3, 2, weights=every, ours=True),
        Head(
            "prefuse recompute, fused", mode("recompute", "fused"), 4, 3, weights=every, ours=True,
            forward=False,
        ),
    ]  # fmt: skip
    return [
        Head("prefuse stash", mode("stash"), 3, 2, weights=every, ours=True),
        Head("prefuse recompute", mode("recompute"), 4, 3, weights=every, ours=True, forward=False),
        Head("prefuse token loss", token_loss, 3, 2, "any, given", every, ours=True, forward=False),
        *(fused if fused_products() else ()),
    ]


def run(head: Head, x: Inputs, weight: Tensor, leaves: tuple[Tensor, ...]) -> tuple:
    """The value, and the gradients of the leaves."""
    value = head.logp(x.hidden, weight, x.targets, x.upstream)
    if not leaves:
        return (value,)
    given = x.upstream if value.dim() else None
    return value.detach(), *torch.autograd.grad(value, leaves, given)


def errors(head: Head, x: Inputs, out: tuple) -> dict[str, float]:
    value, d_hidden, d_weight = (*out, None, None)[:3]
    upstream = {"any, given": "any"}.get(head.upstream, head.upstream)
    told = value if head.upstream in ("any", "ones") else None  # else it is a loss of its own
    return head_errors(x.exact, upstream, told, d_hidden, d_weight)


def method(head: Head, x: Inputs, kind: str, what: str, shape: tuple[int, int, int]) -> Method:
    weight = x.weights[kind]
    if what == FROZEN:
        weight = weight.detach()
    leaves = {BOTH: (x.hidden, weight), FORWARD: (), FROZEN: (x.hidden,)}[what]
    once = partial(run, head, x, weight, leaves)
    if what == FORWARD:
        once = torch.no_grad()(once)
    gemms = {BOTH: head.gemms, FORWARD: 1, FROZEN: head.frozen_gemms}[what]
    gemm = 2.0 * shape[0] * shape[1] * shape[2]
    columns = {"weight": str(weight.dtype).removeprefix("torch.")}
    if what != FORWARD:
        columns["token gradients"] = head.upstream
    again = head.ours and "recompute" in head.name
    return Method(
        head.name, once, partial(errors, head, x),
        LIMITS[x.hidden.dtype] if head.ours else PEER_LIMITS,
        head.ours, flops=gemms * gemm, floor_flops=gemms * gemm if again else None,
        columns=columns,
    )  # fmt: skip


def head_methods(size: str, shape: tuple[int, int, int], what: str) -> list[Method]:
    x = checked_inputs(shape, dtype_of())
    found = []
    for head in ours() + peers(size):
        if (what == FROZEN and not head.frozen_gemms) or (what == FORWARD and not head.forward):
            continue
        # float32 is for the gradient's sake
        kinds = [kind for kind in head.weights if kind in x.weights] if what == BOTH else ["same"]
        found += [method(head, x, kind, what, shape) for kind in kinds]
    return found


def dtype_of() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def cases(size: str) -> list[Case]:
    found = []
    shapes = SHAPES[size]
    for what, gemms in ((BOTH, 3), (FORWARD, 1), (FROZEN, 2)):
        for n, h, v in shapes if what == BOTH else shapes[:1]:
            columns: dict[str, Any] = {"op": "linear_logp", "pass": what}
            columns |= {"N": n, "H": h, "V": v}
            columns["dtype"] = str(dtype_of()).removeprefix("torch.")
            make = partial(head_methods, size, (n, h, v), what)
            gemm = 2.0 * n * h * v
            weight = 2.0 if what == BOTH else 1.0
            if size == "cuda" and not found:  # in which kernels are compiled, packages imported
                weight = 4.0
            found.append(Case(f"{what} H={h}", make, columns, gemms * gemm, weight=weight))
    return found


def memory_methods() -> dict[str, Head]:
    fused = [head for head in peers("tiny") if head.name == "TRL fused head"]
    heads = [*ours(), Head("naive logits", naive, 3), *fused]
    return {head.name: head for head in heads}


def memory_case(name: str, shape: tuple[int, int, int]) -> float:
    """MB at the peak of one step beyond its inputs, outputs and gradients."""
    hidden, weight, targets = inputs(shape, torch.float32)
    factors = torch.ones(len(targets), device=hidden.device)
    head = memory_methods()[name]
    warm, small = (x[:256].detach().requires_grad_() for x in (hidden, weight))
    # the libraries' own buffers
    head.logp(warm, small, targets[:256] % len(small), factors[:256]).sum().backward()
    del warm, small
    before = reset_peak_memory()
    head.logp(hidden, weight, targets, factors).sum().backward()
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight)) / 1e6
    outputs = 4 * len(targets) / 1e6
    return peak_memory_mb() - before - gradients - outputs


def memory_rows(shape: tuple[int, int, int] = MEMORY_SHAPE) -> list[dict]:
    out = []
    for name in memory_methods():
        extra = extra_mb(__file__, name, shape)
        n, h, v = shape
        out.append({"method": name, "N": n, "H": h, "V": v, "dtype": "float32", "extra MB": extra})
    return out


if __name__ == "__main__":
    main(
        __doc__, cases,
        SimpleNamespace(rows=memory_rows, case=memory_case, shape=MEMORY_SHAPE),
    )  # fmt: skip
