"""What every loss returns: per-unit values and the unit they are counted in."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["token", "sequence", "pair", "group"]


class Objective(NamedTuple):
    """A loss per unit, not yet averaged: the training loop divides by the global number of units
    over ranks and accumulation steps, so that splitting a batch cannot change its gradient.

    loss: [units], differentiable.
    unit: what one entry of `loss` stands for.
    metrics: detached tensors [units], averaged at the log line.
    """

    loss: Tensor
    unit: Unit
    metrics: dict[str, Tensor]
