"""Anchored softmax statistics of a block of logits: the arithmetic `logp` and `linear_logp` share.

For one token let x_v be its final logits (bias, logit scale, softcap and temperature applied) and
y its target, known before any logit is computed. Anchored at the target instead of at the maximum,

    d_v = x_v - x_y,   E_v = exp(d_v),   S = sum_{v != y} E_v,
    logp = -log1p(S),            lse = x_y + log1p(S),
    entropy = log1p(S) - sum_{v != y} E_v d_v / (1 + S),

nothing is rescaled and a confident token (S near 0) keeps its relative error, where a float32
log-sum-exp keeps none. The sums of disjoint column blocks add. A block with a d_v too large for
exp raises its own anchor by `shift`, and `merge` brings the blocks to one; then 1 + S reads
exp(-shift) + S, and nothing overflows.

Backward, for upstream gradients of logp, entropy and lse: with p_v = E_v / (1 + S),

    d loss / d x_v = E_v (alpha + beta d_v)  for v != y,   gamma  at y

where alpha, beta and gamma are one number each per token (`coefficients`). `fold.py` makes the sums
and applies the coefficients; here is only arithmetic on [N].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PARTS = ("sum_e", "shift", "sum_ed", "sum_d", "sum_ee", "max_d")
FEWEST_PARTS = 2  # what logp and lse need, and their gradients
OUTPUTS = ("logp", "entropy", "lse", "mean_logit", "log_sum_sq", "top1")


class TokenStats(NamedTuple):
    """Per-token statistics of softmax(x), float32 [N]; None where not requested.

    logp: log p(target), in nats.
    entropy: -sum_v p_v log p_v, in nats.
    lse: log sum_v exp(x_v).
    mean_logit: mean_v x_v; lse - mean_logit - log V is the self-certainty of arXiv:2505.19590.
    log_sum_sq: log sum_v p_v^2, as WPO (arXiv:2406.11827) weighs with.
    top1: bool, whether no other entry has a larger logit than the target.

    logp, entropy and lse are differentiable; the rest are detached.
    """

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq: Tensor | None = None
    top1: Tensor | None = None

    def detach(self) -> TokenStats:
        return TokenStats(self.logp.detach(), *(x if x is None else x.detach() for x in self[1:]))


class Coefficients(NamedTuple):
    """What a token's gradient needs beyond its logits, float32 [N] each."""

    alpha: Tensor
    beta: Tensor | None  # of the entropy: None if that has no gradient
    gamma: Tensor
    shift: Tensor

    def select(self, rows) -> Coefficients:
        alpha, gamma, shift = (x[rows] for x in (self.alpha, self.gamma, self.shift))
        return Coefficients(alpha, None if self.beta is None else self.beta[rows], gamma, shift)


def target_anchor(raw_target: Tensor, scale: float, cap: float | None) -> Tensor:
    """The softcapped logit of the target from its raw logit with the bias, float32 [n]."""
    z = raw_target.float()
    z = z if scale == 1.0 else z * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def parts_for(outputs: tuple[str, ...]) -> int:
    """How many of PARTS these outputs need."""
    return FEWEST_PARTS if {"logp", "lse"}.issuperset(outputs) else len(PARTS)


def merge(parts: Tensor) -> Tensor:
    """Partial sums [blocks, P, N] of column blocks -> [P, N] of the whole row, P 2 or 6."""
    if len(parts) == 1:
        return parts[0]
    sum_e, shift = parts[:, 0], parts[:, 1]
    common = shift.amax(0)
    raise_by = shift - common  # <= 0
    weight = raise_by.exp()
    merged = [(weight * sum_e).sum(0), common]
    if parts.shape[1] > FEWEST_PARTS:
        sum_ed, sum_d, sum_ee, max_d = parts[:, FEWEST_PARTS:].unbind(1)
        merged.append((weight * (sum_ed + raise_by * sum_e)).sum(0))
        merged += [sum_d.sum(0), (weight * weight * sum_ee).sum(0), max_d.amax(0)]
    return torch.stack(merged)


def finalize(
    sums: Tensor, anchor: Tensor, inverse_temperature: Tensor, vocab: int, outputs: tuple[str, ...]
) -> TokenStats:
    """Row sums [P, N] -> the requested statistics, for which `parts_for` says how many it takes."""
    part = dict(zip(PARTS, sums, strict=False))
    shift = part["shift"]
    log_total = torch.log1p(part["sum_e"] + torch.expm1(-shift))
    stats = {"logp": -shift - log_total}
    x_target = anchor * inverse_temperature
    if "entropy" in outputs:
        at_target = (-shift).exp() * -shift
        stats["entropy"] = log_total - (part["sum_ed"] + at_target) / log_total.exp()
    if "lse" in outputs:
        stats["lse"] = x_target + shift + log_total
    if "mean_logit" in outputs:
        stats["mean_logit"] = x_target + part["sum_d"] / vocab
    if "log_sum_sq" in outputs:
        total_ee = part["sum_ee"] + torch.expm1(-2 * shift)
        stats["log_sum_sq"] = torch.log1p(total_ee) - 2 * log_total
    if "top1" in outputs:
        stats["top1"] = part["max_d"] <= 0
    return TokenStats(**stats)


def coefficients(
    sums: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> Coefficients:
    """Upstream gradients [N] -> d loss / d x_v = E_v (alpha + beta d_v), gamma at the target.

    d logp / d x_v = [v=y] - p_v;  d lse / d x_v = p_v;
    d entropy / d x_v = -p_v (log p_v + entropy).
    """
    sum_e, shift = sums[:FEWEST_PARTS]
    zero = torch.zeros_like(sum_e)
    e_target = (-shift).exp()
    log_total = torch.log1p(sum_e + torch.expm1(-shift))
    per_p = zero  # the part of d loss / d x_v that is p_v times a constant
    gamma = zero
    beta = None
    if grad_logp is not None:
        per_p = per_p - grad_logp
        gamma = gamma + grad_logp * sum_e / log_total.exp()  # 1 - p_y without cancellation
    if grad_lse is not None:
        per_p = per_p + grad_lse
        gamma = gamma + grad_lse * (e_target / log_total.exp())
    if grad_entropy is not None:
        total = log_total.exp()
        entropy = log_total - (sums[2] - e_target * shift) / total
        per_p = per_p - grad_entropy * (entropy - log_total)
        beta = -grad_entropy / total
        p_target = e_target / total
        gamma = gamma - grad_entropy * p_target * (entropy - shift - log_total)
    return Coefficients(per_p / log_total.exp(), beta, gamma, shift)
