"""What a run left in its folder, read for its page: curves, samples, counts, configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Series(NamedTuple):
    """A metric over the steps at which it was logged; NaN where it was not a finite number."""

    steps: list[int]
    values: list[float]

    def finite(self) -> list[tuple[int, float]]:
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]

    def bad(self) -> list[int]:
        return [s for s, v in zip(self.steps, self.values, strict=True) if not math.isfinite(v)]


class Run(NamedTuple):
    """A finished or interrupted run; whatever its folder lacks is empty."""

    name: str
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: dict[str, Series]
    samples: list[dict[str, Any]]
    ledgers: dict[str, dict[str, Any]]
    unreadable: dict[str, int]  # by file, what could not be read of it

    def last(self, name: str) -> float | None:
        found = self.metrics[name].finite() if name in self.metrics else []
        return found[-1][1] if found else None

    @property
    def steps(self) -> int:
        return max((s.steps[-1] for s in self.metrics.values()), default=0)


def read_run(folder: Path) -> Run:
    """Never raises for what is missing or broken in the folder: that is counted."""
    unreadable: dict[str, int] = {}
    config = _mapping(folder / "config.yaml", unreadable)
    versions = config.pop("versions", None)
    ledgers = _mapping(folder / "ledger.json", unreadable)
    samples = [x for x in _lines(folder / "samples.jsonl", unreadable) if _step(x) is not None]
    return Run(
        folder.resolve().name,
        config,
        versions if isinstance(versions, dict) else {},
        _metrics(_lines(folder / "metrics.jsonl", unreadable)),
        sorted(samples, key=lambda x: x["step"]),
        {str(k): v for k, v in ledgers.items() if isinstance(v, dict)},
        unreadable,
    )


def _metrics(lines: Iterator[dict[str, Any]]) -> dict[str, Series]:
    """By name, in the order of appearance; of two lines of a step the later one counts."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        step = _step(line)
        if step is None:
            continue
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, {})[step] = number(value)
    return {n: Series(sorted(x), [x[s] for s in sorted(x)]) for n, x in found.items()}


def _step(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def number(value: Any) -> float:
    """NaN for what is no number, or beyond any of training."""
    try:
        found = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        found = math.nan
    return found if abs(found) < 1e100 else math.nan


def _lines(path: Path, unreadable: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a run that was killed may have left half a line."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                value = line
            if isinstance(value, dict):
                yield value
            elif value is not None:
                unreadable[path.name] = unreadable.get(path.name, 0) + 1


def _mapping(path: Path, unreadable: dict[str, int]) -> dict[str, Any]:
    """A YAML file (JSON is YAML too) that holds a mapping."""
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        unreadable[path.name] = 1
        return {}
    return value
