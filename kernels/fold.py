"""One pass over a block of logits: sums forward, gradients backward (formulas in token_stats.py).

Four implementations compute the same numbers: "torch" and "triton" here, "cpu" and "cuda" in
csrc/token_stats.{cpp,cu}. Statistics are float32 whatever the logits are.

Bytes moved per logit of b bytes: forward b read (b + s more when E is stored in s bytes),
backward b read and b written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import _C, device_guard, next_power_of_2, stream_of, tl, triton
from .logit_block import LN2, LOG2E, logit_block
from .token_stats import FEWEST_PARTS, PARTS, Coefficients

# A larger d raises the anchor, for two reasons: exp must not overflow, and the entropy is a
# difference of numbers as large as the largest d. As in csrc/token_stats.h.
MAX_EXPONENT = 10.0
EXCLUDED = -200.0  # exp of it is 0 in float32, and it is finite: 0 * EXCLUDED is 0
_MAX_EXPONENT, _EXCLUDED = tl.constexpr(MAX_EXPONENT), tl.constexpr(EXCLUDED)
FOLD_BLOCK = 4096
FOLD_PROGRAMS = 1024  # enough to fill a GPU when there are few rows
_C_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Logits(NamedTuple):
    """A block [n, v] of raw logits, and what makes final logits of them.

    final logit = softcap(logit_scale * (raw + bias)) / temperature, softcap(z) = c tanh(z / c).
    """

    raw: Tensor  # [n, v], rows contiguous
    targets: Tensor  # [n] int64 vocabulary entries
    anchor: Tensor  # [n] float32: the target's softcapped logit, before the temperature
    inverse_temperature: Tensor  # [n] float32
    first_column: int = 0  # vocabulary entry of column 0
    bias: Tensor | None = None  # [v] float32
    logit_scale: float = 1.0
    softcap: float | None = None


def _distances(b: Logits) -> tuple[Tensor, Tensor | None, Tensor]:
    """d_v [n, v], 1 - tanh^2 under a softcap, and which element is the target's."""
    z = b.raw.float()
    if b.bias is not None:
        z = z + b.bias
    slope = None
    if b.softcap is not None:
        t = torch.tanh(z * (b.logit_scale / b.softcap))
        slope, z = 1 - t * t, t * b.softcap
    elif b.logit_scale != 1.0:
        z = z * b.logit_scale
    d = (z - b.anchor[:, None]) * b.inverse_temperature[:, None]
    columns = torch.arange(z.shape[1], device=z.device)
    return d, slope, columns == (b.targets - b.first_column)[:, None]


def _forward_torch(b: Logits, store: Tensor | None) -> Tensor:
    d, slope, is_target = _distances(b)
    sum_d = d.masked_fill(is_target, 0).sum(1)
    d = d.masked_fill_(is_target, EXCLUDED)
    max_d = d.amax(1)
    shift = torch.where(max_d > MAX_EXPONENT, max_d, 0.0)
    d = (d - shift[:, None]).clamp_(min=EXCLUDED)
    e = d.exp()
    if store is not None:
        stored = e if slope is None else e * slope
        store.copy_(stored.masked_fill(is_target, 0))
    return torch.stack((e.sum(1), shift, (e * d).sum(1), sum_d, (e * e).sum(1), max_d))


def _backward_torch(b: Logits, c: Coefficients, out: Tensor) -> None:
    d, slope, is_target = _distances(b)
    d = (d - c.shift[:, None]).clamp_(min=EXCLUDED)
    per_e = c.alpha[:, None] if c.beta is None else c.alpha[:, None] + c.beta[:, None] * d
    grad = d.exp() * per_e
    grad = torch.where(is_target, c.gamma[:, None], grad)
    grad = grad * (b.inverse_temperature * b.logit_scale)[:, None]
    out.copy_(grad if slope is None else grad * slope)


