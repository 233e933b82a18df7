"""The fused head: time, TFLOP/s and peak memory, beside naive logits and the peers installed.

python benchmarks/bench_linear_logp.py            time
python benchmarks/bench_linear_logp.py --memory   peak memory, one process a case
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

from prefuse.kernels.linear_logp import linear_logp, linear_token_loss, reference

# (N, H, V): a small model with GPT-2's vocabulary, then Qwen2-0.5B's and an 8B model's head
SHAPES = {
    "cpu": [(1024, 384, 50257), (1024, 896, 151936)],
    "cuda": [(8192, 896, 151936), (8192, 4096, 128256), (16384, 4096, 128256)],
}
MEMORY_SHAPE = (4096, 896, 151936)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype):
    n, h, v = shape
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device(), dtype=dtype).requires_grad_()
    weight = (torch.randn(v, h, device=device(), dtype=dtype) * h**-0.5).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), device=device())


def methods() -> dict:
    """name -> (vocabulary GEMMs, function of hidden, weight, targets that gives logp [N], or its
    sum where the method can give no more)."""

    def mode(name):
        return lambda h, w, y: linear_logp(h, w, y, mode=name).logp

    return {
        "prefuse stash": (3, mode("stash")),
        "prefuse recompute": (4, mode("recompute")),
        "prefuse token loss": (3, lambda h, w, y: -linear_token_loss(h, w, y, _nll)[0]),
        "naive logits": (
            3,
            lambda h, w, y: -F.cross_entropy((h @ w.t()).float(), y, reduction="none"),
        ),
        **peers(),
    }


def _nll(stats):
    return -stats.logp


def peers() -> dict:
    """As `methods`: the fused heads of the packages installed that run on this device."""
    found = {}
    with contextlib.suppress(ImportError):
        from trl.kernels import ChunkedLogProbFunction

        found["TRL fused head"] = (
            4,
            lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[
                0
            ],
        )
    if device().type != "cuda":
        return found
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy

        found["CCE, unfiltered"] = (
            4,
            lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", filter_eps=None),
        )
        found["CCE"] = (4, lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none"))
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger, sum only"] = (3, lambda h, w, y: -liger(w, h, y))
    return found


def step(function, hidden, weight, targets) -> None:
    hidden.grad = weight.grad = None
    function(hidden, weight, targets).sum().backward()


def rows() -> list[dict]:
    """Forward and backward of each method on each shape; the error of logp is absolute, in nats,
    against float64, over 64 tokens."""
    limit = ceilings()["tflops"]
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    out = []
    for shape in SHAPES[device().type]:
        n, h, v = shape
        hidden, weight, targets = inputs(shape, dtype)
        exact = reference(hidden[:64].detach().double(), weight.detach().double(), targets[:64])
        found = methods()
        runs: dict[str, Callable[[], object]] = {
            k: partial(step, f, hidden, weight, targets) for k, (_, f) in found.items()
        }
        times = in_turns(runs)
        for name, (gemms, function) in found.items():
            logp = function(hidden, weight, targets).detach()
            error = float((logp[:64] - exact.logp).abs().max()) if logp.dim() else None
            ms = times[name]
            tflops = gemms * 2 * n * h * v / ms / 1e9
            out.append(
                {
                    "op": "linear_logp",
                    "method": name,
                    "N": n,
                    "H": h,
                    "V": v,
                    "dtype": str(dtype).removeprefix("torch."),
                    "ms": ms,
                    "TFLOP/s": tflops,
                    "% of matmul": 100 * tflops / limit,
                    "max error": error,
                }
            )
    return out


def memory_case(name: str, shape: tuple[int, int, int]) -> float:
    """MB at the peak of one step beyond its inputs, outputs and gradients."""
    hidden, weight, targets = inputs(shape, torch.float32)
    function = methods()[name][1]
    warm = [x[:256].detach().requires_grad_() for x in (hidden, weight)]
    function(*warm, targets[:256] % 256).sum().backward()  # the libraries' own buffers
    before = reset_peak_memory()
    step(function, hidden, weight, targets)
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight)) / 1e6
    outputs = 4 * len(targets) / 1e6
    return peak_memory_mb() - before - gradients - outputs


def memory_rows(shape: tuple[int, int, int] = MEMORY_SHAPE) -> list[dict]:
    out = []
    for name in methods():
        extra = extra_mb(__file__, name, shape)
        n, h, v = shape
        out.append({"method": name, "N": n, "H": h, "V": v, "dtype": "float32", "extra MB": extra})
    return out


if __name__ == "__main__":
    with_memory(__doc__, rows, memory_rows, memory_case, MEMORY_SHAPE)
