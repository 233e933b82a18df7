"""From rewards to preferences: how likely one completion of a prompt beats another."""

from __future__ import annotations

import torch
from torch import Tensor

from prefuse.kernels.group_advantage import spo

PREFERENCES = ("larger", "bradley_terry", "difference")


def beats(rewards: Tensor, others: Tensor, how: str) -> Tensor:
    """P(y_i beats y'_j) [G, K, L], from rewards [G, K] and [G, L]; NaN where one is missing.

    how: "larger" is 1, or 1/2 for a tie; "bradley_terry" is sigmoid(r - r'); "difference" is
    1/2 + (r - r') / 2 within [0, 1], for rewards that are win rates already.
    """
    gap = rewards[:, :, None] - others[:, None]
    if how == "bradley_terry":
        return gap.sigmoid()
    lead = gap.sign() if how == "larger" else gap.clamp(-1, 1)
    return torch.where(gap.isnan(), torch.nan, (lead + 1) / 2)  # the sign of NaN is 0


def win_rates(rewards: Tensor, cu_groups: Tensor, how: str) -> Tensor:
    """How likely each of a prompt's completions [S] beats another of them: SPO's reward,
    arXiv:2401.04056. NaN for a whole group where one of its rewards is missing."""
    groups = rewards.view(len(cu_groups) - 1, -1)
    wins = beats(groups, groups, how).flatten(0, 1)
    return spo(wins, cu_groups) + 0.5
