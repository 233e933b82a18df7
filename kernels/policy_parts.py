"""What policy losses read and what they return; policy_losses.py has the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .advantage import discounted_returns
from .preference_parts import Inputs
from .segments import segment_spread, segment_sum
from .surrogate import Rule


@dataclass(frozen=True)
class Actions(Inputs):
    """Numbers per token [M] of packed sequences, whose boundaries are cu_seqlens [S+1]."""

    logp: Tensor
    old_logp: Tensor  # of the policy that the step began with, at the sampling temperature
    advantages: Tensor | None = None  # detached
    mask: Tensor | None = None  # bool: the policy's own tokens; all if None
    cu_seqlens: Tensor | None = None
    steps: Tensor | None = None  # int32 boundaries over which ratios are means; else cu_seqlens
    rollout_logp: Tensor | None = None  # of the engine that sampled, as it saw them; NaN if unknown
    reward: Tensor | None = None  # of the token's sequence: 1 correct, 0 wrong
    pass_rate: Tensor | None = None  # mean reward of the prompt's completions
    off_policy: Tensor | None = None  # bool: tokens of a demonstration or another policy
    selected: Tensor | None = None  # bool: tokens that policy_weights.py picked
    teacher_logp: Tensor | None = None
    impl: str = "auto"

    def log_ratio(self) -> Tensor:
        """log R = log pi - log pi_old, 0 where the mask is False."""
        return self.kept(self.logp - self.old_logp)

    def known(self, rollout_logp: Tensor) -> Tensor:
        """rollout_logp, and log pi_old where the engine gave none: a ratio of 1."""
        return torch.where(rollout_logp.isnan(), self.old_logp, rollout_logp)

    def kept(self, x: Tensor) -> Tensor:
        """x, and 0 at masked tokens."""
        mask = self.optional("mask")
        return x if mask is None else torch.where(mask, x, 0.0)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x, which is `kept`, over each token's sequence or step, at every token."""
        return self._spread(self._total(x), len(x))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x, which is `kept`, over the unmasked tokens of a sequence or step."""
        count = self._bounds().diff()
        mask = self.optional("mask")
        if mask is not None:
            count = self._total(mask.to(x.dtype))
        return self._spread(self._total(x) / count.clamp(min=1), len(x))

    def before(self, x: Tensor) -> Tensor:
        """The sum of x, which is `kept`, over the tokens before each one in its sequence; detached.

        torch.cumsum would add up in another order in each run on a GPU.
        """
        impl = "reference" if x.dtype == torch.float64 else self.impl
        return self.sum(x).detach() - discounted_returns(x, self._bounds(), impl=impl)

    def _bounds(self) -> Tensor:
        steps = self.optional("steps")
        return self.need("cu_seqlens") if steps is None else steps

    def _total(self, x: Tensor) -> Tensor:
        return segment_sum(x, self._bounds(), impl=self.impl)

    def _spread(self, totals: Tensor, tokens: int) -> Tensor:
        return segment_spread(totals, self._bounds(), tokens, impl=self.impl)


class Surrogate(NamedTuple):
    """A policy loss: a rule of surrogate.py (or one like them), with its bounds, on R.

    aggregation: how its authors average it, one of policy.AGGREGATIONS.
    log_ratio: of what a token belongs to, [M], if R is not the token's own.
    weight: detached, [M], on the loss but not on the KL penalty.
    advantages: in place of those given.
    corrects_rollout: it has an answer of its own to a rollout policy that is not pi_old.
    """

    rule: Rule
    low: float = 0.0
    high: float = float("inf")
    cap: float = float("inf")
    aggregation: str = "token-mean"
    log_ratio: Tensor | None = None
    weight: Tensor | None = None
    advantages: Tensor | None = None
    corrects_rollout: bool = False
