"""Which of a prompt's completions are trained on, and which make a pair, by their rewards.

rewards: [K], NaN for those that are left out. Places in it come back; what is drawn by chance comes
from the generator given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator


def ranked(rewards: np.ndarray) -> list[int]:
    """Best first; of equal ones the earlier first."""
    known = np.flatnonzero(~np.isnan(rewards))
    return known[np.argsort(-rewards[known], kind="stable")].tolist()


def best_of(rewards: np.ndarray, keep: int, generator: Generator) -> list[int]:
    """PF-PPO's BoN, arXiv:2409.06957: the best."""
    return sorted(ranked(rewards)[:keep])


def best_and_random(rewards: np.ndarray, keep: int, generator: Generator) -> list[int]:
    """PF-PPO's BR: the best, and others by chance."""
    first, *rest = ranked(rewards) or [-1]
    chosen = generator.permutation(rest)[: keep - 1].tolist()
    return sorted([first, *chosen]) if first >= 0 else []


def best_and_worst(rewards: np.ndarray, keep: int, generator: Generator) -> list[int]:
    """PF-PPO's BW: half of them the best, half the worst; of an odd number one more of the best."""
    order = ranked(rewards)
    if len(order) <= keep:
        return sorted(order)
    return sorted(order[: keep - keep // 2] + order[len(order) - keep // 2 :])


SUBSETS: dict[str, Callable[[np.ndarray, int, Generator], list[int]]] = {
    "best": best_of,
    "best_random": best_and_random,
    "best_worst": best_and_worst,
}


def accepted(rewards: np.ndarray, eta: float, generator: Generator) -> list[int]:
    """RSO's rejection sampling, arXiv:2309.06657: each with probability exp((r - r_max) / eta)."""
    order = ranked(rewards)
    if not order:
        return []
    chance = np.exp((rewards - rewards[order[0]]) / eta)
    drawn = generator.random(len(rewards))
    return [i for i in range(len(rewards)) if drawn[i] < chance[i]]


def extremes(rewards: np.ndarray, generator: Generator) -> list[int]:
    """The best and the worst."""
    order = ranked(rewards)
    return _unequal(rewards, order[0], order[-1]) if order else []


def best_against_random(rewards: np.ndarray, generator: Generator) -> list[int]:
    """The best and one of the others."""
    first, *rest = ranked(rewards) or [-1]
    return _unequal(rewards, first, int(generator.choice(rest))) if rest else []


def two_at_random(rewards: np.ndarray, generator: Generator) -> list[int]:
    """Two of them, the better first."""
    order = ranked(rewards)
    if len(order) < 2:
        return []
    first, second = sorted(generator.choice(len(order), 2, replace=False).tolist())
    return _unequal(rewards, order[first], order[second])


def _unequal(rewards: np.ndarray, chosen: int, rejected: int) -> list[int]:
    """A tie says nothing."""
    return [chosen, rejected] if rewards[chosen] > rewards[rejected] else []


PAIRS: dict[str, Callable[[np.ndarray, Generator], list[int]]] = {
    "best_worst": extremes,
    "best_random": best_against_random,
    "random": two_at_random,
}
