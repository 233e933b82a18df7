"""Feedback: completions -> rewards, by functions that may raise, hang or return nonsense.

A function is TRL's: f(prompts, completions, completion_ids, **columns) -> a number or None for each
completion, plain or `async`. None means that it does not apply; an exception in the place of a
number, that it failed on this completion. A list of numbers, one for each of its completion_ids, or
Spans of its text, says what parts of a completion are worth; their sum is its reward.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import UserError
from .feedback.cache import Cache, key_of
from .feedback.call import Call, Caller, Failure
from .feedback.dense import Dense, Spans, of_json, read_dense, to_json, total
from .feedback.load import BUILTINS, Reward, load

__all__ = ["BUILTINS", "Feedback", "Scores", "Spans", "combine"]

Value = float | Dense


COMPUTED = ("prompts", "completions", "completion_ids", "log_metric", "log_extra")


class Scores(NamedTuple):
    """S completions' rewards from F functions, and what went wrong."""

    rewards: np.ndarray  # [S, F] float64; NaN for None and for failures that are skipped
    failures: dict[str, int]  # completions by kind of failure
    notes: tuple[str, ...] = ()  # a line for each prompt and function that failed
    metrics: dict[str, float] = {}  # what functions gave to log_metric, averaged
    extra: dict[str, list] = {}  # what they gave to log_extra: a value a completion
    dense: dict[tuple[int, int], Dense] = {}  # those that are sums, by completion and function


class Feedback:
    """Several rewards of the same completions, called so that nothing hangs and no failure hides.

    A function that raises or returns the wrong count is called again prompt by prompt, so that only
    the prompts it fails on are lost. A call that times out is given up on as a whole.
    """

    def __init__(
        self,
        functions: Sequence[str | Callable | Reward],
        weights: Sequence[float] | None = None,
        *,
        on_failure: Literal["stop", "skip", "zero"] = "stop",
        timeout: float = 60.0,
        cache: Path | None = None,
        max_concurrency: int = 8,
        kind: str = "reward",
        neutral: float = 0.0,
    ):
        """kind: what messages call a function. neutral: what "zero" puts in a failure's place."""
        if not functions:
            raise UserError("wanted a reward: a built-in's name, a path or a function; got none")
        if on_failure not in ("stop", "skip", "zero"):
            raise UserError(f"on_failure: wanted stop, skip or zero; got {on_failure!r}")
        if not timeout > 0 or max_concurrency < 1:
            raise UserError(
                "wanted a timeout above 0 seconds and max_concurrency of 1 or more; got "
                f"{timeout} and {max_concurrency}"
            )
        self.rewards = tuple(load(f) for f in functions)
        self.names = _distinct([reward.name for reward in self.rewards])
        self.weights = _weights(weights, self.names)
        self.on_failure, self.kind, self.neutral = on_failure, kind, neutral
        self.caller = Caller(timeout, max_concurrency)
        self.cache = None if cache is None else Cache(Path(cache))

    def check(self, columns: Iterable[str]) -> None:
        """A UserError if a function reads what rows with these columns do not give it."""
        given = dict.fromkeys((*COMPUTED, *columns))
        for reward in self.rewards:
            reward.arguments(given)

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        indices: list,
    ) -> Scores:
        """Rewards of completions. `indices` is what the run calls their rows, as "file.jsonl:12".

        Failures that `on_failure` does not stop at are counted and noted.
        """
        given = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
        }
        logs = _Logs()
        tasks = [_Task(self, reward, given, logs) for reward in self.rewards]
        for task in tasks:
            if task.reward.is_async:
                task.start()  # all at once; the others run one after the other
        rewards = np.full((len(completions), len(tasks)), math.nan)
        failures: Counter[str] = Counter()
        notes: dict[tuple, str] = {}
        dense: dict[tuple[int, int], Dense] = {}
        for f, task in enumerate(tasks):
            for i, value in enumerate(task.values(indices)):
                if isinstance(value, (np.ndarray, Spans)):
                    rewards[i, f], dense[i, f] = total(value), value
                    continue
                if not isinstance(value, Failure):
                    rewards[i, f] = value
                    continue
                note = f"{self.kind} {self.names[f]} {value.story} on {indices[i]}"
                if self.on_failure == "stop":
                    raise UserError(
                        f"{note}. Fix the {self.kind} or the row, or go on without: "
                        "--reward_failure skip, or zero"
                    ) from value
                failures[value.kind] += 1
                notes.setdefault((f, value.kind, str(indices[i])), note)
                rewards[i, f] = self.neutral if self.on_failure == "zero" else math.nan
        metrics = {name: float(np.mean(values)) for name, values in logs.metrics.items()}
        extra = {k: v for k, v in logs.extra.items() if len(v) == len(completions)}
        return Scores(rewards, dict(failures), tuple(notes.values()), metrics, extra, dense)


