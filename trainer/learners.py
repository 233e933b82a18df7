"""What an online command learns from judged completions: the method, what it needs to know of
every token beforehand, and the micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import objectives
from .advantages import ESTIMATORS, NEED_GROUPS
from .data import Example
from .errors import UserError
from .experience import Window
from .loss_flags import nearest
from .objectives import Method
from .online_config import OnlineConfig, OnlineDPOConfig, PolicyConfig, PPOConfig, RAFTConfig
from .selection import best_of

ONE_STREAM = {"gdpo", "spo", "remax", "nash", "pass_at_k"}  # estimators of rewards alone


class Learner(NamedTuple):
    """scores: what is read of all sampled tokens: the log-probs of the policy as it sampled
    ("old_logp") and of the reference ("ref_logp"), a critic's "values".
    batches: of a window and the number of the pass over it."""

    method: Method
    scores: tuple[str, ...]
    batches: Callable[[Window, int], list[list[Example]]]


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


def drawing(config: OnlineConfig, window: Window, group: int) -> np.random.Generator:
    """What is drawn for a prompt depends on the seed, the window and the prompt, not on ranks."""
    key = f"{config.seed} {window.number} {window.prompts[group].index}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))


def needs_reference(config: OnlineConfig) -> bool:
    if isinstance(config, PolicyConfig):
        return config.beta != 0
    if isinstance(config, OnlineDPOConfig):
        return objectives.needs_reference(config.loss_type) and not config.reanchor
    return False


def check(config: OnlineConfig) -> None:
    """What the configuration's own checks cannot know."""
    if config.sync_ref_model and not needs_reference(config):
        raise UserError("--sync_ref_model: wanted a run with a reference model; this one has none")
    if isinstance(config, PolicyConfig) and not isinstance(config, PPOConfig):
        _check_policy(config)
    if isinstance(config, OnlineDPOConfig):
        _check_pairs(config)


def _check_policy(config: PolicyConfig) -> None:
    name = config.advantage
    if name not in ESTIMATORS:
        raise UserError(
            f"--advantage: wanted one of {', '.join(ESTIMATORS)}; got {name}"
            f"{nearest(name, ESTIMATORS)}"
        )
    if name in NEED_GROUPS and config.num_generations < 2:
        raise UserError(
            f"--num_generations: wanted 2 or more, for advantage {name} compares the "
            f"completions of a prompt; got {config.num_generations}"
        )
    if name == "pass_at_k" and config.pass_k > config.num_generations:
        raise UserError(
            f"--pass_k: wanted at most --num_generations {config.num_generations}; got "
            f"{config.pass_k}"
        )
    if config.cost_funcs and name in ONE_STREAM:
        raise UserError(
            f"--cost_funcs: wanted an advantage of any numbers, such as grpo or rloo; {name} is of "
            "rewards alone"
        )
    if config.kl_in_reward and config.beta and name in {"gdpo", "pass_at_k"}:
        raise UserError(f"--kl_in_reward: advantage {name} does not read it; pass false")


def _check_pairs(config: OnlineDPOConfig) -> None:
    name, each = config.loss_type, config.num_generations
    if name == "xpo" and each % 2:
        raise UserError(
            f"--num_generations: wanted an even number, for half of xpo's completions are the "
            f"reference's; got {each}"
        )
    if name == "xpo" and config.reanchor:
        raise UserError("--reanchor: xpo explores away from a reference that stays; pass false")
    if name == "egpo" and each < 3:
        raise UserError(
            f"--num_generations: wanted 3 or more, for egpo compares a pair with opponents; got "
            f"{each}"
        )
    if config.extragradient and (
        name != "egpo" or config.num_iterations * config.num_mini_batches > 1
    ):
        raise UserError(
            "--extragradient: wanted --loss_type egpo and one step a sampling, with num_iterations "
            "and num_mini_batches 1"
        )
