"""What an online command learns from judged completions: the method, what it needs to know of
every token beforehand, and the micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels.objective import Objective, Unit
from prefuse.kernels.policy import LOSSES, policy_loss
from prefuse.kernels.policy_parts import Actions
from prefuse.kernels.preference_parts import probe

from . import objectives
from .advantages import ESTIMATORS, NEED_GROUPS, Judged, advantages
from .batch import PackedBatch
from .data import Example
from .errors import UserError
from .experience import Window
from .loss_flags import nearest
from .objectives import Method, Reference
from .online_config import OnlineConfig, OnlineDPOConfig, PolicyConfig, PPOConfig, RAFTConfig
from .scores import Scorer


class Learner(NamedTuple):
    """scores: the log-probs that the judgement or the loss reads, of the policy as it sampled
    ("old_logp") and of the reference ("ref_logp")."""

    method: Method
    scores: tuple[str, ...]
    batches: Callable[[Window, Judged], list[list[Example]]]


def learner(config: OnlineConfig, scorer: Scorer, reference: Scorer | None, live) -> Learner:
    """That of the configuration's command; live: the reference as offline methods take it."""
    if isinstance(config, PolicyConfig):
        return _policy(config)
    if isinstance(config, OnlineDPOConfig):
        return _pairs(config, scorer, reference, live)
    assert isinstance(config, RAFTConfig)
    return _best(config)


def needs_reference(config: OnlineConfig) -> bool:
    if isinstance(config, PolicyConfig):
        return config.beta != 0
    if isinstance(config, OnlineDPOConfig):
        return objectives.needs_reference(config.loss_type)
    return False


def check(config: OnlineConfig) -> None:
    """What the configuration's own checks cannot know."""
    if not isinstance(config, PolicyConfig) or isinstance(config, PPOConfig):
        return
    if config.advantage not in ESTIMATORS:
        raise UserError(
            f"--advantage: wanted one of {', '.join(ESTIMATORS)}; got {config.advantage}"
            f"{nearest(config.advantage, ESTIMATORS)}"
        )
    if config.advantage in NEED_GROUPS and config.num_generations < 2:
        raise UserError(
            f"--num_generations: wanted 2 or more, for advantage {config.advantage} compares the "
            f"completions of a prompt; got {config.num_generations}"
        )


def _policy(config: PolicyConfig) -> Learner:
    steps = config.num_mini_batches * config.num_iterations
    scores = ["old_logp"] if steps > 1 or config.kl_in_reward and config.beta else []
    scores += ["ref_logp"] if config.beta else []

    def batches(window: Window, judged: Judged) -> list[list[Example]]:
        window.set("advantages", advantages(config.advantage, judged))
        window.spread("reward", judged.rewards)
        by_group = judged.rewards.view(-1, window.each)
        window.spread("pass_rate", by_group.nanmean(1).repeat_interleave(window.each))
        if config.filter_zero_std and window.each > 1:
            differ = by_group.amax(1) > by_group.amin(1)
            window.kept &= differ.repeat_interleave(window.each).numpy()
        return window.micro_batches()

    return Learner(policy_method(config), tuple(scores), batches)


def policy_method(config: PolicyConfig) -> Method:
    """The policy loss on the columns of the scored tokens."""
    needed, surrogate = probe(LOSSES[config.loss_type], Actions)
    unit: Unit = "token" if surrogate.aggregation == "token-mean" else "sequence"
    correction = config.importance_sampling_correction
    options: dict[str, Any] = dict(config.hyperparameters, loss_type=config.loss_type)
    uses_rollout = correction != "none" or "rollout_logp" in needed
    if correction != "none":
        options["rollout_mode"] = correction
        options["rollout_bounds"] = (0.0, config.importance_sampling_clip_max)

    def objective(scorer: Scorer, batch: PackedBatch) -> Objective:
        stats = scorer(batch, ("logp", "entropy"))
        assert stats.entropy is not None
        logp, nothing = stats.logp, stats.logp.new_zeros(0)

        def column(name: str) -> Tensor | None:
            return batch.columns.get(name, None if len(logp) else nothing)

        result = policy_loss(
            logp,
            column("old_logp"),
            column("advantages"),
            ref_logp=column("ref_logp") if config.beta else None,
            rollout_logp=column("rollout_logp") if uses_rollout else None,
            cu_seqlens=batch.score_cu_seqlens,
            beta=0.0 if config.kl_in_reward else config.beta,
            kl=config.kl,
            entropy=stats.entropy,
            entropy_coef=config.entropy_coef,
            max_length=config.max_completion_length,
            **{name: column(name) for name in ("reward", "pass_rate") if name in needed},
            **options,
        )
        return result._replace(metrics={**result.metrics, **_gap(logp, column("rollout_logp"))})

    return Method(objective, unit)


def _gap(logp: Tensor, rollout_logp: Tensor | None) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's, where the engine told them."""
    if rollout_logp is None:
        return {}
    return {"sampling/logp_difference": (logp.detach() - rollout_logp).abs().nan_to_num(nan=0.0)}


def _pairs(
    config: OnlineDPOConfig, scorer: Scorer, reference: Scorer | None, live: Reference | None
) -> Learner:
    """A prompt's best completion against its worst."""
    method = objectives.dpo(live, config.loss_type, config.hyperparameters)
    if config.sync_ref_model and reference is not None:
        share, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        method = objectives.following(method, scorer, reference, share, every)

    def batches(window: Window, judged: Judged) -> list[list[Example]]:
        rewards = np.where(window.kept, judged.rewards.numpy(), np.nan)

        def best_and_worst(group: range) -> list[int]:
            known = [i for i in group if rewards[i] == rewards[i]]
            ordered = sorted(known, key=lambda i: -rewards[i])
            if len(ordered) < 2 or rewards[ordered[0]] == rewards[ordered[-1]]:
                return []
            return [ordered[0], ordered[-1]]

        return window.picked(best_and_worst)

    return Learner(method, (), batches)


def _best(config: RAFTConfig) -> Learner:
    """A prompt's best completions, as demonstrations."""
    least = -np.inf if config.min_reward is None else config.min_reward

    def batches(window: Window, judged: Judged) -> list[list[Example]]:
        rewards = np.where(window.kept, judged.rewards.numpy(), np.nan)

        def best(group: range) -> list[int]:
            good = [i for i in group if rewards[i] >= least]
            return sorted(sorted(good, key=lambda i: -rewards[i])[: config.keep_best])

        return window.picked(best)

    return Learner(objectives.sft(), (), batches)


def judged_by(window: Window, config: OnlineConfig, each: Tensor, rewards: Tensor, weights, reduce):
    """What the estimators read, from the rewards and the columns of the window."""
    policy = config if isinstance(config, PolicyConfig) else None
    in_reward = policy is not None and policy.kl_in_reward and policy.beta != 0
    logps = {}
    if in_reward:
        logps = {
            "logp": torch.from_numpy(window.columns["old_logp"]),
            "ref_logp": torch.from_numpy(window.columns["ref_logp"]),
        }
    return Judged(
        rewards,
        each,
        torch.from_numpy(weights),
        window.cu_groups,
        window.cu_seqlens,
        policy.scale_rewards if policy else "none",
        reduce,
        kl_coef=policy.beta if policy else 0.0,
        **logps,
    )