class _Logs:
    """What TRL's log_metric and log_extra were given."""

    def __init__(self):
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: list) -> None:
        self.extra[column] = list(values)


class _Task:
    """One function's work on a batch: what the cache knows, the call, and its values."""

    def __init__(self, feedback: Feedback, reward: Reward, given: dict[str, list], logs: _Logs):
        self.reward, self.caller = reward, feedback.caller
        self.cache = None if reward.compares else feedback.cache
        self.logs = {"log_metric": logs.log_metric, "log_extra": logs.log_extra}
        self.arguments = {
            name: values
            for name, values in reward.arguments({**given, **self.logs}).items()
            if name not in self.logs
        }
        self.completions = given["completions"]
        self.lengths = [len(ids) for ids in given["completion_ids"]]
        self.count = len(self.completions)
        self.known: dict[int, Value] = {}
        self.keys: list[str] = []
        if self.cache is not None:
            self._recall(given)
        self.todo = [i for i in range(self.count) if i not in self.known]
        self.call: Call | None = None

    def _recall(self, given: dict[str, list]) -> None:
        assert self.cache is not None
        read = {**self.arguments, **{k: given[k] for k in ("prompts", "completions")}}
        for i in range(self.count):
            row = {name: values[i] for name, values in read.items()}
            self.keys.append(key_of(self.reward.name, self.reward.version, row))
            for value in self.cache.get(self.keys[i]):
                found = of_json(value)
                if isinstance(found, np.ndarray) and len(found) != self.lengths[i]:
                    continue  # the same text of other tokens
                self.known[i] = found

    def start(self, rows: list[int] | None = None) -> Call:
        """Calls the function on some rows, or on all that are to do."""
        rows = self.todo if rows is None else rows
        some = {name: [values[i] for i in rows] for name, values in self.arguments.items()}
        logs = self.reward.arguments({**self.arguments, **self.logs})
        some.update({name: logs[name] for name in self.logs if name in logs})
        self.call = self.caller.start(self.reward.function, some, self.reward.is_async)
        return self.call

    def values(self, indices: list) -> list[Value | Failure]:
        """A number, rewards of parts or a Failure for every completion."""
        fresh = self._fresh(indices) if self.todo else []
        results: dict[int, Value | Failure] = dict(zip(self.todo, fresh, strict=True))
        if self.cache is not None:
            good = {i: v for i, v in results.items() if not isinstance(v, Failure)}
            self.cache.put({self.keys[i]: to_json(v) for i, v in good.items()})
        return [results[i] if i in results else self.known[i] for i in range(self.count)]

    def _fresh(self, indices: list) -> list[Value | Failure]:
        try:
            call = self.call or self.start()
            return self._read(call.result(), self.todo)
        except Failure as failure:
            if failure.kind == "timed out":
                return [failure] * len(self.todo)
            return self._prompt_by_prompt(indices, failure)

    def _prompt_by_prompt(self, indices: list, failure: Failure) -> list[Value | Failure]:
        """The same function on each prompt's completions; it may compare these with each other."""
        groups: dict[str, list[int]] = {}
        for i in self.todo:
            groups.setdefault(str(indices[i]), []).append(i)
        results: dict[int, Value | Failure] = dict.fromkeys(self.todo, failure)
        deadline = time.monotonic() + self.caller.timeout
        for rows in groups.values() if len(groups) > 1 else ():
            if time.monotonic() > deadline:
                failure = Failure("timed out", f"timed out after {self.caller.timeout:g} s")
                results.update(dict.fromkeys(rows, failure))
                continue
            try:
                found = self._read(self.start(rows).result(), rows)
            except Failure as error:
                found = [error] * len(rows)
            results.update(zip(rows, found, strict=True))
        return [results[i] for i in self.todo]

    def _read(self, result: Any, rows: list[int]) -> list[Value | Failure]:
        """What the function returned for these completions."""
        result = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(result, (list, tuple)):
            story = f"returned {_shown(result)}, not a list of numbers"
            raise Failure("wrong type", story)
        if len(result) != len(rows):
            story = f"returned {len(result)} rewards for {len(rows)} completions"
            raise Failure("wrong count", story)
        return [self._value(value, i) for value, i in zip(result, rows, strict=True)]

    def _value(self, value: Any, i: int) -> Value | Failure:
        if getattr(value, "ndim", 0) == 1 and len(value) > 1:
            value = value.tolist()
        if not isinstance(value, (list, tuple, Spans)):
            return _number(value)
        try:
            return read_dense(value, self.lengths[i], self.completions[i])
        except Failure as failure:
            return failure


