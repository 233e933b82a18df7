"""Losses of reward, cost and preference models on pairs of answers.

h(z) = -log sigmoid(z). w is the chosen and l the rejected answer of a pair, except in `cost`. A
reward is the score at an answer's last token (in a packed row, of its own segment). Rewards that
enter only as r_w - r_l have no zero: centre them on a reference set before a threshold or a sum of
several models is put on them, but never centre costs, whose sign means safe or unsafe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import expect
from .objective import Objective
from .preference_parts import logistic, objective
from .reward_parts import check_bool, check_pair, check_shape, full, label_loss, unit_vectors


class Strength(NamedTuple):
    """How strongly an ensemble prefers the chosen answers [P]."""

    mean: Tensor
    std: Tensor


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    preference: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> Objective:
    """Bradley-Terry, arXiv:2203.02155 eq. 1: h(r_w - r_l - m) + centering (r_w + r_l)^2.

    chosen, rejected: rewards r_w and r_l [P].
    margin: m [P], as in Llama 2 (arXiv:2307.09288); 0 if None.
    preference: probability [P] that w is the better one; p h(z) + (1 - p) h(-z), z = r_w - r_l - m.
    label_smoothing: e, the share of wrong labels: p becomes (1 - e) p + e (1 - p). e = 0.05 is the
        expected loss if a tenth of the labels are drawn anew from both answers alike. Christiano et
        al. put that tenth inside the logarithm instead: `bradley_terry_returns`.
    centering: TRL's center_rewards_coefficient (arXiv:2312.09244), which pins the free constant.

    Secrets of RLHF II (arXiv:2401.06080) needs no more than these: with `vote_strength`, the pairs
    an ensemble contradicts are flipped, the doubtful ones smoothed, the others given a margin:

        strength = vote_strength(ensemble_chosen, ensemble_rejected).mean
        preference = torch.where(strength < low, 0.0, torch.where(strength < high, 0.9, 1.0))
        margin = strength.where(strength >= high, 0.0)

    Unit: pair.
    """
    check_pair(chosen, rejected)
    expect(centering >= 0, "centering", "a number from 0", centering)
    chosen, rejected = full(chosen), full(rejected)
    z = chosen - rejected
    if margin is not None:
        check_shape("margin", margin, chosen.shape)
        z = z - margin
    loss = label_loss(z, preference, label_smoothing)
    if centering:
        loss = loss + centering * (chosen + rejected).square()
    return objective(loss, chosen, rejected)


def vote_strength(ensemble_chosen: Tensor, ensemble_rejected: Tensor) -> Strength:
    """Preference strength, arXiv:2401.06080: mean and deviation of r_w - r_l over M models.

    ensemble_chosen, ensemble_rejected: rewards [M, P]. Both results [P], detached; the deviation is
    the population's, 0 for one model.
    """
    wanted = "[M, P], rewards of P answers by M models"
    expect(ensemble_chosen.dim() == 2, "ensemble_chosen", wanted, tuple(ensemble_chosen.shape))
    check_shape("ensemble_rejected", ensemble_rejected, ensemble_chosen.shape)
    expect(len(ensemble_chosen) > 0, "ensemble_chosen", "at least one model", 0)
    gap = full(ensemble_chosen.detach()) - full(ensemble_rejected.detach())
    return Strength(gap.mean(0), gap.std(0, correction=0))


def cost(
    more_harmful: Tensor,
    less_harmful: Tensor,
    more_harmful_unsafe: Tensor,
    less_harmful_unsafe: Tensor,
) -> Objective:
    """Safe RLHF's cost model, arXiv:2310.12773: h(C_w - C_l) + h(s_w C_w) + h(s_l C_l).

    more_harmful, less_harmful: costs C_w and C_l [P]; here w is the *worse* answer.
    more_harmful_unsafe, less_harmful_unsafe: bool [P]; s is 1 if unsafe, -1 if safe.

    The signs make 0 the border of safety: do not centre costs. Unit: pair.
    """
    check_pair(more_harmful, less_harmful)
    worse, better = full(more_harmful), full(less_harmful)
    signed = []
    for name, value, unsafe in (
        ("more_harmful_unsafe", worse, more_harmful_unsafe),
        ("less_harmful_unsafe", better, less_harmful_unsafe),
    ):
        check_bool(name, unsafe)
        check_shape(name, unsafe, worse.shape)
        signed.append(torch.where(unsafe, value, -value))
    loss = logistic(worse - better) + logistic(signed[0]) + logistic(signed[1])
    right = (signed[0].detach() > 0).float() + (signed[1].detach() > 0).float()
    return Objective(
        loss,
        "pair",
        {
            "costs/more_harmful": worse.detach(),
            "costs/less_harmful": better.detach(),
            "costs/accuracies": (worse.detach() > better.detach()).float(),
            "costs/sign_accuracies": right / 2,
        },
    )


def odin(
    chosen_quality: Tensor,
    rejected_quality: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
    quality_weight: Tensor,
    length_weight: Tensor,
    moments: Tensor | None = None,
    *,
    length_coef: float = 1.0,
    orthogonality_coef: float = 1.0,
) -> Objective:
    """ODIN, arXiv:2402.07319: h(r_w - r_l) + a (|corr(q, n)| - corr(v, n)) + b |cos(W_q, W_v)|.

    r = q + v: a quality and a length head on shared features; RL takes q alone.

    chosen_quality, rejected_quality, chosen_length, rejected_length: q and v [P] of w and l.
    chosen_len, rejected_len: n [P], tokens of the answer without its prompt; no gradient.
    quality_weight, length_weight: the heads' weights W_q, W_v, whole, of one size.
    moments: what `odin_moments` gives for the first six tensors, summed over the micro-batches and
        ranks of an optimizer step; of this batch alone if None.
    length_coef, orthogonality_coef: a and b.

    The correlation is over all answers of the step. So a pair's loss is its share: given the whole
    step's `moments`, losses and gradients of its parts add up to those of the whole, and an entry
    by itself has no meaning. A constant reward or length has correlation 0. Unit: pair.
    """
    answers = (chosen_quality, rejected_quality, chosen_length, rejected_length)
    if moments is None:
        moments = odin_moments(*answers, chosen_len, rejected_len)
    check_shape("moments", moments, (9,), "Pass what odin_moments returns")
    check_shape("length_weight", length_weight, quality_weight.shape)
    quality, length, tokens = _odin_stacked(*answers, chosen_len, rejected_len)
    moments = moments.detach()
    count, q, v, n, qq, vv, nn, qn, vn = moments.unbind()
    of_tokens = (n / count, _inverse_std(n / count, nn / count))
    shares, correlations = [], []
    for x, first, second, mixed in ((quality, q, qq, qn), (length, v, vv, vn)):
        mean = first / count
        inverse_std = _inverse_std(mean, second / count)
        covariance = mixed / count - mean * of_tokens[0]
        correlation = (covariance * inverse_std * of_tokens[1]).clamp(-1, 1)
        shares.append(_correlation_share(x, tokens, mean, inverse_std, *of_tokens, correlation))
        correlations.append(correlation.to(x.dtype))
    penalty = correlations[0].sign() * shares[0] - shares[1]
    cosine = (_direction(quality_weight) * _direction(length_weight)).sum()
    chosen, rejected = quality + length
    loss = logistic(chosen - rejected) + length_coef * penalty.mean(0)
    found = objective(loss + orthogonality_coef * cosine.abs(), quality[0], quality[1])
    extra = {"quality": correlations[0], "length": correlations[1]}
    expanded = {f"correlations/{k}": c.expand_as(chosen) for k, c in extra.items()}
    return found._replace(metrics={**found.metrics, **expanded})


def odin_moments(
    chosen_quality: Tensor,
    rejected_quality: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
) -> Tensor:
    """Sums that `odin` takes, [9]: count, q, v, n, q^2, v^2, n^2, q n, v n. They add up, detached.

    float64 where the device has it: squares of lengths cancel.
    """
    answers = (chosen_quality, rejected_quality, chosen_length, rejected_length)
    stacked = _odin_stacked(*answers, chosen_len, rejected_len)
    wide = torch.float32 if chosen_quality.device.type == "mps" else torch.float64
    q, v, n = (x.detach().to(wide).flatten() for x in stacked)
    terms = (torch.ones_like(q), q, v, n, q * q, v * v, n * n, q * n, v * n)
    return torch.stack([term.sum() for term in terms])


def _odin_stacked(
    chosen_quality: Tensor,
    rejected_quality: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quality, length reward and tokens of w and l, [2, P] each."""
    check_pair(chosen_quality, rejected_quality)
    given = dict(chosen_length=chosen_length, rejected_length=rejected_length)
    given |= dict(chosen_len=chosen_len, rejected_len=rejected_len)
    for name, value in given.items():
        check_shape(name, value, chosen_quality.shape)
    quality = torch.stack([full(chosen_quality), full(rejected_quality)])
    length = torch.stack([full(chosen_length), full(rejected_length)])
    tokens = torch.stack([chosen_len, rejected_len]).detach().to(quality.dtype)
    return quality, length, tokens


