"""Losses of K completions of one prompt, ranked by rewards r.

s = beta rho, rho = log pi - log pi_ref summed over a completion's tokens; p = softmax(r / alpha)
and q = softmax(s) over the K completions; h(z) = -log sigmoid(z). Completions that `mask` leaves
out have no part in a loss and no gradient; a prompt without any counts 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .objective import Objective
from .preference_parts import Listed, logistic

ABSENT = -1e30  # a score whose exp is 0, and finite: 0 * ABSENT is 0


def infonca(x: Listed, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """InfoNCA, arXiv:2402.05369: -sum_i p_i log q_i."""
    scores = _scores(x, beta)
    log_p, log_q = _log_softmax(x, x.need("reward") / alpha), _log_softmax(x, scores)
    return _objective(x, -(log_p.exp() * log_q), scores)


def nca(x: Listed, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """NCA, arXiv:2402.05369: sum_i [p_i h(s_i) + h(-s_i) / K]."""
    scores = _scores(x, beta)
    p = _log_softmax(x, x.need("reward") / alpha).exp()
    count = x.valid().sum(1, keepdim=True).clamp(min=1)
    return _objective(x, p * logistic(scores) + logistic(-scores) / count, scores)


def exo(x: Listed, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """EXO, arXiv:2402.00856: KL(q || p) = sum_i q_i (log q_i - log p_i)."""
    scores = _scores(x, beta)
    log_p, log_q = _log_softmax(x, x.need("reward") / alpha), _log_softmax(x, scores)
    return _objective(x, log_q.exp() * (log_q - log_p), scores)


def plackett_luce(x: Listed, *, beta: float = 0.1) -> Objective:
    """DPO of K, Plackett-Luce, arXiv:2305.18290 app. A.3: sum_k [log sum_{j >= k} exp s_j - s_k].

    k runs from the best reward to the worst; of equal rewards the earlier column is the better.
    """
    scores = _scores(x, beta)
    valid = x.valid()
    reward = x.need("reward").masked_fill(~valid, float("-inf"))
    order = reward.argsort(dim=1, descending=True, stable=True)
    ranked = scores.masked_fill(~valid, ABSENT).gather(1, order)
    rest = ranked.flip(1).logcumsumexp(1).flip(1)
    present = valid.gather(1, order)
    loss = (rest - ranked).masked_fill(~present, 0).sum(1)
    return Objective(loss, "group", _metrics(x, scores))


def lipo(x: Listed, *, beta: float = 0.1) -> Objective:
    """LiPO-lambda, arXiv:2402.01878: sum over r_i > r_j of L_ij h(s_i - s_j).

    L_ij = |2^r_i - 2^r_j| |1 / log(1 + t_i) - 1 / log(1 + t_j)|, t the rank under s from 1, both
    detached; equal scores share the better rank.
    """
    scores, reward, valid = _scores(x, beta), x.need("reward"), x.valid()
    held = scores.detach().masked_fill(~valid, ABSENT)
    rank = 1 + (held[:, None, :] > held[:, :, None]).sum(2)
    discount = 1 / torch.log1p(rank.to(scores.dtype))
    gain = torch.exp2(reward.masked_fill(~valid, 0))
    both = valid[:, :, None] & valid[:, None, :] & (reward[:, :, None] > reward[:, None, :])
    weight = (gain[:, :, None] - gain[:, None, :]).abs()
    weight = weight * (discount[:, :, None] - discount[:, None, :]).abs()
    loss = weight * logistic(scores[:, :, None] - scores[:, None, :])
    return Objective(loss.masked_fill(~both, 0).sum((1, 2)), "group", _metrics(x, scores))


def _scores(x: Listed, beta: float) -> Tensor:
    """beta rho; 0 where absent, for what stands there may be NaN."""
    return (beta * x.log_ratio()).masked_fill(~x.valid(), 0)


def _log_softmax(x: Listed, scores: Tensor) -> Tensor:
    return scores.masked_fill(~x.valid(), ABSENT).log_softmax(1)


def _objective(x: Listed, terms: Tensor, scores: Tensor) -> Objective:
    return Objective(terms.masked_fill(~x.valid(), 0).sum(1), "group", _metrics(x, scores))


def _metrics(x: Listed, scores: Tensor) -> dict[str, Tensor]:
    """How often the best reward has the best score too."""
    held, valid = scores.detach().masked_fill(~x.valid(), ABSENT), x.valid()
    best = x.need("reward").masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)
    return {"rewards/accuracies": (held.gather(1, best).squeeze(1) >= held.amax(1)).float()}


_ALL = (infonca, nca, exo, plackett_luce, lipo)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
