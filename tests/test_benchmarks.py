"""The benchmarks' own parts: the clock, the oracle, a case, and processes that may die."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def module(name: str) -> Any:
    return importlib.import_module(name)


class FakeGpu:
    """Events that read a clock which runs advance, a heap that they fill, graphs that run what they
    hold without its launches; everything else of a GPU does nothing."""

    LAUNCH = 0.5  # milliseconds

    def __init__(self, monkeypatch):
        self.now, self.flushes, self.order = 0.0, 0, []
        self.heap = self.peak = 1e6
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at - self.at

        class Buffer:
            def zero_(self):
                gpu.flushes += 1
                gpu.now += 1000.0

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.heap)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.new_peak)
        monkeypatch.setattr(module("timing"), "graph_of", self.graph_of)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(module("timing"), "_flush_buffer", Buffer)

    def new_peak(self):
        self.peak = self.heap

    def run(self, name: str, ms: float, extra_bytes: float = 0.0):
        def run():
            self.order.append(name)
            self.now += ms + self.LAUNCH
            self.peak = max(self.peak, self.heap + extra_bytes)
            return torch.zeros(250_000)  # a megabyte

        return run

    def graph_of(self, runs):
        def replay():
            for run in runs:
                run()
                self.now -= self.LAUNCH

        return replay


def test_runs_on_a_gpu_take_turns_between_events_after_a_flush(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    runs = {"slow": gpu.run("slow", 39.5), "fast": gpu.run("fast", 1.5)}
    prepared = []

    def prepare():
        prepared.append(gpu.now)
        gpu.now += 7.0  # not on the clock of the run

    found = module("timing").timed(runs, 0.2, prepare={"fast": prepare})
    assert found["slow"][:3] == (40.0, 40.0, 40.0) and found["fast"][:3] == (2.0, 2.0, 2.0)
    # 0.2 s over two methods and five rounds are 20 ms a turn: ten of 2 ms, one of 40
    assert (found["slow"].runs, found["fast"].runs) == (5, 50)
    assert gpu.order[:4] == ["slow", "fast", "slow", "fast"]
    assert gpu.order[2:13] == ["slow", *["fast"] * 10]
    assert gpu.flushes == len(gpu.order) and len(prepared) == 51


def test_a_short_case_is_timed_on_the_device_and_from_call_to_call(monkeypatch, ceilings):
    gpu, measure = FakeGpu(monkeypatch), module("measure")

    def made(name, ms, **more):
        run = gpu.run(name, ms, 4e6)
        return measure.Method(name, run, lambda out: {}, {}, **more)

    copies = tuple(gpu.run("copy", ms) for ms in (2.5, 3.0))
    methods = [made("prefuse", 2.0, ours=True, copies=copies), made("loop", 9.0, graph=False)]
    case = measure.Case("c", lambda: methods, {}, bytes=1e6, short=True)
    row, loop = measure.rows_of(case, 0.1)
    assert (row["ms"], row["call ms"], row["timed by"]) == (2.5, 2.5, "graph")  # mean of 2, 2.5, 3
    assert row["GB/s"] == pytest.approx(0.4) and row["wall ms"] > 0
    assert row["extra MB"] == pytest.approx(3.0)  # 4 above the heap, 1 of them returned
    assert loop["ms"] == 9.5 and "timed by" not in loop and "wall ms" not in loop

    def no_graph(runs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module("timing"), "graph_of", no_graph)
    row, _ = measure.rows_of(case, 0.1)
    assert row["timed by"] == "call" and "not permitted" in row["note"] and row["ms"] == 2.5


def test_a_summary_has_the_median_and_its_spread():
    found = module("timing").summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.ms, found.low, found.high, found.runs) == (3.0, 2.0, 5.0, 6)


def test_one_that_is_slow_does_not_outlive_the_seconds():
    calls = []

    def slow():
        calls.append(0)
        time.sleep(0.02)

    found = module("timing").timed({"slow": slow}, 0.05)
    assert found["slow"].runs == 3 and len(calls) == 4


def test_what_takes_too_long_is_ended():
    timing = module("timing")
    with pytest.raises(timing.TookTooLong, match="not over"), timing.at_most(0.05):
        time.sleep(5)
    with timing.at_most(0.2):
        pass
    time.sleep(0.25)  # the former limit is gone


def test_the_oracle_is_the_reference_in_float64():
    exact, bench = module("exact"), module("bench_linear_logp")
    hidden, weight, targets = bench.inputs((40, 8, 50), torch.float64)
    factors = torch.randn(40, dtype=torch.float64)
    old, exact.CHUNK_BYTES["cpu"] = exact.CHUNK_BYTES["cpu"], 8 * 50 * 7  # runs of 7 tokens
    try:
        found = exact.exact_logp(hidden, weight, targets, {"any": factors})
    finally:
        exact.CHUNK_BYTES["cpu"] = old
    wanted = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)
    logp = wanted.float().detach()
    d_hidden, d_weight = torch.autograd.grad(wanted, (hidden, weight), factors)
    out = found.value, found.d_hidden["any"], found.d_weight["any"]
    torch.testing.assert_close(out[0], wanted.detach())
    torch.testing.assert_close(out[1], d_hidden[found.rows])
    torch.testing.assert_close(out[2], d_weight[found.entries])
    assert torch.isin(targets, found.entries).all()
    errors = exact.head_errors(found, "any", logp, d_hidden, d_weight * 1.01)
    assert errors["max error"] < 1e-5 and errors["d hidden off"] < 1e-12
    assert errors["d weight off"] == pytest.approx(0.01)
    broken = d_hidden.clone()
    broken[found.rows[3]] = float("nan")
    off = exact.head_errors(found, "any", None, broken, None)["d hidden off"]
    assert off != off


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setitem(module("common").CEILINGS, "gbps", 10.0)
    monkeypatch.setitem(module("common").CEILINGS, "tflops", 0.1)


def test_a_case_tells_wrong_and_failing_methods_and_measures_the_others(ceilings):
    measure = module("measure")

    def errors(out):
        return {"off": out}

    def fails():
        raise RuntimeError("no such kernel | here")

    def made(name, run, ours=False):
        return measure.Method(name, run, errors, {"off": 1e-3}, ours, flops=2e6)

    methods = [
        made("prefuse", lambda: 0.0, True),
        made("prefuse nan", lambda: float("nan"), True),
        made("peer", lambda: 0.5),
        made("broken", fails),
    ]
    case = measure.Case("c", lambda: methods, {"N": 3}, flops=1e6, bytes=1e3)
    rows = {row["method"]: row for row in measure.rows_of(case, 0.01)}
    assert rows["prefuse"]["ms"] > 0 and "wrong" not in rows["prefuse"]
    # the larger of 1e6 FLOPs at 0.1 TFLOP/s and 1e3 bytes at 10 GB/s
    assert rows["prefuse"]["floor ms"] == pytest.approx(0.01)
    share = 100 * 0.01 / rows["prefuse"]["ms"]
    assert rows["prefuse"]["% of floor"] == pytest.approx(share)
    assert rows["prefuse"]["TFLOP/s"] == pytest.approx(2e6 / rows["prefuse"]["ms"] / 1e9)
    assert rows["prefuse nan"]["ours"] == "failed" and "wrong" in rows["prefuse nan"]
    assert rows["peer"]["wrong"] == "off 5.0e-01 > 1e-03" and "ours" not in rows["peer"]
    assert rows["broken"]["error"] == "RuntimeError: no such kernel / here"
    assert "ms" not in rows["broken"] and rows["broken"]["N"] == 3


def script(folder: Path, monkeypatch, body: str) -> None:
    """A benchmark of the name `toy`, as processes.py starts it."""
    monkeypatch.setattr(module("processes"), "HERE", folder)
    head = f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
    text = textwrap.dedent(body)
    (folder / "bench_toy.py").write_text(head + text)


TOY = """
    import os
    from measure import Case, Method, main

    def die():
        os._exit(11)

    def made(name, run, ours=False):
        return Method(name, run, lambda out: {"off": 0.0}, {}, ours, flops=1.0)

    def cases(size):
        first = [made("prefuse", lambda: 0, True), made("deadly", die), made("peer", lambda: 0)]
        calls = []
        later = [made("prefuse", lambda: calls.append(0) or len(calls) > 2 and die(), True)]
        return [
            Case("first", lambda: first, {"op": "first"}, 1.0),
            Case("timed", lambda: later, {"op": "timed"}, 1.0),
            Case("second", lambda: [made("prefuse", lambda: 0, True)], {"op": "second"}, 1.0),
        ]

    main("toy", cases)
