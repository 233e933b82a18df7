"""Which implementation runs an op, and the few facts every launcher needs.

Every public op takes `impl=`: "reference" is plain PyTorch, "cpu" the C++ extension, "cuda" its
CUDA half, "triton" the Triton kernels, and "auto" the best of those that fit the tensors.
Triton is optional: without it (macOS) the kernels stay undefined and the other paths work.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch

_C: Any
try:
    from . import _C
except ImportError:  # a clone that was never built: the reference serves
    _C = None

triton: Any  # its stubs know neither launches nor constexpr arguments
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        """Stands in for triton, so that kernels can be defined where they cannot run."""

        def jit(self, fn=None, **_):
            return fn if fn is not None else self.jit

        def constexpr(self, value):
            return value

        def __getattr__(self, name):
            return None

    triton = tl = _NoTriton()
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA_EXTENSION = _C is not None and _C.has_cuda


def has_values(x: torch.Tensor) -> bool:
    """False for fake tensors and under torch.compile: then plain PyTorch is what is traced."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def choose_impl(impl: str, device: torch.device, candidates: tuple[str, ...]) -> str:
    """The implementation to run on `device`: the first of `candidates` that can, if `impl="auto"`.

    `candidates` are the op's own implementations, best first; "reference" is always one of them.

    Raises:
        ValueError: `impl` is unknown to the op, or cannot run here; the message says why.
    """
    if impl == "auto":
        usable = (name for name in candidates if _obstacle(name, device, auto=True) is None)
        return next(usable, "reference")
    if impl != "reference" and impl not in candidates:
        choices = ", ".join(("auto", "reference", *(c for c in candidates if c != "reference")))
        raise ValueError(f"impl: wanted one of {choices}; got {impl!r}")
    obstacle = _obstacle(impl, device, auto=False)
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run on {device.type} tensors here: {obstacle}")
    return impl


def _obstacle(impl: str, device: torch.device, auto: bool) -> str | None:
    """Why `impl` cannot run on `device`, or None if it can."""
    if impl in ("reference", "torch"):
        return None
    if impl == "cpu":
        if device.type != "cpu":
            return "it takes CPU tensors; pass impl='auto'"
        return None if _C is not None else "prefuse.kernels._C is not built; run `pip install .`"
    if impl == "cuda":
        if device.type != "cuda" or torch.version.hip:
            return "it takes NVIDIA CUDA tensors; pass impl='auto'"
        return None if HAS_CUDA_EXTENSION else "reinstall prefuse with nvcc on PATH"
    if impl == "fused":
        hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
        if not hopper or torch.version.hip:
            return "its tiles are for NVIDIA's Hopper; pass impl='triton'"
        return _obstacle("triton", device, auto)
    if impl == "triton":
        if not HAS_TRITON:
            return "triton is not installed"
        if device.type == "cpu" and (auto or not INTERPRETED):
            return "Triton runs on a GPU (or, slowly, with TRITON_INTERPRET=1)"
        return None
    return "it is not an implementation"


def device_guard(x: torch.Tensor):
    """Makes `x`'s GPU the current one, so that a launch lands on it; nothing on a CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def stream_of(x: torch.Tensor) -> int:
    """The address of the current CUDA stream of `x`'s device, as the extension takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream


def differentiated_once(op: str) -> None:
    """Where a backward by kernels begins: autograd would take what it gives for constants.

    `once_differentiable` notices only where the upstream gradient has one of its own.

    Raises:
        RuntimeError: under create_graph=True.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: wanted create_graph=False, for its backward has no derivative; got True. "
            "Pass impl='reference' for second derivatives"
        )


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def expect(condition: bool, tensor: str, wanted: object, got: object, remedy: str = "") -> None:
    """Raises the house's ValueError about a tensor: what was wanted, what came, the remedy."""
    if not condition:
        raise ValueError(
            f"{tensor}: wanted {wanted}; got {got}" + (f". {remedy}" if remedy else "")
        )
