"""One case of a benchmark: every method is checked, then all are timed in turns, and rows tell it.

A method that raises, takes too long or returns something wrong is a row with its reason; the others
are measured all the same. Before each method's first run the record says which one it is: if that
run takes the process with it, run.py starts the rest again without it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import CEILINGS, ceilings, device, machine, peak_memory_mb, reset_peak_memory, table
from timing import Run, Times, at_most, replayed, timed, told, wall_ms

FIRST_RUN_SECONDS = 45.0  # compilers and autotuning included
DEVICE_LOST = 70  # exit code: nothing more can run in this process
OUT_OF_TIME = "not measured: the time was over"
LATE = 25.0  # seconds beyond its time in which a process still measures what is ours
BRIEFLY = 0.5
TIMED = 0.4  # of a case's seconds, whatever its checks took
GRACE = 10.0  # seconds beyond a case's until a peer is too late to be checked: imports take some


class Method(NamedTuple):
    """One way to do what the case asks for."""

    name: str
    run: Run  # once, all of it
    errors: Callable[[Any], dict[str, float]]  # of what run returned, by column
    limits: dict[str, float]  # what is still right, by column; NaN never is
    ours: bool = False
    flops: float = 0.0  # that it does
    floor_flops: float | None = None  # of its mode, if that has a floor of its own
    prepare: Run | None = None  # untimed, before each run
    copies: tuple[Run, ...] = ()  # the same run on other inputs, for a graph of all
    graph: bool = True  # whether a graph of it is worth capturing, in a short case
    columns: dict[str, Any] = {}  # noqa: B006 - never changed
    returned: Callable[[Any], float] = lambda out: _bytes_of(out)  # bytes that any method returns


class Case(NamedTuple):
    name: str
    methods: Callable[[], list[Method]]  # makes the inputs
    columns: dict[str, Any]
    flops: float = 0.0  # the least that must be done
    bytes: float = 0.0
    weight: float = 1.0  # its share of the time
    short: bool = False  # so short that launches count: device and wall time are told apart
    label: str = "method"  # the column that names the methods


class Progress(NamedTuple):
    """What the process was told to leave out, and whom it tells what it does."""

    doing: Callable[[str, str], None] = lambda case, method: None
    checked: Callable[[str, list[dict]], None] = lambda case, rows: None  # then they are timed
    without: frozenset[tuple[str, str]] = frozenset()


def _bytes_of(out: Any) -> float:
    tensors = [x for x in out if torch.is_tensor(x)] if isinstance(out, (tuple, list)) else []
    tensors = [out] if torch.is_tensor(out) else tensors
    return float(sum(x.numel() * x.element_size() for x in tensors))


def rows_of(case: Case, seconds: float, progress: Progress | None = None) -> list[dict]:
    """A row for each method of the case, measured in about so many seconds, checks and compilers
    included: peers that are late are left out, ours are measured all the same. If there are no
    seconds, ours are measured as briefly as can be."""
    progress = progress or Progress()
    start = time.perf_counter()
    methods = case.methods()
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        rows[method.name] = row = {**case.columns, case.label: method.name, **method.columns}
        if (case.name, method.name) in progress.without:
            row["error"] = "took its process with it"
            continue
        late = seconds <= 0 or time.perf_counter() - start >= seconds + GRACE
        if late and not method.ours:
            row["error"] = OUT_OF_TIME
            continue
        progress.doing(case.name, method.name)
        row |= _checked(method)
    good = [m for m in methods if "error" not in rows[m.name]]
    progress.checked(case.name, list(rows.values()))
    left = seconds - (time.perf_counter() - start)
    for method, found in _timed(good, case, max(left, TIMED * seconds, BRIEFLY)):
        row = rows[method.name]
        row |= found
        if "ms" in row:
            row |= _rates(method, case, row["ms"])
    for method in methods:  # what is told of few rows comes last
        row = rows[method.name]
        for key in ("note", "wrong", "error"):
            if key in row:
                row[key] = row.pop(key)
        if method.ours and not {"wrong", "error"}.isdisjoint(row):
            row["ours"] = "failed"
    return list(rows.values())


def _checked(method: Method) -> dict[str, Any]:
    """Its errors, and the memory of its second run."""
    found: dict[str, Any] = {}
    try:
        with at_most(FIRST_RUN_SECONDS):
            if method.prepare is not None:
                method.prepare()
            found |= method.errors(method.run())
            if torch.cuda.is_available():
                found["extra MB"] = _extra_mb(method)
    except torch.cuda.OutOfMemoryError:
        found["error"] = "out of memory"
    except Exception as error:
        found["error"] = told(error)
    if torch.cuda.is_available():
        if "error" in found:
            torch.cuda.synchronize()  # raises if the device is lost: then this process is, too
        torch.cuda.empty_cache()
    off = [k for k, limit in method.limits.items() if k in found and not found[k] <= limit]
    if off:
        told_off = ", ".join(f"{k} {found[k]:.1e} > {method.limits[k]:.0e}" for k in off)
        found["wrong"] = told_off
    return found


def _extra_mb(method: Method) -> float:
    """MB at the peak of a run beyond what was there before and what it returns."""
    if method.prepare is not None:
        method.prepare()
    before = reset_peak_memory()
    out = method.run()
    return max(0.0, peak_memory_mb() - before - method.returned(out) / 1e6)


def _timed(
    methods: list[Method], case: Case, seconds: float
) -> Iterator[tuple[Method, dict[str, Any]]]:
    prepare = {m.name: m.prepare for m in methods if m.prepare is not None}
    graphs = case.short and torch.cuda.is_available()
    share = seconds / 2 if graphs else seconds
    try:
        runs = {m.name: m.run for m in methods}
        times: dict[str, Times | str] = dict(timed(runs, share, prepare=prepare))
    except Exception:  # of which method? each alone tells
        times = {m.name: _alone(m, share / len(methods)) for m in methods}
    for method in methods:
        if isinstance(reason := times[method.name], str):
            yield method, {"error": reason}
    methods = [m for m in methods if isinstance(times[m.name], Times)]
    device_times: dict[str, Times | str] = {}
    if graphs:
        short = {m.name: [m.run, *m.copies] for m in methods if m.graph}
        device_times = replayed(short, share)
    for method in methods:
        call = times[method.name]
        assert isinstance(call, Times)
        found = _columns(call)
        if graphs and method.graph:
            found = _of_graph(found, device_times[method.name])
            found["wall ms"] = wall_ms(method.run)
        yield method, found


def _of_graph(call: dict[str, Any], replay: Times | str) -> dict[str, Any]:
    """The columns of a short run: its device time first, if a graph could be had."""
    if isinstance(replay, str):
        return call | {"timed by": "call", "note": replay}
    return _columns(replay) | {"timed by": "graph", "call ms": call["ms"]}


def _alone(method: Method, seconds: float) -> Times | str:
    prepare = {} if method.prepare is None else {method.name: method.prepare}
    try:
        return timed({method.name: method.run}, seconds, prepare=prepare)[method.name]
    except Exception as error:
        return f"while timed: {told(error)}"


def _columns(times: Times) -> dict[str, float]:
    return {"ms": times.ms, "p20 ms": times.low, "p80 ms": times.high, "runs": times.runs}


def _rates(method: Method, case: Case, ms: float) -> dict[str, float]:
    limit = ceilings()
    found = {}
    if method.flops:
        found["TFLOP/s"] = method.flops / ms / 1e9
        found["% of matmul"] = 100 * found["TFLOP/s"] / limit["tflops"]
    elif case.bytes:
        found["GB/s"] = case.bytes / ms / 1e6
        found["% of copy"] = 100 * found["GB/s"] / limit["gbps"]
    flops = case.flops if method.floor_flops is None else method.floor_flops
    floor = max(flops / limit["tflops"] / 1e9, case.bytes / limit["gbps"] / 1e6)
    if not floor:
        return found
    return found | {"floor ms": floor, "% of floor": 100 * floor / ms}


class Record:
    """What a benchmark's process has found so far, in a file: it may be ended at any moment."""

    def __init__(self, path: Path | None):
        self.path = path
        self.sections: dict[str, list[dict]] = {}
        self.doing: tuple[str, str] = ("", "")
        if path is not None and path.exists():
            self.sections = json.loads(path.read_text())["sections"]

    def write(self) -> None:
        if self.path is None:
            return
        new = self.path.with_suffix(".new")
        told = {"sections": self.sections, "doing": self.doing, "ceilings": CEILINGS}
        new.write_text(json.dumps(told))
        new.replace(self.path)

    def now(self, case: str, method: str) -> None:
        self.doing = (case, method)
        self.write()

    def checked(self, case: str, rows: list[dict]) -> None:
        self.sections[case] = rows
        self.now(case, "")


