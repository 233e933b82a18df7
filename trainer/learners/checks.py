"""Whether a configuration's learner can do what it asks, and whether it reads a reference."""

from __future__ import annotations

from .. import objectives
from ..errors import UserError
from ..loss_flags import nearest
from ..online_config import NashMDConfig, OnlineConfig, OnlineDPOConfig, PolicyConfig, PPOConfig
from .advantages import COMPARE, ESTIMATORS, NEED_GROUPS

ONE_STREAM = {"gdpo", "spo", "remax", "nash", "pass_at_k"}  # estimators of rewards alone


def needs_reference(config: OnlineConfig) -> bool:
    if isinstance(config, PolicyConfig):
        return config.beta != 0
    if isinstance(config, OnlineDPOConfig):
        return objectives.needs_reference(config.loss_type) and not config.reanchor
    return False


def check(config: OnlineConfig) -> None:
    """What the configuration's own checks cannot know."""
    _check_preference(config)
    _check_combination(config)
    if config.sync_ref_model and not needs_reference(config):
        raise UserError("--sync_ref_model: wanted a run with a reference model; this one has none")
    if isinstance(config, PolicyConfig) and not isinstance(config, PPOConfig):
        _check_policy(config)
    if isinstance(config, OnlineDPOConfig):
        _check_pairs(config)


def _check_preference(config: OnlineConfig) -> None:
    if config.preference_func is None:
        return
    each, mixed = config.num_generations, isinstance(config, NashMDConfig)
    if each < 2 and not mixed:
        raise UserError(
            "--num_generations: wanted 2 or more, for a preference function compares the "
            f"completions of a prompt; got {each}"
        )
    if isinstance(config, PolicyConfig) and config.replay_success is not None:
        raise UserError(
            "--replay_success: wanted rewards alone; a preference function compares what is "
            "sampled together. Leave one of them out"
        )
    judged = config.reward_funcs or config.environment is not None
    if judged and not config.win_rates and not _reads_wins(config):
        raise UserError(
            "--preference_func: nothing reads it beside rewards here; pass --win_rates to learn "
            "from it, or leave one of them out"
        )
    if not judged and (config.eval_strategy != "no" or config.eval_on_start):
        raise UserError(
            "--eval_strategy: wanted no, or a --reward_funcs to evaluate by: a policy's "
            "completions beat each other half of the time, whatever it has learnt"
        )


def _check_combination(config: OnlineConfig) -> None:
    """A z-score is among completions of one prompt, sampled alike."""
    if config.reward_combination != "normalized_sum":
        return
    if config.num_generations < 2:
        raise UserError(
            "--reward_combination: wanted sum or min with one completion a prompt, for its z-score "
            "is 0 whatever it is; got normalized_sum. Or pass --num_generations 2 or more"
        )
    remax = isinstance(config, PolicyConfig) and config.advantage == "remax"
    egpo = isinstance(config, OnlineDPOConfig) and config.loss_type == "egpo"
    if remax or egpo or isinstance(config, NashMDConfig):
        raise UserError(
            "--reward_combination: wanted sum or min, for rewards are compared with those of other "
            "completions, which would have z-scores of their own; got normalized_sum"
        )


def _reads_wins(config: OnlineConfig) -> bool:
    if isinstance(config, OnlineDPOConfig):
        read = objectives.judged_columns(config.loss_type)
        return config.loss_type in ("xpo", "egpo") or "preference" in read
    return isinstance(config, PolicyConfig) and config.advantage in COMPARE


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
    if name == "remax" and (config.win_rates or config.preference_func):
        raise UserError(
            "--advantage: remax takes off the reward of the greedy completion, and win rates have "
            "none; wanted another, as rloo or spo"
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
