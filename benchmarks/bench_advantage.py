"""GAE over packed sequences beside the usual loops over time steps.

`gae`: each impl beside the loop of the RLHF trainers over a padded batch; all sequences of a row
are equally long, which flatters the loop. A token costs 17 bytes: rewards, values and mask read,
advantages and returns written.

`ragged gae`: a million packed tokens of sequences of very different lengths. The padded loop (as in
verl and in TRL's former PPO trainer) runs over the longest; its padding is not timed. The Python
loop goes over the tokens of each sequence as floats.

`shaped gae`: KL in the reward, a lambda for the critic and whitening statistics in one launch, 25
bytes a token, beside the same from functions that do one of these each.

GB/s is the bytes of the packed tokens over the time, for the loops too.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from common import ceilings, machine, milliseconds, table

from prefuse.kernels.advantage import gae, shaped_gae
from prefuse.kernels.advantage_parts import shaped_rewards
from prefuse.kernels.launch import choose_impl
from prefuse.kernels.whitening import whitening_statistics

BYTES_PER_TOKEN = 17
SHAPED_BYTES_PER_TOKEN = 25
RAGGED_TOKENS = 1 << 20
LONGEST = 8192
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


def python_loop(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] each, packed; one token at a time."""
    r, v, acts, bounds = rewards.tolist(), values.tolist(), mask.tolist(), ends.tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        next_value = next_advantage = 0.0
        for t in range(end - 1, begin - 1, -1):
            if acts[t]:
                advantage = r[t] + GAMMA * next_value - v[t] + GAMMA * LAM * next_advantage
                advantages[t], returns[t] = advantage, advantage + v[t]
                next_value, next_advantage = v[t], advantage
    return torch.tensor(advantages), torch.tensor(returns)


def timed(runs: dict[str, Any], tokens: int, bytes_per_token: int, **columns: object) -> list[dict]:
    """A measurement of each run; the others are compared with the last."""
    measured = []
    times = {name: milliseconds(run) for name, run in runs.items()}
    last = list(times)[-1]
    for name, ms in times.items():
        gbps = bytes_per_token * tokens / ms / 1e6
        row = {**columns, "impl": name, "ms": ms, "GB/s": gbps}
        row["% of copy"] = 100 * gbps / ceilings()["gbps"]
        measured.append(row | {"times as fast as the last": times[last] / ms})
    return measured


def agree(runs: dict[str, Any], wanted: tuple[torch.Tensor, ...]) -> None:
    for run in runs.values():
        for got, exact in zip(run(), wanted, strict=True):
            exact = exact.to(got)
            torch.testing.assert_close(got.view_as(exact), exact, rtol=1e-4, atol=1e-4)


def even_rows(device: str) -> list[dict]:
    measured = []
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
        agree(runs, runs["padded loop"]())
        shape = {"op": "gae", "sequences": sequences, "tokens each": length}
        measured += timed(runs, sequences * length, BYTES_PER_TOKEN, **shape)
    return measured


def ragged(device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Boundaries of sequences with log-uniform lengths, and [T] tensors."""
    torch.manual_seed(0)
    lengths = torch.exp(torch.rand(RAGGED_TOKENS // 64) * torch.tensor(float(LONGEST)).log())
    ends = torch.cat([torch.zeros(1), lengths.long().cumsum(0)])
    ends = torch.cat([ends[ends < RAGGED_TOKENS], torch.tensor([RAGGED_TOKENS])])
    mask = torch.rand(RAGGED_TOKENS) > 0.2
    tokens = {name: torch.randn(RAGGED_TOKENS) for name in ("values", "logp", "ref_logp")}
    tokens |= dict(rewards=torch.randn(RAGGED_TOKENS) * mask, mask=mask)
    ends = ends.to(device=device, dtype=torch.int32)
    return ends, {name: x.to(device) for name, x in tokens.items()}


def ragged_rows(device: str) -> list[dict]:
    ends, x = ragged(device)
    packed = (x["rewards"], x["values"], ends)
    runs: dict[str, Any] = {
        impl: partial(gae, *packed, gamma=GAMMA, lam=LAM, mask=x["mask"], impl=impl)
        for impl in usable_impls(device)
    }
    lengths = ends.diff()
    longest, sequences = int(lengths.max()), len(lengths)
    inside = torch.arange(longest, device=device) < lengths[:, None]

    def pad(packed: torch.Tensor) -> torch.Tensor:
        grid = packed.new_zeros(sequences, longest)
        return grid.masked_scatter(inside, packed)

    padded = [pad(x[name]) for name in ("rewards", "values", "mask")]
    loop = partial(padded_loop, *padded)
    python = partial(python_loop, *packed[:2], x["mask"], ends)
    agree(runs | {"Python loop": python}, tuple(found[inside] for found in loop()))
    runs |= {"padded loop": loop, "Python loop": python}
    shape = {"op": "ragged gae", "sequences": sequences, "tokens each": f"1 to {longest}"}
    return timed(runs, RAGGED_TOKENS, BYTES_PER_TOKEN, **shape)


def shaped_rows(device: str) -> list[dict]:
    ends, x = ragged(device)
    options: dict[str, Any] = dict(gamma=GAMMA, lam=LAM, critic_lam=1.0, mask=x["mask"])

    def fused(impl: str) -> tuple[torch.Tensor, ...]:
        pair = x["logp"], x["ref_logp"]
        return shaped_gae(x["rewards"], x["values"], ends, *pair, **options, impl=impl)

    def composed(impl: str) -> tuple[torch.Tensor, ...]:
        names = ("rewards", "logp", "ref_logp", "mask")
        rewards = shaped_rewards(*(x[name] for name in names), kl_coef=0.05)
        found = gae(rewards, x["values"], ends, **options, impl=impl)
        return *found, whitening_statistics(found[0], x["mask"])

    measured = []
    for impl in usable_impls(device):
        runs = {
            f"{impl}, one launch": partial(fused, impl),
            f"{impl}, steps": partial(composed, impl),
        }
        agree(runs, runs[f"{impl}, steps"]())
        shape = {"op": "shaped gae", "sequences": len(ends) - 1, "tokens each": "ragged"}
        measured += timed(runs, RAGGED_TOKENS, SHAPED_BYTES_PER_TOKEN, **shape)
    return measured


def rows() -> list[dict]:
    """Every result is checked against that of the loops before it is timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return even_rows(device) + ragged_rows(device) + shaped_rows(device)


if __name__ == "__main__":
    print(json.dumps(machine()))
    print(table(rows()))
