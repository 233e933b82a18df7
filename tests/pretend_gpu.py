"""A GPU that is not there: tensors whose values are on the CPU and whose device says "cuda:0".

Code under test moves its tensors, mixes them and reads them as it would on a GPU. What a GPU would
refuse raises here: operands on two devices, an address of device memory given to code for the host.
What would wait for it is written down, with the line that asked. Values are real, so a run can be
compared with one on the CPU. Autocast of "cuda" is that of the CPU.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("cuda", 0)
aten = torch.ops.aten
ROOT = str(Path(__file__).resolve().parents[1])
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim}
READS |= {aten._unique2, aten.equal, aten.is_nonzero, aten.bincount, aten.nonzero_numpy}
MIXES = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put}
OWN_STATE = {aten._fused_adamw_}  # its step count may be anywhere


class OnGpu(Tensor):
    """Holds `held`, a tensor of the CPU."""

    held: Tensor
    device = property(lambda self: HERE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, real: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, real.size(), real.stride(), real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=real.device,
        )  # fmt: skip
        made.held = real
        return made

    def __repr__(self, **_):
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.tolist:
            return to_host(args[0], name).tolist()
        if func is Tensor.cpu:
            return to_host(args[0], name)
        if func in (Tensor.numpy, Tensor.data_ptr, Tensor.__array__):
            raise TypeError(f"{name} of a tensor on {HERE}")
        if func is Tensor.to:
            where = kwargs.get("device") or next(
                (a for a in args[1:] if isinstance(a, torch.device | str)), None
            )
            if where is not None:
                if torch.device(where).type != "cuda":
                    return to_host(args[0], name)
                kinds = [a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)]
                args, kwargs = (args[0], *kinds), {}
                if not kinds:
                    return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Waits:
    """Where the host waited for the device."""

    def __init__(self):
        self.at: Counter[str] = Counter()
        self.on = True

    def __call__(self, what: str) -> None:
        if not self.on:
            return
        frames = [f for f in traceback.extract_stack() if _is_ours(f.filename)]
        ours = [f for f in frames if "/tests/pretend_gpu" not in f.filename]
        place = " < ".join(
            f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in reversed(ours[-3:])
        )
        self.at[f"{what} at {place}"] += 1

    def total(self) -> int:
        return sum(self.at.values())


@cache
def _is_ours(file: str) -> bool:
    """Not of a package, which may be installed inside the clone."""
    return "site-packages" not in file and str(Path(file).resolve()).startswith(ROOT)


WAITS = Waits()
PINNED: set[int] = set()


def to_host(x: OnGpu, what: str) -> Tensor:
    WAITS(what)
    return x.held.detach().clone()


def run(func, args, kwargs):
    """An operation that has a tensor of the device among its arguments, or makes one there."""
    packet = func.overloadpacket
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    hosts = [x for x in given if not isinstance(x, OnGpu)]
    if packet in READS:
        WAITS(packet.__name__)
    if packet in (aten.index, aten.index_put, aten.index_put_):
        masks = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in masks):
            WAITS("index by mask")
        if any(not isinstance(i, OnGpu) for i in masks):
            WAITS("index from the host")
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        WAITS("repeat_interleave")
    if packet is aten.copy_ and (len(hosts) == 1) and len(given) == 2:
        pinned = args[1].data_ptr() in PINNED if hosts[0] is args[1] else False
        if not (pinned and len(args) > 2 and args[2]):
            WAITS("copy_ between devices")
    elif packet not in MIXES and any(x.dim() for x in hosts):
        shapes = [tuple(x.shape) for x in hosts]
        raise RuntimeError(f"{func}: tensors {shapes} of the host beside those of {HERE}")
    unwrap = lambda x: x.held if isinstance(x, OnGpu) else x  # noqa: E731
    kwargs = dict(kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")  # autograd asks for it where it casts back
    kwargs.pop("pin_memory", None)
    own = REPLACED.get(func)
    inner = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    out = own(*inner[0], **inner[1]) if own else func(*inner[0], **inner[1])
    if packet is aten._local_scalar_dense:
        return out
    if packet is aten.copy_ and not isinstance(args[0], OnGpu):
        return args[0]
    wrapped = tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class Gpu(TorchDispatchMode):
    """While it is on, tensors can be made on or moved to cuda."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = kwargs.get("device")
        there = where is not None and torch.device(where).type == "cuda"
        if any(isinstance(x, OnGpu) for x in tree_leaves((args, kwargs))):
            return run(func, args, kwargs)
        if not there:
            return func(*args, **kwargs)
        if func.overloadpacket is aten._to_copy:
            pinned = args[0].data_ptr() in PINNED and kwargs.get("non_blocking")
            if args[0].numel() and not pinned:
                WAITS("copy from pageable memory")
        kwargs = dict(kwargs, device=torch.device("cpu"))
        out = func(*args, **kwargs)
        return OnGpu(out.clone() if out is args[0] else out) if args else OnGpu(out)


