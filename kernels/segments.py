"""Reductions over the segments of a packed tensor.

Segment s of x [M] is x[cu_seqlens[s] : cu_seqlens[s + 1]]; cu_seqlens [S+1] is int32, starts at
0 and ends at M. Sums accumulate in float32 or better, in a fixed order: the same bits every run.

    forward    sum_s = sum of x over segment s, 0 if it is empty
    backward   dx_i = dsum_s for every i in segment s
    bytes      forward 4 M + 8 S, backward 4 M + 8 S (float32)
"""

from __future__ import annotations

import torch

from .launch import _C, choose_impl, device_guard, expect, has_values, tl, triton


def reference(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(len(cu_seqlens) - 1, dtype=x.dtype, device=x.device)
    return sums.index_add(0, segment_ids(cu_seqlens, len(x)), x)


@triton.jit
def _segment_sum_kernel(x, cu_seqlens, sums, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    lanes = tl.zeros([BLOCK], x.dtype.element_ty)
    for first in range(begin, end, BLOCK):
        item = first + tl.arange(0, BLOCK)
        lanes += tl.load(x + item, mask=item < end, other=0.0)
    tl.store(sums + segment, tl.sum(lanes, 0))


def _launch_cpu(x: torch.Tensor, cu_seqlens: torch.Tensor, sums: torch.Tensor) -> None:
    _C.segment_sum_cpu(
        x.data_ptr(),
        cu_seqlens.data_ptr(),
        len(sums),
        sums.data_ptr(),
        x.dtype == torch.float64,
        torch.get_num_threads(),
    )


def _launch_triton(x: torch.Tensor, cu_seqlens: torch.Tensor, sums: torch.Tensor) -> None:
    with device_guard(x):
        _segment_sum_kernel[(len(sums),)](x, cu_seqlens, sums, BLOCK=1024)


@triton.jit
def _segment_spread_kernel(x, cu_seqlens, out, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    value = tl.full([BLOCK], 0.0, x.dtype.element_ty) + tl.load(x + segment)
    for first in range(begin, end, BLOCK):
        item = first + tl.arange(0, BLOCK)
        tl.store(out + item, value, mask=item < end)


def _repeated(x: torch.Tensor, cu_seqlens: torch.Tensor, total: int, impl: str) -> torch.Tensor:
    """x[s] at every item of segment s."""
    if x.dtype not in (torch.float32, torch.float64):
        return torch.repeat_interleave(x, cu_seqlens.diff(), output_size=total)
    out = x.new_empty(total)
    if not total:
        return out
    x = x.contiguous()
    if impl == "cpu":
        wide, threads = x.dtype == torch.float64, torch.get_num_threads()
        addresses = x.data_ptr(), cu_seqlens.data_ptr(), len(x), out.data_ptr()
        _C.segment_spread_cpu(*addresses, wide, threads)
    else:
        with device_guard(x):
            _segment_spread_kernel[(len(x),)](x, cu_seqlens, out, BLOCK=1024)
    return out


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, impl):
        ctx.save_for_backward(cu_seqlens)
        ctx.items, ctx.impl = len(x), impl
        sums = x.new_empty(len(cu_seqlens) - 1)
        if len(sums):
            (_launch_cpu if impl == "cpu" else _launch_triton)(x, cu_seqlens, sums)
        return sums

    @staticmethod
    def backward(ctx, *grads):
        (cu_seqlens,) = ctx.saved_tensors
        return segment_spread(grads[0], cu_seqlens, ctx.items, impl=ctx.impl), None, None


def segment_sum(x: torch.Tensor, cu_seqlens: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Sums of x [M] over each segment, [S]; differentiable; an empty segment gives 0.

    The result is float64 for float64 x, else float32. impl: "cpu" (C++), "triton", "reference".
    """
    x = _check(x, cu_seqlens)
    if _choose(impl, x) == "reference":
        return reference(x, cu_seqlens)
    return _SegmentSum.apply(x.contiguous(), cu_seqlens.contiguous(), _choose(impl, x))


def _choose(impl: str, x: torch.Tensor) -> str:
    if impl == "auto" and not has_values(x):
        return "reference"
    return choose_impl(impl, x.device, ("cpu", "triton"))


def segment_mean(x: torch.Tensor, cu_seqlens: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Means of x [M] over each segment, [S]; differentiable; an empty segment gives 0."""
    return segment_sum(x, cu_seqlens, impl=impl) / cu_seqlens.diff().clamp(min=1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, total, impl):
        ctx.save_for_backward(cu_seqlens)
        ctx.impl = impl
        return _repeated(x, cu_seqlens, total, impl)

    @staticmethod
    def backward(ctx, *grads):
        return segment_sum(grads[0], *ctx.saved_tensors, impl=ctx.impl), None, None, None


def segment_spread(
    x: torch.Tensor, cu_seqlens: torch.Tensor, total: int, *, impl: str = "auto"
) -> torch.Tensor:
    """x [S] repeated over the items of each segment, [total]; its gradient is a segment_sum."""
    check_boundaries("cu_seqlens", cu_seqlens, total, x.device)
    got, segments = tuple(x.shape), len(cu_seqlens) - 1
    expect(got == (segments,), "x", f"shape ({segments},), a number a segment", got)
    if _choose(impl, x) == "reference":
        return x[segment_ids(cu_seqlens, total)]
    return _Spread.apply(x, cu_seqlens.contiguous(), total, _choose(impl, x))


def segment_max(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Maxima of x [M] over each segment, [S]; an empty segment gives 0.

    Differentiable; items that tie for the maximum share its gradient.
    """
    x = _check(x, cu_seqlens)
    zeros = x.new_zeros(len(cu_seqlens) - 1)
    ids = segment_ids(cu_seqlens, len(x))
    return zeros.scatter_reduce(0, ids, x, "amax", include_self=False)


def segment_logsumexp(
    x: torch.Tensor, cu_seqlens: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """log sum exp of x [M] over each segment, [S]; differentiable; an empty segment gives 0."""
    x = _check(x, cu_seqlens)
    peak = segment_max(x.detach(), cu_seqlens)
    peak = torch.where(peak.isfinite(), peak, 0.0)  # all -inf: -inf - -inf would be NaN
    total = segment_sum((x - peak[segment_ids(cu_seqlens, len(x))]).exp(), cu_seqlens, impl=impl)
    return torch.where(cu_seqlens.diff() > 0, total, 1.0).log() + peak


def segment_ids(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The segment of each of `total` items, [total] int64; does not wait for the GPU."""
    segments = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(segments, cu_seqlens.diff(), output_size=total)


def check_boundaries(
    name: str, boundaries: torch.Tensor, total: int, device: torch.device, *, wait: bool = False
) -> None:
    """Raises unless `boundaries` are int32 offsets on `device` that rise from 0 to `total`.

    The values are read on a CPU only, or with `wait`: on a GPU that means waiting for it.
    """
    expect(
        boundaries.dtype == torch.int32 and boundaries.dim() == 1 and len(boundaries) > 0,
        name,
        "a 1-D int32 tensor of segment boundaries",
        f"{boundaries.dtype} of shape {tuple(boundaries.shape)}",
        f"Pass `{name}.to(torch.int32)`, one more entry than segments",
    )
    expect(boundaries.device == device, name, f"a tensor on {device}", boundaries.device)
    if has_values(boundaries) and (boundaries.device.type == "cpu" or wait):
        offsets = boundaries.tolist()
        rises = offsets == sorted(offsets)
        expect(
            rises and offsets[0] == 0 and offsets[-1] == total,
            name,
            f"boundaries that rise from 0 to the number of tokens, {total}",
            f"{offsets[0]} to {offsets[-1]}" + ("" if rises else ", falling in between"),
            "Segments are packed end to end: cumsum of their lengths, with a leading 0",
        )


def check_steps(
    steps: torch.Tensor, cu_seqlens: torch.Tensor, total: int, *, wait: bool = False
) -> None:
    """Raises unless `steps` are boundaries that every entry of `cu_seqlens` is one of, so that each
    lies inside one sequence. The values are read as `check_boundaries` reads them."""
    check_boundaries("steps", steps, total, cu_seqlens.device, wait=wait)
    if not has_values(steps) or not (wait or steps.device.type == "cpu"):
        return
    missing = cu_seqlens[~torch.isin(cu_seqlens, steps)].tolist()
    expect(
        not missing,
        "steps",
        "steps that each lie inside one sequence",
        f"one that crosses the sequence boundary at token {missing[0]}" if missing else "",
        "Every entry of cu_seqlens must be one of steps",
    )


def _check(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """x as float64 or float32, after every check."""
    expect(
        x.dim() == 1 and x.is_floating_point(),
        "x",
        "a 1-D floating-point tensor",
        f"{x.dtype} of shape {tuple(x.shape)}",
        "Pack the segments end to end",
    )
    check_boundaries("cu_seqlens", cu_seqlens, len(x), x.device)
    return x if x.dtype == torch.float64 else x.float()


AOT = [
    (kernel, {"x": dtype, "cu_seqlens": "*i32", result: dtype}, {"BLOCK": 1024}, 4)
    for kernel, result in ((_segment_sum_kernel, "sums"), (_segment_spread_kernel, "out"))
    for dtype in ("*fp32", "*fp64")
]
