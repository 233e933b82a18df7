"""Held-out accuracy of a reward model on HH pairs, and what its reward has to do with length.

    PREFUSE_DATA=... python benchmarks/bench_reward_accuracy.py --out benchmarks/results

Trains Bradley-Terry and ODIN by `prefuse reward` from the same small model on the same pairs,
then scores the held-out ones by what was saved. The length correlation is Pearson's, over all
held-out answers, of the reward and the number of characters of the answer's last turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from prefuse.trainer.cli import main as prefuse
from prefuse.trainer.data import pair_examples
from prefuse.trainer.model import load_tokenizer
from prefuse.trainer.reward_model import RewardModel
from prefuse.trainer.rows import load_rows

SETTINGS = {
    "max_length": 512,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 16,
    "seed": 0,
}


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def fitting_rows(data: Path, tokenizer, seed: int) -> list[dict]:
    """Pairs of which both answers fit, in a fixed random order; a prompt stays on one side."""
    rows = load_rows(str(data / "prefs" / "hh_rlhf_train.jsonl"))
    examples, _ = pair_examples(rows, tokenizer, None)
    limit = SETTINGS["max_length"]
    fits = {e.where for e in examples if max(len(s.tokens) for s in e.sequences) <= limit}
    kept = [row.columns for row in rows if row.where in fits]
    random.Random(seed).shuffle(kept)
    return kept


def evaluate(folder: Path, rows: list[dict]) -> dict[str, float]:
    model = RewardModel(str(folder), batch_size=32)
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    rewards = np.array(model([""] * len(texts), texts)).reshape(-1, 2)
    lengths = np.array([len(t.rsplit("\n\nAssistant:", 1)[-1]) for t in texts]).reshape(-1, 2)
    gap = rewards[:, 0] - rewards[:, 1]
    right = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
    low, high = wilson(right, len(rows))
    longer = lengths[:, 0] - lengths[:, 1]
    return {
        "pairs": len(rows),
        "accuracy": right / len(rows),
        "accuracy_low": low,
        "accuracy_high": high,
        "length_correlation": float(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1]),
        "margin_length_correlation": float(np.corrcoef(gap, longer)[0, 1]),
        "longer_is_chosen": float((longer > 0).mean() + 0.5 * (longer == 0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("PREFUSE_DATA"))
    parser.add_argument("--model", help="Unset: stories260k of the data folder.")
    parser.add_argument("--held_out", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--losses", nargs="+", default=["bradley_terry", "odin"])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    data = Path(options.data)
    model = options.model or str(data / "models" / "stories260k")
    rows = fitting_rows(data, load_tokenizer(model), SETTINGS["seed"])
    held_out, train = rows[: options.held_out], rows[options.held_out :]
    prompts = {row["chosen"].rsplit("\n\nAssistant:", 1)[0] for row in held_out}
    train = [r for r in train if r["chosen"].rsplit("\n\nAssistant:", 1)[0] not in prompts]
    results: dict = {"model": Path(model).name, "train_pairs": len(train)}
    results |= {"settings": {**SETTINGS, "num_train_epochs": options.epochs}}
    results |= {"threads": torch.get_num_threads(), "losses": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in train))
        for loss in options.losses:
            started, out = time.perf_counter(), Path(folder) / loss
            flags = [f"--{k}={v}" for k, v in SETTINGS.items()]
            prefuse(
                [
                    *("reward", "--model_name_or_path", model, "--dataset_name", str(file)),
                    *("--output_dir", str(out), "--loss_type", loss, "--disable_tqdm"),
                    *("--num_train_epochs", str(options.epochs), "--save_steps", "0", *flags),
                ]
            )
            found = evaluate(out, held_out)
            results["losses"][loss] = {**found, "seconds": time.perf_counter() - started}
            print(loss, json.dumps(results["losses"][loss], indent=1), flush=True)
    if options.out is not None:
        (options.out / "reward_accuracy_cpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
