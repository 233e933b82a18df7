"""prefuse as the whole-step benchmarks run it: settings to search, its loop under a clock."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train_common import PRECISIONS, Clock

from prefuse.trainer.loop import train
from prefuse.trainer.report import Meter, Report


@dataclass(frozen=True)
class Prefuse:
    """A setting: the size of a micro-batch in `unit`, and what else is searched."""

    size: int
    unit: str
    checkpointing: str = ""
    compiled: bool = False

    def __str__(self) -> str:
        told = ["shared prefixes", f"micro-batches of {self.size} {self.unit}"]
        told += [f"{self.checkpointing} checkpointing"] if self.checkpointing else []
        return ", ".join(told + (["torch_compile"] if self.compiled else []))


def stages(
    sizes: list[int], unit: str, compiled: bool
) -> list[Callable[[Prefuse | None], list[Prefuse]]]:
    """Micro-batches of these sizes; then the largest with less kept of each row."""

    def first(_: Prefuse | None) -> list[Prefuse]:
        return [Prefuse(size, unit) for size in sizes]

    def leaner(best: Prefuse | None) -> list[Prefuse]:
        best = best or Prefuse(sizes[0], unit)
        large = replace(best, size=max(sizes))
        return [replace(large, checkpointing=x) for x in ("selective", "full")]

    def compiler(best: Prefuse | None) -> list[Prefuse]:
        return [replace(best, compiled=True)] if best and compiled else []

    return [first, leaner, compiler]


def options(folder: str, precision: str, setting: Prefuse, clock: Clock) -> dict[str, Any]:
    """Of any command: prefuse's defaults but for these."""
    dtype, mixed = PRECISIONS[precision]
    return dict(
        model_name_or_path="random",
        dataset_name="lengths.json",
        output_dir=folder,
        dtype=str(dtype).removeprefix("torch."),
        bf16=mixed,
        gradient_checkpointing=bool(setting.checkpointing),
        gradient_checkpointing_policy=setting.checkpointing or "full",
        torch_compile=setting.compiled,
        max_steps=clock.total,
        learning_rate=1e-6,
        shuffle_dataset=False,
        save_steps=0,
        disable_tqdm=True,
    )


class Enough(Exception):
    """A run has the steps that it may have."""


def steps(
    config,
    method,
    trained,
    optimizer,
    schedule,
    ranks,
    clock: Clock,
    between: Callable[[int], None] = lambda done: None,
    meter=None,
) -> float:
    """prefuse's training loop until the clock has enough; the first step's gradient norm.

    between: called after each step with their number.
    """

    def objective(scorer, batch):
        clock.computed += len(batch.tokens)
        return method.objective(scorer, batch)

    def after_step(done: int) -> None:
        method.after_step(done)
        enough = clock.mark()
        between(done)
        if enough:
            raise Enough

    timed = method._replace(objective=objective, after_step=after_step)
    run = config, timed, trained, optimizer, schedule, None, ranks
    with contextlib.suppress(Enough):
        train(*run, Report(config, "benchmark", ranks), meter or Meter(ranks))
    first = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0]
    return json.loads(first)["grad_norm"]
