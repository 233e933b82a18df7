"""token_logp from existing logits: time and GB/s, beside torch.log_softmax.

Bytes counted: one read of the logits forward, one read and one write backward.
"""

from __future__ import annotations

import json
from functools import partial

import torch
from common import ceilings, device, machine, milliseconds, table

from prefuse.kernels.launch import HAS_CUDA_EXTENSION
from prefuse.kernels.logp import reference, token_logp

SHAPES = {"cpu": [(1024, 50257)], "cuda": [(8192, 128256), (8192, 151936), (256, 151936)]}


def step(function, logits: torch.Tensor, targets: torch.Tensor) -> None:
    logits.grad = None
    function(logits, targets).logp.sum().backward()


def rows() -> list[dict]:
    dev = device()
    limit = ceilings()["gbps"]
    dtype = torch.bfloat16 if dev.type == "cuda" else torch.float32
    impls = ["cpu", "torch"] if dev.type == "cpu" else ["triton"]
    impls += ["cuda"] if dev.type == "cuda" and HAS_CUDA_EXTENSION else []
    out = []
    for n, v in SHAPES[dev.type]:
        logits = (torch.randn(n, v, device=dev) * 2).to(dtype).requires_grad_()
        targets = torch.randint(v, (n,), device=dev)
        bytes_ = n * v * logits.element_size()
        for impl in (*impls, "reference"):
            function = partial(token_logp, impl=impl) if impl != "reference" else reference
            with torch.no_grad():
                forward = milliseconds(partial(function, logits, targets))
            both = milliseconds(partial(step, function, logits, targets))
            gbps = bytes_ / forward / 1e6
            out.append(
                {
                    "op": "token_logp",
                    "impl": impl,
                    "N": n,
                    "V": v,
                    "dtype": str(dtype).removeprefix("torch."),
                    "forward ms": forward,
                    "forward GB/s": gbps,
                    "% of copy": 100 * gbps / limit,
                    "forward + backward ms": both,
                    "GB/s": 3 * bytes_ / both / 1e6,
                }
            )
    return out


if __name__ == "__main__":
    print(json.dumps(machine()))
    print(table(rows()))
