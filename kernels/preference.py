"""Preference losses on sequence log-probabilities, in the notation of DPO (arXiv:2305.18290).

rho(y) = log pi(y) - log pi_ref(y), summed over the completion's tokens; delta = rho(w) - rho(l) for
a pair of a chosen w and a rejected l. A loss is one function of a `Pair` with its hyperparameters
as keyword arguments, and one line in LOSSES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import expect
from .objective import Objective


class Pair(NamedTuple):
    """Sequence log-probabilities [P] of both completions, and their lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """rho(w), rho(l): sums over the completion."""
        return self.chosen - self._need("ref_chosen"), self.rejected - self._need("ref_rejected")

    def mean_log_ratios(self) -> tuple[Tensor, Tensor]:
        """rho(w) and rho(l) per token."""
        chosen, rejected = self.log_ratios()
        return chosen / self._need("chosen_len"), rejected / self._need("rejected_len")

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """log pi per token."""
        return self.chosen / self._need("chosen_len"), self.rejected / self._need("rejected_len")

    def _need(self, name: str) -> Tensor:
        value = getattr(self, name)
        expect(value is not None, name, "a tensor [P], which this loss uses", None)
        return value


def sigmoid(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO, arXiv:2305.18290: -log sigmoid(beta delta); cDPO with label smoothing."""
    chosen, rejected = pair.log_ratios()
    loss = _smoothed(_logistic, beta * (chosen - rejected), label_smoothing)
    return _objective(loss, beta * chosen, beta * rejected)


def hinge(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """RSO's hinge, arXiv:2309.06657: max(0, 1 - beta delta)."""
    chosen, rejected = pair.log_ratios()
    loss = _smoothed(lambda z: F.relu(1 - z), beta * (chosen - rejected), label_smoothing)
    return _objective(loss, beta * chosen, beta * rejected)


def ipo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """IPO, arXiv:2310.12036 eq. 17, on log-ratios per token: (delta - 1 / (2 beta))^2.

    beta is the paper's tau. Means, as in TRL and as the authors confirmed there; the equation as
    printed has sums, for which tau would depend on the length.
    """
    chosen, rejected = pair.mean_log_ratios()
    target = 1 / (2 * beta)
    loss = _smoothed(lambda delta: (delta - target) ** 2, chosen - rejected, label_smoothing)
    return _objective(loss, beta * chosen, beta * rejected)


def simpo(
    pair: Pair, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Objective:
    """SimPO, arXiv:2405.14734: -log sigmoid(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma).

    No reference model.
    """
    chosen, rejected = pair.mean_logps()
    loss = _smoothed(_logistic, beta * (chosen - rejected) - gamma, label_smoothing)
    return _objective(loss, beta * chosen, beta * rejected)


def _logistic(z: Tensor) -> Tensor:
    return -F.logsigmoid(z)


def _smoothed(link: Callable[[Tensor], Tensor], z: Tensor, label_smoothing: float) -> Tensor:
    """(1 - e) link(z) + e link(-z), for labels that are wrong with probability e (cDPO,
    https://ericmitchell.ai/cdpo.pdf)."""
    expect(0 <= label_smoothing <= 1, "label_smoothing", "a probability", label_smoothing)
    if label_smoothing == 0:
        return link(z)
    return (1 - label_smoothing) * link(z) + label_smoothing * link(-z)


def _objective(loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor) -> Objective:
    """The loss with the implicit rewards every preference loss reports; a tie counts half."""
    chosen, rejected = chosen_reward.detach(), rejected_reward.detach()
    wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": wins,
        "rewards/margins": chosen - rejected,
    }
    return Objective(loss, "pair", metrics)


LOSSES: dict[str, Callable[..., Objective]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
}


def hyperparameters(loss: Callable) -> dict[str, float]:
    """A loss's own hyperparameters and their defaults, read off its signature."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def uses_reference(loss: Callable) -> bool:
    """Whether the loss reads pi_ref, found by calling it without one."""
    one = torch.ones(1)
    try:
        loss(Pair(one, one, chosen_len=one, rejected_len=one))
    except ValueError:
        return True
    return False


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    chosen_len: Tensor | None = None,
    rejected_len: Tensor | None = None,
    **hyperparameter: float,
) -> Objective:
    """A preference loss per pair.

    Args:
        chosen, rejected: log pi of the completions, summed over their tokens, [P], in nats.
        ref_chosen, ref_rejected: the same under the reference model, for losses that use it.
        loss_type: a key of LOSSES.
        chosen_len, rejected_len: scored tokens of each completion [P], for losses per token.
        hyperparameter: the loss's own, such as beta=0.1 and label_smoothing=0.0; its signature
            has their names and defaults.

    Returns:
        Objective: loss [P], unit "pair", metrics of the implicit rewards.

    Raises:
        ValueError: an unknown loss or hyperparameter, or a tensor that is missing or misshapen.
    """
    expect(loss_type in LOSSES, "loss_type", f"one of {', '.join(LOSSES)}", repr(loss_type))
    loss = LOSSES[loss_type]
    known = hyperparameters(loss)
    for name in hyperparameter:
        expect(name in known, name, f"a hyperparameter of {loss_type}: {', '.join(known)}", name)
    pair = Pair(chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len)
    for name, value in pair._asdict().items():
        if value is not None:
            expect(value.shape == chosen.shape, name, tuple(chosen.shape), tuple(value.shape))
    return loss(pair, **hyperparameter)
