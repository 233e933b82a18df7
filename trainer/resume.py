"""All that the next step depends on, written and read with the shards of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import checkpoint
from .config import updated
from .dist import Ranks
from .errors import UserError
from .report import Meter, Report
from .schedule import Steps


class Checkpoints:
    """Those of a run: model, optimizer, learning rate, place in the data, random streams, what is
    left of a window of samples, sums of metrics not yet logged."""

    def __init__(
        self,
        config,
        modules: Mapping[str, nn.Module],
        optimizer,
        learning_rate,
        schedule: Steps,
        ranks: Ranks,
        report: Report,
        meter: Meter,
    ):
        self.config, self.modules, self.optimizer = config, modules, optimizer
        self.learning_rate, self.schedule, self.ranks = learning_rate, schedule, ranks
        self.report, self.meter, self.folder = report, meter, Path(config.output_dir)
        self.rows = schedule.rows()
        _same_everywhere(self.rows, config, ranks)
        self.beside, self.started = None, None
        if config.save_async:
            group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None
            self.beside = checkpoint.Beside(group)

    def begin(self) -> int:
        """The step to begin with."""
        seed(self.config.seed + self.ranks.rank)
        if not self.config.resume_from_checkpoint:
            return 0
        path = checkpoint.resolve(self.folder, self.config.resume_from_checkpoint)
        progress = checkpoint.progress_of(path)
        self._check(path, progress)
        settings = [{**group, "params": None} for group in self.optimizer.param_groups]
        checkpoint.load(path, self.modules, self.optimizer)
        _go_on(self.learning_rate, settings, progress["learning_rate"])
        step, world = progress["step"], progress["world"]
        same = world == self.ranks.world
        own = checkpoint.own_of(path, self.ranks.rank) if self.ranks.rank < world else None
        every = [own] if same else [checkpoint.own_of(path, r) for r in range(world)]
        self.schedule.restore(step, progress["schedule"], [x["schedule"] for x in every if x])
        if own is not None:
            restore_streams(own["streams"])
        self.meter.restore([x["meter"] for x in every if x] if same or self.ranks.is_main else [])
        self.report.forget_after(step)
        self.report.say(f"resumed {path} at step {step}")
        if not same:
            self.report.say(
                f"{world} ranks then, {self.ranks.world} now: gradient_accumulation_steps is "
                f"{self.config.gradient_accumulation_steps}, so that steps see the same rows"
            )
        return step

    def save(self, done: int, last: bool) -> Path:
        """Where it is, or will be.

        last: nothing comes after it, so that one which cannot be written is the user's to mend;
        else the run goes on with the ones that it has.
        """
        self.poll(done, wait=True)
        try:
            self._start(done)
            if last or self.beside is None:
                self._finish()
        except checkpoint.SaveFailed as error:
            if last:
                raise UserError(self._told(error)) from error
            self.report.say(f"step {done}: {self._told(error)}. The run goes on")
        return self.folder / f"checkpoint-{done}"

    def poll(self, done: int, wait: bool) -> None:
        """Gives a checkpoint that was written in the meantime its name."""
        if self.started is None or not (wait or self.started.is_written(self.ranks)):
            return
        try:
            self._finish()
        except checkpoint.SaveFailed as error:
            self.report.say(f"step {done}: {self._told(error)}. The run goes on")

    def _told(self, error: checkpoint.SaveFailed) -> str:
        found = checkpoint.complete(self.folder)
        return f"{error}; " + (f"the newest one is {found[-1]}" if found else "there is none yet")

    def _start(self, done: int) -> None:
        progress = {
            "step": done,
            "learning_rate": self.learning_rate.state_dict(),
            "schedule": self.schedule.state(),
            "world": self.ranks.world,
            "rows_per_step": rows_per_step(self.config, self.ranks),
            "rows": self.rows,
        }
        own = {
            "schedule": self.schedule.own(done),
            "streams": streams(),
            "meter": self.meter.state(),
        }
        given = self.folder, self.ranks, self.modules, self.optimizer
        self.started = checkpoint.start(*given, progress, own, self.beside)

    def _finish(self) -> None:
        started, self.started = self.started, None
        if started is not None:
            saved = checkpoint.finish(started, self.ranks, self.config.save_total_limit)
            self.report.say(f"saved {saved}")

    def _check(self, path: Path, progress: dict[str, Any]) -> None:
        """Other rows would be trained on twice, or never."""
        if progress["rows"] != self.rows:
            raise UserError(
                f"--resume_from_checkpoint {path}: wanted the rows that the run began with "
                f"({_told(progress['rows'])}); got others ({_told(self.rows)}). Give back "
                f"{self.config.dataset_name} as it was, take the former tokenizer and flags, or "
                "begin a new run"
            )


def _go_on(learning_rate, settings: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """The optimizer's settings are the flags of this run, at the place where the schedule was."""
    learning_rate.load_state_dict({**state, "base_lrs": learning_rate.base_lrs})
    place, optimizer = learning_rate.last_epoch, learning_rate.optimizer
    for group, own, share in zip(
        optimizer.param_groups, settings, learning_rate.lr_lambdas, strict=True
    ):
        rate = own["initial_lr"] * share(place)
        group.update({**own, "params": group["params"], "lr": rate})
    learning_rate._last_lr = [group["lr"] for group in optimizer.param_groups]


def _told(rows: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v[:12] if k == 'sha256' else v}" for k, v in rows.items())


def _same_everywhere(rows: dict[str, Any], config, ranks: Ranks) -> None:
    found = ranks.gather(rows)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise UserError(
                f"--dataset_name {config.dataset_name}: wanted the same rows on every rank; rank 0 "
                f"has {_told(found[0])}, rank {rank} {_told(theirs)}. Give every node "
                "the same files"
            )


def rows_per_step(config, ranks: Ranks) -> int:
    """The global batch: rows, or completions."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return rows * ranks.world


def same_rows(config, ranks: Ranks):
    """On other ranks than before a resumed run's steps see the rows that they would have seen:
    accumulation makes up for the ranks."""
    if not config.resume_from_checkpoint:
        return config
    path = checkpoint.resolve(Path(config.output_dir), config.resume_from_checkpoint)
    progress = checkpoint.progress_of(path)
    wanted, got = progress["rows_per_step"], rows_per_step(config, ranks)
    each = config.per_device_train_batch_size * ranks.world
    if got == wanted:
        return config
    if progress["world"] == ranks.world or wanted % each:
        raise UserError(
            "--per_device_train_batch_size x gradient_accumulation_steps x ranks: wanted "
            f"{wanted}, as {path} has it, for the rows of a step follow from it; got {got}. Choose "
            f"a per_device_train_batch_size that divides {wanted / ranks.world:g}, or begin a new "
            "run"
        )
    return updated(config, gradient_accumulation_steps=wanted // each)


def seed(number: int) -> None:
    """Of what draws from the global streams: a user's reward functions, dropout."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def streams() -> dict[str, Any]:
    """The state of every global random stream, of types that load without running code."""
    _, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_streams(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
