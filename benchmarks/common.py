"""What every benchmark shares: the clock, the ceilings, the description of the machine, tables."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def milliseconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Median time of `run` after a warm-up, on whatever device it runs."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        ms: Any = do_bench(run, warmup=100, rep=int(seconds * 1000), return_mode="median")
        return ms
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return sorted(times)[len(times) // 2]


def in_turns(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of each, measured in turn: a machine that slows down for a minute slows
    all of them."""
    if torch.cuda.is_available():
        return {name: milliseconds(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


def machine() -> dict[str, object]:
    """Device, versions and commit, for the head of a result file."""
    import prefuse.kernels.launch as launch

    info: dict[str, object] = {"device": _device_name(), "torch": torch.__version__}
    info["triton"] = getattr(launch.triton, "__version__", "none") if launch.HAS_TRITON else "none"
    info["threads"] = torch.get_num_threads()
    git = ["git", "-C", str(ROOT)]
    info["commit"] = _output([*git, "rev-parse", "--short", "HEAD"]) or "unknown"
    if _output([*git, "status", "--porcelain", "--untracked-files=no"]):
        info["commit"] = f"{info['commit']} + changes"
    return info


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            x.split(":", 1)[1].strip()
            for x in cpuinfo.read_text().splitlines()
            if "model name" in x
        ]
        if names:
            return f"{names[0]} ({len(names)} threads)"
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def reset_peak_memory() -> float:
    """Starts a new peak; returns the memory in use, in MB of 10^6 bytes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_memory_mb() -> float:
    """The peak since `reset_peak_memory`: of the allocator on a GPU, else of the Linux process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    return _resident("VmHWM")


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux")


@cache
def ceilings() -> dict[str, float]:
    """Measured limits of this machine: GB/s of a large copy, TFLOP/s of a large matrix product."""
    dev = device()
    size = 1 << (28 if dev.type == "cuda" else 25)
    source = torch.randn(size, device=dev)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source))
    dtype, n = (torch.bfloat16, 8192) if dev.type == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(n, n, device=dev, dtype=dtype) for _ in range(2))
    matmul_ms = milliseconds(lambda: a @ b)
    return {"gbps": 8 * size / copy_ms / 1e6, "tflops": 2 * n**3 / matmul_ms / 1e9}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; columns in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def publish(title: str, info: dict[str, object], rows: list[dict], output: Path | None) -> None:
    """Prints a result; `output`.json and `output`.md get it too."""
    told = "; ".join(f"{k} {v}" for k, v in info.items())
    script = Path(sys.argv[0]).name
    text = f"# {title}\n\n{told}.\nWritten by benchmarks/{script}.\n\n{table(rows)}"
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": info, "results": rows}
        output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        output.with_suffix(".md").write_text(text + "\n")


def with_memory(about, rows, memory_rows, memory_case, shape: tuple[int, int, int]) -> None:
    """A benchmark's own command: its rows, or with --memory those of memory, each in a process of
    its own, which is asked for with --case."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, default=shape, metavar=("N", "H", "V"))
    args = parser.parse_args()
    if args.case:
        print(memory_case(args.case, tuple(args.shape)))
        return
    print(json.dumps(machine()))
    print(table(memory_rows(tuple(args.shape)) if args.memory else rows()))


def extra_mb(script: str, case: str, shape: tuple[int, ...]) -> float:
    """What `memory_case` of that script says, from a process of its own."""
    command = [sys.executable, script, "--case", case, "--shape", *map(str, shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
