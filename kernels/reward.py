"""Losses of reward, cost, preference and process models by name, and rewards of an ensemble.

reward_pairs.py, reward_ratings.py, reward_tokens.py and reward_embeddings.py have the losses.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import reward_embeddings, reward_pairs, reward_ratings, reward_tokens
from .launch import expect
from .objective import Objective
from .reward_embeddings import goal_contrastive, info_nce
from .reward_pairs import bradley_terry, cost, lore, odin, odin_moments, vote_strength, vpl
from .reward_parts import full
from .reward_ratings import (
    all_pairs,
    binary,
    k_wise,
    ordered_thresholds,
    ordinal,
    regression,
)
from .reward_tokens import (
    both_orders,
    bradley_terry_returns,
    implicit_prm,
    prm,
    time_smoothness,
    token_nll,
    verdict_pair,
)

__all__ = [
    "COMBINERS",
    "LOSSES",
    "all_pairs",
    "binary",
    "both_orders",
    "bradley_terry",
    "bradley_terry_returns",
    "cost",
    "goal_contrastive",
    "implicit_prm",
    "info_nce",
    "lore",
    "lower_bound_reward",
    "mean_reward",
    "odin",
    "odin_moments",
    "ordered_thresholds",
    "ordinal",
    "k_wise",
    "prm",
    "regression",
    "time_smoothness",
    "token_nll",
    "uncertainty_weighted_reward",
    "verdict_pair",
    "vote_strength",
    "vpl",
    "worst_reward",
]


def mean_reward(rewards: Tensor) -> Tensor:
    """Mean of an ensemble, arXiv:2310.02743: [M, S] rewards of M models -> [S]."""
    return _ensemble(rewards).mean(0)


def worst_reward(rewards: Tensor) -> Tensor:
    """Worst case, arXiv:2310.02743: the least of [M, S] rewards -> [S]."""
    return _ensemble(rewards).amin(0)


def lower_bound_reward(rewards: Tensor, *, std_coef: float = 1.0) -> Tensor:
    """Lower confidence bound: mean - std_coef std of [M, S] rewards -> [S].

    The deviation is the population's: 0 for one model.
    """
    x = _ensemble(rewards)
    return x.mean(0) - std_coef * x.std(0, correction=0)


def uncertainty_weighted_reward(rewards: Tensor, *, variance_coef: float = 0.1) -> Tensor:
    """UWO, arXiv:2310.02743: mean - variance_coef variance of [M, S] rewards -> [S]."""
    x = _ensemble(rewards)
    return x.mean(0) - variance_coef * x.var(0, correction=0)


def _ensemble(rewards: Tensor) -> Tensor:
    """In float32, detached: models with their own scales must be normalised first."""
    good = rewards.dim() == 2 and len(rewards) > 0
    expect(good, "rewards", "[M, S], of at least one model", tuple(rewards.shape))
    return full(rewards.detach())


LOSSES: dict[str, Callable[..., Objective]] = {
    **reward_pairs.LOSSES,
    **reward_ratings.LOSSES,
    **reward_tokens.LOSSES,
    **reward_embeddings.LOSSES,
}
COMBINERS: dict[str, Callable[..., Tensor]] = {
    "mean": mean_reward,
    "min": worst_reward,
    "lcb": lower_bound_reward,
    "uwo": uncertainty_weighted_reward,
}