def _number(value: Any) -> float | Failure:
    if value is None:
        return math.nan
    if isinstance(value, Failure):
        return value
    if isinstance(value, Exception):  # of one completion, by a function that goes on with others
        return Failure("raised", f"raised {type(value).__name__}: {value}")
    try:
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, (bool, int, float)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return Failure("wrong type", f"returned {_shown(value)}, not a number,")
    if not math.isfinite(number):
        return Failure("not finite", f"returned {number}")
    return number


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"


def _distinct(names: list[str]) -> tuple[str, ...]:
    """The names, numbered where they repeat."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(distinct)


def _weights(weights: Sequence[float] | None, names: Sequence[str]) -> np.ndarray:
    result = np.ones(len(names)) if weights is None else np.asarray(weights, dtype=np.float64)
    if result.shape != (len(names),) or not np.isfinite(result).all():
        raise UserError(
            f"reward_weights: wanted a number for each of {', '.join(names)}; got {weights}"
        )
    return result


def combine(
    rewards: np.ndarray,
    weights: Sequence[float] | np.ndarray,
    normalise: Literal["none", "per_function"] = "none",
    *,
    how: Literal["sum", "min"] = "sum",
    group_size: int | None = None,
) -> np.ndarray:
    """One reward a completion: the weighted sum of those that apply; NaN where none does, [S].

    Args:
        rewards: [S, F], NaN where a function does not apply.
        normalise: "per_function" subtracts each function's mean and divides by its standard
            deviation + 1e-4, over the batch or over groups of `group_size` rows in a row.
        how: "min" is max-min's reward, the smallest of the weighted ones (arXiv:2402.08925).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if normalise not in ("none", "per_function") or how not in ("sum", "min"):
        raise UserError(
            "wanted normalise none or per_function and how sum or min; got "
            f"{normalise!r} and {how!r}"
        )
    if normalise == "per_function":
        grouped = rewards.reshape(-1, group_size or max(len(rewards), 1), rewards.shape[1])
        rewards = _standardised(grouped).reshape(rewards.shape)
    weighted = rewards * np.asarray(weights, dtype=np.float64)
    applies = ~np.isnan(weighted)
    if how == "min":
        total = np.where(applies, weighted, np.inf).min(1, initial=np.inf)
    else:
        total = np.where(applies, weighted, 0.0).sum(1)
    return np.where(applies.any(1), total, np.nan)


def _standardised(x: np.ndarray) -> np.ndarray:
    """Over axis 1, by what is not NaN; Bessel's correction, as torch's std has."""
    good = ~np.isnan(x)
    count = good.sum(1, keepdims=True)
    mean = np.where(good, x, 0.0).sum(1, keepdims=True) / np.maximum(count, 1)
    square = np.where(good, x - mean, 0.0) ** 2
    std = np.sqrt(square.sum(1, keepdims=True) / np.maximum(count - 1, 1))
    return (x - mean) / (std + 1e-4)
