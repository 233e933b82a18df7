"""The hyperparameters of losses as flags: read off the signatures of the losses of a command."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from prefuse.kernels import policy, preference
from prefuse.kernels.policy_parts import Actions
from prefuse.kernels.preference import (
    BATCHWISE,
    hyperparameters,
    inputs,
    preference_loss,
    unpaired_loss,
)
from prefuse.kernels.preference_parts import Labelled
from prefuse.kernels.registry import ADVANTAGES, METHODS

from . import reward
from .config import DPOConfig, KTOConfig, RewardConfig
from .errors import UserError
from .objectives import EXPLORED, JUDGED, PROVIDED
from .online_config import OnlineDPOConfig, PolicyConfig, PPOConfig

OF_ROWS = frozenset({*PROVIDED, *JUDGED})
OF_SAMPLES = OF_ROWS | {EXPLORED, "prev_chosen", "prev_rejected"}


class Losses(NamedTuple):
    """What `--loss_type` of a command may be.

    check: of a chosen loss's name and hyperparameters, before the run and not inside it.
    """

    table: dict[str, Callable]
    check: Callable[[str, dict[str, Any]], None]


def losses_of(config: type) -> Losses | None:
    """Those of a configuration's command; None if it has one loss."""
    for kind in config.__mro__:
        if kind in COMMANDS:
            return COMMANDS[kind]
    return None


def names(config: type) -> set[str]:
    """Every hyperparameter that some loss of the command has."""
    losses = losses_of(config)
    table = losses.table if losses else {}
    return {name for loss in table.values() for name in hyperparameters(loss)}


def keys(config: type) -> set[str]:
    """The keys by which they are given in YAML, TRL's names among them."""
    own = names(config)
    return own | {theirs for ours, theirs in ALIASES.items() if ours in own}


def add_flags(parser: argparse.ArgumentParser, losses: Losses) -> None:
    """A flag for every hyperparameter of every loss the command may train."""
    users: dict[str, dict[Any, list[str]]] = {}
    for loss_name, loss in losses.table.items():
        for name, default in hyperparameters(loss).items():
            users.setdefault(name, {}).setdefault(default, []).append(loss_name)
    for name, defaults in users.items():
        told = (f"{value} for {', '.join(who)}" for value, who in defaults.items())
        kind = str if any(isinstance(value, str) for value in defaults) else float
        flags = [f"--{n}" for n in (name, ALIASES.get(name)) if n]
        parser.add_argument(*flags, type=kind, help="Of the loss: " + "; ".join(told) + ".")


def take(config: Any, losses: Losses, values: argparse.Namespace) -> None:
    """The chosen loss's hyperparameters, defaults filled in; any other that was given is wrong."""
    loss_type = config.loss_type
    if loss_type not in losses.table:
        hint = nearest_loss(loss_type, losses.table)
        wanted = ", ".join(losses.table)
        raise UserError(f"--loss_type: wanted one of {wanted}; got {loss_type}{hint}")
    own = hyperparameters(losses.table[loss_type])
    given = {n: getattr(values, n) for n in names(type(config))}
    given = {n: value for n, value in given.items() if value is not None}
    for name in given:
        if name not in own:
            raise UserError(
                f"--{name}: loss {loss_type!r} has no such hyperparameter; it takes "
                f"{', '.join(own)}"
            )
    config.hyperparameters.update({**own, **given})
    try:
        losses.check(loss_type, config.hyperparameters)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean ...?", by the whole name or by its beginning."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        beginning = difflib.SequenceMatcher(None, name, candidate[: len(name)]).ratio()
        return max(whole, 0.95 * beginning)

    best = max(known, key=likeness, default="")
    return f"; did you mean {prefix}{best}?" if best and likeness(best) >= 0.6 else ""


def nearest_loss(name: str, known: Iterable[str]) -> str:
    """The same for losses, of which some are known by another name: DPO's is sigmoid."""
    titles = {m.title.lower(): m.name for m in (*METHODS.values(), *ADVANTAGES.values())}
    other = titles.get(name.lower(), "")
    return f"; did you mean {other}?" if other in known else nearest(name, known)


def _check_pair_loss(
    loss_type: str, hyperparameters: dict[str, Any], provided: frozenset[str] = OF_ROWS
) -> None:
    loop = "call prefuse.kernels.preference.preference_loss in a loop of your own"
    if loss_type in BATCHWISE:
        raise UserError(
            f"--loss_type {loss_type}: it compares the pairs of the whole batch, which this "
            f"command sees a part at a time; {loop}"
        )
    needed = inputs(preference.LOSSES[loss_type])
    absent = set(needed) - provided
    if absent:
        raise UserError(
            f"--loss_type {loss_type}: it reads {', '.join(sorted(absent))} of every pair, "
            f"which the rows of this command do not have; {loop}"
        )
    preference_loss(loss_type=loss_type, **dict.fromkeys(needed, torch.ones(1)), **hyperparameters)


def _check_unpaired_loss(loss_type: str, hyperparameters: dict[str, Any]) -> None:
    one = torch.ones(1)
    needed = set(inputs(preference.UNPAIRED_LOSSES[loss_type], Labelled)) - {"logp"}
    given = {name: one > 0 if name == "label" else one for name in needed}
    unpaired_loss(one, loss_type=loss_type, **given, **hyperparameters)


def _check_policy_loss(loss_type: str, hyperparameters: dict[str, Any]) -> None:
    needed = inputs(policy.LOSSES[loss_type], Actions)
    absent = set(needed) - COLUMNS
    if absent:
        raise UserError(
            f"--loss_type {loss_type}: it reads {', '.join(sorted(absent))} of every token, which "
            "this command does not have; call prefuse.kernels.policy.policy_loss in a loop of your "
            "own"
        )
    one = torch.ones(1)
    others = {k: one for k in needed if k not in ("logp", "old_logp", "advantages", "cu_seqlens")}
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    options = dict(cu_seqlens=bounds, max_length=1.0, loss_type=loss_type)
    policy.policy_loss(one, one, one, **others, **options, **hyperparameters)


# what an online command knows of every token
COLUMNS = {"logp", "old_logp", "advantages", "rollout_logp", "reward", "pass_rate", "cu_seqlens"}
ALIASES = {"centering": "center_rewards_coefficient"}  # TRL's name
COMMANDS: dict[type, Losses] = {
    RewardConfig: Losses(reward.LOSSES, reward.check),
    DPOConfig: Losses(preference.LOSSES, _check_pair_loss),
    KTOConfig: Losses(preference.UNPAIRED_LOSSES, _check_unpaired_loss),
    PolicyConfig: Losses(policy.LOSSES, _check_policy_loss),
    PPOConfig: Losses(
        # PPO has a gamma of its own
        {k: f for k, f in policy.LOSSES.items() if "gamma" not in hyperparameters(f)},
        _check_policy_loss,
    ),
    OnlineDPOConfig: Losses(preference.LOSSES, partial(_check_pair_loss, provided=OF_SAMPLES)),
}
