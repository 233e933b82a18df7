"""V-trace: returns of a policy from another policy's samples, over packed sequences.

Actions, observations, rewards between actions and the bootstrap are those of advantage.py. With
R_k = pi(a_k) / mu(a_k), mu the policy that sampled:

    delta_k = rho_k (r_k + gamma V_{k+1} - V_k),      rho_k = min(rho_bar, R_k)
    v_k     = V_k + delta_k + gamma c_k (v_{k+1} - V_{k+1}),  c_k = lam min(c_bar, R_k)
    A_k     = rho_k (r_k + gamma v_{k+1} - V_k)

v - V is a reverse scan of (gamma c, delta), in plain PyTorch: log2(T) passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantage_parts import check_packed, layout, reverse_scan
from .kl import LARGEST_EXPONENT
from .launch import expect


def vtrace(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace, arXiv:1802.01561: v_k = V_k + delta_k + gamma c_k (v_{k+1} - V_{k+1}).

    Advantages A_k = rho_k (r_k + gamma v_{k+1} - V_k) and returns v_k, [T] each, detached, float32
    (float64 for float64). On policy (log_ratio 0) with bars of at least 1 they are A and G of GAE:
    v_k at lam, A_k with the lambda-return of k+1 inside.

    Args:
        log_ratio: [T], log pi - log mu of the sampled tokens; not read at observations. It counts
            as 80 nats at most.
        rho_bar, c_bar: the caps, positive, rho_bar >= c_bar; inf for none. rho_bar decides which
            policy's value v is, c_bar how far surprises travel back.
    """
    expect(c_bar > 0, "c_bar", "a positive number", c_bar)
    expect(rho_bar >= c_bar, "rho_bar", f"at least c_bar, {c_bar}", rho_bar)
    p = check_packed(
        rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam
    )
    same = tuple(log_ratio.shape) == tuple(rewards.shape)
    expect(same, "log_ratio", f"shape {tuple(rewards.shape)}", tuple(log_ratio.shape))
    ids, acts, last, next_acts = layout(p)
    value = torch.where(acts, values.detach().to(p.rewards.dtype), 0.0)

    # What an action earns until the next, and V of the next: observations pass both on.
    passes = torch.where(last | next_acts, 0.0, 1.0).to(value.dtype)
    following = torch.where(next_acts, F.pad(value[1:], (0, 1)), 0.0)
    if p.bootstrap is not None:
        following = following + torch.where(last, p.bootstrap[ids], 0.0)
    reward, next_value = reverse_scan(
        passes.expand(2, -1), torch.stack([p.rewards, following])
    ).unbind()

    ratio = log_ratio.detach().to(value.dtype).clamp(max=LARGEST_EXPONENT).exp()
    ratio = torch.where(acts, ratio, 0.0)
    rho, c = ratio.clamp(max=rho_bar), p.lam * ratio.clamp(max=c_bar)
    delta = torch.where(acts, rho * (reward + p.gamma * next_value - value), 0.0)
    slope = torch.where(last, 0.0, torch.where(acts, p.gamma * c, 1.0))
    surprise = reverse_scan(slope, delta)  # v - V of this action, or of the next one if none
    later = torch.where(last, 0.0, F.pad(surprise[1:], (0, 1)))
    advantages = rho * (reward + p.gamma * (next_value + later) - value)
    return torch.where(acts, advantages, 0.0), torch.where(acts, value + surprise, 0.0)
