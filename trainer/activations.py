"""Which activations the backward pass finds: kept, made again, or brought back from the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

SMALL = 1024  # elements that are not worth a copy

aten = torch.ops.aten
KEPT = {  # by the selective policy: they cost most to compute again
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._flash_attention_forward.default,
}


def checkpoint(model: Any, policy: str) -> None:
    """Layers keep their inputs ("full"), or besides them what matrix products and attention made
    ("selective": only the cheap rest is computed again)."""
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    # transformers 5.23 renamed it and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(options)


def _keep_products(_context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def budget(share: float | None) -> None:
    """How much of its activations torch.compile lets a layer keep; the rest is made again, the
    cheapest first. For this process; None leaves torch's own choice."""
    if share is not None:
        from torch._functorch import config

        config.activation_memory_budget = share


def offloaded(on: bool) -> AbstractContextManager:
    """What autograd keeps goes to the host's memory as it is made, and comes back when it is read;
    weights and small tensors stay."""
    if not on:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(x: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    stays = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
    if stays or type(x) is not Tensor or x.numel() < SMALL or not x.is_floating_point():
        return x
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True), x.device


def _unpack(packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    host, device = packed
    return host.to(device, non_blocking=True)
