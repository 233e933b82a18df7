"""RAFT, ReST, expert iteration: fine-tuning on the best of what was sampled."""

from __future__ import annotations

import numpy as np

from .. import objectives
from ..data import Example
from ..experience import Window
from ..online_config import RAFTConfig
from ..selection import best_of
from .learner import Learner, drawing


def raft(config: RAFTConfig) -> Learner:
    """A prompt's best completions, as demonstrations; of ReST's passes each has a threshold."""

    def batches(window: Window, iteration: int) -> list[list[Example]]:
        groups = window.candidates
        least = config.min_reward or [-np.inf]
        threshold = least[min(iteration, len(least) - 1)]

        def best(group: int) -> list[Example]:
            rewards = np.where(groups[group] >= threshold, groups[group], np.nan)
            chosen = best_of(rewards, config.keep_best, drawing(config, window, group))
            first = group * window.each
            return [window.example([first + i for i in chosen])] if chosen else []

        return window.picked(best)

    return Learner(objectives.sft(), (), batches)