@triton.jit
def _forward_kernel(
    raw_ptr, store_ptr, parts_ptr, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
    n_rows, n_cols, first_column, raw_stride, store_stride, scale, softcap, cols_per_split,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, N_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Bound by instructions where the logits lie in the cache: two parts cost a third of six, a
    # whole block without the target takes no mask, and distances are in units of log 2.
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    raw_ptr += row * raw_stride
    target = tl.load(targets_ptr + row) - first_column
    anchor = tl.load(anchor_ptr + row)
    rate = tl.load(inverse_temp_ptr + row) * LOG2E
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, n_cols)
    origin = anchor  # the anchor, raised by the shift
    sum_e = tl.zeros([BLOCK], tl.float32)
    sum_ed, sum_d, sum_ee = 0.0, 0.0, 0.0
    max_d = _EXCLUDED + 0.0
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, slope = logit_block(
            raw_ptr, bias_ptr, columns, columns < end, scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        d = (z - origin) * rate
        whole = (start + BLOCK <= end) & ((target < start) | (target >= start + BLOCK))
        if N_PARTS > 2:
            counted = (z - anchor) * rate
            if not whole:
                counted = tl.where((columns < end) & (columns != target), counted, 0.0)
            sum_d += tl.sum(counted)
        if not whole:
            d = tl.where((columns < end) & (columns != target), d, _EXCLUDED)
        top = tl.max(d)
        if top > _MAX_EXPONENT * LOG2E:
            raised = origin + top / rate
            by = (raised - origin) * rate
            weight = tl.exp2(-by)
            if N_PARTS > 2:
                sum_ed = weight * (sum_ed - by * tl.sum(sum_e))
                sum_ee *= weight * weight
            sum_e *= weight
            d -= by
            top -= by
            origin = raised
        if N_PARTS > 2:
            max_d = tl.maximum(max_d, top + (origin - anchor) * rate)
            d = tl.maximum(d, _EXCLUDED)
        e = tl.exp2(d)
        sum_e += e
        if N_PARTS > 2:
            sum_ed += tl.sum(e * d)
            sum_ee += tl.sum(e * e)
        if STORE:
            # the caller gives one block per split, so a stored block has one shift
            tl.store(
                store_ptr + row * store_stride + columns,
                (e * slope).to(store_ptr.dtype.element_ty),
                mask=columns < end,
            )
    out = parts_ptr + split * N_PARTS * n_rows + row
    tl.store(out, tl.sum(sum_e))
    tl.store(out + n_rows, (origin - anchor) * rate * LN2)
    if N_PARTS > 2:
        tl.store(out + 2 * n_rows, sum_ed * LN2)
        tl.store(out + 3 * n_rows, sum_d * LN2)
        tl.store(out + 4 * n_rows, sum_ee)
        tl.store(out + 5 * n_rows, max_d * LN2)


@triton.jit
def _backward_kernel(
    raw_ptr, out_ptr, targets_ptr, anchor_ptr, inverse_temp_ptr, bias_ptr,
    alpha_ptr, beta_ptr, gamma_ptr, shift_ptr,
    n_cols, first_column, raw_stride, out_stride, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row) - first_column
    inverse_temp = tl.load(inverse_temp_ptr + row)
    rate = inverse_temp * LOG2E
    z, slope = logit_block(
        raw_ptr + row * raw_stride, bias_ptr, columns, columns < n_cols, scale, softcap,
        HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    d = (z - (tl.load(anchor_ptr + row) + tl.load(shift_ptr + row) / inverse_temp)) * rate
    factor = inverse_temp * scale
    alpha = tl.load(alpha_ptr + row) * factor
    if HAS_BETA:
        d = tl.maximum(d, _EXCLUDED)
        grad = tl.exp2(d) * (alpha + tl.load(beta_ptr + row) * factor * LN2 * d)
    else:
        grad = tl.exp2(d) * alpha
    if (target >= start) & (target < start + BLOCK):
        grad = tl.where(columns == target, tl.load(gamma_ptr + row) * factor, grad)
    tl.store(
        out_ptr + row * out_stride + columns,
        (grad * slope).to(out_ptr.dtype.element_ty),
        mask=columns < n_cols,
    )


@triton.jit
def _dot_kernel(
    hidden_ptr, weight_ptr, entries_ptr, out_ptr, depth, hidden_stride, weight_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    hidden_ptr += row * hidden_stride
    weight_ptr += tl.load(entries_ptr + row) * weight_stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + at, mask=at < depth, other=0.0)
        w = tl.load(weight_ptr + at, mask=at < depth, other=0.0)
        total += h.to(tl.float32) * w.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total))


