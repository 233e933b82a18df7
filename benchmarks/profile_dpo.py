"""Where the time of a DPO step goes: kernels by group, gaps between them, waits of the host.

    python benchmarks/profile_dpo.py --shape 1.5b     # benchmarks/results/profile_dpo_<device>

The steps are those of bench_train_dpo.py. A few run without the profiler, for the time that they
take by themselves; then as many under it. On a CPU it is a table of operations.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_train_dpo import random_pairs, run_prefuse
from common import ROOT, machine, publish
from lengths import MAX_LENGTH
from torch.profiler import ProfilerActivity, profile
from train_common import PRECISIONS, SHAPES, Clock, hushed, wait
from train_prefuse import Prefuse

# the first that fits; prefuse's own kernels are known by their names in the sources
GROUPS = (
    ("attention", r"flash|fmha|sdpa|attention|mha_"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk|aten::(add)?b?mm"),
    ("optimizer and clipping", r"multi_tensor|fused_?adam|lpnorm|_foreach|optimizer"),
    ("casts and copies", r"copy|catarray|memset|memcpy|aten::(to|cat)$"),
    ("gather, scatter and sort", r"index|gather|scatter|embedding|sort|cub::|aten::masked"),
    ("norms and reductions", r"reduce|norm|softmax|aten::(sum|mean|cumsum)"),
    ("elementwise", r"elementwise|pointwise|triton_poi|aten::(mul|add|sub|div|neg|silu|pow|rsqrt)"),
)
LONGEST, LARGEST = 10, 25  # gaps, kernels


class Kernel(NamedTuple):
    """Something that the GPU did; microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def own_kernels() -> dict[str, str]:
    """prefuse's kernels by name: the files that have one of that name."""
    found: dict[str, list[str]] = {}
    patterns = {
        "kernels/*.py": r"@triton\.jit\s+def (\w+)\(",
        "csrc/*.cu": r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(",
    }
    for files, pattern in patterns.items():
        for path in sorted(ROOT.glob(files)):
            for name in re.findall(pattern, path.read_text()):
                found.setdefault(name, []).append(path.name)
    return {name: ", ".join(files) for name, files in found.items()}


def group_of(name: str, own: dict[str, str]) -> str:
    bare = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*(\w+)", name)
    if bare and bare[1] in own and not name.startswith(("void at::", "at::")):
        return f"prefuse: {own[bare[1]]}"
    found = (group for group, pattern in GROUPS if re.search(pattern, name, re.I))
    return next(found, "other")


def read_trace(file: Path) -> tuple[list[Kernel], Counter]:
    """What the GPU did, in order; and how often the host waited, by the call."""
    kernels, waits = [], Counter()
    for event in json.loads(file.read_text())["traceEvents"]:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(Kernel(name, float(event["ts"]), float(event["dur"])))
        elif kind in ("cuda_runtime", "cuda_driver") and "Synchronize" in name:
            waits[name] += 1
    return sorted(kernels, key=lambda k: k.start), waits


def gaps(kernels: list[Kernel]) -> list[tuple[float, str, str]]:
    """Microseconds in which nothing ran, between which kernels; the longest first."""
    found, last = [], kernels[0]
    for kernel in kernels[1:]:
        if kernel.start > last.end:
            found.append((kernel.start - last.end, last.name, kernel.name))
        if kernel.end > last.end:
            last = kernel
    return sorted(found, reverse=True)


def table_of(kernels: list[Kernel], waits: Counter, steps: int) -> list[dict]:
    """Rows; times are of a step, shares of the time from the first kernel's start to the last's
    end. Kernels that run side by side both count, so shares may add up to more than is busy."""
    own = own_kernels()
    span = max(k.end for k in kernels) - kernels[0].start
    idle = gaps(kernels)
    share = lambda us: us / span  # noqa: E731
    rows: list[dict[str, Any]] = [
        {"part": "total", "name": "first kernel to last", "ms": span / steps / 1e3, "share": 1.0},
        {"part": "total", "name": "no kernel runs", "share": share(sum(g[0] for g in idle))},
        {"part": "total", "name": "kernels and copies", "count": len(kernels) / steps},
    ]
    rows[1]["ms"] = sum(g[0] for g in idle) / steps / 1e3
    rows[1]["count"] = len(idle) / steps
    rows += [{"part": "host", "name": n, "count": c / steps} for n, c in waits.most_common()]
    for part, key, most in (
        ("group", lambda k: group_of(k.name, own), None),
        ("kernel", lambda k: k.name, LARGEST),
    ):
        times: dict[str, float] = defaultdict(float)
        counts = Counter()
        for kernel in kernels:
            times[key(kernel)] += kernel.duration
            counts[key(kernel)] += 1
        for name, us in sorted(times.items(), key=lambda item: -item[1])[:most]:
            row = {"part": part, "name": _short(name), "ms": us / steps / 1e3, "share": share(us)}
            row["count"] = counts[name] / steps
            rows.append(row if part == "group" else {**row, "group": group_of(name, own)})
    for us, before, after in idle[:LONGEST]:
        name = f"{_short(before, 60)} -> {_short(after, 60)}"
        rows.append({"part": "gap", "name": name, "ms": us / 1e3, "share": share(us)})
    return rows


def _short(name: str, most: int = 110) -> str:
    name = name.replace("|", "/")  # a table's own sign
    return name if len(name) <= most else name[: most - 3] + "..."


def operations(profiler: profile, steps: int) -> list[dict]:
    """The same of a CPU, from the time that operations take themselves."""
    found = [x for x in profiler.key_averages() if x.self_cpu_time_total > 0]
    total = sum(x.self_cpu_time_total for x in found)
    times, counts = Counter(), Counter()
    for x in found:
        times[group_of(x.key, {})] += x.self_cpu_time_total
        counts[group_of(x.key, {})] += x.count
    rows: list[dict[str, Any]] = [
        {"part": "total", "name": "all operations", "ms": total / steps / 1e3, "share": 1.0}
    ]
    for name, us in times.most_common():
        row = {"part": "group", "name": name, "ms": us / steps / 1e3, "share": us / total}
        rows.append({**row, "count": counts[name] / steps})
    for x in sorted(found, key=lambda x: -x.self_cpu_time_total)[:LARGEST]:
        us = x.self_cpu_time_total
        row = {"part": "operation", "name": _short(x.key), "ms": us / steps / 1e3}
        rows.append({**row, "share": us / total, "count": x.count / steps})
    return rows


def profiled(
    shape: str, batch: int, precision: str, setting: Prefuse, warmup: int, steps: int
) -> tuple[list[dict], dict[str, float]]:
    """Rows, and the milliseconds of a step by itself and under the profiler."""
    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    times: list[float] = []

    def between(done: int) -> None:
        if done in (warmup, warmup + steps, warmup + 2 * steps):
            wait()
            times.append(time.perf_counter())
        if done == warmup + steps:
            profiler.start()
            times.append(time.perf_counter())
        if done == warmup + 2 * steps:
            profiler.stop()

    clock = Clock(warmup, 2 * steps, float("inf"), waits=False)
    longest = 256 if shape == "tiny" else MAX_LENGTH
    pairs = random_pairs(SHAPES[shape], batch * clock.total, longest)
    with hushed():
        run_prefuse(SHAPES[shape], pairs, batch, precision, setting, clock, between)
    begun, ended, again, done = times
    ms = {"by itself": ended - begun, "under the profiler": done - again}
    if on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            rows = table_of(*read_trace(Path(folder, "trace.json")), steps)
    else:
        rows = operations(profiler, steps)
    return rows, {f"ms a step {k}": 1e3 * v / steps for k, v in ms.items()}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], default="1.5b")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--tokens", type=int, default=16384, help="real ones of a micro-batch")
    parser.add_argument("--checkpointing", choices=["", "selective", "full"], default="")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=[*PRECISIONS], help="default: bfloat16 on a GPU")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="by themselves, then profiled")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/profile_dpo_...")
    args = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    precision = args.precision or ("bfloat16" if on_gpu else "float32")
    setting = Prefuse(args.tokens, "tokens", args.checkpointing, args.compile)
    rows, ms = profiled(args.shape, args.batch, precision, setting, args.warmup, args.steps)
    info = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
    output = args.output or ROOT / "benchmarks" / "results" / f"profile_dpo_{slug}"
    told = {"shape": args.shape, "batch": f"{args.batch} pairs a step", "precision": precision}
    publish(
        "Where a DPO step's time goes", info | told | {"setting": str(setting)} | ms, rows, output
    )


if __name__ == "__main__":
    main()
