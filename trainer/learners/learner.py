"""What an online command learns from judged completions: the method, what it needs to know of
every token beforehand, and the micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..data import Example
from ..experience import Window
from ..objectives import Method
from ..online_config import OnlineConfig


class Learner(NamedTuple):
    """scores: what is read of all sampled tokens: the log-probs of the policy as it sampled
    ("old_logp") and of the reference ("ref_logp"), a critic's "values".
    batches: of a window and the number of the pass over it."""

    method: Method
    scores: tuple[str, ...]
    batches: Callable[[Window, int], list[list[Example]]]


def drawing(config: OnlineConfig, window: Window, group: int) -> np.random.Generator:
    """What is drawn for a prompt depends on the seed, the window and the prompt, not on ranks."""
    key = f"{config.seed} {window.number} {window.prompts[group].index}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
