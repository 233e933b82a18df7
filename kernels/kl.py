"""KL divergence from samples, and controllers of its coefficient.

k = log pi(y) - log pi_ref(y) for y drawn from pi, per token; the estimators of KL(pi || pi_ref) are
those of John Schulman, http://joschu.net/blog/kl-approx.html. As a *value* each has the KL as its
mean (k2 only nearly). As a *loss*, differentiated, they are different things:

    k1          nothing: its expected gradient is 0
    k2          the gradient of KL(pi || pi_ref), what PPO-type objectives mean
    k3          the gradient of the other direction, KL(pi_ref || pi)
    ratio_k3    R k3 with R = pi / pi_old differentiated too: that of KL(pi || pi_ref)

As a detached *reward*, k1 gives the gradient of KL(pi || pi_ref), if each token is paid for the
tokens after it as well (arXiv:2506.09477 has these facts; the tests have them by enumeration).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect

# exp of more overflows float32's gradients; a log-ratio this large weighs as much as this one
LARGEST_EXPONENT = 80.0


def k1(k: Tensor, ratio: Tensor) -> Tensor:
    """k."""
    return k


def k2(k: Tensor, ratio: Tensor) -> Tensor:
    """k^2 / 2."""
    return k**2 / 2


def k3(k: Tensor, ratio: Tensor) -> Tensor:
    """exp(-k) - 1 + k, with -k at most LARGEST_EXPONENT."""
    return _k3(k, LARGEST_EXPONENT)


def ratio_k3(k: Tensor, ratio: Tensor) -> Tensor:
    """R (exp(-k) - 1 + k): TRL's use_bias_correction_kl, from DeepSeek-V3.2, arXiv:2512.02556.

    -k + max(0, log R) is at most LARGEST_EXPONENT.
    """
    return ratio * _k3(k, LARGEST_EXPONENT - ratio.detach().log().clamp(min=0))


def _k3(k: Tensor, largest: Tensor | float) -> Tensor:
    back = -k
    return torch.expm1(torch.where(back > largest, largest, back)) + k


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    estimator.__name__: estimator for estimator in (k1, k2, k3, ratio_k3)
}


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """An estimate of KL(pi || pi_ref) per token, differentiable in logp; shapes are alike.

    On samples of pi itself: ratio_k3's R is 1, with the gradient of pi / sg(pi).
    """
    expect(kind in ESTIMATORS, "kind", f"one of {', '.join(ESTIMATORS)}", repr(kind))
    expect(ref_logp.shape == logp.shape, "ref_logp", tuple(logp.shape), tuple(ref_logp.shape))
    return ESTIMATORS[kind](logp - ref_logp.detach(), (logp - logp.detach()).exp())


def adaptive_coefficient(
    coefficient: Tensor | float, kl: Tensor | float, *, target: float, horizon: float, steps: float
) -> Tensor | float:
    """Ziegler et al., arXiv:1909.08593: coef (1 + clip(kl / target - 1, +-0.2) n / horizon).

    kl: the mean KL of a *sequence*, in nats, over the global batch.
    steps: n, how many sequences it was measured on; horizon is in sequences too.
    """
    expect(target > 0, "target", "a positive number of nats", target)
    expect(horizon > 0, "horizon", "a positive number of sequences", horizon)
    error = kl / target - 1
    error = error.clamp(-0.2, 0.2) if isinstance(error, Tensor) else min(max(error, -0.2), 0.2)
    return coefficient * (1 + error * steps / horizon)
