"""One pass over two blocks of logits, student's S and teacher's T: divergence and gradient.

Every kind is an f-divergence, value = sum_v p_T f(rho), rho = p_S / p_T, with f written so that
f(1) = f'(1) = 0. Then no term is negative, and with r = log rho,

    forward_kl   p_T (e^r - 1 - r)                   w = p_S - p_T
    reverse_kl   p_S (e^-r - 1 + r)                  w = p_S r
    jsd          -b p_T u_T - (1 - b) p_S u_S        w = -(1 - b) p_S u_S
    alpha        ((1 - a) p_S + a p_T - q) / (a (1 - a))    w = (p_S - q) / a
    tvd          |p_S - p_T| / 2                  w = p_S sign(r) / 2

for b the teacher's weight in the mixture M, u = log(p_M / p_.), q = p_S^(1-a) p_T^a. The gradient
is d value / d x_S = w - p_S sum w. An error of the normalisers enters only squared, or times the
value; r is a difference of logits, not of log-probabilities; and a small r takes a series: so a
divergence of 1e-8 keeps its digits in float32, where sum p_T (log p_T - log p_S) has none left.

`statistics` makes sums per row (two reads of both blocks), `gradient` writes the block of
gradients (one read of both, one write). "torch" is here, "triton" in divergence_triton.py, "cpu"
in csrc/divergence.cpp. A pair of logits that are both -inf (a padded vocabulary) counts as 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence_triton import CLOSE, FINITE, KINDS, NEAR, launch
from .launch import _C

STATISTICS = (
    "lse_student",
    "lse_teacher",
    "offset",
    "value",
    "mean",
)  # offset: the lses' difference
TORCH_ELEMENTS = 1 << 20  # of a block that plain torch takes at a time


class Rule(NamedTuple):
    kind: str
    weight: float  # beta of "jsd", alpha of "alpha"; both strictly between 0 and 1


class Side(NamedTuple):
    """One head's block of raw logits; final = softcap(scale (raw + bias)) / temperature."""

    raw: Tensor  # [n, v], rows contiguous
    bias: Tensor | None  # [v], of the dtype that is computed in
    scale: float
    softcap: float | None


class Tile(NamedTuple):
    student: Side
    teacher: Side
    inverse_temperature: Tensor  # [n]

    def rows(self, rows: slice) -> Tile:
        student, teacher = (side._replace(raw=side.raw[rows]) for side in self[:2])
        return Tile(student, teacher, self.inverse_temperature[rows])


def final_logits(side: Side, inverse_temperature: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, v], and d x / d raw [n, v] or [n, 1]; float64 stays, the rest becomes float32."""
    wide = torch.float64 if side.raw.dtype == torch.float64 else torch.float32
    z = side.raw.to(wide)
    if side.bias is not None:
        z = z + side.bias
    slope = (inverse_temperature * side.scale)[:, None]
    if side.softcap is None:
        return z * slope, slope
    t = torch.tanh(z * (side.scale / side.softcap))
    return t * (side.softcap * inverse_temperature)[:, None], (1 - t * t) * slope


def _phi(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| < NEAR, without its cancellation."""
    p = torch.zeros_like(x)
    for k in range(16 if x.dtype == torch.float64 else 9, 1, -1):
        p = p * x + 1 / math.factorial(k)
    return p * x * x


def _atanh_tail(z: Tensor) -> Tensor:
    """atanh(z) / z - 1 for |z| < 1/4."""
    p = torch.zeros_like(z)
    for k in range(27 if z.dtype == torch.float64 else 13, 1, -2):
        p = p * (z * z) + 1 / k
    return p * z * z