def _direction(weight: Tensor) -> Tensor:
    return unit_vectors(full(weight).flatten())


def _inverse_std(mean: Tensor, mean_square: Tensor) -> Tensor:
    """1 / std; 0 for what is constant up to rounding."""
    variance = mean_square - mean * mean
    varies = variance > 1e-12 * mean_square
    return torch.where(varies, torch.where(varies, variance, 1).rsqrt(), 0)


def _correlation_share(
    x: Tensor,
    y: Tensor,
    x_mean: Tensor,
    x_inverse_std: Tensor,
    y_mean: Tensor,
    y_inverse_std: Tensor,
    correlation: Tensor,
) -> Tensor:
    """Per item a number whose mean is corr(x, y), and the gradient of whose mean is corr's."""
    a = (x.detach() - x_mean) * x_inverse_std
    b = (y - y_mean) * y_inverse_std
    slope = (b - correlation * a) * x_inverse_std
    return a * b + slope * (x - x.detach())


def lore(
    user_logits: Tensor, chosen_basis: Tensor, rejected_basis: Tensor, *, divisor: float = 100.0
) -> Objective:
    """LoRe, arXiv:2504.14439: h(softmax(u) . (R_w - R_l) / divisor), u the user, R basis rewards.

    user_logits: u [P, B] of each pair's user, before the softmax.
    chosen_basis, rejected_basis: R = V^T phi [P, B], rewards of the B shared functions.
    divisor: 100 in the authors' code, for raw embeddings phi; it is part of the recipe.

    A new user is fitted with the basis frozen. Unit: pair.
    """
    wanted = "[P, B], B weights of each pair's user"
    expect(user_logits.dim() == 2, "user_logits", wanted, tuple(user_logits.shape))
    expect(divisor > 0, "divisor", "a positive number", divisor)
    check_shape("chosen_basis", chosen_basis, user_logits.shape)
    check_shape("rejected_basis", rejected_basis, user_logits.shape)
    weights = full(user_logits).softmax(1)
    chosen = (weights * full(chosen_basis)).sum(1) / divisor
    rejected = (weights * full(rejected_basis)).sum(1) / divisor
    return objective(logistic(chosen - rejected), chosen, rejected)


