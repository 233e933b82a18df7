"""Losses of a critic: values V of tokens against returns G, each [M] and per token.

Tokens that `mask` leaves out have loss 0, no gradient and no part in the count; G is detached. The
terms carry the half of PPO's implementations: value_loss_coef is theirs to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import expect, has_values
from .objective import Mean, Objective


def value_mse(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Objective:
    """Squared error: (V - G)^2 / 2."""
    values, returns, mask = _checked(values, returns, mask)
    return _objective((values - returns) ** 2 / 2, values, returns, mask)


def value_clipped(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float = 0.2,
) -> Objective:
    """PPO's clipped value loss, arXiv:2005.12729: max((V - G)^2, (C - G)^2) / 2.

    C = V_old + clamp(V - V_old, -cliprange, cliprange); old_values are those the step began with.
    """
    values, returns, mask = _checked(values, returns, mask)
    expect(cliprange > 0, "cliprange", "a positive number", cliprange)
    expect(
        old_values.shape == values.shape, "old_values", tuple(values.shape), tuple(old_values.shape)
    )
    old = torch.where(mask, old_values.detach(), 0.0)
    clipped = old + (values - old).clamp(-cliprange, cliprange)
    plain, held = (values - returns) ** 2, (clipped - returns) ** 2
    share = {"clip_ratio/value": Mean((held > plain).detach().sum(), mask.sum())}
    return _objective(torch.maximum(plain, held) / 2, values, returns, mask, share)


def value_huber(
    values: Tensor, returns: Tensor, mask: Tensor | None = None, *, delta: float = 1.0
) -> Objective:
    """Huber's loss, Huber 1964: (V - G)^2 / 2 up to |V - G| = delta, then straight."""
    expect(delta > 0, "delta", "a positive number", delta)
    values, returns, mask = _checked(values, returns, mask)
    loss = F.huber_loss(values, returns, reduction="none", delta=delta)
    return _objective(loss, values, returns, mask)


def value_hl_gauss(
    logits: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    low: float = -1.0,
    high: float = 1.0,
    sigma_bins: float = 0.75,
) -> Objective:
    """HL-Gauss, arXiv:2403.03950: -sum_b p_b log softmax(logits)_b, p the mass of N(G, sigma) in b.

    logits: [M, B] of B equal bins from low to high; sigma is sigma_bins of a bin's width. A return
    outside [low, high] is an error on a CPU; on a GPU, where nobody looks, it counts as the end.
    """
    expect(logits.dim() == 2 and logits.shape[1] > 1, "logits", "[M, B]", tuple(logits.shape))
    expect(low < high, "low", f"less than high, {high}", low)
    expect(sigma_bins > 0, "sigma_bins", "a positive number", sigma_bins)
    edges = torch.linspace(low, high, logits.shape[1] + 1, device=logits.device)
    centres = (edges[1:] + edges[:-1]) / 2
    if mask is not None:
        logits = torch.where(mask[:, None], logits, 0.0)
    log_p = logits.log_softmax(1)
    values = (log_p.exp() * centres.to(log_p.dtype)).sum(1)
    _, returns, mask = _checked(values, returns, mask)
    if has_values(returns) and returns.device.type == "cpu":
        inside = ~mask | ((returns >= low) & (returns <= high))
        got = f"{returns.amin():.4g} to {returns.amax():.4g}" if len(returns) else ""
        expect(bool(inside.all()), "returns", f"numbers from low to high, {low} to {high}", got)
    sigma = sigma_bins * (high - low) / logits.shape[1]
    centred = (edges.to(log_p.dtype) - returns.clamp(low, high)[:, None]) / (sigma * math.sqrt(2))
    mass = torch.erf(centred).diff(dim=1)
    target = mass / mass.sum(1, keepdim=True)
    return _objective(-(target * log_p).sum(1), values, returns, mask)


def value_of_bins(logits: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The value that `value_hl_gauss` trains, [M]: the mean of the bins' centres."""
    edges = torch.linspace(low, high, logits.shape[1] + 1, device=logits.device)
    return (logits.softmax(1) * ((edges[1:] + edges[:-1]) / 2).to(logits.dtype)).sum(1)


def _checked(values: Tensor, returns: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 or better, and 0 where the mask is False, whatever stands there."""
    expect(returns.shape == values.shape, "returns", tuple(values.shape), tuple(returns.shape))
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    expect(mask.dtype == torch.bool, "mask", "a bool tensor", mask.dtype)
    expect(mask.shape == values.shape, "mask", tuple(values.shape), tuple(mask.shape))
    values = values if values.dtype == torch.float64 else values.float()
    returns = returns.detach().to(values.dtype)
    return torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0), mask


def _objective(
    loss: Tensor, values: Tensor, returns: Tensor, mask: Tensor, more: Mapping[str, Mean] = {}
) -> Objective:
    count = mask.sum()
    error = torch.where(mask, (values - returns).detach(), 0.0)
    metrics = {
        "values/mean": Mean(values.detach().sum(), count),
        "values/squared_error": Mean((error**2).sum(), count),
        **more,
    }
    return Objective(torch.where(mask, loss, 0.0), "token", metrics, count)


_ALL = (value_mse, value_clipped, value_huber, value_hl_gauss)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
