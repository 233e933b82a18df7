"""PPO: a critic beside the policy, trained together, and advantages by GAE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels.advantage import ShapedGae, length_adaptive_lam, shaped_gae
from prefuse.kernels.credit import (
    at_ends,
    lagrangian,
    ngram_steps,
    perplexity_steps,
    step_values,
)
from prefuse.kernels.objective import Objective
from prefuse.kernels.segments import segment_sum
from prefuse.kernels.value_losses import value_clipped
from prefuse.kernels.whitening import Reduce, whiten, whitening_statistics

from ..batch import PackedBatch
from ..critic import ActorCritic
from ..data import Example
from ..environments import turn_rewards
from ..errors import UserError
from ..experience import Window
from ..objectives import Method
from ..online_config import PPOConfig
from .controls import Controls
from .learner import Learner
from .policy import policy_method, select


def ppo(config: PPOConfig, policy: Method, controls: Controls, reduce: Reduce) -> Learner:
    """GAE of rewards less the KL at every token, whitened over the window.

    What a reward gives to tokens is paid there, the rest of it at the last. Of costs too, by a
    critic of their own: the advantages are mixed by Safe RLHF's multiplier.
    """
    scores = ("old_logp", *(("ref_logp",) if config.beta else ()), "values")
    scores += ("cost_values",) if config.cost_funcs else ()

    def batches(window: Window, iteration: int) -> list[list[Example]]:
        if iteration:
            return window.micro_batches()
        tokens = torch.from_numpy(np.concatenate([np.zeros(0), *window.paid()]))
        found = _gae(config, window, window.rewards, tokens, "values", controls.beta)
        window.set("returns", found.returns)
        mixed, statistics, judged = found.advantages, found.statistics, _judged(window)
        if window.costs is not None:
            none = torch.zeros_like(tokens)
            costs = _gae(config, window, window.costs, none, "cost_values", -controls.beta)
            window.set("cost_returns", costs.returns)
            mixed = lagrangian(mixed, costs.advantages, controls.log_multiplier)
        if window.costs is not None or not judged.all():
            statistics = whitening_statistics(mixed, judged)
        white = whiten(mixed, reduce(statistics), judged)
        warm = window.number >= config.critic_warmup_windows
        window.set("advantages", white if warm else torch.zeros_like(white))
        select(window, config)
        return window.micro_batches()

    def objective(both: ActorCritic, batch: PackedBatch) -> Objective:
        result = policy.objective(both.actor, batch)
        loss, metrics = result.loss, dict(result.metrics)
        for critic, kind in ((both.critic, ""), (both.cost_critic, "cost_")):
            if critic is None:
                continue
            values = critic(batch)
            nothing = values.detach()
            returns, old = (
                batch.columns[name] if name in batch.columns else nothing
                for name in (f"{kind}returns", f"{kind}values")
            )
            value = value_clipped(values, returns, old, cliprange=config.cliprange_value)
            loss = loss + config.vf_coef * value.loss
            told = {**value.metrics, "value_loss": value.loss.detach()}
            metrics |= {f"{kind}{name}": number for name, number in told.items()}
        return result._replace(loss=loss, metrics=metrics)

    return Learner(policy._replace(objective=objective), scores, batches)


def _judged(window: Window) -> Tensor:
    """bool [M]: tokens of completions with a reward, and a cost where there are any."""
    costs = 0.0 if window.costs is None else window.costs
    lengths = window.cu_seqlens.diff().long()
    return torch.repeat_interleave(~(window.rewards + costs).isnan(), lengths)


def _gae(
    config: PPOConfig, window: Window, rewards: Tensor, tokens: Tensor, critic: str, kl_coef: float
) -> ShapedGae:
    """Of one stream of rewards, by its critic's values; tokens: what is given to tokens of it."""
    values, bounds = window.column(critic), window.cu_seqlens
    logps = (window.column("old_logp"), window.column("ref_logp")) if config.beta else ()
    rest = rewards.double() - segment_sum(tokens, bounds)
    placed = tokens + at_ends(rest.nan_to_num(nan=0.0), bounds, len(values))
    steps, lam = _steps(config, window), config.lam
    if config.macro_actions != "none" and steps is not None:
        values = step_values(values, steps, how=config.macro_value)
    if config.lam_alpha is not None:
        first = None if steps is None else _starts(steps, len(values))
        lam = length_adaptive_lam(bounds, first, alpha=config.lam_alpha)
    return shaped_gae(
        placed.to(values.dtype),
        values,
        bounds,
        *logps,
        steps=steps,
        kl_coef=kl_coef,
        gamma=config.gamma,
        lam=lam,
        critic_lam=config.critic_lam,
        impl="reference" if values.dtype == torch.float64 else "auto",  # which keeps float64
    )


def _steps(config: PPOConfig, window: Window) -> Tensor | None:
    """What an action is, where it is more than a token: turns, or macro actions inside of them."""
    episodes, bounds = window.episodes, window.cu_seqlens
    turns = bounds if episodes is None else torch.from_numpy(turn_rewards(episodes)[1])
    if config.turn_values:
        return turns
    if config.macro_actions == "ngram":
        return ngram_steps(turns, int(bounds[-1]), size=config.macro_size)
    if config.macro_actions == "perplexity":
        return perplexity_steps(window.column("ref_logp" if config.beta else "old_logp"), turns)
    return None


def _starts(steps: Tensor, total: int) -> Tensor:
    starts = torch.zeros(total, dtype=torch.bool)
    starts[steps[:-1][steps.diff() > 0].long()] = True
    return starts


def ppo_method(config: PPOConfig, controls: Controls) -> Method:
    """The policy's part; the critic's is counted in tokens too."""
    method = policy_method(config, controls)
    if method.unit != "token":
        raise UserError(
            f"--loss_type {config.loss_type}: it averages over sequences, and the critic's loss "
            "over tokens; pass one that averages over tokens, such as ppo"
        )
    return method
