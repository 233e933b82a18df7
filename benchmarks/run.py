"""All kernel benchmarks on this machine, written to one file.

python benchmarks/run.py                      benchmarks/results/kernels-<device>.md and .json
python benchmarks/run.py --output DIR --only linear_logp logp    linear_logp-logp-<device>.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

from common import ROOT, ceilings, machine, table

BENCHMARKS = ("linear_logp", "logp", "policy", "advantage", "divergence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    args = parser.parse_args()
    info = machine()
    limits = ceilings()
    sections = {}
    for name in args.only:
        module = importlib.import_module(f"bench_{name}")
        sections[name] = module.rows()
        if hasattr(module, "memory_rows"):
            sections[f"{name}: peak memory"] = module.memory_rows()
    slug = re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    stem = "kernels" if args.only == BENCHMARKS else "-".join(args.only)
    path = args.output / f"{stem}-{slug}"
    result = {"machine": info, "ceilings": limits, "results": sections}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    head = [f"# Kernels on {info['device']}", ""]
    head += [", ".join(f"{k} {v}" for k, v in info.items() if k != "device") + "."]
    head += [
        f"Ceilings measured here: {limits['gbps']:.0f} GB/s (copy), "
        f"{limits['tflops']:.3g} TFLOP/s (matmul).",
        "Written by benchmarks/run.py.",
    ]
    for name, rows in sections.items():
        head += ["", f"## {name}", "", table(rows)]
    path.with_suffix(".md").write_text("\n".join(head) + "\n")
    print("\n".join(head))


if __name__ == "__main__":
    main()