"""
FLAGS = ["--tiny", "--ceilings", json.dumps({"gbps": 1.0, "tflops": 1.0})]


def test_a_method_that_kills_its_process_leaves_the_others_measured(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, TOY)
    processes = module("processes")
    found = processes.kernel_benchmark("toy", tmp_path, 30, time.monotonic() + 60, FLAGS)
    rows = {(r.get("op"), r.get("method")): r for r in found.sections["toy"]}
    assert rows["first", "prefuse"]["ms"] > 0 and rows["first", "peer"]["ms"] > 0
    assert rows["first", "deadly"]["error"] == "took its process with it"
    assert rows["second", "prefuse"]["ms"] > 0
    assert "exit code 11" in rows[None, None]["error"]
    # one that dies while it is timed is not blamed on anyone, and its check stays
    assert rows["timed", "prefuse"]["off"] == 0 and "ms" not in rows["timed", "prefuse"]
    assert found.failed == ["timed: exit code 11: no output"] and found.ceilings["gbps"] == 1.0


ENDLESS = """
    import json, subprocess, sys, time
    record = sys.argv[sys.argv.index("--record") + 1]
    rows = {"first": [{"op": "first", "method": "prefuse", "ms": 1.0}]}
    worker = subprocess.Popen(["sleep", "60"])
    told = {"sections": rows, "doing": ["second", "prefuse"], "ceilings": {"worker": worker.pid}}
    open(record, "w").write(json.dumps(told))
    time.sleep(60)
