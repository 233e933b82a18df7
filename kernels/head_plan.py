"""What is settled before a head runs: its shapes, its options, how many tokens keep their E."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import choose_impl, expect
from .tiled_head import Options, for_device
from .vocab_shard import VocabShard

TILED = ("triton", "cpu", "torch")  # implementations of every tiled head, best first
DEFAULT_BUDGET = {"cpu": 1 << 30, "cuda": 4 << 30}


class Plan(NamedTuple):
    """How `linear_logp` will run: the tokens whose E is kept, and the bytes that takes."""

    stash_rows: int
    stash_bytes: int
    gemms: float  # vocabulary GEMMs per token, forward and backward, with nothing frozen


def plan(
    n: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    mode: str = "auto",
    budget_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan for `n` tokens: "stash" keeps all, "recompute" none, "auto" what fits the budget."""
    row_bytes = vocab * (4 if dtype == torch.float32 else 2)
    budget = (
        for_device(DEFAULT_BUDGET, torch.device(device)) if budget_bytes is None else budget_bytes
    )
    rows = {"stash": n, "recompute": 0, "auto": max(0, min(n, budget // row_bytes))}
    expect(mode in rows, "mode", "'auto', 'stash' or 'recompute'", repr(mode))
    kept = rows[mode]
    return Plan(kept, kept * row_bytes, 4 - kept / n if n else 3)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """The shapes and devices of a head; `prefix` goes before the names in the message."""
    shape, remedy = tuple(hidden.shape), "Flatten the batch"
    expect(hidden.dim() == 2, f"{prefix}hidden", "shape [N, H]", shape, remedy)
    vocab_first = weight.dim() == 2 and weight.shape[1] == hidden.shape[1]
    expect(vocab_first, f"{prefix}weight", f"shape [V, {hidden.shape[1]}]", tuple(weight.shape))
    expect(weight.is_floating_point(), f"{prefix}weight", "a floating-point dtype", weight.dtype)
    place = hidden.device
    expect(weight.device == place, f"{prefix}weight", f"device {place}", weight.device)
    if bias is not None:
        expect(bias.device == place, f"{prefix}bias", f"device {place}", bias.device)
        expect(
            bias.shape == weight.shape[:1], f"{prefix}bias", f"[{len(weight)}]", tuple(bias.shape)
        )


def head_options(
    hidden: Tensor,
    logit_scale: float,
    softcap: float | None,
    impl: str,
    shard: VocabShard | None = None,
    candidates: tuple[str, ...] = TILED,
) -> Options:
    if hidden.dtype == torch.float64 and impl == "auto":
        impl = "reference"
    impl = choose_impl(impl, hidden.device, candidates)
    device = hidden.device.type
    if device == "cpu":
        dtype = torch.float32  # faster there than 16-bit GEMMs, and exact
    else:
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
    return Options(logit_scale, softcap, impl, dtype, shard)


def check_fused(hidden: Tensor, weight: Tensor, options: Options) -> None:
    """Tensor descriptors read 16-bit rows that begin at 16 bytes and lie one after another."""
    remedy = "Pass impl='triton'"
    expect(options.dtype.itemsize == 2, "hidden", "16 bits for impl='fused'", options.dtype, remedy)
    expect(hidden.shape[1] % 8 == 0, "hidden", "H a multiple of 8", hidden.shape[1], remedy)
    for name, x in (("hidden", hidden), ("weight", weight)):
        whole = x.is_contiguous() and x.data_ptr() % 16 == 0
        expect(whole, name, "contiguous rows that begin at 16 bytes", tuple(x.stride()), remedy)
