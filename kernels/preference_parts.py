"""What preference losses are made of: what they read, links, soft targets.

The files *_losses.py beside it have the losses and their notation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import expect
from .objective import Objective


@dataclass(frozen=True)
class Inputs:
    """What a family of losses may read; a loss asks for what it does read by `need`."""

    def need(self, name: str) -> Tensor:
        value = getattr(self, name)
        expect(value is not None, name, "a tensor, which this loss uses", None)
        return value

    def optional(self, name: str) -> Tensor | None:
        """What a loss can do without: it is no input in the sense of `inputs`."""
        return getattr(self, name)


@dataclass(frozen=True)
class Pair(Inputs):
    """Numbers per pair [P]. Log-probabilities are sums over the completion's tokens, in nats."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_len: Tensor | None = None  # scored tokens
    rejected_len: Tensor | None = None
    margin: Tensor | None = None  # how much better w is, in the units of a reward
    preference: Tensor | None = None  # probability in [0, 1] that w is preferred
    prev_chosen: Tensor | None = None  # log-probs under the policy of the round before
    prev_rejected: Tensor | None = None
    chosen_kl: Tensor | None = None  # sum_t KL(pi_ref || pi) over the vocabulary
    rejected_kl: Tensor | None = None
    chosen_weight: Tensor | None = None  # mean_t (log pi - log sum_v p_v^2)
    rejected_weight: Tensor | None = None
    gold: Tensor | None = None  # log pi of a third completion, a demonstration
    gold_len: Tensor | None = None
    explored: Tensor | None = None  # log pi of a completion that pi_ref sampled
    batch_margin: Tensor | None = None  # mean of beta delta over the global batch, [P] or []
    running_margin: Tensor | None = None  # its moving average
    matched: Tensor | None = None  # the reference's l(w) - l(l) of the policy's rank

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """rho(w), rho(l)."""
        return self.chosen - self.need("ref_chosen"), self.rejected - self.need("ref_rejected")

    def mean_log_ratios(self) -> tuple[Tensor, Tensor]:
        """rho(w) / |w|, rho(l) / |l|."""
        chosen, rejected = self.log_ratios()
        return chosen / self.need("chosen_len"), rejected / self.need("rejected_len")

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """l(w) / |w|, l(l) / |l|."""
        return self.chosen / self.need("chosen_len"), self.rejected / self.need("rejected_len")

    def mean_nll(self) -> Tensor:
        """-l(w) / |w|."""
        return -self.chosen / self.need("chosen_len")


@dataclass(frozen=True)
class Labelled(Inputs):
    """Numbers per completion [S], each judged for itself."""

    logp: Tensor  # summed over its tokens, in nats
    ref_logp: Tensor | None = None
    label: Tensor | None = None  # bool: desirable
    shift: Tensor | None = None  # of the rewards, [S] or []: detached, from the global batch
    reward: Tensor | None = None
    value: Tensor | None = None  # of the prompt, by a critic

    def log_ratio(self) -> Tensor:
        """rho."""
        return self.logp - self.need("ref_logp")


@dataclass(frozen=True)
class Listed(Inputs):
    """Numbers per completion [G, K]: G prompts with up to K completions each."""

    logp: Tensor  # summed over its tokens, in nats
    ref_logp: Tensor | None = None
    reward: Tensor | None = None
    mask: Tensor | None = None  # bool: there is such a completion; all if None

    def log_ratio(self) -> Tensor:
        """rho."""
        return self.logp - self.need("ref_logp")

    def valid(self) -> Tensor:
        mask = self.optional("mask")
        return torch.ones_like(self.logp, dtype=torch.bool) if mask is None else mask


def logistic(z: Tensor) -> Tensor:
    """h(z) = -log sigmoid(z)."""
    return -F.logsigmoid(z)


def smoothed(link: Callable[[Tensor], Tensor], z: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) link(z) + e link(-z), for labels that are wrong with probability e (cDPO,
    https://ericmitchell.ai/cdpo.pdf)."""
    expect(0 <= label_smoothing <= 1, "label_smoothing", "a probability", label_smoothing)
    if label_smoothing == 0:
        return link(z)
    return (1 - label_smoothing) * link(z) + label_smoothing * link(-z)


def soft(z: Tensor, preference: Tensor) -> Tensor:
    """p h(z) + (1 - p) h(-z): least at z = logit p."""
    return preference * logistic(z) + (1 - preference) * logistic(-z)


def objective(loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor) -> Objective:
    """The loss with the implicit rewards every pair loss reports; a tie counts half."""
    chosen, rejected = chosen_reward.detach(), rejected_reward.detach()
    wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": wins,
        "rewards/margins": chosen - rejected,
    }
    return Objective(loss, "pair", metrics)


BOOLEAN = ("label", "mask", "off_policy", "selected")
BOUNDARIES = ("cu_seqlens", "steps")


def hyperparameters(loss: Callable) -> dict[str, float]:
    """A loss's own hyperparameters and their defaults, read off its signature."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def inputs(loss: Callable, kind: type[Inputs] = Pair) -> tuple[str, ...]:
    """The fields of `kind` that a loss cannot do without."""
    return probe(loss, kind)[0]


def probe(loss: Callable, kind: type[Inputs]) -> tuple[tuple[str, ...], Any]:
    """The fields of `kind` that a loss reads, found by calling it on ones, and what it returned."""
    names = [f.name for f in fields(kind) if "Tensor" in str(f.type)]
    one = torch.ones((1, 1) if kind is Listed else (1,))
    given = dict.fromkeys(names, one)
    given |= {name: one.bool() for name in BOOLEAN if name in given}
    given |= {name: torch.tensor([0, 1]).int() for name in BOUNDARIES if name in given}
    asked: set[str] = set()

    def remembered(self, name: str):
        if name in names:
            asked.add(name)
        return object.__getattribute__(self, name)

    bare = {"__getattribute__": remembered, "optional": lambda self, name: None}
    recorder = type("Recorder", (kind,), bare)
    result = loss(recorder(**given))
    return tuple(name for name in names if name in asked), result
