"""GAE over packed sequences: each impl beside the usual loop over time steps of a padded batch.

A token costs 17 bytes: rewards, values and mask read, advantages and returns written. GB/s is
17 bytes a token over the time, for the padded loop too (all sequences of a row are equally long).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from common import ceilings, machine, milliseconds, table

from prefuse.kernels.advantage import gae
from prefuse.kernels.launch import choose_impl

BYTES_PER_TOKEN = 17
GAMMA, LAM = 1.0, 0.95
SHAPES = {
    "cuda": [(1024, 8192), (8192, 1024), (8, 131072)],
    "cpu": [(64, 2048), (1024, 128), (1, 16384)],
}


def padded_loop(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] each; the masked recursion of the RLHF trainers, one time step at a time."""
    acts = mask.to(rewards.dtype)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * next_advantage
        next_value = values[:, t] * acts[:, t] + next_value * (1 - acts[:, t])
        next_advantage = advantage * acts[:, t] + next_advantage * (1 - acts[:, t])
        advantages.append(next_advantage)
    result = torch.stack(advantages[::-1], 1)
    return result * acts, (result + values) * acts


def usable_impls(device: str) -> list[str]:
    impls = []
    for impl in ("cuda", "triton", "cpu"):
        try:
            impls.append(choose_impl(impl, torch.device(device), ("cuda", "triton", "cpu")))
        except ValueError:
            continue
    return impls


def rows() -> list[dict]:
    """One measurement a shape and impl; every result is checked against the loop first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = []
    limit = ceilings()["gbps"]
    for sequences, length in SHAPES[device]:
        torch.manual_seed(0)
        mask = torch.rand(sequences, length, device=device) > 0.2
        rewards = torch.randn(sequences, length, device=device) * mask
        values = torch.randn(sequences, length, device=device)
        ends = torch.arange(sequences + 1, device=device, dtype=torch.int32) * length
        packed = (rewards.flatten(), values.flatten(), ends)
        options: dict[str, Any] = dict(gamma=GAMMA, lam=LAM, mask=mask.flatten())
        runs: dict[str, Any] = {
            impl: partial(gae, *packed, **options, impl=impl) for impl in usable_impls(device)
        }
        runs["padded loop"] = partial(padded_loop, rewards, values, mask)
        wanted = runs["padded loop"]()
        for impl, run in runs.items():
            for got, exact in zip(run(), wanted, strict=True):
                torch.testing.assert_close(got.view_as(exact), exact, rtol=1e-4, atol=1e-4)
            ms = milliseconds(run)
            gbps = BYTES_PER_TOKEN * sequences * length / ms / 1e6
            measured.append(
                {
                    "op": "gae",
                    "impl": impl,
                    "sequences": sequences,
                    "tokens each": length,
                    "ms": ms,
                    "GB/s": gbps,
                    "% of copy": 100 * gbps / limit,
                }
            )
    return measured


if __name__ == "__main__":
    print(json.dumps(machine()))
    print(table(rows()))