def _flash(q, k, v, cu_q, cu_k, max_q, max_k, p, is_causal, *_, scale: Any = None, **__):
    from prefuse.kernels.attention import Segments, _cpu_forward

    narrow(q, k, v)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out, lse = _cpu_forward(q, k, v, Segments(cu_q, cu_k, max_q, max_k, is_causal, scale))
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, lse, nothing, nothing, nothing


def _flash_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, p, causal, *_, scale: Any = None
):
    from prefuse.kernels.attention import Segments, _cpu_backward

    narrow(dout, q, k, v, out)
    segments = Segments(cu_q, cu_k, max_q, max_k, causal, scale)
    return _cpu_backward(dout, q, k, v, out, lse, segments)


def narrow(*tensors: Tensor) -> None:
    found = {x.dtype for x in tensors}
    if found not in ({torch.bfloat16}, {torch.float16}):
        raise RuntimeError(f"flash attention: wanted one 16-bit dtype; got {found}")


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    narrow(a, b)
    assert dtype == torch.float32
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _wide_sum(total, a, b, dtype, *, beta=1, alpha=1, out=None) -> Tensor:
    narrow(a, b)
    assert total.dtype == dtype == torch.float32
    return torch.addmm(total, a.to(dtype), b.to(dtype), beta=beta, alpha=alpha, out=out)


REPLACED = {
    aten.addmm.dtype: _wide_sum,
    aten.addmm.dtype_out: _wide_sum,
    aten._flash_attention_forward.default: _flash,
    aten._flash_attention_backward.default: _flash_backward,
    aten.mm.dtype: _wide_product,
    aten.mm.dtype_out: _wide_product,
}


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def install(patch) -> None:
    """Until `patch`, pytest's monkeypatch, is undone: cuda seems to be here to those who ask."""
    from torch.nn.utils import clip_grad

    from prefuse.trainer import offline, online
    from prefuse.trainer.dist import Ranks
    from prefuse.trainer.plan import measured

    def translated(name):
        known = getattr(torch, name)
        patch.setattr(torch, name, lambda kind="cpu": known("cpu" if kind == "cuda" else kind))

    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        translated(name)
    patch.setattr(torch, "autocast", _Autocast)
    # `Module.to` would only give a plain parameter other data
    patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 30))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    patch.setattr(measured, "measured_bytes", lambda device: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name, module in list(sys.modules.items()):  # whose kernels take addresses
        for has in ("HAS_TRITON", "HAS_CUDA_EXTENSION"):
            if name.startswith("prefuse.kernels.") and hasattr(module, has):
                patch.setattr(module, has, False)
    patch.setattr(Tensor, "pin_memory", _pin)
    _device._device_constructors()  # remembers the real ones
    patch.setattr(torch, "tensor", partial(_tensor, torch.tensor))
    group = clip_grad._group_tensors_by_device_and_dtype
    patch.setattr(
        clip_grad,
        "_group_tensors_by_device_and_dtype",
        lambda given: {(given[0][0].device, kind): x for (_, kind), x in group(given).items()},
    )
    patch.setattr(offline, "export", _export)  # safetensors takes addresses
    for module in (offline, online):
        patch.setattr(module, "start", lambda timeout: Ranks(0, 1, HERE))
    WAITS.at.clear()
    PINNED.clear()


EXPORTED: dict[str, dict[str, Tensor]] = {}


def _export(model, state, tokenizer, folder: Path) -> None:
    EXPORTED[str(folder)] = {k: to_host(v, "export") for k, v in state.items()}


def _tensor(made, data, *, device=None, **how) -> Tensor:
    """torch.tensor asks no mode."""
    if device is None or torch.device(device).type != "cuda":
        return made(data, device=device, **how)
    return made(data, **how).to(device)


KEPT: list[Tensor] = []


def _pin(x: Tensor) -> Tensor:
    pinned = x.clone()
    KEPT.append(pinned)  # its address stays its own
    PINNED.add(pinned.data_ptr())
    return pinned
