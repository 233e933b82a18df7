"""Losses of reward models on labels of single answers, and on rankings of a prompt's answers.

h(z) = -log sigmoid(z). Answers that `mask` leaves out have no part in a loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import expect
from .objective import Mean, Objective
from .preference_parts import logistic, smoothed, soft
from .reward_parts import (
    ABSENT,
    check_bool,
    check_probability,
    check_shape,
    full,
    mean_over,
    readable,
)


def binary(rewards: Tensor, label: Tensor) -> Objective:
    """RLUF's P[Love], arXiv:2505.14946: y h(r) + (1 - y) h(-r), so that P = sigmoid(r).

    rewards: r [S]. label: y [S], bool or a probability. Also a classifier of broken rules
    (Sparrow, arXiv:2209.14375), or of right answers. Unit: sequence.
    """
    expect(rewards.dim() == 1, "rewards", "[S], one per answer", tuple(rewards.shape))
    check_shape("label", label, rewards.shape)
    check_probability("label", label)
    r = full(rewards)
    right = ((r > 0) == (label > 0.5)).float()
    return Objective(
        soft(r, label.to(r.dtype)),
        "sequence",
        {"rewards": r.detach(), "rewards/accuracies": right},
    )


def regression(
    rewards: Tensor, target: Tensor, mask: Tensor | None = None, *, huber: float = 0.0
) -> Objective:
    """Regression on ratings, arXiv:2311.09528: mean over attributes of (r - target)^2.

    rewards, target: [S] or [S, A], A attributes (HelpSteer has five).
    mask: bool of the same shape: this attribute was rated; all if None. An answer without a rating
        is no unit.
    huber: beyond |r - target| = huber the loss is straight, 2 huber |r - target| - huber^2, twice
        torch's huber_loss; 0 leaves it square.

    Unit: sequence.
    """
    expect(rewards.dim() in (1, 2), "rewards", "[S] or [S, A]", tuple(rewards.shape))
    expect(huber >= 0, "huber", "a number from 0", huber)
    check_shape("target", target, rewards.shape)
    r = full(rewards)
    rated = torch.ones_like(r, dtype=torch.bool) if mask is None else mask
    check_bool("mask", rated)
    check_shape("mask", rated, r.shape)
    error = r.masked_fill(~rated, 0) - target.to(r.dtype).masked_fill(~rated, 0)
    loss = error.square()
    if huber:
        loss = 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber)
    off = error.detach().abs()
    if r.dim() == 2:
        count = rated.sum(1).clamp(min=1)
        loss, off, rated = loss.sum(1) / count, off.sum(1) / count, rated.any(1)
    return Objective(
        loss,
        "sequence",
        {"rewards/absolute_error": mean_over(off, rated)},
        rated.sum(),
    )


def ordinal(rewards: Tensor, label: Tensor, thresholds: Tensor) -> Objective:
    """Cumulative logits, McCullagh 1980: -log [sigmoid(b_y - r) - sigmoid(b_{y-1} - r)].

    rewards: r [S]. label: y [S], int64 in 0..K-1, best last. thresholds: b [K-1], rising, of which
    b_{-1} = -inf and b_{K-1} = inf are left out; a parameter, by `ordered_thresholds`.

    With one threshold b this is `binary` of r - b. Reward and thresholds share a free constant.
    Labels and order are checked on a CPU; elsewhere a label outside counts as the nearest one.
    Unit: sequence.
    """
    expect(rewards.dim() == 1, "rewards", "[S], one per answer", tuple(rewards.shape))
    wanted = "[K-1] numbers, at least one"
    good = thresholds.dim() == 1 and len(thresholds) > 0
    expect(good, "thresholds", wanted, tuple(thresholds.shape))
    check_shape("label", label, rewards.shape)
    expect(label.dtype == torch.int64, "label", "int64 classes", label.dtype)
    top = len(thresholds)
    if readable(label) and readable(thresholds):
        inside = bool(((label >= 0) & (label <= top)).all())
        expect(inside, "label", f"classes 0 to {top}, one more than thresholds", label.tolist())
        rises = bool((thresholds.diff() > 0).all())
        remedy = "Make them with ordered_thresholds"
        expect(rises, "thresholds", "rising numbers", thresholds.tolist(), remedy)
    r, b = full(rewards), full(thresholds)
    upper, lower = b[label.clamp(0, top - 1)], b[(label - 1).clamp(0, top - 1)]
    below_top, above_bottom = label < top, label > 0
    # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u)): nothing cancels
    gap = torch.where(below_top & above_bottom, upper - lower, 1)
    inner = torch.where(below_top & above_bottom, -(-torch.expm1(-gap)).log(), 0)
    loss = logistic(upper - r) * below_top + logistic(r - lower) * above_bottom + inner
    guess = (r.detach()[:, None] > b.detach()).sum(1)
    return Objective(
        loss,
        "sequence",
        {"rewards": r.detach(), "rewards/accuracies": (guess == label).float()},
    )


def ordered_thresholds(raw: Tensor) -> Tensor:
    """Rising thresholds from any numbers [K-1]: raw_0, then steps of softplus(raw_k)."""
    return torch.cat([raw[:1], F.softplus(raw[1:])]).cumsum(0)


def k_wise(rewards: Tensor, quality: Tensor, mask: Tensor | None = None) -> Objective:
    """K-wise, Plackett-Luce, arXiv:2301.11270: sum_i [log sum_{j = i or worse} exp r_j - r_i].

    rewards: r [G, K] of the K answers of G prompts.
    quality: [G, K], higher is better (for ranks, minus the rank).
    mask: bool [G, K], the answers there are; all if None.

    Answers of equal quality are not compared: neither is in the other's sum. The worst adds 0, so
    two answers are a Bradley-Terry pair; a prompt with nothing to compare counts 0. Unit: group.
    """
    r, better = _comparisons(rewards, quality, mask)
    kept = better | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    total = torch.where(kept, r[:, None, :], ABSENT).logsumexp(2)
    return Objective((total - r).sum(1), "group", _accuracy(r, better))


def all_pairs(
    rewards: Tensor,
    quality: Tensor,
    mask: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Objective:
    """All pairs of a prompt, arXiv:2203.02155 eq. 1: mean over i better than j of h(r_i - r_j).

    Shapes and masks as in `k_wise`. The mean is within the prompt, so a prompt with many
    answers weighs no more than another; ties are no pairs, a prompt without pairs counts 0. Unit:
    group.
    """
    r, better = _comparisons(rewards, quality, mask)
    loss = smoothed(logistic, r[:, :, None] - r[:, None, :], label_smoothing)
    total = torch.where(better, loss, 0).sum((1, 2))
    return Objective(total / better.sum((1, 2)).clamp(min=1), "group", _accuracy(r, better))


def _comparisons(rewards: Tensor, quality: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards, 0 where absent, and whether i is better than j [G, K, K]."""
    expect(rewards.dim() == 2, "rewards", "[G, K], K answers of G prompts", tuple(rewards.shape))
    check_shape("quality", quality, rewards.shape)
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    check_bool("mask", valid)
    check_shape("mask", valid, rewards.shape)
    both = valid[:, :, None] & valid[:, None, :]
    better = both & (quality[:, :, None] > quality[:, None, :])
    return full(rewards).masked_fill(~valid, 0), better


def _accuracy(rewards: Tensor, better: Tensor) -> dict[str, Tensor | Mean]:
    """Share of a prompt's comparisons that the rewards get right; a tie is a half."""
    gap = rewards.detach()[:, :, None] - rewards.detach()[:, None, :]
    wins = torch.where(better, (gap > 0).float() + 0.5 * (gap == 0).float(), 0).sum((1, 2))
    count = better.sum((1, 2))
    return {"rewards/accuracies": mean_over(wins / count.clamp(min=1), count > 0)}


_ALL = (binary, regression, ordinal, k_wise, all_pairs)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
