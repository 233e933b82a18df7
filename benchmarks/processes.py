"""The processes of run.py: a benchmark each, with a time after which it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
PEERS = ("transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn")
STARTS = 4  # of a benchmark whose processes die
SLACK = 45.0  # seconds: to start, to check, to compile beyond a benchmark's own clock
START = 8.0  # seconds until Python has its modules
SHORTEST = 15.0  # seconds that are worth starting for


class Found(NamedTuple):
    sections: dict[str, list[dict]]
    ceilings: dict[str, float]
    failed: list[str]  # of ours
    seconds: float
    told: str


def kernel_benchmark(
    name: str, folder: Path, seconds: float, end: float, flags: list[str], memory: bool = False
) -> Found:
    """Runs bench_<name>.py until it is through, starting it again without what it died of."""
    start = time.monotonic()
    stop = min(start + seconds + SLACK, end)
    record = folder / f"{name}{'-memory' if memory else ''}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"bench_{name}.py"), "--record", str(record), *flags]
    command += ["--memory"] if memory else []
    lost: list[str] = []
    why = []
    for _ in range(STARTS):
        left = start + seconds - START - time.monotonic()
        log = record.with_suffix(".log")
        code = _run([*command, "--seconds", str(max(left, 1)), *lost], log, stop)
        if code in (0, 1):
            break
        case, method = _doing(record)
        reason = "it was not over in time" if code is None else f"exit code {code}: {_tail(log)}"
        why.append(f"{case or name}{', ' + method if method else ''}: {reason}")
        if code is None or not case:
            break
        if method:
            lost += ["--without", case, method]
        else:
            _give_up(record, case, reason)
        if stop - time.monotonic() < SHORTEST:
            break
    return _found(name, record, why, time.monotonic() - start, memory)


def _run(command: list[str], log: Path, stop: float) -> int | None:
    """The exit code, or None if the time was over: then it and what it started are ended."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=max(stop - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """The group of a process that this one started, compilers' workers among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _read(record: Path) -> dict[str, Any]:
    return json.loads(record.read_text()) if record.exists() else {}


def _doing(record: Path) -> tuple[str, str]:
    case, method = _read(record).get("doing", ("", ""))
    return case, method


def _give_up(record: Path, case: str, reason: str) -> None:
    """A case that no single method can be blamed for is not started again: what was found of it,
    its errors perhaps, is all."""
    told = _read(record)
    told["sections"].setdefault(case, []).append({"case": case, "error": reason, "ours": "failed"})
    record.write_text(json.dumps(told))


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def _found(name: str, record: Path, why: list[str], seconds: float, memory: bool) -> Found:
    told = _read(record)
    rows = [row for found in told.get("sections", {}).values() for row in found]
    failed = [
        f"{row.get('method', row.get('impl', row.get('case', '')))}: "
        f"{row.get('wrong', row.get('error'))}"
        for row in rows
        if row.get("ours") == "failed"
    ]
    if not rows:
        failed.append("no result")
    rows += [{"error": reason} for reason in why]
    title = f"{name}: peak memory" if memory else name
    summary = f"{len(rows)} rows" + "".join(f"; {reason}" for reason in why)
    return Found({title: rows}, told.get("ceilings", {}), failed, seconds, summary)


def training_benchmark(name: str, folder: Path, seconds: float, end: float, tiny: bool) -> Found:
    """Runs bench_<name>.py, whose time for its search and steps is given."""
    start = time.monotonic()
    output = folder / name
    output.with_suffix(".json").unlink(missing_ok=True)
    log = folder / f"{name}.log"
    shape = ["--tiny"] if tiny else ["--shape", "1.5b"]
    stop = min(start + seconds, end)
    own = max(stop - start - SLACK, SHORTEST)
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *shape]
    code = _run([*command, "--seconds", str(own), "--output", str(output)], log, stop)
    told = _read(output.with_suffix(".json"))
    rows = told.get("results", [])
    why = [] if code == 0 else [f"exit code {code}: {_tail(log)}" if code else "not over in time"]
    rows = [*rows, *({"error": reason} for reason in why)]
    summary = f"{len(rows)} rows" + "".join(f"; {reason}" for reason in why)
    return Found({name: rows}, {}, why, time.monotonic() - start, summary)


def versions() -> dict[str, object]:
    """Of what a GPU's numbers depend on, and of the peers; nothing that is not there."""
    found: dict[str, object] = {}
    if torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
        found["driver"] = _smi("driver_version")
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def clocks() -> str:
    """SM and memory clocks, power and temperature of now."""
    return _smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")


def _smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