def _jsd_terms(r, p_s, p_t, beta: float, near: Tensor) -> tuple[Tensor, Tensor]:
    small = torch.where(near, r, 0)
    grown = small + _phi(small)
    y_t, y_s = (1 - beta) * grown, -beta * grown / (1 + grown)
    z_t, z_s = y_t / (2 + y_t), y_s / (2 + y_s)
    near_t, near_s = (2 * z * (z / (1 - z) - _atanh_tail(z)) for z in (z_t, z_s))  # y - log1p(y)
    ahead = r > 0
    share = torch.where(ahead, torch.full_like(r, beta), 1 - beta)
    lost = share * torch.expm1(-r.abs())
    total = torch.where(ahead, torch.full_like(r, 1 - beta), beta) + share * (-r.abs()).exp()
    log_total = torch.where(total > 0.5, torch.log1p(lost), total.log())
    far_t = torch.where(p_t > 0, p_t * torch.where(ahead, log_total + r, log_total), 0)
    far_s = torch.where(p_s > 0, p_s * torch.where(ahead, log_total, log_total - r), 0)
    value = torch.where(
        near,
        beta * p_t * near_t + (1 - beta) * p_s * near_s,
        -beta * far_t - (1 - beta) * far_s,
    )
    near_log = 2 * z_s * (1 + _atanh_tail(z_s))
    return value, -(1 - beta) * torch.where(near, p_s * near_log, far_s)


def _alpha_terms(r, p_s, p_t, mixed, alpha: float, near, close) -> tuple[Tensor, Tensor]:
    # the smaller exponent, where no digits cancel: of p_S from p_T, or of p_T from p_S
    s, x, p, other = (1 - alpha, r, p_t, p_s) if alpha >= 0.5 else (alpha, -r, p_s, p_t)
    mixed = torch.where(close, p * (s * x.clamp(-CLOSE, CLOSE)).exp(), mixed)
    whole = torch.where(near, p * _phi(torch.where(near, x, 0)), other - p - p * x)
    scaled = s * x
    small = scaled.abs() < NEAR
    phi = _phi(torch.where(small, scaled, 0))
    part = torch.where(small, p * phi, mixed - p - p * scaled)
    disjoint = ((1 - alpha) * p_s + alpha * p_t) / (alpha * (1 - alpha))
    value = torch.where(r.abs() < FINITE, (whole - part / s) / (1 - s), disjoint)
    y = -alpha * r
    return value, torch.where(y.abs() < NEAR, -p_s * torch.expm1(y), p_s - mixed) / alpha


