"""What losses of reward models are made of: precision, shapes, labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import expect, has_values
from .objective import Mean
from .preference_parts import logistic, smoothed, soft

ABSENT = -1e30  # a score whose exp is 0, and finite: 0 * ABSENT is 0


def full(x: Tensor) -> Tensor:
    """x in float32; float64 stays. Differences of bfloat16 rewards would lose the margin."""
    return x if x.dtype == torch.float64 else x.float()


def check_shape(name: str, value: Tensor, wanted: tuple[int, ...], remedy: str = "") -> None:
    expect(tuple(value.shape) == tuple(wanted), name, tuple(wanted), tuple(value.shape), remedy)


def check_bool(name: str, value: Tensor) -> None:
    expect(value.dtype == torch.bool, name, "a bool tensor", value.dtype, f"Pass `{name} > 0`")


def check_pair(chosen: Tensor, rejected: Tensor) -> None:
    expect(chosen.dim() == 1, "chosen", "[P], one number per pair", tuple(chosen.shape))
    check_shape("rejected", rejected, chosen.shape)


def readable(x: Tensor) -> bool:
    """Reading the values costs no wait for a GPU."""
    return has_values(x) and x.device.type == "cpu"


def check_probability(name: str, value: Tensor) -> None:
    """Labels of -1 and 1, or ratings, would be another loss, without a least value; on a CPU."""
    if readable(value) and value.dtype != torch.bool and value.numel():
        least, most = value.min().item(), value.max().item()
        inside, got = 0 <= least and most <= 1, f"{least:.4g} to {most:.4g}"
        expect(inside, name, "probabilities in [0, 1]", got)


def label_loss(z: Tensor, preference: Tensor | None, label_smoothing: float) -> Tensor:
    """p h(z) + (1 - p) h(-z), p the preference (1 if None) smoothed: (1 - e) p + e (1 - p)."""
    if preference is None:
        return smoothed(logistic, z, label_smoothing)
    expect(0 <= label_smoothing <= 1, "label_smoothing", "a probability", label_smoothing)
    check_shape("preference", preference, z.shape)
    check_probability("preference", preference)
    p = preference.to(z.dtype)
    return soft(z, p + label_smoothing * (1 - 2 * p))


def mean_over(values: Tensor, counted: Tensor) -> Mean:
    """A metric over the units that count, where `counted` is True."""
    return Mean(torch.where(counted, values.detach(), 0).sum(), counted.sum())


def unit_vectors(x: Tensor) -> Tensor:
    """Rows of x at length 1; a row of zeros stays, with gradient 0."""
    squares = x.square().sum(-1, keepdim=True)
    nonzero = squares > 0
    return x * torch.where(nonzero, torch.where(nonzero, squares, 1).rsqrt(), 0)