@triton.jit
def _reanchor_kernel(
    store_ptr, shift_ptr, n_parts, n_cols, part_stride, store_stride, cols_per_part,
    PARTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    shift_ptr += row
    shifts = tl.load(shift_ptr + part * part_stride, mask=part < n_parts, other=0.0)
    common = tl.max(shifts)
    if common > 0.0:
        for index in range(0, n_parts):
            weight = tl.exp(tl.load(shift_ptr + index * part_stride) - common)
            end = tl.minimum((index + 1) * cols_per_part, n_cols)
            for start in range(index * cols_per_part, end, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                e_ptr = store_ptr + row * store_stride + columns
                e = tl.load(e_ptr, mask=columns < end, other=0.0).to(tl.float32) * weight
                tl.store(e_ptr, e.to(store_ptr.dtype.element_ty), mask=columns < end)


def row_dots(impl: str, hidden: Tensor, weight: Tensor, entries: Tensor) -> Tensor:
    """hidden[i] . weight[entries[i]] in float32 [n], the weight rounded to hidden's dtype."""
    out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if impl in ("triton", "fused") and weight.stride(1) == hidden.stride(1) == 1:
        block = min(next_power_of_2(hidden.shape[1]), 1024)
        with device_guard(hidden):
            _dot_kernel[(len(hidden),)](
                hidden, weight, entries, out, hidden.shape[1], hidden.stride(0), weight.stride(0),
                BLOCK=block, num_warps=max(1, block // 256),
            )  # fmt: skip
        return out
    for start in range(0, len(hidden), 4096):  # bounds the gathered rows
        rows = slice(start, start + 4096)
        gathered = weight[entries[rows]].to(hidden.dtype).float()
        torch.sum(hidden[rows].float() * gathered, -1, out=out[rows])
    return out


def fold_forward(impl: str, b: Logits, n_parts: int, store: Tensor | None = None) -> Tensor:
    """The first `n_parts` partial sums [parts, n_parts, n] of a block, 2 or 6; with `store` [n, v],
    E (times 1 - tanh^2 under a softcap, 0 at the target) goes there, each part at its own shift,
    and `b.raw` may be overwritten."""
    n, v = b.raw.shape
    if impl == "torch" or n == 0:
        return _forward_torch(b, store)[None, :n_parts]
    if impl == "cpu":
        parts = b.raw.new_empty((1, len(PARTS), n), dtype=torch.float32)
        in_place = store is not None
        _C.fold_forward_cpu(
            _c_block(b), _C_DTYPES[b.raw.dtype], parts.data_ptr(), in_place, torch.get_num_threads()
        )
        if in_place and store.data_ptr() != b.raw.data_ptr():
            store.copy_(b.raw)
        return parts[:, :n_parts]
    block = min(next_power_of_2(v), FOLD_BLOCK)
    blocks = -(-v // block)
    splits = blocks if store is not None else min(blocks, -(-FOLD_PROGRAMS // n))
    parts = b.raw.new_empty((splits, n_parts, n), dtype=torch.float32)
    with device_guard(b.raw):
        if impl == "cuda":
            _C.fold_forward_cuda(
                _c_block(b), _C_DTYPES[b.raw.dtype], parts.data_ptr(), n_parts, splits,
                stream_of(b.raw),
            )  # fmt: skip
            return parts
        out = b.raw if store is None else store
        _forward_kernel[(n, splits)](
            b.raw, out, parts, b.targets, b.anchor, b.inverse_temperature, b.bias,
            n, v, b.first_column, b.raw.stride(0), out.stride(0), b.logit_scale, b.softcap or 1.0,
            -(-blocks // splits) * block,
            HAS_BIAS=b.bias is not None, HAS_SOFTCAP=b.softcap is not None,
            STORE=store is not None, N_PARTS=n_parts, BLOCK=block, num_warps=_warps(block, n_parts),
        )  # fmt: skip
    return parts


def fold_backward(impl: str, b: Logits, c: Coefficients, out: Tensor) -> None:
    """Writes d loss / d raw logits [n, v] to `out`, which may be `b.raw`, and is of its dtype for
    "cpu" and "cuda"."""
    n, v = b.raw.shape
    if impl == "torch" or n == 0:
        _backward_torch(b, c, out)
    elif impl in ("cpu", "cuda"):
        if out.stride() != b.raw.stride():  # they write with the strides they read with
            b = b._replace(raw=out.copy_(b.raw))
        beta = torch.zeros_like(c.alpha) if c.beta is None else c.beta
        numbers = [x.data_ptr() for x in (c.shift, c.alpha, beta, c.gamma)]
        args = (_c_block(b), _C_DTYPES[b.raw.dtype], *numbers, out.data_ptr())
        if impl == "cpu":
            _C.fold_backward_cpu(*args, torch.get_num_threads())
        else:
            with device_guard(b.raw):
                _C.fold_backward_cuda(*args, stream_of(b.raw))
    else:
        block = min(next_power_of_2(v), FOLD_BLOCK)
        with device_guard(b.raw):
            _backward_kernel[(n, -(-v // block))](
                b.raw, out, b.targets, b.anchor, b.inverse_temperature, b.bias,
                c.alpha, c.beta, c.gamma, c.shift,
                v, b.first_column, b.raw.stride(0), out.stride(0), b.logit_scale, b.softcap or 1.0,
                HAS_BIAS=b.bias is not None, HAS_SOFTCAP=b.softcap is not None,
                HAS_BETA=c.beta is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip


def reanchor(impl: str, store: Tensor, parts: Tensor, cols_per_part: int) -> None:
    """Brings the stored E [n, V] of all parts [parts, P, n] to the rows' common shift, in place.

    Rows whose target is within MAX_EXPONENT nats of every logit, nearly all, are left alone.
    """
    if impl == "triton":
        with device_guard(store):
            _reanchor_kernel[(store.shape[0],)](
                store, parts[0, 1], parts.shape[0], store.shape[1], parts.stride(0),
                store.stride(0), cols_per_part,
                PARTS_BLOCK=next_power_of_2(parts.shape[0]), BLOCK=1024,
            )  # fmt: skip
        return
    shift = parts[:, 1]
    rows = (shift.amax(0) > 0).nonzero().squeeze(1)
    for part in range(parts.shape[0]) if len(rows) else ():
        columns = slice(part * cols_per_part, (part + 1) * cols_per_part)
        weight = (shift[part, rows] - shift[:, rows].amax(0)).exp()
        store[rows, columns] = (store[rows, columns].float() * weight[:, None]).to(store.dtype)


def _warps(block: int, n_parts: int = FEWEST_PARTS) -> int:
    """All the sums take more registers than a thread has for 16 logits."""
    return max(1, min(8 if n_parts == FEWEST_PARTS else 16, block // 256))


def _c_block(b: Logits):
    return _C.Block(
        b.raw.data_ptr(),
        *b.raw.shape,
        b.raw.stride(0),
        b.first_column,
        b.targets.data_ptr(),
        b.anchor.data_ptr(),
        b.inverse_temperature.data_ptr(),
        0 if b.bias is None else b.bias.data_ptr(),
        b.logit_scale,
        b.softcap or 0.0,
    )


_AOT_BLOCK = {
    **dict.fromkeys(("raw_ptr", "store_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("hidden_ptr", "weight_ptr"), "*bf16"),
    **dict.fromkeys(("parts_ptr", "anchor_ptr", "inverse_temp_ptr", "bias_ptr"), "*fp32"),
    **dict.fromkeys(("alpha_ptr", "beta_ptr", "gamma_ptr", "shift_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
    **dict.fromkeys(("targets_ptr", "entries_ptr"), "*i64"),
}
_AOT_FLAGS = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "BLOCK": FOLD_BLOCK}
# What ahead-of-time compilation checks: (kernel, argument types, constants, warps); i32 elsewhere.
AOT = [
    *(
        (_forward_kernel, _AOT_BLOCK, _AOT_FLAGS | flags, _warps(FOLD_BLOCK, flags["N_PARTS"]))
        for flags in (dict(STORE=stored, N_PARTS=n) for stored in (True, False) for n in (2, 6))
    ),
    (_backward_kernel, _AOT_BLOCK, {**_AOT_FLAGS, "HAS_BETA": True}, _warps(FOLD_BLOCK)),
    (_backward_kernel, _AOT_BLOCK, {**_AOT_FLAGS, "HAS_BETA": False}, _warps(FOLD_BLOCK)),
    (_dot_kernel, _AOT_BLOCK | {"out_ptr": "*fp32"}, {"BLOCK": 1024}, 4),
    (_reanchor_kernel, _AOT_BLOCK, {"PARTS_BLOCK": 256, "BLOCK": 1024}, 4),
]
