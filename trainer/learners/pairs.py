"""Online preference optimisation: pairs of a prompt's completions, and what their loss reads."""

from __future__ import annotations

import numpy as np
import torch

from prefuse.kernels.preference import LOSSES, inputs

from .. import objectives
from ..data import Example
from ..experience import Window
from ..objectives import Reference
from ..online_config import OnlineDPOConfig
from ..selection import PAIRS, accepted
from ..win_rates import beats
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
        groups = window.candidates

        def made(group: int) -> list[Example]:
            rewards, first = groups[group], group * window.each
            examples = []
            for chosen, rejected in _chosen(config, window, group, rewards):
                numbers = _numbers(config, window, group, chosen, rejected)
                judged = tuple(
                    numbers[name] for name in objectives.judged_columns(config.loss_type)
                )
                examples.append(window.example([first + chosen, first + rejected], judged))
            return examples

        return window.picked(made)

    return Learner(method, scores, batches)


def _chosen(
    config: OnlineDPOConfig, window: Window, group: int, rewards: np.ndarray
) -> list[tuple[int, int]]:
    """Places of chosen and rejected completions in their group."""
    if config.loss_type == "xpo":  # equal ones too, whose preference is a half
        half = window.each - window.foreign
        met = [(i, half + i) for i in range(half)]
        return [
            (i, j) if rewards[i] >= rewards[j] else (j, i)
            for i, j in met
            if not np.isnan(rewards[[i, j]]).any()
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
    config: OnlineDPOConfig, window: Window, group: int, chosen: int, rejected: int
) -> dict[str, float]:
    """What a loss may read of a pair besides its log-probs."""
    rewards = window.groups[group]
    better, worse = (rewards[[i]][None] for i in (chosen, rejected))
    margin = float(better - worse)
    if config.loss_type == "egpo":
        assert window.others is not None
        opponents = window.others.groups[group][None]
        wins = [beats(side, opponents, config.preference) for side in (better, worse)]
        margin = float(torch.nanmean(wins[0] - wins[1]))
    return {
        "margin": margin,
        "preference": float(beats(better, worse, config.preference)),
        "explored": float(chosen >= window.each - window.foreign),
    }
