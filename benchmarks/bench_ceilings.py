"""What this machine can do at most: a large copy, a large matrix product, the head's own products.

The first two are the ceilings that every other benchmark's rows are held against. The head's three
products are those of its forward and its two gradients at each of its shapes, on random data, with
results of the operands' dtype and, on a GPU, of float32.
"""

from __future__ import annotations

from functools import partial

import torch
from common import ceilings, device
from measure import Case, Method, main

SHAPES = {
    "tiny": [(64, 64, 512)],
    "cpu": [(512, 384, 8192)],
    "cuda": [(8192, 4096, 128256), (8192, 896, 151936)],
}


def methods(shape: tuple[int, int, int]) -> list[Method]:
    n, h, v = shape
    dev = device()
    dtype = torch.bfloat16 if dev.type == "cuda" else torch.float32
    hidden, weight, logits = (
        torch.randn(*size, device=dev, dtype=dtype) for size in ((n, h), (v, h), (n, v))
    )
    products = {
        "hidden @ weight.T": (hidden, weight.t()),
        "logits @ weight": (logits, weight),
        "logits.T @ hidden": (logits.t(), hidden),
    }
    found = []
    for name, (a, b) in products.items():
        found.append(_method(name, partial(torch.mm, a, b), n * h * v))
        if dtype == torch.bfloat16:
            wide = partial(torch.mm, a, b, out_dtype=torch.float32)
            found.append(_method(f"{name}, float32", wide, n * h * v))
    return found


def _method(name: str, run, size: int) -> Method:
    return Method(name, run, lambda out: {}, {}, flops=2.0 * size)


def cases(size: str) -> list[Case]:
    """The copy and the product come with the ceilings, which are measured before any case."""
    ceilings()
    return [
        Case(
            f"products H={shape[1]}", partial(methods, shape), dict(zip("NHV", shape, strict=True))
        )
        for shape in SHAPES[size]
    ]


if __name__ == "__main__":
    main(__doc__, cases)
