"""The clock of the benchmarks.

Methods take turns, so that a machine that slows down for a minute slows all of them; the median
counts and the 20th and 80th percentile are told with it. On a GPU every run stands between two
events, on inputs that a write of several times the L2 has pushed out of it. An op of microseconds
is also timed as a replayed CUDA graph, which has no launches of the host between its kernels.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch

Run = Callable[[], object]
FLUSH_BYTES = 256 << 20  # an L2 has 50 to 126 MB
ROUNDS = 5
MOST = 40  # runs of a method in one of its turns


class Times(NamedTuple):
    """Milliseconds of a run."""

    ms: float  # median
    low: float  # 20th percentile
    high: float  # 80th percentile
    runs: int

    def __truediv__(self, parts: int) -> Times:  # type: ignore[override]
        return Times(self.ms / parts, self.low / parts, self.high / parts, self.runs)


def timed(
    runs: dict[str, Run],
    seconds: float = 1.0,
    rounds: int = ROUNDS,
    prepare: dict[str, Run] | None = None,
) -> dict[str, Times]:
    """Times of each, after a warm-up, in turns; `prepare` runs before each run, untimed.

    Fast ones run several times in a turn, so that each takes its share of the seconds. A slow one
    runs once in each of the rounds; when the seconds are over, in three of them, and when they are
    over twice, in one.
    """
    prepare = prepare or {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rest = {name: _once(run, prepare.get(name)) for name, run in runs.items()}
    share = 1000 * seconds / (rounds * max(len(runs), 1))
    turns = {name: min(max(int(share / max(ms, 1e-3)), 1), MOST) for name, ms in rest.items()}
    for done in range(rounds):
        late = time.perf_counter() - end
        if 0 < seconds and (done >= 3 and late > 0 or done and late > seconds):
            break
        for name, run in runs.items():
            times[name] += [_once(run, prepare.get(name)) for _ in range(turns[name])]
    return {name: summary(found) for name, found in times.items()}


def in_turns(runs: dict[str, Run], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each, run once in each of the rounds."""
    return {name: found.ms for name, found in timed(runs, 0, rounds).items()}


def summary(times: list[float]) -> Times:
    ordered = sorted(times)
    last = len(ordered) - 1
    low, middle, high = (ordered[round(last * share)] for share in (0.2, 0.5, 0.8))
    return Times(middle, low, high, len(ordered))


def _once(run: Run, prepare: Run | None = None) -> float:
    if prepare is not None:
        prepare()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1000
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def wall_ms(run: Run, seconds: float = 0.2) -> float:
    """Milliseconds from call to call in a loop that never waits: host and launches included."""
    run()
    torch.cuda.synchronize()
    calls, start = 0, time.perf_counter()
    while calls < 10 or time.perf_counter() < start + seconds:
        run()
        calls += 1
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def graph_of(runs: list[Run]) -> Run:
    """The replay of one CUDA graph of all `runs`: one run on several inputs, which together exceed
    the L2, so that each finds its inputs outside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def replayed(methods: dict[str, list[Run]], seconds: float) -> dict[str, Times | str]:
    """Device times of one run of each method, by graphs; or why there is no graph of it."""
    graphs: dict[str, Run] = {}
    found: dict[str, Times | str] = {}
    for name, runs in methods.items():
        try:
            graphs[name] = graph_of(runs)
        except Exception as error:  # it synchronises, or allocates outside PyTorch
            found[name] = f"no graph: {told(error)}"
            torch.cuda.synchronize()  # raises if the device is lost, which is the caller's to tell
    times = timed(graphs, seconds)
    return found | {name: times[name] / len(methods[name]) for name in graphs}


def told(error: BaseException, length: int = 160) -> str:
    """An exception in one line of a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= length else f"{text[: length - 3]}..."


class TookTooLong(Exception):
    """A run that was not over in time."""


@contextmanager
def at_most(seconds: float):
    """Raises TookTooLong inside the block when the time is over: a compiler that takes minutes
    would take them from everything after it. In threads other than the main one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    former = signal.signal(signal.SIGALRM, partial(_raise_too_long, seconds))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _raise_too_long(seconds: float, *_) -> None:
    raise TookTooLong(f"not over after {seconds:.0f} s")
