"""GEMM 1 of the tiled head with the fold in its epilogue: logits that never leave the registers.

fold.py's arithmetic on the float32 accumulators of hidden @ weight.T, one tile at a time, by
programs that stay (one a multiprocessor) and take their operands through tensor descriptors, which
are Hopper's TMA. Forward a tile leaves its partial sums and, if wanted, E; backward it leaves its
gradients. 16-bit operands only: a float32 dot would be TF32.

Bytes: both operands once a group of tiles, E or gradients written once. Every tile has one writer
and its sums one order, so that results do not change from run to run.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fold import EXCLUDED, MAX_EXPONENT
from .launch import device_guard, tl, triton
from .logit_block import LN2, LOG2E, final_block
from .token_stats import FEWEST_PARTS, Coefficients

TensorDescriptor: Any
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_MAX_EXPONENT, _EXCLUDED = tl.constexpr(MAX_EXPONENT), tl.constexpr(EXCLUDED)
# Rows, columns and depth of a tile; rows of tiles whose operands share the cache; whether a tile's
# first loads go out before the last one's epilogue is over.
TILE = dict(BM=128, BN=256, BK=64, GROUP=16, FLATTEN=False)
NARROW = TILE | dict(BN=128)  # where the entropy and its like would spill registers
LAUNCH = dict(num_warps=8, num_stages=3)


class Product(NamedTuple):
    """hidden @ weight.T [n, v], and what makes final logits of it, as fold.Logits says."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [v, H], of the same 16-bit dtype
    targets: Tensor
    anchor: Tensor
    inverse_temperature: Tensor
    first_column: int
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


