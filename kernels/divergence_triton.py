"""The Triton half of divergence_pass.py, which has the formulas and the reasons.

One program sums a row, reading it twice: for the normalisers, then for the terms. The gradient's
programs each take a block of a row. Everything is float32 whatever the logits are.
"""

from __future__ import annotations

from torch import Tensor

from .launch import device_guard, next_power_of_2, tl, triton
from .logit_block import logit_block

KINDS = ("forward_kl", "reverse_kl", "jsd", "alpha", "tvd")
NEAR = 0.5  # a log-ratio below this takes the series
CLOSE = 1.0  # up to here p_S is p_T e^r, so that their errors are one
FINITE = 1e30
_NEAR, _CLOSE, _FINITE = tl.constexpr(NEAR), tl.constexpr(CLOSE), tl.constexpr(FINITE)
BLOCK = 1024


@triton.jit
def _final_block(raw, bias, columns, inside, scale, softcap, inverse_temp,
                 HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    z, slope = logit_block(raw, bias, columns, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    return tl.where(inside, z * inverse_temp, -float("inf")), slope * scale * inverse_temp


@triton.jit
def _phi_block(x):
    p = x * (1.0 / 362880.0) + 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return p * x * x


@triton.jit
def _atanh_tail_block(z):
    s = z * z
    p = s * (1.0 / 13.0) + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return p * s


@triton.jit
def _terms_block(x_s, x_t, lse_s, lse_t, offset, weight, rest, inside, KIND: tl.constexpr):
    # the names and the branches of _terms
    r = tl.where(inside, (x_s - x_t) - offset, 0.0)
    size = tl.abs(r)
    near = size < _NEAR
    close = size <= _CLOSE
    small = tl.where(near, r, 0.0)
    p_t = tl.exp(x_t - lse_t)
    p_s = tl.where(close, p_t * tl.exp(tl.where(close, r, 0.0)), tl.exp(x_s - lse_s))
    if KIND == 0:
        phi = _phi_block(small)
        far = tl.where(p_t > 0, p_s - p_t - p_t * r, p_s)
        value = tl.where(near, p_t * phi, far)
        slope = tl.where(near, p_t * (small + phi), p_s - p_t)
    elif KIND == 1:
        far = tl.where(p_s > 0, p_t - p_s + p_s * r, p_t)
        value = tl.where(near, p_s * _phi_block(-small), far)
        slope = tl.where(p_s > 0, p_s * r, 0.0)
    elif KIND == 2:
        grown = small + _phi_block(small)
        y_t = rest * grown
        y_s = -weight * grown / (1.0 + grown)
        z_t = y_t / (2.0 + y_t)
        z_s = y_s / (2.0 + y_s)
        tail_s = _atanh_tail_block(z_s)
        near_t = 2.0 * z_t * (z_t / (1.0 - z_t) - _atanh_tail_block(z_t))
        near_s = 2.0 * z_s * (z_s / (1.0 - z_s) - tail_s)
        share = tl.where(r > 0, weight, rest)
        decay = tl.exp(-size)
        total = tl.where(r > 0, rest, weight) + share * decay
        lost = -share * (1.0 - decay) - (total - 1.0)
        log_total = tl.log(total) + tl.where(total > 0.5, lost / total, 0.0)
        # log (p_M / p) of the less likely side: near 0 its two parts would leave their errors
        part = tl.where(r > 0, rest, weight) * (1.0 - decay)
        log_whole = tl.log(decay + part) + size
        ratio = part / decay
        series = 1.0 / 3.0 - ratio * (0.25 - ratio * (0.2 - ratio * (1.0 / 6.0)))
        series = ratio * (1.0 - ratio * (0.5 - ratio * series))
        log_whole = tl.where(ratio < 0.1, series, log_whole)
        far_t = tl.where(p_t > 0, p_t * tl.where(r > 0, log_whole, log_total), 0.0)
        far_s = tl.where(p_s > 0, p_s * tl.where(r > 0, log_total, log_whole), 0.0)
        far = -weight * far_t - rest * far_s
        value = tl.where(near, weight * p_t * near_t + rest * p_s * near_s, far)
        slope = -rest * tl.where(near, p_s * 2.0 * z_s * (1.0 + tail_s), far_s)
    elif KIND == 3:
        by_teacher = weight >= 0.5
        s = tl.where(by_teacher, rest, weight)
        x = tl.where(by_teacher, r, -r)
        p = tl.where(by_teacher, p_t, p_s)
        other = tl.where(by_teacher, p_s, p_t)
        scaled = s * x
        small_scaled = tl.where(tl.abs(scaled) < _NEAR, scaled, 0.0)
        mixed = tl.exp(rest * (x_s - lse_s) + weight * (x_t - lse_t))
        mixed = tl.where(close, p * tl.exp(tl.where(close, scaled, 0.0)), mixed)
        whole = tl.where(near, p * _phi_block(tl.where(near, x, 0.0)), other - p - p * x)
        part = mixed - p - p * scaled
        part = tl.where(tl.abs(scaled) < _NEAR, p * _phi_block(small_scaled), part)
        disjoint = (rest * p_s + weight * p_t) / (weight * rest)
        value = tl.where(size < _FINITE, (whole - part / s) / (1.0 - s), disjoint)
        y = -weight * r
        y_small = tl.where(tl.abs(y) < _NEAR, y, 0.0)
        grown = y_small + _phi_block(y_small)
        slope = tl.where(tl.abs(y) < _NEAR, -p_s * grown, p_s - mixed) / weight
    else:
        gap = tl.where(near, p_t * (small + _phi_block(small)), p_s - p_t)
        value = 0.5 * tl.abs(gap)
        slope = tl.where(r > 0, 0.5 * p_s, tl.where(r < 0, -0.5 * p_s, 0.0))
    return value, slope


@triton.jit
def _statistics_kernel(
    student, teacher, student_bias, teacher_bias, inverse_temp, stats, n_rows, n_cols,
    student_stride, teacher_stride, student_scale, teacher_scale, student_cap, teacher_cap, weight,
    rest,
    KIND: tl.constexpr, BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    temp = tl.load(inverse_temp + row)
    top_s, top_t = -3.0e38, -3.0e38  # finite: a row may begin with -inf
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_cols
        x_s, _ = _final_block(
            student, student_bias, at, inside, student_scale, student_cap, temp, BIAS_S, CAP_S
        )
        x_t, _ = _final_block(
            teacher, teacher_bias, at, inside, teacher_scale, teacher_cap, temp, BIAS_T, CAP_T
        )
        higher_s = tl.maximum(top_s, tl.max(x_s, 0))
        higher_t = tl.maximum(top_t, tl.max(x_t, 0))
        sum_s = sum_s * tl.exp(top_s - higher_s) + tl.exp(x_s - higher_s)
        sum_t = sum_t * tl.exp(top_t - higher_t) + tl.exp(x_t - higher_t)
        top_s, top_t = higher_s, higher_t
    total_s, total_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    lse_s, lse_t = top_s + tl.log(total_s), top_t + tl.log(total_t)
    # rounded, for of equal logits it is 1 and no less
    offset = (top_s - top_t) + tl.log(tl.div_rn(total_s, total_t))
    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_cols
        x_s, _ = _final_block(
            student, student_bias, at, inside, student_scale, student_cap, temp, BIAS_S, CAP_S
        )
        x_t, _ = _final_block(
            teacher, teacher_bias, at, inside, teacher_scale, teacher_cap, temp, BIAS_T, CAP_T
        )
        value, slope = _terms_block(x_s, x_t, lse_s, lse_t, offset, weight, rest, inside, KIND)
        values += value
        slopes += slope
    stats += row
    tl.store(stats, lse_s)
    tl.store(stats + n_rows, lse_t)
    tl.store(stats + 2 * n_rows, offset)
    tl.store(stats + 3 * n_rows, tl.sum(values, 0))
    tl.store(stats + 4 * n_rows, tl.sum(slopes, 0))


@triton.jit
def _gradient_kernel(
    student, teacher, student_bias, teacher_bias, inverse_temp, stats, out, n_rows, n_cols,
    student_stride, teacher_stride, out_stride, student_scale, teacher_scale, student_cap,
    teacher_cap, weight, rest,
    KIND: tl.constexpr, BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_cols
    temp = tl.load(inverse_temp + row)
    x_s, chain = _final_block(
        student + row * student_stride, student_bias, at, inside, student_scale, student_cap, temp,
        BIAS_S, CAP_S,
    )  # fmt: skip
    x_t, _ = _final_block(
        teacher + row * teacher_stride, teacher_bias, at, inside, teacher_scale, teacher_cap, temp,
        BIAS_T, CAP_T,
    )  # fmt: skip
    stats += row
    lse_s = tl.load(stats)
    lse_t = tl.load(stats + n_rows)
    offset = tl.load(stats + 2 * n_rows)
    _, slope = _terms_block(x_s, x_t, lse_s, lse_t, offset, weight, rest, inside, KIND)
    grad = (slope - tl.load(stats + 4 * n_rows) * tl.exp(x_s - lse_s)) * chain
    out += row * out_stride
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)


def launch(
    student, teacher, inverse_temperature: Tensor, kind: str, weight: float, stats: Tensor,
    out: Tensor | None,
) -> None:  # fmt: skip
    """Fills `stats` [5, n] from the sides' logits; or, given `out`, fills that with gradients."""
    n, v = student.raw.shape
    block = min(BLOCK, next_power_of_2(v))
    flags = dict(
        KIND=KINDS.index(kind), BIAS_S=student.bias is not None, BIAS_T=teacher.bias is not None,
        CAP_S=student.softcap is not None, CAP_T=teacher.softcap is not None, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    tensors = (student.raw, teacher.raw, student.bias, teacher.bias, inverse_temperature, stats)
    strides = (student.raw.stride(0), teacher.raw.stride(0))
    caps = (student.softcap or 1.0, teacher.softcap or 1.0)
    scalars = (student.scale, teacher.scale, *caps, weight, 1 - weight)
    with device_guard(stats):
        if out is None:
            _statistics_kernel[(n,)](*tensors, n, v, *strides, *scalars, **flags)
        else:
            grid = (n, -(-v // block))
            strides += (out.stride(0),)
            _gradient_kernel[grid](*tensors, out, n, v, *strides, *scalars, **flags)


def _warps(block: int) -> int:
    return max(1, min(8, block // 128))


_FLOATS = ("student_bias", "teacher_bias", "inverse_temp", "stats")
_SCALARS = ("student_scale", "teacher_scale", "student_cap", "teacher_cap", "weight", "rest")
_AOT_TYPES = {
    **dict.fromkeys(("student", "teacher"), "*fp32"),
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(_SCALARS, "fp32"),
    "out": "*bf16",
}
# What ahead-of-time compilation checks: (kernel, argument types, constants, warps); i32 elsewhere.
AOT = [
    (
        kernel,
        _AOT_TYPES,
        {
            "KIND": kind,
            "BIAS_S": True,
            "BIAS_T": True,
            "CAP_S": True,
            "CAP_T": True,
            "BLOCK": BLOCK,
        },
        _warps(BLOCK),
    )
    for kernel in (_statistics_kernel, _gradient_kernel)
    for kind in range(len(KINDS))
]
