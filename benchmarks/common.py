"""What every benchmark shares: the ceilings, the description of the machine, memory, tables."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from timing import in_turns as in_turns  # for other benchmarks
from timing import timed

ROOT = Path(__file__).parents[1]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


CEILINGS: dict[str, float] = {}  # what run.py measured once for all of its processes


def ceilings() -> dict[str, float]:
    """Measured limits of this machine: GB/s of a large copy, TFLOP/s of a large matrix product."""
    if not CEILINGS:
        CEILINGS.update(_measured_ceilings())
    return CEILINGS


def _measured_ceilings() -> dict[str, float]:
    dev = device()
    size = 1 << (30 if dev.type == "cuda" else 25)
    source = torch.randn(size, device=dev)
    target = torch.empty_like(source)
    dtype, n = (torch.bfloat16, 8192) if dev.type == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(n, n, device=dev, dtype=dtype) for _ in range(2))
    times = timed({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 2.0)
    return {
        "gbps": 8 * size / times["copy"].ms / 1e6,
        "tflops": 2 * n**3 / times["matmul"].ms / 1e9,
    }


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
    return f"{value:.3g}" if not abs(value) >= 1000 else f"{value:.0f}"


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


def extra_mb(script: str, case: str, shape: tuple[int, ...]) -> float:
    """What `memory_case` of that script says, from a process of its own."""
    command = [sys.executable, script, "--case", case, "--shape", *map(str, shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
