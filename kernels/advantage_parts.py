"""What the estimators of advantage.py and vtrace.py read, and a scan in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kl import kl_estimate
from .launch import expect, has_values
from .segments import check_boundaries, segment_ids


class Packed(NamedTuple):
    """Checked inputs, of one floating-point dtype. Values None: only returns are wanted."""

    rewards: Tensor
    values: Tensor | None
    mask: Tensor | None
    bootstrap: Tensor | None
    cu_seqlens: Tensor
    gamma: float
    lam: Tensor | float  # [S], or one for all
    critic_lam: Tensor | float | None = None  # lam, if None
    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    kl_coef: float = 0.0


class Layout(NamedTuple):
    """Where the tokens of packed sequences stand, [T] each."""

    ids: Tensor  # the sequence
    acts: Tensor  # bool: not an observation
    last: Tensor  # bool: the sequence ends here
    next_acts: Tensor  # bool: the token after this one, of the same sequence, acts


def layout(p: Packed) -> Layout:
    ids = segment_ids(p.cu_seqlens, len(p.rewards))
    acts = torch.ones_like(ids, dtype=torch.bool) if p.mask is None else p.mask
    last = torch.arange(len(ids), device=ids.device) + 1 == p.cu_seqlens[ids + 1]
    return Layout(ids, acts, last, F.pad(acts[1:], (0, 1)) & ~last)


def reverse_scan(slope: Tensor, offset: Tensor) -> Tensor:
    """y_t = slope_t y_{t+1} + offset_t along the last dimension, 0 beyond the end; [..., T].

    In log2(T) passes of plain PyTorch. Slope 0 lets nothing through, not even a NaN.
    """
    step = 1
    while step < offset.shape[-1]:
        later_slope = F.pad(slope[..., step:], (0, step), value=1.0)
        later_offset = F.pad(offset[..., step:], (0, step))
        offset = torch.where(slope == 0, offset, slope * later_offset + offset)
        slope = torch.where(slope == 0, slope, slope * later_slope)
        step *= 2
    return offset


def shaped_rewards(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: Tensor | float,
    kind: str = "k1",
) -> Tensor:
    """KL in the reward, arXiv:1909.08593: r_t - kl_coef KL_t, KL_t an estimate of KL(pi || pi_ref).

    All [T], detached. kind: k1 gives the policy gradient of the KL of whole sequences, if each
    token is paid for the tokens after it; the others of kl.py do not. Observations (mask False)
    keep their reward; log-probabilities there are not read.
    """
    penalty = kl_coef * kl_estimate(logp.detach(), ref_logp, kind)
    penalty = penalty if mask is None else torch.where(mask, penalty, 0.0)
    return rewards.detach() - penalty


def check_packed(
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: float,
    lam: Tensor | float = 1.0,
    critic_lam: Tensor | float | None = None,
    logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Packed:
    """Every check but that of steps; floats come back as float64 or float32, as `rewards` is."""
    expect(
        rewards.dim() == 1 and rewards.is_floating_point(),
        "rewards",
        "a 1-D floating-point tensor",
        f"{rewards.dtype} of shape {tuple(rewards.shape)}",
        "Pack the sequences end to end",
    )
    check_boundaries("cu_seqlens", cu_seqlens, len(rewards), rewards.device)
    _check_factor("gamma", gamma)
    sequences = len(cu_seqlens) - 1
    for name, x, length in (
        ("values", values, len(rewards)),
        ("mask", mask, len(rewards)),
        ("logp", logp, len(rewards)),
        ("ref_logp", ref_logp, len(rewards)),
        ("bootstrap", bootstrap, sequences),
        ("lam", lam, sequences),
        ("critic_lam", critic_lam, sequences),
    ):
        if not isinstance(x, Tensor):
            continue
        expect(tuple(x.shape) == (length,), name, f"shape ({length},)", tuple(x.shape))
        expect(x.device == rewards.device, name, f"a tensor on {rewards.device}", x.device)
        kind = x.dtype == torch.bool if name == "mask" else x.is_floating_point()
        expect(kind, name, "bool" if name == "mask" else "a floating-point dtype", x.dtype)
    for name, x, other in (("logp", logp, ref_logp), ("ref_logp", ref_logp, logp)):
        expect(x is not None or other is None, name, "both log-probabilities or neither", None)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    return Packed(
        rewards.detach().to(dtype),
        cast(values),
        mask,
        cast(bootstrap),
        cu_seqlens,
        float(gamma),
        _check_factor("lam", lam, dtype),
        None if critic_lam is None else _check_factor("critic_lam", critic_lam, dtype),
        cast(logp),
        cast(ref_logp),
        float(kl_coef),
    )


def _check_factor(
    name: str, factor: Tensor | float, dtype: torch.dtype = torch.float64
) -> Tensor | float:
    if not isinstance(factor, Tensor):
        expect(0 <= factor <= 1, name, "a number in [0, 1]", factor)
        return float(factor)
    if has_values(factor) and factor.device.type == "cpu" and len(factor):
        inside = bool(((factor >= 0) & (factor <= 1)).all())
        expect(inside, name, "numbers in [0, 1]", f"{factor.min():g} to {factor.max():g}")
    return factor.detach().to(dtype)
