"""Devices: their memory and ceilings, as their vendors tell them, or as measured here."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ..errors import UserError


class Device(NamedTuple):
    """memory: bytes, None where it is not limited. Rates are of dense matrix products."""

    name: str
    kind: torch.device
    memory: int | None
    tflops: float  # bfloat16
    tflops_float32: float
    gbps: float
    network_gbps: float | None = None
    node: int = 8  # devices of a node


GPU = torch.device("cuda")
# GiB that are usable, TFLOP/s in bfloat16 and float32, GB/s
KNOWN = {
    "l4": (22, 121, 30, 300),
    "l40s": (44, 362, 91, 864),
    "a100-40gb": (39, 312, 19.5, 1555),
    "a100-80gb": (79, 312, 19.5, 2039),
    "h100": (79, 989, 67, 3350),
    "h200": (140, 989, 67, 4800),
    "b200": (178, 2250, 75, 8000),
    "mi300x": (191, 1307, 163, 5300),
}


def find(options) -> Device:
    """The device of `--device`, or the one here, with what other flags say of it."""
    name = options.device or ("here" if torch.cuda.is_available() else "cpu")
    if name in KNOWN:
        gib, *rates = KNOWN[name]
        device = Device(name, GPU, gib << 30, *rates)
    elif name in ("here", "cpu"):
        device = _here(torch.device("cpu") if name == "cpu" else GPU, options)
    else:
        raise UserError(f"--device: wanted one of here, cpu, {', '.join(KNOWN)}; got {name}")
    given = options.device_memory_gb
    return device._replace(
        memory=device.memory if given is None else round(given * 2**30),
        tflops=options.device_tflops or device.tflops,
        tflops_float32=options.device_tflops or device.tflops_float32,
        gbps=options.device_gbps or device.gbps,
        network_gbps=options.network_gbps,
        node=options.gpus_per_node,
    )


def _here(kind: torch.device, options) -> Device:
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device here: no GPU is here; name one: cpu, {', '.join(KNOWN)}")
    memory = torch.cuda.get_device_properties(0).total_memory if kind.type == "cuda" else None
    name = torch.cuda.get_device_name() if kind.type == "cuda" else "cpu"
    if options.device_tflops and options.device_gbps:
        return Device(name, kind, memory, 1.0, 1.0, 1.0)
    narrow, wide = (_tflops(kind, dtype) for dtype in (torch.bfloat16, torch.float32))
    return Device(name, kind, memory, narrow, wide, _gbps(kind))


def _tflops(kind: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if kind.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=kind)
    return 2 * n**3 / _fastest(lambda: a @ a) / 1e12


def _gbps(kind: torch.device) -> float:
    source = torch.zeros(1 << (28 if kind.type == "cuda" else 24), device=kind)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source)) / 1e9


def _fastest(run) -> float:
    times = []
    for _ in range(4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
