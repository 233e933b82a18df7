"""GAE over packed sequences beside the usual loops over time steps.

`gae`: each impl beside the loop of the RLHF trainers over a padded batch; all sequences of a row
are equally long, which flatters the loop. A token costs 17 bytes: rewards, values and mask read,
advantages and returns written. `ragged gae`: packed tokens of sequences of very different lengths.
The padded loop (as in verl and in TRL's former PPO trainer) runs over the longest; its padding is
not timed. The Python loop goes over the tokens of each sequence as floats.

`shaped gae`, even and ragged: KL in the reward, a lambda for the critic and whitening statistics in
one launch, 25 bytes a token, beside the same from functions that do one of these each.

On a GPU "ms" is the time on the device, of replayed CUDA graphs; "call ms" that of single calls,
"wall ms" from call to call. GB/s is the bytes of the packed tokens over the time, for loops too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import device
from exact import most_off
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.advantage import gae, shaped_gae
from prefuse.kernels.advantage_parts import shaped_rewards
from prefuse.kernels.launch import choose_impl
from prefuse.kernels.whitening import whitening_statistics

BYTES, SHAPED_BYTES = 17, 25  # a token
GAMMA, LAM, CRITIC_LAM, KL = 1.0, 0.95, 1.0, 0.05
EVEN = {
    "cuda": [(1024, 8192), (8192, 1024), (8, 131072)],
    "cpu": [(64, 2048), (1024, 128), (1, 16384)],
    "tiny": [(4, 32)],
}
RAGGED = {"cuda": (1 << 23, 32768), "cpu": (1 << 20, 8192), "tiny": (256, 64)}  # tokens, longest
LIMITS = {"max error": 1e-5, "of statistics": 1e-5}
LOOPED = 1 << 14  # time steps that a loop over them is worth waiting for


def padded_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
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


def python_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
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


def usable_impls() -> list[str]:
    impls = []
    for impl in ("cuda", "triton", "cpu"):
        try:
            impls.append(choose_impl(impl, device(), ("cuda", "triton", "cpu")))
        except ValueError:
            continue
    return impls


def tokens(ends: Tensor) -> dict[str, Tensor]:
    """[T] tensors; rewards of observations are 0, as the loops drop them."""
    total = int(ends[-1])
    mask = torch.rand(total, device=device()) > 0.2
    names = ("values", "logp", "ref_logp", "rewards")
    x = {name: torch.randn(total, device=device()) for name in names}
    return x | dict(rewards=x["rewards"] * mask, mask=mask)


def even_ends(sequences: int, length: int) -> Tensor:
    return torch.arange(sequences + 1, device=device(), dtype=torch.int32) * length


def ragged_ends(total: int, longest: int) -> Tensor:
    """Boundaries of sequences with log-uniform lengths; the first is the longest."""
    draws = torch.rand(max(total // 64, longest)) * torch.tensor(float(longest)).log()
    lengths = torch.cat([torch.tensor([longest]), draws.exp().long()])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ends = torch.cat([ends[ends < total], torch.tensor([total])])
    return ends.to(device=device(), dtype=torch.int32)


def errors(exact: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> dict[str, float]:
    """Of advantages and returns, over the largest of them; relative of the statistics."""
    pairs = zip(out[:2], exact[:2], strict=True)
    off = [most_off(a.flatten().to(b.device), b) / float(b.abs().max()) for a, b in pairs]
    found = {"max error": max(off)}
    if len(exact) > 2:
        found["of statistics"] = most_off(out[2] / exact[2], torch.ones_like(exact[2]))
    return found


def in_double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in x.items()}


def gae_methods(ends: Callable[[], Tensor], loops: bool, copies: int) -> list[Method]:
    torch.manual_seed(0)
    bounds = ends()
    sets = [tokens(bounds) for _ in range(copies)]
    options: dict[str, Any] = dict(gamma=GAMMA, lam=LAM)

    def ours(impl: str, x: dict[str, Tensor]):
        return gae(x["rewards"], x["values"], bounds, mask=x["mask"], **options, impl=impl)

    exact = ours("reference", in_double(sets[0]))
    found = [_ours(impl, partial(ours, impl), sets, exact) for impl in usable_impls()]
    longest = int(bounds.diff().max())
    if loops and longest <= LOOPED:
        found += _loops(bounds, longest, sets[0], exact)
    return found


def _ours(name: str, run: Callable[..., Any], sets: list, exact: tuple) -> Method:
    again = tuple(partial(run, x) for x in sets[1:])
    return Method(name, partial(run, sets[0]), partial(errors, exact), LIMITS, True, copies=again)


def _loops(bounds: Tensor, longest: int, x: dict[str, Tensor], exact: tuple) -> list[Method]:
    lengths = bounds.diff()
    inside = torch.arange(longest, device=bounds.device) < lengths[:, None]
    names = ("rewards", "values", "mask")
    grids = [x[n].new_zeros(inside.shape).masked_scatter(inside, x[n]) for n in names]

    def packed(out: tuple) -> dict[str, float]:
        return errors(exact, tuple(found[inside] for found in out))

    padded = partial(padded_loop, *grids)
    found = [Method("padded loop", padded, packed, LIMITS, graph=False)]
    if bounds.device.type == "cpu":
        python = partial(python_loop, *(x[n] for n in names), bounds)
        found.append(Method("Python loop", python, partial(errors, exact), LIMITS))
    return found


def shaped_methods(ends: Callable[[], Tensor], copies: int) -> list[Method]:
    torch.manual_seed(0)
    bounds = ends()
    sets = [tokens(bounds) for _ in range(copies)]
    options: dict[str, Any] = dict(gamma=GAMMA, lam=LAM, critic_lam=CRITIC_LAM)

    def fused(impl: str, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = x["rewards"], x["values"], bounds, x["logp"], x["ref_logp"]
        return shaped_gae(*given, kl_coef=KL, mask=x["mask"], **options, impl=impl)

    def composed(impl: str, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        names = ("rewards", "logp", "ref_logp", "mask")
        rewards = shaped_rewards(*(x[name] for name in names), kl_coef=KL)
        found = gae(rewards, x["values"], bounds, mask=x["mask"], **options, impl=impl)
        return *found, whitening_statistics(found[0], x["mask"])

    exact = composed("reference", in_double(sets[0]))
    found = []
    for impl in usable_impls():
        for name, run in (("one launch", fused), ("steps", composed)):
            found.append(_ours(f"{impl}, {name}", partial(run, impl), sets, exact))
    return found


def cases(size: str) -> list[Case]:
    found = []
    sets = 3 if size == "cuda" else 1  # in a graph: the smallest has 8 million bytes

    def add(op: str, make: Callable, total: int, per_token: int, **columns: object) -> None:
        name = f"{op} {columns['sequences']} x {columns['tokens each']}"
        told = {"op": op, **columns, "tokens": total}
        moved = float(per_token * total)
        found.append(Case(name, make, told, bytes=moved, short=True, label="impl"))

    total, longest = RAGGED[size]
    torch.manual_seed(0)
    bounds = ragged_ends(total, longest)
    ragged = {"sequences": len(bounds) - 1, "tokens each": f"1 to {longest}"}
    first, *others = EVEN[size]

    def even(shape: tuple[int, int]) -> None:
        columns = {"sequences": shape[0], "tokens each": shape[1]}
        ends = partial(even_ends, *shape)
        make = partial(gae_methods, ends, True, sets)
        add("gae", make, shape[0] * shape[1], BYTES, **columns)
        if shape == first:
            make = partial(shaped_methods, ends, sets)
            add("shaped gae", make, shape[0] * shape[1], SHAPED_BYTES, **columns)

    even(first)
    ends = partial(lambda given: given, bounds)
    add("ragged gae", partial(gae_methods, ends, size != "cuda", sets), total, BYTES, **ragged)
    add("ragged shaped gae", partial(shaped_methods, ends, sets), total, SHAPED_BYTES, **ragged)
    for shape in others:
        even(shape)
    return found


if __name__ == "__main__":
    main(__doc__, cases)
