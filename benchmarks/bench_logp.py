"""token_logp from logits that exist: time, GB/s and error, beside PyTorch and other kernels.

Passes: forward alone; forward + backward, with another random factor for every token; the same with
the gradient written over the logits, which are brought back before every run, untimed.

Bytes counted: a read of the logits forward, a read and a write backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import device
from exact import most_off, off
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.launch import HAS_CUDA_EXTENSION
from prefuse.kernels.logp import reference, token_logp

SHAPES = {
    "tiny": [(16, 300)],
    "cpu": [(1024, 50257)],
    "cuda": [(8192, 128256), (8192, 151936), (256, 151936)],
}
FORWARD, BOTH, IN_PLACE = "forward", "forward + backward", "in place"
READS = {FORWARD: 1, BOTH: 3, IN_PLACE: 3}
CHECKED = 256  # rows whose gradient is checked
LIMITS = {
    torch.float32: {"max error": 2e-5, "gradient off": 1e-4},
    torch.bfloat16: {"max error": 2e-5, "gradient off": 1e-2},
}
PEER_LIMITS = {"max error": 0.25, "gradient off": 0.1}


class Kernel(NamedTuple):
    name: str
    logp: Callable[[Tensor, Tensor], Tensor]
    passes: tuple[str, ...]
    ours: bool = False


class Exact(NamedTuple):
    logp: Tensor  # [N]
    gradient: Tensor  # of `rows`
    rows: Tensor


def ours() -> list[Kernel]:
    gpu = device().type == "cuda"
    names = ["triton"] if gpu else ["cpu", "torch"]
    names += ["cuda"] if gpu and HAS_CUDA_EXTENSION else []
    found = []
    for name in names:
        plain = partial(_ours, name, False)
        found.append(Kernel(name, plain, (FORWARD, BOTH), ours=True))
        found.append(Kernel(name, partial(_ours, name, True), (IN_PLACE,), ours=True))
    return found


def _ours(impl: str, inplace: bool, logits: Tensor, targets: Tensor) -> Tensor:
    return token_logp(logits, targets, inplace_backward=inplace, impl=impl).logp


def _eager(logits: Tensor, targets: Tensor) -> Tensor:
    return reference(logits, targets).logp


def _trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)[0]


def _liger(logits: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return -LigerCrossEntropyLoss(reduction="none")(logits, targets)


def kernels(compiles: bool) -> list[Kernel]:
    found = [*ours(), Kernel("reference", _eager, (FORWARD, BOTH))]
    if device().type == "cuda" and importlib.util.find_spec("trl"):
        found.append(Kernel("TRL with entropy", _trl, (FORWARD, BOTH)))
    if device().type == "cuda" and importlib.util.find_spec("liger_kernel"):
        # its forward writes a gradient over the logits, which its backward multiplies
        found.append(Kernel("Liger", _liger, (IN_PLACE,)))
    if compiles:  # last, for a compiler takes the time of the others
        compiled = torch.compile(_eager, dynamic=False)
        found.append(Kernel("torch.compile of it", compiled, (FORWARD, BOTH)))
    return found


def exact_of(logits: Tensor, targets: Tensor, upstream: Tensor) -> Exact:
    n, vocab = logits.shape
    rows = torch.linspace(0, n - 1, min(CHECKED, n), device=logits.device).long()
    step = max(1, (1 << 30) // (8 * vocab))
    values = []
    for start in range(0, n, step):
        part = slice(start, start + step)
        z = logits[part].detach().double()
        at_target = z.gather(1, targets[part, None]).squeeze(1)
        values.append(at_target - z.logsumexp(-1))
    some = logits[rows].detach().double().requires_grad_()
    logp = some.log_softmax(-1).gather(1, targets[rows, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(logp, some, upstream[rows].double())
    return Exact(torch.cat(values), gradient, rows)


def run(kernel: Kernel, what: str, logits: Tensor, targets: Tensor, upstream: Tensor) -> tuple:
    if what == FORWARD:
        with torch.no_grad():
            return (kernel.logp(logits, targets),)
    logp = kernel.logp(logits, targets)
    return logp.detach(), torch.autograd.grad(logp, logits, upstream)[0]


def errors(exact: Exact, out: tuple) -> dict[str, float]:
    found = {"max error": most_off(out[0], exact.logp)}
    if len(out) > 1:
        found["gradient off"] = off(out[1][exact.rows], exact.gradient)
    return found


def methods(compiles: bool, shape: tuple[int, int], what: str) -> list[Method]:
    n, v = shape
    torch.manual_seed(0)
    dtype = dtype_of()
    logits = (torch.randn(n, v, device=device()) * 2).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device())
    upstream = torch.randn(n, device=device())
    exact = exact_of(logits, targets, upstream)
    prepare = None
    if what == IN_PLACE:
        kept = logits.detach().clone()
        prepare = partial(logits.data.copy_, kept)
    found = []
    for kernel in kernels(compiles):
        if what in kernel.passes:
            found.append(
                Method(
                    kernel.name,
                    partial(run, kernel, what, logits, targets, upstream),
                    partial(errors, exact),
                    LIMITS[dtype] if kernel.ours else PEER_LIMITS,
                    kernel.ours,
                    prepare=prepare,
                    returned=partial(_returned, what == IN_PLACE),
                )
            )
    return found


def _returned(in_place: bool, out: tuple) -> float:
    """Bytes: the gradient that lies over the logits is no memory of its own."""
    kept = out[:1] if in_place else out
    return float(sum(x.numel() * x.element_size() for x in kept))


def dtype_of() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def cases(size: str) -> list[Case]:
    found = []
    element = torch.empty(0, dtype=dtype_of()).element_size()
    for n, v in SHAPES[size]:
        first = (n, v) == SHAPES[size][0]  # of which more is asked
        for what in (FORWARD, BOTH, IN_PLACE):
            columns: dict[str, Any] = {"op": "token_logp", "pass": what, "N": n, "V": v}
            columns["dtype"] = str(dtype_of()).removeprefix("torch.")
            make = partial(methods, first and size != "tiny", (n, v), what)
            moved = float(READS[what] * n * v * element)
            name, weight = f"{what} {n} x {v}", 2.0 if first else 1.0
            case = Case(name, make, columns, bytes=moved, weight=weight, label="impl")
            found.append(case)
    return found


if __name__ == "__main__":
    main(__doc__, cases)
