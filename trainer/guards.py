"""What ends a run early: numbers that are not finite, signals, ranks that are gone."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .data import Example
from .dist import Ranks
from .errors import UserError

BROKEN = re.compile(r"\bgloo/|nccl", re.I)  # in the message of an error that is a RuntimeError
ROLL_CALL = 10  # seconds to wait for other ranks' names when one is lost


def finite(losses: list[Tensor], grad_norm: Tensor, ranks: Ranks) -> bool:
    """Asked before the update that would spoil the weights; every rank sees the same answer."""
    bad = torch.as_tensor(sum((~torch.isfinite(x)).double() for x in (*losses, grad_norm)))
    return not ranks.total(bad.reshape(1)).item()


def not_finite(
    step: int,
    losses: list[Tensor],
    grad_norm: Tensor,
    micro_batches: list[list[Example]],
    norm_of: Callable[[list[list[Example]]], float],
    ranks: Ranks,
) -> UserError:
    """Whose rows did it, and whether in the loss or in its gradient.

    norm_of: the gradient's norm where ranks take these micro-batches alone.
    """
    wrong = [i for i, loss in enumerate(losses) if not math.isfinite(float(loss))]
    found = ranks.gather(wrong)
    phase = "loss"
    if not any(found):
        phase = "gradient"
        found = _culprits(micro_batches, norm_of, ranks)
    rows = ranks.gather([_names(rows) for rows in micro_batches])
    told = [
        f"rank {rank}: {', '.join(rows[rank][i] for i in batches)}"
        for rank, batches in enumerate(found)
        if batches
    ]
    if not told:
        told = ["those of no rank alone: a sum over them overflows, or a device is at fault"]
    values = [f"{float(x):.4g}" for x in losses]
    return UserError(
        f"step {step + 1}: {phase} is not finite (rank {ranks.rank} has loss {', '.join(values)}, "
        f"gradient norm {float(grad_norm):.4g}); the weights are as they were before it. "
        f"Rows of {'; '.join(told)}. Lower --learning_rate, or look at those rows"
    )


def _culprits(micro_batches: list[list[Example]], norm_of, ranks: Ranks) -> list[list[int]]:
    """By rank, the micro-batches whose gradient alone is not finite. The others' are empty, so
    that all ranks take part: what is sharded works together."""
    found: list[list[int]] = [[] for _ in range(ranks.world)]
    for rank in range(ranks.world):
        mine = ranks.rank == rank
        if math.isfinite(norm_of([rows if mine else [] for rows in micro_batches])):
            continue
        for i in range(len(micro_batches)):
            alone = [rows if mine and i == k else [] for k, rows in enumerate(micro_batches)]
            if not math.isfinite(norm_of(alone)):
                found[rank].append(i)
    return found


def _names(rows: list[Example]) -> str:
    """Of a micro-batch's rows: their numbers, and where they came from."""
    shown = [f"{e.index} ({e.where})" if e.where else str(e.index) for e in rows[:8]]
    return ", ".join(shown) + (", ..." if len(rows) > 8 else "")


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM ask for an end after the step at hand, and are told by their number; a
    second Ctrl-C ends at once."""
    asked, when = 0, 0.0

    def ask(signum, frame):
        nonlocal asked, when
        now = time.monotonic()
        # torchrun passes on what the terminal sent too
        if signum == signal.SIGINT and asked and now - when > 1:
            raise KeyboardInterrupt
        asked, when = asked or signum, when or now

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def naming_lost_ranks(ranks: Ranks, place: Callable[[], str]) -> Iterator[None]:
    """Where others are waited for in vain, says who is gone and where."""
    try:
        yield
    except RuntimeError as error:
        broken = isinstance(error, dist.DistError) or BROKEN.search(str(error))
        if ranks.world == 1 or not broken:
            raise
        cause = str(error).splitlines()[0][:200]
        lost = missing(ranks)
        who = f"rank {', '.join(map(str, lost))}" if lost else "another rank"
        raise UserError(
            f"rank {ranks.rank}, {place()}: {who} of {ranks.world} did not answer ({cause}). Look "
            "at its own messages; --resume_from_checkpoint true goes on from the last checkpoint, "
            "if there is one"
        ) from error


def missing(ranks: Ranks) -> list[int]:
    """The ranks that do not find out within seconds that one is gone: that one, and among four or
    more perhaps some that are still waiting for it."""
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"prefuse/lost/{ranks.rank}", "")
        dist.destroy_process_group()  # some of those who wait for this rank find out by it
    except Exception:  # the store's own rank may be the one
        return [0] if ranks.rank else []
    deadline = time.monotonic() + ROLL_CALL
    found = []
    for rank in range(ranks.world):
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([f"prefuse/lost/{rank}"], timedelta(seconds=left))
        except Exception:
            found.append(rank)
    return found
