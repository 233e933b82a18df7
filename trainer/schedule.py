"""Which rows an optimizer step sees, and how they are laid out over ranks and micro-batches.

The rows of step s are a function of the seed and s alone, so a resumed run continues exactly, and
any split of them over ranks and micro-batches gives the same gradient.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Protocol

import torch

from prefuse.kernels.packing import pack as first_fit

from .data import Example
from .dist import Ranks
from .errors import UserError


class Steps(Protocol):
    """The optimizer steps of a run, as the loop takes them."""

    steps_per_epoch: float  # an epoch may end within a step
    total_steps: int
    known_ahead: bool  # whether a step can be asked for before the one ahead of it is done

    def resumable(self, done: int) -> bool:
        """Whether a checkpoint after `done` steps holds all that the next step needs."""
        ...

    def rows(self) -> dict[str, Any]:
        """What the order of rows follows from: a SHA-256 of them, the seed."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run must know besides the step; the same on every rank."""
        ...

    def own(self, done: int) -> dict[str, Any]:
        """What it must know of this rank: tensors and plain values."""
        ...

    def restore(self, done: int, state: dict[str, Any], owned: list[dict[str, Any]]) -> None:
        """owned: what this rank left, or all ranks where there were more or fewer of them."""
        ...

    def step(self, step: int) -> list[list[Example]]:
        """This rank's micro-batches of optimizer step `step`; every rank has as many."""
        ...


class Schedule:
    """The optimizer steps of a run over its examples."""

    known_ahead = True

    def __init__(self, examples: list[Example], config, ranks: Ranks):
        self.examples, self.ranks = examples, ranks
        self.drawn: tuple[int, list[int]] = -1, []  # an epoch and its order
        self.seed = config.seed if config.shuffle_dataset else None
        self.micro_rows = config.per_device_train_batch_size
        self.rows_per_step = self.micro_rows * config.gradient_accumulation_steps * ranks.world
        self.max_tokens = config.max_tokens_per_micro_batch
        self.steps_per_epoch = math.ceil(len(examples) / self.rows_per_step)
        if config.max_steps > 0:
            self.total_steps = config.max_steps
        else:
            self.total_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        longest = max(e.n_tokens for e in examples)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise UserError(
                f"--max_tokens_per_micro_batch: wanted at least {longest}, the longest row; got "
                f"{self.max_tokens}. Raise it, or lower --max_length"
            )

    def resumable(self, done: int) -> bool:
        return True

    def rows(self) -> dict[str, Any]:
        found = hashlib.sha256()
        for example in self.examples:
            for sequence in example.sequences:
                found.update(len(sequence.tokens).to_bytes(8, "little"))
                found.update(sequence.tokens.tobytes() + sequence.scored.tobytes())
            found.update(repr(example.judged).encode())
            for name, numbers in sorted(example.columns.items()):
                found.update(name.encode() + numbers.tobytes())
        return {"rows": len(self.examples), "sha256": found.hexdigest(), "seed": self.seed}

    def state(self) -> dict[str, Any]:
        return {}

    def own(self, done: int) -> dict[str, Any]:
        return {}

    def restore(self, done: int, state: dict[str, Any], owned: list[dict[str, Any]]) -> None:
        pass

    def step(self, step: int) -> list[list[Example]]:
        """This rank's micro-batches of optimizer step `step`; every rank has as many."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        rows = [self.examples[i] for i in order]
        if self.max_tokens is None:
            batches = [rows[i : i + self.micro_rows] for i in range(0, len(rows), self.micro_rows)]
        else:
            bins = first_fit([e.n_tokens for e in rows], self.max_tokens)
            batches = [[rows[i] for i in b] for b in bins]
        return share_out(batches, self.ranks)

    def _order(self, epoch: int) -> list[int]:
        if epoch != self.drawn[0]:
            order = list(range(len(self.examples)))
            if self.seed is not None:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(len(self.examples), generator=generator).tolist()
            self.drawn = epoch, order
        return self.drawn[1]


def share_out(batches: list[list[Example]], ranks: Ranks) -> list[list[Example]]:
    """This rank's batches, dealt in turn; empty ones make the number equal on every rank."""
    batches = batches + [[]] * (-len(batches) % ranks.world)
    return batches[ranks.rank :: ranks.world]
