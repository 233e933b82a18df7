"""Preference losses on sequence log-probabilities, by name; pair_losses.py has each of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import expect
from .objective import Objective
from .pair_losses import LOSSES
from .pairs import Pair, hyperparameters, inputs

__all__ = ["LOSSES", "Pair", "hyperparameters", "inputs", "preference_loss"]


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
    expect(loss_type in LOSSES, "loss_type", f"one of {', '.join(LOSSES)}", repr(loss_type))
    loss = LOSSES[loss_type]
    known = hyperparameters(loss)
    given: dict[str, Any] = dict(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    given |= dict(chosen_len=chosen_len, rejected_len=rejected_len)
    given |= {name: others.pop(name) for name in Pair._fields if name in others}
    for name, value in others.items():
        expect(name in known, name, f"a hyperparameter of {loss_type}: {', '.join(known)}", name)
        if name in ("beta", "eta"):
            expect(bool(value > 0), name, "a positive number", value)
    pair = Pair(chosen, rejected, **given)
    for name, value in pair._asdict().items():
        if value is not None:
            expect(value.shape == chosen.shape, name, tuple(chosen.shape), tuple(value.shape))
    return loss(pair, **others)