"""


def test_a_benchmark_that_is_not_over_is_ended_and_keeps_what_it_found(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, ENDLESS)
    start = time.monotonic()
    found = module("processes").kernel_benchmark("toy", tmp_path, 1, start + 3, FLAGS)
    assert time.monotonic() - start < 8
    rows = found.sections["toy"]
    assert rows[0] == {"op": "first", "method": "prefuse", "ms": 1.0}
    assert rows[1] == {"error": "second, prefuse: it was not over in time"}
    worker = Path(f"/proc/{found.ceilings['worker']:.0f}/stat")  # its worker is ended, too
    time.sleep(0.2)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"


def test_what_the_time_does_not_suffice_for_is_told_and_ours_measured(ceilings):
    measure = module("measure")

    def made(name, ours):
        return measure.Method(name, lambda: 0, lambda out: {}, {}, ours)

    methods = [made("prefuse", True), made("peer", False)]
    case = measure.Case("c", lambda: methods, {"N": 3}, 1.0)
    record = measure.Record(None)
    assert measure.measure([case], 0.0, record, frozenset()) == 0
    ours, peer = record.sections["c"]
    assert ours["ms"] >= 0 and "ms" not in peer and peer["error"] == measure.OUT_OF_TIME
    record = measure.Record(None)
    assert measure.measure([case], -60.0, record, frozenset()) == 0
    assert record.sections["c"] == [{"N": 3, "method": "", "error": measure.OUT_OF_TIME}]


def test_the_checks_of_peers_are_on_the_clock_of_their_case(ceilings, monkeypatch):
    """A compiler's minute would be taken from the cases after it."""
    measure = module("measure")
    monkeypatch.setattr(measure, "GRACE", 0.05)

    def made(name, seconds=0.0, ours=False):
        checks = lambda out: time.sleep(seconds) or {}  # noqa: E731
        return measure.Method(name, lambda: 0, checks, {}, ours)

    methods = [made("peer"), made("compiled", 0.3), made("late"), made("prefuse", ours=True)]
    rows = measure.rows_of(measure.Case("c", lambda: methods, {}), 0.2)
    told = {row["method"]: row.get("error", "measured") for row in rows}
    wanted = dict.fromkeys(("peer", "compiled", "prefuse"), "measured")
    assert told == wanted | {"late": measure.OUT_OF_TIME}


@pytest.mark.full
def test_run_measures_and_merges(tmp_path, monkeypatch, capsys):
    run = module("run")
    arguments = ["run.py", "--only", "logp", "--tiny", "--seconds", "40", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(tmp_path)])
    assert run.main() == 0
    (path,) = tmp_path.glob("logp-tiny-*.json")
    result = json.loads(path.read_text())
    assert result["machine"]["commit"] == "abc" and result["ceilings"]["gbps"] > 0
    passes = {row["pass"] for row in result["results"]["logp"] if row["impl"] == "torch"}
    assert passes == {"forward", "forward + backward", "in place"}
    assert all(row["ms"] > 0 for row in result["results"]["logp"])
    assert "targets" not in result  # they are for an H200
    assert "## logp" in path.with_suffix(".md").read_text()
    assert "FAILED" not in capsys.readouterr().out


def test_every_setting_of_a_kernel_is_tried_and_then_undone():
    tune, tiled_head = module("tune"), importlib.import_module("prefuse.kernels.tiled_head")
    before, seen = tiled_head.FORWARD_TILE, []

    def run():
        seen.append(tiled_head.FORWARD_TILE)
        if tiled_head.FORWARD_TILE == "too large":
            raise MemoryError("no room")

    sizes = ("one", "too large", "other")
    settings = [({"size": x}, [(tiled_head, "FORWARD_TILE", x)]) for x in sizes]
    one, large, other = tune.tried(settings, run, 0.01)
    assert one["ms"] >= 0 and other["ms"] >= 0 and "ms" not in large
    assert large == {"size": "too large", "no": "MemoryError: no room"}
    assert set(seen) == set(sizes) and tiled_head.FORWARD_TILE is before
