"""A batch for every objective of the registry, and how to take a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from test_policy import CU
from test_policy import draw as tokens
from test_preference import draw as pairs
from test_reward import CASES as REWARDS
from torch import Tensor

from prefuse.kernels.divergence import linear_divergence
from prefuse.kernels.informed_pair_losses import matched_by_rank
from prefuse.kernels.objective import Objective
from prefuse.kernels.policy import policy_loss
from prefuse.kernels.preference import BATCHWISE, list_loss, preference_loss, unpaired_loss
from prefuse.kernels.registry import METHODS

Batch = dict[str, Tensor]


class Case(NamedTuple):
    """rows: how many parts it has (pairs, prompts, sequences); learnt: what has a gradient."""

    given: Batch
    rows: int
    learnt: tuple[str, ...]
    part: Callable[[Batch, list[int]], Batch]
    call: Callable[[Batch], Objective]


def by_rows(given: Batch, rows: list[int]) -> Batch:
    return {k: v[rows] for k, v in given.items()}


def by_sequences(given: Batch, rows: list[int]) -> Batch:
    """Tokens and boundaries of some sequences of a pack."""
    cu = given["cu_seqlens"]
    places = [torch.arange(int(cu[i]), int(cu[i + 1])) for i in rows]
    at = torch.cat([torch.zeros(0, dtype=torch.long), *places])
    lengths = torch.tensor([0, *(len(p) for p in places)])
    return {k: v[at] for k, v in given.items() if k != "cu_seqlens"} | {
        "cu_seqlens": lengths.cumsum(0).int()
    }


def pair(name: str) -> Case:
    given = pairs(9)
    if name == "aot":
        deltas = (given[p + "chosen"] - given[p + "rejected"] for p in ("", "ref_"))
        given["matched"] = matched_by_rank(*deltas)
    call = lambda x: preference_loss(**x, loss_type=name)  # noqa: E731
    return Case(given, 9, ("chosen", "rejected"), by_rows, call)


def unpaired(name: str) -> Case:
    given = {k: torch.randn(9).double() for k in ("logp", "ref_logp", "shift", "reward", "value")}
    given["label"] = torch.rand(9) < 0.5
    return Case(given, 9, ("logp",), by_rows, lambda x: unpaired_loss(**x, loss_type=name))


def listed(name: str) -> Case:
    given = {k: torch.randn(7, 4).double() for k in ("logp", "ref_logp", "reward")}
    given["mask"] = torch.rand(7, 4) < 0.7
    return Case(given, 7, ("logp",), by_rows, lambda x: list_loss(**x, loss_type=name))


def policy(name: str) -> Case:
    given = tokens() | {"cu_seqlens": CU}

    def call(x: Batch) -> Objective:
        options = dict(max_length=7.0, beta=0.1, kl="ratio_k3", rollout_mode="sequence_truncate")
        extra = dict(entropy=x["old_logp"], entropy_coef=0.1)
        return policy_loss(**x, **options, **extra, loss_type=name)

    return Case(given, len(CU) - 1, ("logp",), by_sequences, call)


def value(name: str) -> Case:
    given = {k: torch.rand(8).double() for k in ("values", "returns", "old_values")}
    given |= dict(mask=torch.rand(8) < 0.7, logits=torch.randn(8, 5).double())
    method = METHODS[name]
    given = {k: given[k] for k in (*method.inputs, *method.optional)}
    return Case(given, 8, method.inputs[:1], by_rows, lambda x: method.function(**x))


def divergence(name: str) -> Case:
    """Tokens of hidden states; the heads are shared."""
    shared = {k: torch.randn(11, 4).double() for k in ("weight", "teacher_weight")}
    given = {k: torch.randn(7, 4).double() for k in ("hidden", "teacher_hidden")} | shared

    def call(x: Batch) -> Objective:
        return Objective(linear_divergence(**x, kind=name), "token", {})

    def part(x: Batch, rows: list[int]) -> Batch:
        return {k: v if k in shared else v[rows] for k, v in x.items()}

    return Case(given, 7, ("hidden", "weight"), part, call)


def reward(name: str) -> Case:
    case = next(c for c in REWARDS if c.loss == name)
    given = case.tensors(learn=False)
    rows = len(next(v for k, v in given.items() if k not in case.packed and k not in case.shared))
    if case.packed:
        rows = len(given[next(iter(case.packed.values()))]) - 1
    return Case(given, rows, case.wrt, lambda x, rows: case.rows(x, rows), case.call)


MAKE = dict(pair=pair, unpaired=unpaired, list=listed, policy=policy, value=value, reward=reward)
MAKE["divergence"] = divergence
# their losses are of the whole batch; AOT's parts are given what it is matched with
WHOLE = BATCHWISE - {"aot"}


def case(name: str) -> Case:
    """The same on every call and in every process."""
    torch.manual_seed(0)
    return MAKE[METHODS[name].family.name](name)


def gradients(case: Case, rows: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of a part: the loss's sum, its count of units, the gradients placed where they belong."""
    given = {k: v.clone() for k, v in case.given.items()}
    for name in case.learnt:
        given[name].requires_grad_()
    objective = case.call(case.part(given, rows))
    total = objective.sum()
    grads = torch.autograd.grad(total, [given[k] for k in case.learnt], allow_unused=True)
    grads = [
        torch.zeros_like(given[k]) if g is None else g
        for k, g in zip(case.learnt, grads, strict=True)
    ]
    count = torch.tensor(objective.loss.numel()) if objective.count is None else objective.count
    return total.detach().double(), count.double(), grads


def on_rank(rank: int, world: int, names: list[str], folder: str) -> None:
    """Every objective, its rows dealt out over the ranks; the gradient of the global mean."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for name in names:
        batch = case(name)
        total, count, grads = gradients(batch, list(range(rank, batch.rows, world)))
        for x in (total, count, *grads):
            dist.all_reduce(x)
        found[name] = [total / count, *(g / count for g in grads)]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
