"""What every loss returns: per-unit values and the unit they are counted in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["token", "sequence", "pair", "group"]


class Mean(NamedTuple):
    """A metric that is averaged over something else than the units: a sum and how many it is of."""

    total: Tensor  # []
    count: Tensor  # []


class Objective(NamedTuple):
    """A loss per unit, not yet averaged: the training loop divides by the global number of units
    over ranks and accumulation steps, so that splitting a batch cannot change its gradient.

    loss: [units], differentiable.
    unit: what one entry of `loss` stands for.
    metrics: detached tensors [units], averaged at the log line, or `Mean`s.
    count: how many entries of `loss` are units, []; all if None. The others are 0.
    summed: a loss and its sum, [] and differentiable, if one pass made both.
    """

    loss: Tensor
    unit: Unit
    metrics: Mapping[str, Tensor | Mean]
    count: Tensor | None = None
    summed: tuple[Tensor, Tensor] | None = None

    def sum(self) -> Tensor:
        """The sum of `loss`."""
        if self.summed is not None and self.summed[0] is self.loss:  # nobody replaced it
            return self.summed[1]
        return self.loss.sum()

    def mean(self) -> Tensor:
        """The loss of a batch that is neither accumulated nor spread over ranks."""
        total = self.sum()
        if self.count is None:  # as a tensor, it would wait for the GPU
            return total / max(1, self.loss.numel())
        return total / self.count.clamp(min=1)