def vpl(
    chosen: Tensor, rejected: Tensor, mean: Tensor, log_var: Tensor, *, kl_coef: float = 1e-4
) -> Objective:
    """VPL, arXiv:2408.10075: h(r_w - r_l) + kl_coef KL(N(mean, exp log_var) || N(0, I)).

    chosen, rejected: rewards [P] given a latent user, z = mean + exp(log_var / 2) * noise.
    mean, log_var: of the user's posterior [P, D], one row per pair.

    KL = (mean^2 + exp log_var - 1 - log_var) / 2, summed over D, as in the authors' code for
    language models, which scales z to the length sqrt(D). Theirs for control leaves the half out
    and sums over the batch: its weight is not this one. Unit: pair.
    """
    check_pair(chosen, rejected)
    expect(mean.dim() == 2, "mean", "[P, D], one row per pair", tuple(mean.shape))
    check_shape("mean", mean, (len(chosen), mean.shape[1]), "Repeat a user's row for each pair")
    check_shape("log_var", log_var, mean.shape)
    chosen, rejected, mean, log_var = (full(x) for x in (chosen, rejected, mean, log_var))
    kl = (mean.square() + torch.expm1(log_var) - log_var).sum(1) / 2
    found = objective(logistic(chosen - rejected) + kl_coef * kl, chosen, rejected)
    return found._replace(metrics={**found.metrics, "kl": kl.detach()})


_ALL = (bradley_terry, cost, odin, lore, vpl)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
