"""All benchmarks of the kernels, and on a GPU of whole training steps, written to one file.

python benchmarks/run.py                      benchmarks/results/kernels-<device>.md and .json
python benchmarks/run.py --output DIR --only linear_logp logp    linear_logp-logp-<device>.md
python benchmarks/run.py --tiny --output DIR                     does everything run?

Every benchmark is a process of its own with its share of `--seconds`; the file is written anew
after each. If one dies, what it found stays, and the rest of it starts again without the method
that it died of. On a GPU the whole stays below 9 minutes. Exit code 1: something of ours is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, table
from processes import clocks, kernel_benchmark, training_benchmark, versions
from targets import judged

# the weights of their times
KERNELS = {
    "linear_logp": 8.0, "logp": 3.0, "policy": 2.5, "advantage": 2.5, "divergence": 4.0,
    "attention": 1.5,
}  # fmt: skip
TRAINING = ("train_dpo", "train_grpo")
TRAINING_SHARE = 0.4  # of the time, if there is training
RESULTS = ROOT / "benchmarks" / "results"
WITH_MEMORY = ("linear_logp", "divergence")  # on a CPU by processes of their own


def main() -> int:
    args = _arguments()
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    info = machine() | versions()
    info["commit"] = args.commit or info["commit"]
    info |= {"clocks before": clocks()} if on_gpu else {}
    args.output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
    stem = "-".join(args.only or ["kernels"]) + ("-tiny" if args.tiny else "")
    path = args.output / f"{stem}-{slug}"
    result: dict[str, Any] = {"machine": info, "ceilings": {}, "results": {}}
    failed = _measure(args, start, path, result)
    if on_gpu:
        info["clocks after"] = clocks()
    info["seconds"] = round(time.monotonic() - start)
    _write(path, result)
    _conclude(path, result, failed)
    if args.output == RESULTS and not failed:
        shutil.rmtree(_parts(path))
    return int(bool(failed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=[*KERNELS, *TRAINING])
    parser.add_argument("--seconds", type=float, help="for everything; 520 on a GPU, else 5400")
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing compiled")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    args = parser.parse_args()
    args.seconds = args.seconds or (520 if torch.cuda.is_available() else 5400)
    return args


def _measure(args, start: float, path: Path, result: dict[str, Any]) -> list[str]:
    """Fills the result, a benchmark at a time; what failed of ours."""
    on_gpu = torch.cuda.is_available()
    names = args.only or [*KERNELS, *(TRAINING if on_gpu else ())]
    kernels = [name for name in names if name in KERNELS]
    training = [name for name in names if name in TRAINING]
    end = start + args.seconds
    share = TRAINING_SHARE if kernels else 1.0
    kernels_end = end - (share * args.seconds if training else 0)
    folder = _parts(path)
    folder.mkdir(exist_ok=True)
    flags = ["--tiny"] if args.tiny else []
    failed = []

    def took(name: str, found) -> None:
        result["results"] |= found.sections
        failed.extend([f"{name}: {why}" for why in found.failed])
        _write(path, result)
        print(f"{name}: {found.seconds:.0f} s, {found.told}", flush=True)

    first = kernel_benchmark("ceilings", folder, 20, end, flags)
    result["ceilings"] = first.ceilings
    took("ceilings", first)
    if first.ceilings:
        flags += ["--ceilings", json.dumps(first.ceilings)]
    for number, name in enumerate(kernels):
        rest = sum(KERNELS[other] for other in kernels[number:])
        seconds = (kernels_end - time.monotonic()) * KERNELS[name] / rest
        took(name, kernel_benchmark(name, folder, seconds, kernels_end, flags))
        if name in WITH_MEMORY and not on_gpu and not args.tiny:
            memory = kernel_benchmark(name, folder, 600, end, flags, memory=True)
            took(f"{name}: peak memory", memory)
    for number, name in enumerate(training):
        seconds = (end - time.monotonic()) / (len(training) - number)
        took(name, training_benchmark(name, folder, seconds, end, args.tiny))
    return failed


def _parts(path: Path) -> Path:
    """Records and logs of the processes."""
    return path.with_name(f"{path.name}.parts")


def _write(path: Path, result: dict[str, Any]) -> None:
    result["targets"] = judged(result)
    if not result["targets"]:
        del result["targets"]
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(_text(result)) + "\n")


def _text(result: dict[str, Any]) -> list[str]:
    info, limits = result["machine"], result["ceilings"]
    lines = [f"# Kernels on {info['device']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in info.items() if k != "device") + "."]
    if limits:
        lines += [
            f"Ceilings measured here: {limits['gbps']:.0f} GB/s (copy), "
            f"{limits['tflops']:.3g} TFLOP/s (matmul)."
        ]
    lines += ["Written by benchmarks/run.py."]
    if result.get("targets"):
        lines += ["", "## Targets", "", table(result["targets"])]
    for name, rows in result["results"].items():
        lines += ["", f"## {name}", "", table(rows)]
    return lines


def _conclude(path: Path, result: dict[str, Any], failed: list[str]) -> None:
    """Short, and last: only the end of a long output may be seen."""
    print(f"\n{path.with_suffix('.md')}: {result['machine']['seconds']} s, {result['ceilings']}")
    for name, rows in result["results"].items():
        for row in rows:
            if "error" in row or "wrong" in row:
                who = row.get("method", row.get("impl", ""))
                case = row.get("pass", row.get("op", row.get("kind", row.get("loss", ""))))
                print(f"{name}, {case}, {who}: {row.get('wrong', row.get('error'))}"[:200])
    if result.get("targets"):
        print(f"\n{table(result['targets'])}")
    for why in failed:
        print(f"FAILED {why}")


if __name__ == "__main__":
    raise SystemExit(main())
