"""Successes of former windows, for prompts that none of their completions solves (ARPO,
arXiv:2505.16282)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prefuse.kernels.objective import Mean

from .dist import Ranks
from .experience import Window
from .rollout import Completion, Episode


class Replay:
    """The last success of every prompt; all ranks hold all of them, and so do checkpoints.

    A completion with a reward of `least` is a success. What is replayed has no log-probs of an
    engine: the trainer's own, by the weights as they are, make it a sample like the others.
    """

    def __init__(self, least: float, ranks: Ranks):
        self.least, self.ranks = least, ranks
        self.stored: dict[str, dict[str, Any]] = {}  # by the prompt's index, as JSON has it

    def __call__(self, window: Window) -> dict[str, Mean]:
        """Puts a stored success in the place of the last completion of prompts without one."""
        found: dict[str, dict[str, Any]] = {}
        replayed = 0
        for group, rewards in enumerate(window.candidates):
            key, first = str(window.prompts[group].index), group * window.each
            best = int(np.nanargmax(rewards)) if not np.isnan(rewards).all() else -1
            if best >= 0 and rewards[best] >= self.least:
                found[key] = _written(window, first + best)
            elif key in self.stored:
                _put(window, first + window.each - 1, self.stored[key])
                replayed += 1
        for theirs in self.ranks.gather(found):
            self.stored.update(theirs)
        count = torch.tensor(replayed), torch.tensor(len(window.prompts))
        return {"sampling/replayed": Mean(*count)}


def _written(window: Window, i: int) -> dict[str, Any]:
    """A completion and its rewards as JSON."""
    completion, episode = window.completions[i], None
    if completion.episode is not None:
        episode = {
            k: v.tolist() if isinstance(v, np.ndarray) else v
            for k, v in completion.episode._asdict().items()
            if k != "logp"
        }
    return {
        "tokens": completion.tokens.tolist(),
        "finished": completion.finished,
        "episode": episode,
        "reward": float(window.rewards[i]),
        "parts": [None if x != x else x for x in window.parts[i].tolist()],
        "paid": None if window.token_rewards is None else window.token_rewards[i].tolist(),
    }


def _put(window: Window, i: int, stored: dict[str, Any]) -> None:
    tokens, episode = np.array(stored["tokens"], dtype=np.int64), None
    if stored["episode"] is not None:
        given: dict[str, Any] = stored["episode"]
        given = {k: np.array(v) if k in LISTS else v for k, v in given.items()}
        episode = Episode(**given, logp=np.full(len(given["tokens"]), np.nan, dtype=np.float32))
    unknown = np.full(len(tokens), np.nan, dtype=np.float32)
    paid = stored.get("paid")
    if paid is not None or window.token_rewards is not None:
        window.token_rewards = window.paid()
        window.token_rewards[i] = np.zeros(len(tokens)) if paid is None else np.array(paid)
    window.completions[i] = Completion(tokens, unknown, stored["finished"], episode)
    window.rewards[i] = stored["reward"]
    parts = [float("nan") if x is None else x for x in stored["parts"]]
    window.parts[i] = torch.tensor(parts, dtype=window.parts.dtype)
    window.kept[i] = True


LISTS = ("tokens", "own", "rewards", "ends")  # of an Episode
