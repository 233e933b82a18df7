"""The memory arithmetic of docs/scaling.md: 7B, 32B and 70B by phase, from their shapes alone.

python benchmarks/scaling.py   prints the tables
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import table
from transformers import AutoConfig

from prefuse.trainer.config import DPOConfig
from prefuse.trainer.estimate import Estimate, Run, estimate, seconds
from prefuse.trainer.plan.command import PlanConfig
from prefuse.trainer.plan.device import find
from prefuse.trainer.plan.work import uniform

SHAPES = {
    "7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8),
    "70B": ("llama", 128256, 8192, 28672, 80, 64, 8),
}
NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads")
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("7B", "h200", 1, {"dtype": "bfloat16"}),
    ("7B", "h100", 8, {}),
    ("32B", "h200", 8, {}),
    ("32B", "h100", 32, {"dtype": "bfloat16"}),
    ("70B", "h200", 16, {"dtype": "bfloat16"}),
    ("70B", "b200", 64, {"dtype": "bfloat16"}),
]


def config_of(name: str):
    kind, *sizes = SHAPES[name]
    return AutoConfig.for_model(kind, **dict(zip(NAMES, sizes, strict=True)))


def case(name: str, device: str, ranks: int, changes: dict[str, Any]) -> tuple[Run, Estimate]:
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = dict(bf16=True, gradient_checkpointing=True)
        given |= dict(precompute_ref_log_probs=True)
        given |= dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
        config = DPOConfig(name, "rows", str(Path(folder)), max_length=2048, **given | changes)
    work = lambda c: uniform(c, 2048, 1024)  # noqa: E731
    run = Run(config, config_of(name), find(PlanConfig(device=device)), ranks, work)
    return run, estimate(run)


def rows() -> list[dict]:
    found = []
    for name, device, ranks, changes in CASES:
        run, told = case(name, device, ranks, changes)
        row: dict[str, Any] = {"model": name, "ranks": f"{ranks} x {device}"}
        row["weights"] = changes.get("dtype", "float32")
        for phase in told.phases:
            row[phase.name] = round(phase.total / 2**30, 1)
        time = sum(seconds(told, run.device, run.config).values())
        row["s a step"] = round(time, 2)
        found.append(row)
    return found


def classes() -> list[dict]:
    """Of the forward and backward pass."""
    found = []
    for name, device, ranks, changes in CASES:
        _, told = case(name, device, ranks, changes)
        held = next(p.held for p in told.phases if p.name == "forward and backward")
        row: dict[str, Any] = {"model": name, "ranks": f"{ranks} x {device}"}
        found.append(row | {k: round(v / 2**30, 2) for k, v in sorted(held.items())})
    return found


if __name__ == "__main__":
    print(table(rows()))
    print()
    print(table(classes()))
