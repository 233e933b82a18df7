"""Weights and masks of tokens [M] for `policy_loss`: detached, pure, without a wait for the GPU.

They answer how far a token can be trusted (it was sampled by another policy than the one trained)
or how much it should be moved (its entropy, its covariance with the advantage). A statistic over
tokens is one of the tensors given: pass those of the global batch where a part must not differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import expect
from .segments import segment_spread, segment_sum
from .surrogate import exp_ratio

ROLLOUT_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def rollout_weight(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mode: str = "token_truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """Truncated importance sampling: clamp(pi_old / pi_rollout, low, high).

    By Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems". pi_old is the
    trainer's own computation and pi_rollout the engine's, of the same tokens.

    mode: "token" ratios or "sequence" ones, products over the unmasked tokens of a sequence;
        "truncate" clamps them, "mask" (arXiv:2510.18855) makes those outside [low, high] 0.
    A token whose log-prob the engine could not give (NaN) counts as a ratio of 1.
    """
    expect(mode in ROLLOUT_MODES, "mode", f"one of {', '.join(ROLLOUT_MODES)}", repr(mode))
    expect(0 <= low < high, "low", f"from 0 to below high, {high}", low)
    level, action = mode.split("_")
    log_ratio = _kept((old_logp - rollout_logp).detach().nan_to_num(nan=0.0), mask)
    if level == "sequence":
        log_ratio = _spread_sum(log_ratio, cu_seqlens)
    ratio = exp_ratio(log_ratio)
    if action == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def off_policy_mask(
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    threshold: float = 0.05,
) -> Tensor:
    """Off-policy sequence mask, DeepSeek-V3.2, arXiv:2512.02556: A >= 0 or the mean drift is small.

    False where A < 0 and mean (log pi_rollout - log pi) over the sequence is above `threshold`.
    """
    drift = _kept((rollout_logp - logp).detach().nan_to_num(nan=0.0), mask)
    count = _spread_sum(_kept(torch.ones_like(drift), mask), cu_seqlens).clamp(min=1)
    return (advantages >= 0) | (_spread_sum(drift, cu_seqlens) / count <= threshold)


def covariance(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    means: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Each token's part of cov(log pi, A), arXiv:2505.22617: (log pi - mean) (A - mean).

    means: of log pi and of A over the unmasked tokens of the global batch; of this one if None.
    """
    logp, advantages = logp.detach(), advantages.detach()
    if means is None:
        count = _kept(torch.ones_like(logp), mask).sum().clamp(min=1)
        means = _kept(logp, mask).sum() / count, _kept(advantages, mask).sum() / count
    return _kept((logp - means[0]) * (advantages - means[1]), mask)


def select_clip_cov(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov's tokens, arXiv:2505.22617: a random `fraction` of them, covariance in (low, high).

    The fraction is of all unmasked tokens, and at least one token.
    """
    fits = (covariance > low) & (covariance < high) & _all(covariance, mask)
    lot = torch.rand(covariance.shape, generator=generator, device=covariance.device)
    return fits & (_rank(lot.masked_fill(~fits, -1.0)) < _share(fraction, covariance, mask))


def select_kl_cov(
    covariance: Tensor, mask: Tensor | None = None, *, fraction: float = 2e-4
) -> Tensor:
    """KL-Cov's tokens, arXiv:2505.22617: the `fraction` with the largest covariance."""
    valid = _all(covariance, mask)
    ranks = _rank(covariance.masked_fill(~valid, float("-inf")))
    return valid & (ranks < _share(fraction, covariance, mask))


def high_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float = 0.2,
    threshold: Tensor | None = None,
) -> Tensor:
    """The `fraction` of tokens with the largest entropy, arXiv:2506.01939: the "forking" tokens.

    threshold: what counts as large; the (1 - fraction) quantile of these tokens if None. For a
        batch in parts, `masked_quantile` of all of it.
    """
    expect(0 < fraction <= 1, "fraction", "a number in (0, 1]", fraction)
    if threshold is None:
        threshold = masked_quantile(entropy, mask, 1 - fraction)
    return (entropy.detach() >= threshold) & _all(entropy, mask)


def masked_quantile(x: Tensor, mask: Tensor | None, q: float) -> Tensor:
    """The q-quantile of the unmasked x, [], between neighbours in proportion; inf if none."""
    valid = _all(x, mask)
    ordered = x.detach().masked_fill(~valid, float("inf")).sort().values
    ordered = torch.cat([ordered, ordered.new_full((1,), float("inf"))])
    place = q * (valid.sum() - 1).clamp(min=0)
    # gather, for an index that is a tensor [] would be asked for its value
    below, above = ordered.gather(0, torch.stack([place.floor(), place.ceil()]).long()).unbind()
    # of equal neighbours the difference is 0, also where both are infinite
    return below + torch.where(above > below, (place - place.floor()) * (above - below), 0.0)


def _share(fraction: float, like: Tensor, mask: Tensor | None) -> Tensor:
    expect(0 < fraction <= 1, "fraction", "a number in (0, 1]", fraction)
    return (fraction * _all(like, mask).sum()).floor().clamp(min=1)


def _rank(x: Tensor) -> Tensor:
    """0 for the largest, and so on; ties by position."""
    order = x.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(x), device=x.device))


def _all(like: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def _spread_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        raise ValueError("cu_seqlens: wanted the boundaries of the sequences; got None")
    return segment_spread(segment_sum(x, cu_seqlens), cu_seqlens, len(x))
