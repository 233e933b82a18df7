"""Whitening with statistics of more than one batch.

[count, sum, sum of squares] of the values in float64 are all that whitening needs, and they add
up: over micro-batches by +, over ranks by an all-reduce. So whitening parts with the summed
statistics is whitening the whole. Functions that whiten take `reduce`, which is given the local
statistics and returns those of all ranks.

A spread below 1e-6 of the root mean square is rounding, not signal: its variance counts as 0, and
deviations from the mean as 0, so no noise is divided by an epsilon.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect

Reduce = Callable[[Tensor], Tensor]  # statistics of this rank -> statistics of all

ROUNDING = 1e-12  # of the mean square: a smaller variance counts as 0


def whitening_statistics(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """[count, sum, sum of squares] of x where mask is True, float64, to be added over batches.

    mask: as x, bool; or numbers, how many times each value counts (a completion's length). What
    counts 0 times is not read: it may be NaN.
    """
    _check(x, mask)
    exact = x.detach().double()
    weight = torch.ones_like(exact) if mask is None else mask.detach().double()
    exact = torch.where(weight != 0, exact, 0.0)
    return torch.stack([weight.sum(), (weight * exact).sum(), (weight * exact**2).sum()])


def mean_and_variance(statistics: Tensor, ddof: int = 1) -> tuple[Tensor, Tensor]:
    """Of [count, sum, sum of squares]; the variance is 0 if there are no more values than ddof."""
    count, total, squares = statistics.unbind()
    mean, mean_square = total / count.clamp(min=1), squares / count.clamp(min=1)
    variance = mean_square - mean**2
    variance = torch.where(variance > ROUNDING * mean_square, variance, 0.0)
    variance = variance * count / (count - ddof).clamp(min=1)
    return mean, torch.where(count > ddof, variance, 0.0)


def whiten(
    x: Tensor,
    statistics: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    epsilon: float = 1e-8,
    reduce: Reduce | None = None,
) -> Tensor:
    """Whitening, arXiv:2005.12729: (x - mean) / sqrt(var + epsilon), + mean if not shift_mean.

    Detached, of x's shape, float32 (float64 for float64); 0 where mask is False. Reward whitening
    of arXiv:2403.17031 does not shift the mean; advantages do.

    Args:
        statistics: [3], of `whitening_statistics`, summed over whatever the batch is; those of x
            and mask if None.
        ddof: 1, as torch.var and verl have it, or 0.
        epsilon: beside the variance, as in verl; beside nothing where the variance is 0.
        reduce: applied to the statistics of x if `statistics` is None.
    """
    _check(x, mask)
    if statistics is None:
        statistics = whitening_statistics(x, mask)
        statistics = statistics if reduce is None else reduce(statistics)
    expect(statistics.shape == (3,), "statistics", "shape (3,)", tuple(statistics.shape))
    mean, variance = mean_and_variance(statistics, ddof)
    scale = torch.where(variance > 0, (variance + epsilon).rsqrt(), 0.0)
    white = (x.detach().double() - mean) * scale
    white = white if shift_mean else white + mean
    white = white if mask is None else torch.where(mask != 0, white, 0.0)
    return white.to(x.dtype if x.dtype == torch.float64 else torch.float32)


def moving_mean(mean: Tensor | float, statistics: Tensor, *, decay: float = 0.9) -> Tensor:
    """A moving average, []: decay mean + (1 - decay) mean of the statistics; `mean` if count is 0.

    For a baseline of REINFORCE or a mean cost; float64, as the statistics are.
    """
    expect(0 <= decay < 1, "decay", "a number in [0, 1)", decay)
    moved = decay * mean + (1 - decay) * mean_and_variance(statistics)[0]
    return torch.where(statistics[0] > 0, moved, mean)


def _check(x: Tensor, mask: Tensor | None) -> None:
    expect(x.is_floating_point(), "x", "a floating-point tensor", x.dtype)
    if mask is not None:
        expect(mask.shape == x.shape, "mask", f"shape {tuple(x.shape)}", tuple(mask.shape))
        expect(mask.device == x.device, "mask", f"a tensor on {x.device}", mask.device)
