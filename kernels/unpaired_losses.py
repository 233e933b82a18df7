"""Losses of completions judged one at a time: desirable or not, or with a reward.

rho = log pi - log pi_ref of the completion, summed over its tokens; h(z) = -log sigmoid(z).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .launch import expect
from .objective import Objective
from .preference_parts import Labelled, logistic


def kto(
    x: Labelled,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Objective:
    """KTO, arXiv:2402.01306: a sigmoid(z - beta rho) if desirable, else b sigmoid(beta rho - z).

    z = beta max(0, shift), where shift is the mean log-ratio of mismatched prompts and completions
    over the global batch, detached. a and b are the two weights.
    """
    reward = beta * x.log_ratio()
    z = beta * x.need("shift").detach().clamp(min=0)
    good, bad = (
        desirable_weight * (z - reward).sigmoid(),
        undesirable_weight * (reward - z).sigmoid(),
    )
    return _objective(good.where(x.need("label"), bad), reward)


def bco(x: Labelled, *, beta: float = 0.1) -> Objective:
    """BCO, arXiv:2404.04656: h(beta rho - shift) if desirable, else h(shift - beta rho).

    shift is the mean of the two classes' mean rewards, a moving average, detached.
    """
    reward = beta * x.log_ratio()
    z = reward - x.need("shift").detach()
    return _objective(logistic(z).where(x.need("label"), logistic(-z)), reward)


def apo_zero_unpaired(
    x: Labelled,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Objective:
    """APO-zero unpaired, arXiv:2408.06266: a sigmoid(-z) if desirable, else b sigmoid(z).

    z = beta rho; a and b are the two weights, as in TRL; the paper has none.
    """
    reward = beta * x.log_ratio()
    good, bad = desirable_weight * (-reward).sigmoid(), undesirable_weight * reward.sigmoid()
    return _objective(good.where(x.need("label"), bad), reward)


def dro_v(x: Labelled, *, tau: float = 1.0) -> Objective:
    """DRO-V, arXiv:2405.19107: (reward - value - tau rho)^2 / 2, for the policy and the critic.

    The policy's gradient is of order tau: give the two their own learning rates.
    """
    expect(tau > 0, "tau", "a positive number", tau)
    rho = x.log_ratio()
    loss = (x.need("reward") - x.need("value") - tau * rho) ** 2 / 2
    return _objective(loss, tau * rho)


def a2po(x: Labelled, *, beta: float = 1e-3) -> Objective:
    """A*-PO, arXiv:2505.20686: (beta rho - (reward - value))^2.

    value is V* = beta_1 log mean exp(reward / beta_1) over samples of pi_ref: a prompt's own, from
    `optimal_value`, and the same in every step.
    """
    rho = x.log_ratio()
    loss = (beta * rho - (x.need("reward") - x.need("value"))) ** 2
    return _objective(loss, beta * rho)


def optimal_value(rewards: Tensor, *, beta: float = 0.5) -> Tensor:
    """A*-PO's V*, arXiv:2505.20686: beta log mean_k exp(r_k / beta), [G, K] rewards -> [G]."""
    expect(beta > 0, "beta", "a positive number", beta)
    expect(rewards.dim() == 2, "rewards", "[G, K], of samples of pi_ref", tuple(rewards.shape))
    return beta * ((rewards.detach() / beta).logsumexp(1) - math.log(rewards.shape[1]))


def _objective(loss: Tensor, reward: Tensor) -> Objective:
    return Objective(loss, "sequence", {"rewards": reward.detach()})


_ALL = (kto, bco, apo_zero_unpaired, dro_v, a2po)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