@triton.jit
def _distances(
    tile, hidden, weight, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
    n_rows, n_cols, depth, first_column, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile's place, rows and columns; of its logits d in units of log 2, the softcap's slope and
    where the target is; 1 / temperature. GROUP rows of tiles are done before the next."""
    in_group = GROUP * tl.cdiv(n_cols, BN)
    first = tile // in_group * GROUP
    height = tl.minimum(tl.cdiv(n_rows, BM) - first, GROUP)
    row_tile, col_tile = first + tile % in_group % height, tile % in_group // height
    rows = row_tile * BM + tl.arange(0, BM)
    columns = col_tile * BN + tl.arange(0, BN)
    z = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth, BK):
        z = tl.dot(hidden.load([row_tile * BM, k]), weight.load([col_tile * BN, k]).T, z)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < n_cols, other=0.0)[None, :]
    z, slope = final_block(z, scale, softcap, HAS_SOFTCAP)
    in_rows = rows < n_rows
    target = tl.load(targets_ptr + rows, mask=in_rows, other=0) - first_column
    anchor = tl.load(anchor_ptr + rows, mask=in_rows, other=0.0)
    inverse_temp = tl.load(inverse_temp_ptr + rows, mask=in_rows, other=1.0)
    d = (z - anchor[:, None]) * (inverse_temp * LOG2E)[:, None]
    is_target = columns[None, :] == target[:, None]
    return row_tile, col_tile, rows, columns, d, slope, is_target, inverse_temp


@triton.jit
def _forward_kernel(
    hidden, weight, store, parts_ptr, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
    n_rows, n_cols, depth, first_column, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, N_PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_cols, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        row_tile, col_tile, rows, columns, d, slope, is_target, _ = _distances(
            tile, hidden, weight, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
            n_rows, n_cols, depth, first_column, scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BM, BN, BK, GROUP,
        )  # fmt: skip
        in_rows = rows < n_rows
        last = (col_tile + 1) * BN > n_cols  # of a row of tiles: it may reach beyond
        inside = (columns < n_cols)[None, :]
        out = parts_ptr + col_tile.to(tl.int64) * N_PARTS * n_rows + rows
        if N_PARTS > 2:
            counted = tl.where(is_target, 0.0, d)
            if last:
                counted = tl.where(inside, counted, 0.0)
            tl.store(out + 3 * n_rows, tl.sum(counted, 1) * LN2, mask=in_rows)
        d = tl.where(is_target, _EXCLUDED, d)
        if last:
            d += tl.where(inside, 0.0, -float("inf"))
        top = tl.max(d, 1)
        by = tl.where(top > _MAX_EXPONENT * LOG2E, top, 0.0)
        d -= by[:, None]
        if N_PARTS > 2:
            d = tl.maximum(d, _EXCLUDED)
        e = tl.exp2(d)
        tl.store(out, tl.sum(e, 1), mask=in_rows)
        tl.store(out + n_rows, by * LN2, mask=in_rows)
        if N_PARTS > 2:
            tl.store(out + 2 * n_rows, tl.sum(e * d, 1) * LN2, mask=in_rows)
            tl.store(out + 4 * n_rows, tl.sum(e * e, 1), mask=in_rows)
            tl.store(out + 5 * n_rows, top * LN2, mask=in_rows)
        if STORE:
            if HAS_SOFTCAP:
                e *= slope
            store.store([row_tile * BM, col_tile * BN], e.to(store.dtype))


@triton.jit
def _backward_kernel(
    hidden, weight, grad, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
    alpha_ptr, beta_ptr, gamma_ptr, shift_ptr,
    n_rows, n_cols, depth, first_column, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BETA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_cols, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        row_tile, col_tile, rows, columns, d, slope, is_target, inverse_temp = _distances(
            tile, hidden, weight, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
            n_rows, n_cols, depth, first_column, scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BM, BN, BK, GROUP,
        )  # fmt: skip
        in_rows = rows < n_rows
        factor = inverse_temp * scale
        d -= (tl.load(shift_ptr + rows, mask=in_rows, other=0.0) * LOG2E)[:, None]
        per_e = (tl.load(alpha_ptr + rows, mask=in_rows, other=0.0) * factor)[:, None]
        if HAS_BETA:
            d = tl.maximum(d, _EXCLUDED)
            beta = tl.load(beta_ptr + rows, mask=in_rows, other=0.0) * factor * LN2
            per_e = per_e + beta[:, None] * d
        gamma = tl.load(gamma_ptr + rows, mask=in_rows, other=0.0) * factor
        out = tl.where(is_target, gamma[:, None], tl.exp2(d) * per_e)
        if HAS_SOFTCAP:
            out *= slope
        grad.store([row_tile * BM, col_tile * BN], out.to(grad.dtype))


def gemm_forward(p: Product, n_parts: int, store: Tensor | None) -> tuple[Tensor, int]:
    """As fold.fold_forward, of the product: partial sums [tiles, n_parts, n], and the columns of a
    tile; fills `store`."""
    tile = TILE if n_parts == FEWEST_PARTS else NARROW
    tiles = triton.cdiv(len(p.weight), tile["BN"])
    parts = p.anchor.new_empty((tiles, n_parts, len(p.hidden)))
    flags = dict(STORE=store is not None, N_PARTS=n_parts)
    _launch(_forward_kernel, p, store, (parts,), (), flags | tile)
    return parts, tile["BN"]


def gemm_backward(p: Product, c: Coefficients, out: Tensor) -> None:
    """As fold.fold_backward, of the product: d loss / d raw logits [n, v] into `out`."""
    numbers = (c.alpha, c.beta, c.gamma, c.shift)
    flags = dict(HAS_BETA=True, **NARROW) if c.beta is not None else dict(HAS_BETA=False, **TILE)
    _launch(_backward_kernel, p, out, (), numbers, flags)


def _launch(kernel, p: Product, written: Tensor | None, parts, coefficients, flags) -> None:
    (n, depth), v = p.hidden.shape, len(p.weight)
    tiles = triton.cdiv(n, flags["BM"]) * triton.cdiv(v, flags["BN"])
    if tiles == 0:
        return

    def block(x: Tensor | None, height: str, width: str):
        if x is None:
            return None
        return TensorDescriptor.from_tensor(x, [flags[height], flags[width]])

    programs = min(tiles, _multiprocessors(p.hidden.device))
    with device_guard(p.hidden):
        kernel[(programs,)](
            block(p.hidden, "BM", "BK"), block(p.weight, "BN", "BK"), block(written, "BM", "BN"),
            *parts, p.targets, p.anchor, p.inverse_temperature, p.bias, *coefficients,
            n, v, depth, p.first_column, p.logit_scale, p.softcap or 1.0,
            HAS_BIAS=p.bias is not None, HAS_SOFTCAP=p.softcap is not None,
            **flags, PROGRAMS=programs, **LAUNCH,
        )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aot(kernel, tile: dict, **flags) -> tuple:
    height, width, depth = tile["BM"], tile["BN"], tile["BK"]
    floats = ("parts_ptr", "anchor_ptr", "inverse_temp_ptr", "bias_ptr")
    types = {
        "hidden": f"tensordesc<bf16[{height}, {depth}]>",
        "weight": f"tensordesc<bf16[{width}, {depth}]>",
        **dict.fromkeys(("store", "grad"), f"tensordesc<bf16[{height}, {width}]>"),
        **dict.fromkeys((*floats, "alpha_ptr", "beta_ptr", "gamma_ptr", "shift_ptr"), "*fp32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        "targets_ptr": "*i64",
    }
    flags |= dict(HAS_BIAS=False, HAS_SOFTCAP=False, PROGRAMS=132)
    return kernel, types, flags | tile, LAUNCH["num_warps"]


# As fold.AOT; its tiles are for Hopper's registers.
AOT_ARCHITECTURES = (90,)
AOT_OPTIONS = {"num_stages": LAUNCH["num_stages"]}
AOT = [
    _aot(_forward_kernel, TILE, STORE=True, N_PARTS=2),
    _aot(_forward_kernel, TILE, STORE=False, N_PARTS=2),
    _aot(_forward_kernel, NARROW, STORE=True, N_PARTS=6),
    _aot(_backward_kernel, TILE, HAS_BETA=False),
    _aot(_backward_kernel, NARROW, HAS_BETA=True),
]