def _terms(rule: Rule, x_s: Tensor, x_t: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Each entry's share of the value, and its w."""
    lse_s, lse_t, offset = (x[:, None] for x in stats[:3])
    r = (x_s - x_t) - offset
    near, close = r.abs() < NEAR, r.abs() <= CLOSE  # both False where both logits are -inf
    p_t = (x_t - lse_t).exp()
    p_s = torch.where(close, p_t * r.clamp(-CLOSE, CLOSE).exp(), (x_s - lse_s).exp())
    if rule.kind == "jsd":
        return _jsd_terms(r, p_s, p_t, rule.weight, near)
    if rule.kind == "alpha":
        logs = (1 - rule.weight) * (x_s - lse_s) + rule.weight * (x_t - lse_t)
        return _alpha_terms(r, p_s, p_t, logs.exp(), rule.weight, near, close)
    small = torch.where(near, r, 0)
    if rule.kind == "tvd":
        gap = torch.where(near, p_t * (small + _phi(small)), p_s - p_t)
        return gap.abs() / 2, p_s * ((r > 0).to(r) - (r < 0).to(r)) / 2
    if rule.kind == "forward_kl":
        phi = _phi(small)
        far = torch.where(p_t > 0, p_s - p_t - p_t * r, p_s)
        return torch.where(near, p_t * phi, far), torch.where(near, p_t * (r + phi), p_s - p_t)
    far = torch.where(p_s > 0, p_t - p_s + p_s * r, p_t)
    return torch.where(near, p_s * _phi(-small), far), torch.where(p_s > 0, p_s * r, 0)


def _statistics_torch(tile: Tile, rule: Rule) -> Tensor:
    x_s, x_t = (final_logits(side, tile.inverse_temperature)[0] for side in tile[:2])
    top_s, top_t = x_s.amax(1), x_t.amax(1)
    sum_s, sum_t = (x_s - top_s[:, None]).exp().sum(1), (x_t - top_t[:, None]).exp().sum(1)
    offset = (top_s - top_t) + (sum_s / sum_t).log()
    stats = torch.stack((top_s + sum_s.log(), top_t + sum_t.log(), offset))
    value, w = _terms(rule, x_s, x_t, stats)
    return torch.cat((stats, torch.stack((value.sum(1), w.sum(1)))))


def _gradient_torch(tile: Tile, rule: Rule, stats: Tensor) -> Tensor:
    x_s, slope = final_logits(tile.student, tile.inverse_temperature)
    x_t = final_logits(tile.teacher, tile.inverse_temperature)[0]
    w = _terms(rule, x_s, x_t, stats)[1]
    return (w - stats[4][:, None] * (x_s - stats[0][:, None]).exp()) * slope


def _c_tile(tile: Tile, rule: Rule):
    sides = []
    for side in tile[:2]:
        bias = 0 if side.bias is None else side.bias.data_ptr()
        sides += [side.raw.data_ptr(), side.raw.stride(0), bias, side.scale, side.softcap or 0.0]
    temperature = tile.inverse_temperature.data_ptr()
    kind = KINDS.index(rule.kind)
    return _C.DivergenceTile(*sides, *tile.student.raw.shape, temperature, kind, rule.weight)


def _in_float32(tile: Tile) -> Tile:
    """The C++ pass reads float32."""
    return tile._replace(
        student=tile.student._replace(raw=tile.student.raw.float()),
        teacher=tile.teacher._replace(raw=tile.teacher.raw.float()),
    )


def statistics(impl: str, tile: Tile, rule: Rule) -> Tensor:
    """STATISTICS of each row, [5, n]: float32, or float64 of float64 logits."""
    n, v = tile.student.raw.shape
    stats = tile.inverse_temperature.new_empty((len(STATISTICS), n))
    if impl == "triton" and n:
        launch(*tile, *rule, stats, None)
    elif impl == "cpu":
        tile = _in_float32(tile)
        threads = torch.get_num_threads()
        _C.divergence_statistics_cpu(_c_tile(tile, rule), stats.data_ptr(), threads)
    elif impl == "torch":
        for rows in _row_blocks(n, v):
            stats[:, rows] = _statistics_torch(tile.rows(rows), rule)
    return stats


def gradient(impl: str, tile: Tile, rule: Rule, stats: Tensor, out: Tensor) -> None:
    """Writes d value / d raw student logits to `out` [n, v], which may be the student's block, and
    is of its dtype if that must not be overwritten.

    stats: contiguous, [5, n], as `statistics` made it from these rows' whole vocabulary; the tile
    may be any part of the columns.
    """
    n, v = tile.student.raw.shape
    if impl == "triton" and n:
        launch(*tile, *rule, stats, out)
    elif impl == "cpu":
        tile = _in_float32(tile)
        target = out if out.dtype == torch.float32 else tile.student.raw
        threads = torch.get_num_threads()
        _C.divergence_gradient_cpu(
            _c_tile(tile, rule), stats.data_ptr(), target.data_ptr(), target.stride(0), threads
        )
        if target is not out:
            out.copy_(target)
    elif impl == "torch":
        for rows in _row_blocks(n, v):
            out[rows] = _gradient_torch(tile.rows(rows), rule, stats[:, rows]).to(out.dtype)


def _row_blocks(n: int, v: int) -> list[slice]:
    step = max(1, TORCH_ELEMENTS // max(v, 1))
    return [slice(start, start + step) for start in range(0, n, step)]
