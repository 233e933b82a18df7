"""Policy gradients: advantages of sampled completions, and the loss on the scored tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels.objective import Objective, Unit
from prefuse.kernels.policy import LOSSES, policy_loss
from prefuse.kernels.policy_parts import Actions
from prefuse.kernels.preference_parts import probe
from prefuse.kernels.whitening import Reduce

from ..batch import PackedBatch
from ..data import Example
from ..experience import Window
from ..objectives import Method
from ..online_config import PolicyConfig
from ..scores import Scorer
from ..selection import SUBSETS
from ..win_rates import wins_of
from .advantages import COMPARE, Judged, advantages
from .controls import Controls
from .learner import Learner, drawing


def policy(config: PolicyConfig, controls: Controls, reduce: Reduce) -> Learner:
    """Advantages by the estimator's name; reduce: statistics of this rank -> of all."""

    def batches(window: Window, iteration: int) -> list[list[Example]]:
        if iteration == 0:
            judged = judged_by(window, config, controls, reduce)
            found = advantages(config.advantage, judged, controls.log_multiplier)
            window.set("advantages", found)
            select(window, config)
        return window.micro_batches()

    return Learner(policy_method(config, controls), scores(config), batches)


def scores(config: PolicyConfig) -> tuple[str, ...]:
    steps = config.num_mini_batches * config.num_iterations
    in_reward = config.kl_in_reward and config.beta
    old = steps > 1 or in_reward or config.kl_target is not None
    old = old or config.importance_sampling_correction != "none"
    return (("old_logp",) if old else ()) + (("ref_logp",) if config.beta else ())


def judged_by(window: Window, config: PolicyConfig, controls: Controls, reduce: Reduce) -> Judged:
    """What the estimators read, from the rewards and the columns of the window."""
    logps = {}
    if config.kl_in_reward and config.beta:
        logps = {"logp": window.column("old_logp"), "ref_logp": window.column("ref_logp")}
    weights = list(config.reward_weights or [1.0] * len(config.reward_funcs))
    weights += [1.0] * (window.parts.shape[1] - len(weights))  # an environment's, of comparisons
    return Judged(
        window.rewards,
        window.parts,
        torch.tensor(weights, dtype=torch.float64),
        window.cu_groups,
        window.cu_seqlens,
        reduce,
        scale=config.scale_rewards,
        wins=wins_of(window, config.preference) if config.advantage in COMPARE else None,
        pass_k=config.pass_k,
        others=None if window.others is None else window.others.groups,
        costs=window.costs,
        kl_coef=controls.beta,
        **logps,
    )


def select(window: Window, config: PolicyConfig) -> None:
    """Which completions are trained on; their advantages are those among all."""
    rewards = window.groups
    window.spread("reward", window.rewards)
    window.spread("pass_rate", rewards.nanmean(1).repeat_interleave(window.each))
    if config.filter_zero_std and window.each > 1:
        window.kept &= np.repeat(window.informative(), window.each)
    if config.select != "all":
        keep = np.zeros_like(window.kept)
        for group, own in enumerate(window.candidates):
            chosen = SUBSETS[config.select](own, config.keep, drawing(config, window, group))
            keep[[group * window.each + i for i in chosen]] = True
        window.kept &= keep


def policy_method(config: PolicyConfig, controls: Controls) -> Method:
    """The policy loss on the columns of the scored tokens."""
    needed, surrogate = probe(LOSSES[config.loss_type], Actions)
    unit: Unit = "token" if surrogate.aggregation == "token-mean" else "sequence"
    correction = config.importance_sampling_correction
    options: dict[str, Any] = dict(config.hyperparameters, loss_type=config.loss_type)
    turns = 1 if config.environment is None else config.max_turns
    longest = turns * config.max_completion_length  # Dr. GRPO's divisor
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
            beta=0.0 if config.kl_in_reward else controls.beta,
            kl=config.kl,
            entropy=stats.entropy,
            entropy_coef=config.entropy_coef,
            max_length=longest,
            **{name: column(name) for name in ("reward", "pass_rate") if name in needed},
            **options,
        )
        old = column("old_logp")  # later passes have moved away from what sampled
        gap = _gap(logp.detach() if old is None else old, column("rollout_logp"))
        return result._replace(metrics={**result.metrics, **gap})

    return Method(objective, unit)


def _gap(logp: Tensor, rollout_logp: Tensor | None) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's, where the engine told them."""
    if rollout_logp is None:
        return {}
    return {"sampling/logp_difference": (logp - rollout_logp).abs().nan_to_num(nan=0.0)}
