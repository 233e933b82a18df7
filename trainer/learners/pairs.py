"""Online preference optimisation: pairs of a prompt's completions, and what their loss reads."""

from __future__ import annotations

import numpy as np

from prefuse.kernels.preference import LOSSES, inputs

from .. import objectives
from ..data import Example
from ..experience import Window
from ..objectives import Reference
from ..online_config import OnlineDPOConfig
from ..selection import PAIRS, accepted
from ..win_rates import wins_of
from .learner import Learner, drawing


def pairs(config: OnlineDPOConfig, reference: Reference | None) -> Learner:
    """reference: a model's log-probs; without one, those of the policy that sampled."""
    needed = inputs(LOSSES[config.loss_type])
    sampled = objectives.column_reference("old_logp")
    if config.reanchor:
        reference = sampled
    previous = sampled if "prev_chosen" in needed else None
    method = objectives.dpo(reference, config.loss_type, config.hyperparameters, previous=previous)
    scores = ("old_logp",) if config.reanchor or previous else ()

    def batches(window: Window, iteration: int) -> list[list[Example]]:
        groups, wins = window.candidates, wins_of(window, config.preference).numpy()

        def made(group: int) -> list[Example]:
            rewards, first = groups[group], group * window.each
            examples = []
            for chosen, rejected in _chosen(config, window, group, rewards, wins[group]):
                numbers = _numbers(config, window, group, chosen, rejected, wins[group])
                judged = tuple(
                    numbers[name] for name in objectives.judged_columns(config.loss_type)
                )
                if np.isnan(judged).any():  # a comparison that failed
                    continue
                examples.append(window.example([first + chosen, first + rejected], judged))
            return examples

        return window.picked(made)

    return Learner(method, scores, batches)


def _chosen(
    config: OnlineDPOConfig, window: Window, group: int, rewards: np.ndarray, wins: np.ndarray
) -> list[tuple[int, int]]:
    """Places of chosen and rejected completions in their group."""
    if config.loss_type == "xpo":  # equal ones too, whose preference is a half
        half = window.each - window.foreign
        met = [(i, half + i) for i in range(half)]
        return [
            (i, j) if wins[i, j] >= 0.5 else (j, i)
            for i, j in met
            if not np.isnan([*rewards[[i, j]], wins[i, j]]).any()
        ]
    if config.loss_type == "egpo":  # equal ones too: it learns how far apart they should be
        return [] if np.isnan(rewards).any() else [(0, 1)]
    generator = drawing(config, window, group)
    if config.rso_eta is not None:
        survivors = accepted(rewards, config.rso_eta, generator)
        rewards = np.where(np.isin(np.arange(len(rewards)), survivors), rewards, np.nan)
    found = PAIRS[config.pairs](rewards, generator)
    if not found or rewards[found[0]] - rewards[found[1]] < config.min_margin:
        return []
    return [(found[0], found[1])]


def _numbers(
    config: OnlineDPOConfig,
    window: Window,
    group: int,
    chosen: int,
    rejected: int,
    wins: np.ndarray,
) -> dict[str, float]:
    """What a loss may read of a pair besides its log-probs. wins: [K, L], against opponents or the
    group itself."""
    rewards = window.groups[group]
    if config.loss_type == "egpo":
        gaps = wins[chosen] - wins[rejected]
        known = gaps[~np.isnan(gaps)]
        return {"margin": float(known.mean()) if len(known) else float("nan")}
    return {
        "margin": float(rewards[chosen] - rewards[rejected]),
        "preference": float(wins[chosen, rejected]),
        "explored": float(chosen >= window.each - window.foreign),
    }
