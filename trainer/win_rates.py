"""From rewards to preferences: how likely one completion of a prompt beats another."""

from __future__ import annotations

import torch
from torch import Tensor

from .experience import Window

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


def wins_of(window: Window, how: str) -> Tensor:
    """P(y_i beats y'_j) [G, K, L], y' of the others or of the group itself where there are none: as
    a preference function told, or from rewards as `how` says."""
    if window.wins is not None:
        return window.wins
    others = window.groups if window.others is None else window.others.groups
    return beats(window.groups, others, how)


def win_rates(wins: Tensor, among_themselves: bool) -> Tensor:
    """How likely each of a prompt's completions [S] beats one that it meets: SPO's reward,
    arXiv:2401.04056. Of those that are known; NaN where none is.

    among_themselves: they meet the others of their own group, not themselves.
    """
    if among_themselves:
        itself = torch.eye(wins.shape[1], dtype=torch.bool, device=wins.device)
        wins = wins.masked_fill(itself, torch.nan)
    return wins.nanmean(2).flatten()


def unmet(own: list, others: list | None) -> tuple[Tensor, list[tuple[int, int]]]:
    """A prompt's completions: what is known of P(y_i beats y'_j) [K, L], 1/2 for equal ones, and
    the pairs to ask for. Within a group (others None) that is one order of each."""
    rivals = own if others is None else others
    wins = torch.full((len(own), len(rivals)), torch.nan, dtype=torch.float64)
    pairs = []
    for i, completion in enumerate(own):
        for j, rival in enumerate(rivals):
            if completion == rival:
                wins[i, j] = 0.5
            elif others is not None or i < j:
                pairs.append((i, j))
    return wins, pairs