def measure(
    cases: list[Case], seconds: float, record: Record, without: frozenset[tuple[str, str]]
) -> int:
    """Measures what the record does not have yet; the exit code of the process."""
    ceilings()  # not on the benchmark's time
    end = time.perf_counter() + seconds
    todo = [case for case in cases if case.name not in record.sections]
    for number, case in enumerate(todo):
        left = end - time.perf_counter()
        label = {**case.columns, case.label: ""}
        if left <= -LATE:
            record.sections[case.name] = [label | {"error": OUT_OF_TIME}]
            continue
        share = case.weight / sum(other.weight for other in todo[number:])
        try:
            rows = rows_of(case, left * share, Progress(record.now, record.checked, without))
        except Exception as error:
            rows = [label | {"error": told(error), "ours": "failed"}]
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                except Exception:
                    return DEVICE_LOST
        record.sections[case.name] = rows
        record.now("", "")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    record.write()
    rows = [row for found in record.sections.values() for row in found]
    return int(any(row.get("ours") == "failed" for row in rows))


def main(about: str | None, cases: Callable[[str], list[Case]], memory: Any = None) -> None:
    """A benchmark's own command. `cases` takes "tiny", "cpu" or "cuda"; `memory`, if there is one,
    has `rows(shape)`, `case(name, shape)` and `shape`: peak memory, a process a case."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=60 if torch.cuda.is_available() else 600)
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all?")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs=2, action="append", default=[], help=argparse.SUPPRESS)
    if memory is not None:
        parser.add_argument("--memory", action="store_true", help="peak memory alone")
        parser.add_argument("--case", help=argparse.SUPPRESS)
        parser.add_argument("--shape", type=int, nargs=3, default=memory.shape)
    args = parser.parse_args()
    if memory is not None and args.case:
        print(memory.case(args.case, tuple(args.shape)))
        return
    record = Record(args.record)
    if memory is not None and args.memory:
        record.sections["peak memory"] = memory.rows(tuple(args.shape))
        record.write()
        print(table(record.sections["peak memory"]))
        return
    CEILINGS.update(args.ceilings or {})
    without = frozenset((case, method) for case, method in args.without)
    size = "tiny" if args.tiny else device().type
    code = measure(cases(size), args.seconds, record, without)
    if args.record is None:
        print(json.dumps(machine()))
        for name, rows in record.sections.items():
            print(f"\n## {name}\n\n{table(rows)}")
    sys.stdout.flush()
    sys.exit(code)
