"""Attention over two sets of keys, from the attention and log-sum-exp over each alone; in place.

    lse = log(e^lse1 + e^lse2),   share = e^(lse2 - lse),   out = (1 - share) out1 + share out2

Bytes a token and head, D its size: 6 D of 16-bit outputs and 12 of log-sum-exps. In plain PyTorch
float32 copies of both outputs and the result make it 30 D, in seven launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import HAS_TRITON, device_guard, next_power_of_2, tl, triton

BLOCK_TOKENS = 16


def reference(
    out: Tensor, lse: Tensor, out_shared: Tensor, lse_shared: Tensor, has_prefix: Tensor | None
) -> None:
    """merge(), in plain PyTorch."""
    if has_prefix is not None:
        lse_shared = lse_shared.masked_fill(~has_prefix, float("-inf"))
        out_shared = out_shared.masked_fill(~has_prefix[:, None, None], 0)
    share = torch.sigmoid(lse_shared - lse).T.unsqueeze(-1)
    out.copy_(torch.lerp(out.to(share.dtype), out_shared.to(share.dtype), share))
    torch.logaddexp(lse, lse_shared, out=lse)


@triton.jit
def _merge_kernel(
    out,
    lse,
    out_shared,
    lse_shared,
    has_prefix,
    tokens,
    size,
    out_token,
    out_head,
    lse_head,
    shared_token,
    shared_head,
    lse_shared_head,
    HAS_PREFIX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, BLOCK_SIZE)
    here = token < tokens
    tile = here[:, None] & (entry < size)[None, :]
    row = token.to(tl.int64)
    own_lse = tl.load(lse + head * lse_head + row, mask=here, other=0.0)
    other_lse = tl.load(lse_shared + head * lse_shared_head + row, mask=here, other=0.0)
    at = out + head * out_head + row[:, None] * out_token + entry[None, :]
    at_shared = out_shared + head * shared_head + row[:, None] * shared_token + entry[None, :]
    own = tl.load(at, mask=tile, other=0.0).to(tl.float32)
    other = tl.load(at_shared, mask=tile, other=0.0).to(tl.float32)
    if HAS_PREFIX:  # without keys a kernel leaves anything
        has = tl.load(has_prefix + token, mask=here, other=0) != 0
        other_lse = tl.where(has, other_lse, -float("inf"))
        other = tl.where(has[:, None], other, 0.0)
    ahead = other_lse - own_lse
    decay = tl.exp(-tl.abs(ahead))
    share = (tl.where(ahead > 0, 1.0, decay) / (1.0 + decay))[:, None]
    change = other - own
    merged = tl.where(share < 0.5, own + share * change, other - (1.0 - share) * change)
    tl.store(at, merged.to(out.dtype.element_ty), mask=tile)
    total = tl.maximum(own_lse, other_lse) + tl.log(1.0 + decay)
    tl.store(lse + head * lse_head + row, total, mask=here)


def launch(
    out: Tensor, lse: Tensor, out_shared: Tensor, lse_shared: Tensor, has_prefix: Tensor | None
) -> None:
    tokens, heads, size = out.shape
    block = next_power_of_2(size)
    with device_guard(out):
        _merge_kernel[(-(-tokens // BLOCK_TOKENS), heads)](
            out,
            lse,
            out_shared,
            lse_shared,
            has_prefix,
            tokens,
            size,
            *out.stride()[:2],
            lse.stride(0),
            *out_shared.stride()[:2],
            lse_shared.stride(0),
            HAS_PREFIX=has_prefix is not None,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_SIZE=block,
            num_warps=_warps(block),
        )


def _warps(block_size: int) -> int:
    return 8 if block_size > 128 else 4


def merge(
    out: Tensor, lse: Tensor, out_shared: Tensor, lse_shared: Tensor, has_prefix: Tensor | None
) -> None:
    """Adds keys to `out` [t, H, D] and `lse` [H, t]: those that gave out_shared and lse_shared.

    has_prefix: bool [t], False where there were none; None if there were some for every token.
    """
    fused = HAS_TRITON and out.is_cuda
    (launch if fused else reference)(out, lse, out_shared, lse_shared, has_prefix)


AOT = [
    (
        _merge_kernel,
        dict.fromkeys(("out", "out_shared"), "*bf16")
        | dict.fromkeys(("lse", "lse_shared"), "*fp32")
        | {"has_prefix": "*i1"},
        {"HAS_PREFIX": has_prefix, "BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_SIZE": size},
        _warps(size),
    )
    for has_prefix, size in ((False, 128), (True, 256))
]
