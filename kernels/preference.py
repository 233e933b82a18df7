"""Preference losses on sequence log-probabilities, by name: of pairs, of single completions, of
lists. The four files *_losses.py beside this one have each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import informed_pair_losses, list_losses, pair_losses, unpaired_losses
from .launch import expect, has_values
from .objective import Objective
from .preference_parts import (
    BOOLEAN,
    Inputs,
    Labelled,
    Listed,
    Pair,
    hyperparameters,
    inputs,
)

__all__ = [
    "BATCHWISE",
    "LIST_LOSSES",
    "LOSSES",
    "UNPAIRED_LOSSES",
    "hyperparameters",
    "inputs",
    "list_loss",
    "preference_loss",
    "unpaired_loss",
]

BATCHWISE = informed_pair_losses.BATCHWISE
LOSSES = pair_losses.LOSSES | informed_pair_losses.LOSSES
UNPAIRED_LOSSES = unpaired_losses.LOSSES
LIST_LOSSES = list_losses.LOSSES
# read off once: torch.compile does not trace introspection
_FIELDS: dict[type[Inputs], tuple[str, ...]] = {
    kind: tuple(f.name for f in fields(kind)) for kind in (Pair, Labelled, Listed)
}
_SCALARS = ("shift", "batch_margin", "running_margin")  # one number for the batch, too
_KNOWN = {
    loss: hyperparameters(loss)
    for losses in (LOSSES, UNPAIRED_LOSSES, LIST_LOSSES)
    for loss in losses.values()
}


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    chosen_len: Tensor | None = None,
    rejected_len: Tensor | None = None,
    **others: Tensor | float,
) -> Objective:
    """A preference loss per pair.

    Args:
        chosen, rejected: log pi of the completions, summed over their tokens, [P], in nats.
        ref_chosen, ref_rejected: the same under the reference model, for losses that use it.
        loss_type: a key of LOSSES.
        chosen_len, rejected_len: scored tokens of each completion [P], for losses per token.
        others: what else the loss reads, [P], under its name in `Pair` (margin, preference, ...),
            and its hyperparameters, such as beta=0.1 and label_smoothing=0.0; its signature has
            their names and defaults.

    Returns:
        Objective: loss [P], unit "pair", metrics of the implicit rewards.

    Raises:
        ValueError: an unknown loss or hyperparameter, or a tensor that is missing or misshapen.
    """
    given = dict(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    given |= dict(chosen_len=chosen_len, rejected_len=rejected_len)
    given |= dict(chosen=chosen, rejected=rejected)
    return _call(LOSSES, loss_type, Pair, chosen, given | others)


def unpaired_loss(logp: Tensor, *, loss_type: str = "kto", **others: Tensor | float) -> Objective:
    """A loss per completion [S] from log pi, summed over its tokens, in nats.

    `others` are what the loss reads under its name in `Labelled` (ref_logp, label, shift, ...) and
    its hyperparameters; `loss_type` is a key of UNPAIRED_LOSSES. Raises as `preference_loss`.
    """
    return _call(UNPAIRED_LOSSES, loss_type, Labelled, logp, {"logp": logp, **others})


def list_loss(logp: Tensor, *, loss_type: str = "lipo", **others: Tensor | float) -> Objective:
    """A loss per prompt [G] from log pi of its K completions [G, K], summed over their tokens.

    `others` are what the loss reads under its name in `Listed` (ref_logp, reward, mask) and its
    hyperparameters; `loss_type` is a key of LIST_LOSSES. Raises as `preference_loss`.
    """
    expect(logp.dim() == 2, "logp", "[G, K], K completions of G prompts", tuple(logp.shape))
    return _call(LIST_LOSSES, loss_type, Listed, logp, {"logp": logp, **others})


def _call(
    losses: dict[str, Callable], loss_type: str, kind: type[Inputs], like: Tensor, given: dict
) -> Objective:
    """Tells tensors from hyperparameters, checks both, and calls the loss."""
    expect(loss_type in losses, "loss_type", f"one of {', '.join(losses)}", repr(loss_type))
    loss = losses[loss_type]
    known = _KNOWN[loss]
    tensors: dict[str, Any] = {name: given.pop(name) for name in _FIELDS[kind] if name in given}
    for name, value in given.items():
        expect(name in known, name, f"a hyperparameter of {loss_type}: {', '.join(known)}", name)
        if name in ("beta", "eta"):
            expect(value > 0, name, "a positive number", value)
    for name, value in tensors.items():
        scalar = name in _SCALARS and isinstance(value, Tensor) and value.dim() == 0
        if value is not None and not scalar:
            expect(value.shape == like.shape, name, tuple(like.shape), tuple(value.shape))
        if value is not None:
            _check_values(name, value)
    return loss(kind(**tensors), **given)


def _check_values(name: str, value: Tensor) -> None:
    """What a wrong dtype or range would turn into another loss; ranges on a CPU only."""
    if name in BOOLEAN:
        remedy = f"Pass `{name} > 0`" if name == "label" else ""
        expect(value.dtype == torch.bool, name, "a bool tensor", value.dtype, remedy)
    if name == "preference" and has_values(value) and value.device.type == "cpu":
        inside = bool(((value >= 0) & (value <= 1)).all())
        got = "" if inside else f"{value.amin():.4g} to {value.amax():.4g}"
        expect(inside, name, "probabilities in [0, 1]", got)
