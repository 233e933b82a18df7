"""Divergences of two heads: time, TFLOP/s and peak memory, beside naive logits and the peers.

python benchmarks/bench_divergence.py            time
python benchmarks/bench_divergence.py --memory   peak memory, one process a case
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import (
    ceilings,
    device,
    extra_mb,
    in_turns,
    peak_memory_mb,
    reset_peak_memory,
    with_memory,
)

from prefuse.kernels.divergence import linear_divergence, reference

# (N, H, V), student and teacher alike: GPT-2's vocabulary, then Qwen2-0.5B's and an 8B model's head
SHAPES = {
    "cpu": [(512, 384, 50257), (1024, 896, 151936)],
    "cuda": [(8192, 896, 151936), (8192, 4096, 128256)],
}
MEMORY_SHAPE = (1024, 896, 151936)
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as the peers name the kinds
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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


def methods(kind: str) -> dict[str, tuple[int, Callable[..., torch.Tensor]]]:
    """name -> (vocabulary GEMMs, function of the heads that gives the divergence [N], or its sum
    where the method can give no more)."""
    return {
        "prefuse stash": (4, partial(linear_divergence, kind=kind, mode="stash")),
        "prefuse recompute": (6, partial(linear_divergence, kind=kind, mode="recompute")),
        "naive logits": (4, partial(_naive, BETAS[kind])),
        **peers(kind),
    }


def _naive(beta: float, hidden, weight, teacher_hidden, teacher_weight) -> torch.Tensor:
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


def peers(kind: str) -> dict[str, tuple[int, Callable[..., torch.Tensor]]]:
    """As `methods`: the fused divergences of the packages installed that run on this device."""
    found = {}
    beta = BETAS[kind]
    with contextlib.suppress(ImportError):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(hidden, weight, teacher_hidden, teacher_weight):
            heads = (hidden, weight, None, teacher_hidden, teacher_weight, None)
            return ChunkedDivergenceFunction.apply(*heads, beta)[0]

        found["TRL chunked"] = (8 if kind == "jsd" else 6, trl)
    with contextlib.suppress(ImportError):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=device().type == "cuda")

        def liger(hidden, weight, teacher_hidden, teacher_weight):
            targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            total = loss(hidden, weight, teacher_hidden, teacher_weight, targets)
            return total * len(hidden)

        found["Liger, sum only"] = (4, liger)
    return found


def step(function, hidden, weight, *teacher) -> None:
    hidden.grad = weight.grad = None
    function(hidden, weight, *teacher).sum().backward()


def rows() -> list[dict]:
    """Forward and backward of each method on each shape; the error is relative, of the worst of 16
    tokens, against float64."""
    limit = ceilings()["tflops"]
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    out = []
    for shape in SHAPES[device().type]:
        n, h, v = shape
        heads = inputs(shape, dtype)
        # the two KLs cost the same
        kinds = ("forward_kl", "jsd") if shape == SHAPES[device().type][-1] else ("forward_kl",)
        logits = [
            torch.cat(
                [x[:16].detach().double() @ w.double().t() for w in weight.detach().split(8192)], 1
            )
            for x, weight in (heads[:2], heads[2:])
        ]
        for kind in kinds:
            exact = reference(*logits, kind="jsd", beta=BETAS[kind])
            found = methods(kind)
            times = in_turns({k: partial(step, f, *heads) for k, (_, f) in found.items()}, 3)
            for name, (gemms, function) in found.items():
                value = function(*heads).detach()
                error = float((value[:16] / exact - 1).abs().max()) if value.dim() else None
                del value
                ms = times[name]
                tflops = gemms * 2 * n * h * v / ms / 1e9
                out.append(
                    {
                        "kind": kind,
                        "method": name,
                        "N": n,
                        "H": h,
                        "V": v,
                        "dtype": str(dtype).removeprefix("torch."),
                        "ms": ms,
                        "TFLOP/s": tflops,
                        "% of matmul": 100 * tflops / limit,
                        "relative error": error,
                    }
                )
    return out


def memory_case(name: str, shape: tuple[int, int, int]) -> float:
    """MB at the peak of one step beyond its inputs, outputs and gradients."""
    heads = inputs(shape, torch.float32)
    function = methods("jsd")[name][1]
    warm = [x[:256].detach() for x in heads]
    for leaf in warm[:2]:
        leaf.requires_grad_()
    function(*warm).sum().backward()  # the libraries' own buffers
    before = reset_peak_memory()
    step(function, *heads)
    gradients = sum(x.numel() * x.element_size() for x in heads[:2]) / 1e6
    return peak_memory_mb() - before - gradients - 4 * shape[0] / 1e6


def memory_rows(shape: tuple[int, int, int] = MEMORY_SHAPE) -> list[dict]:
    out = []
    for name in methods("jsd"):
        extra = extra_mb(__file__, name, shape)
        n, h, v = shape
        case = {"kind": "jsd", "method": name, "N": n, "H": h, "V": v, "dtype": "float32"}
        out.append(case | {"extra MB": extra})
    return out


if __name__ == "__main__":
    with_memory(__doc__, rows, memory_rows, memory_case, MEMORY_SHAPE)
