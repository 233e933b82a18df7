"""Held-out accuracy of a reward model on HH pairs, and what its reward has to do with length.

    PREFUSE_DATA=... python benchmarks/bench_reward_accuracy.py --output benchmarks/results/NAME

Trains Bradley-Terry and ODIN by `prefuse reward` from the same small model on the same pairs,
then scores the held-out ones by what was saved. The length correlation is Pearson's, over all
held-out answers, of the reward and the number of tokens of the answer's last turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, table

from prefuse.trainer.cli import main as prefuse
from prefuse.trainer.data import pair_examples
from prefuse.trainer.model import load_tokenizer
from prefuse.trainer.reward_model import RewardModel
from prefuse.trainer.rows import load_rows

SETTINGS = {
    "max_length": 512,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "seed": 0,
}
SHAPE: dict[str, Any] = {
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TURN = "\n\nAssistant:"


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def make_model(folder: Path, tokenizer_folder: Path, hidden: int, layers: int) -> None:
    """A causal model from scratch, with GPT-2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        max_position_embeddings=SETTINGS["max_length"],
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    torch.manual_seed(SETTINGS["seed"])
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def split(data: Path, tokenizer, held_out: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs of which both answers fit; a prompt stays on one side."""
    rows = load_rows(str(data / "prefs" / "hh_rlhf_train.jsonl"))
    examples, _ = pair_examples(rows, tokenizer, None)
    limit = SETTINGS["max_length"]
    fits = {e.where for e in examples if max(len(s.tokens) for s in e.sequences) <= limit}
    kept = [row.columns for row in rows if row.where in fits]
    random.Random(SETTINGS["seed"]).shuffle(kept)
    prompt = lambda row: row["chosen"].rpartition(TURN)[0]  # noqa: E731
    seen = {prompt(row) for row in kept[:held_out]}
    return [row for row in kept[held_out:] if prompt(row) not in seen], kept[:held_out]


def evaluate(folder: Path, rows: list[dict]) -> dict[str, float]:
    model = RewardModel(str(folder), batch_size=32)
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    rewards = np.array(model([""] * len(texts), texts)).reshape(-1, 2)
    answers = model.tokenizer([text.rpartition(TURN)[2] for text in texts])["input_ids"]
    lengths = np.array([len(ids) for ids in answers], dtype=float).reshape(-1, 2)
    gap, longer = rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]
    right = float((gap > 0).sum() + 0.5 * (gap == 0).sum())
    low, high = wilson(right, len(rows))
    return {
        "held-out pairs": len(rows),
        "accuracy": right / len(rows),
        "95 % from": low,
        "to": high,
        "length correlation": float(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1]),
        "of margins": float(np.corrcoef(gap, longer)[0, 1]),
        "longer is chosen": float((longer > 0).mean() + 0.5 * (longer == 0).mean()),
    }


def train(loss: str, model: Path, file: Path, out: Path, args) -> None:
    flags = {
        **SETTINGS,
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "per_device_train_batch_size": args.batch,
        "save_steps": 0,
    }
    if loss == "odin":
        flags["length_coef"] = args.length_coef
    prefuse(
        [
            *("reward", "--model_name_or_path", str(model), "--dataset_name", str(file)),
            *("--output_dir", str(out), "--loss_type", loss, "--disable_tqdm"),
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFUSE_DATA"))
    parser.add_argument("--model", type=Path, help="Unset: one from scratch.")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--held_out", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--length_coef", type=float, default=0.2, help="ODIN's")
    parser.add_argument("--losses", nargs="+", default=["bradley_terry", "odin"])
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or PREFUSE_DATA must name the folder of data")
    here = machine()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), args.model
        if model is None:
            model = folder / "scratch"
            make_model(model, args.data / "tokenizers" / "gpt2", args.hidden, args.layers)
        rows, held_out = split(args.data, load_tokenizer(str(model)), args.held_out)
        file = folder / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        measured = []
        for loss in args.losses:
            started = time.perf_counter()
            train(loss, model, file, folder / loss, args)
            found = {"loss": loss, **evaluate(folder / loss, held_out)}
            measured.append({**found, "seconds": time.perf_counter() - started})
            print(measured[-1], flush=True)
    shape = f"{args.layers} layers of {args.hidden}, GPT-2's tokenizer, from scratch"
    info = {
        **here,
        "model": shape if args.model is None else args.model.name,
        "data": f"{len(rows)} HH pairs to train on",
        "settings": f"{args.epochs:g} epochs, {args.batch} pairs a step, learning rate "
        f"{args.learning_rate:g}, weight decay {args.weight_decay:g}, "
        f"ODIN's length_coef {args.length_coef:g}, {SETTINGS}",
    }
    text = "\n".join(
        [
            "# Reward models: accuracy on held-out HH pairs",
            "",
            "; ".join(f"{k} {v}" for k, v in info.items()) + ".",
            "Written by benchmarks/bench_reward_accuracy.py.",
            "",
            table(measured),
            "",
            "The correlations are of the reward with the answer's tokens, over all answers, and of "
            "margins with differences in length. ODIN's are those of the head that is exported.",
        ]
    )
    print(text)
    if args.output:
        result = {"machine": info, "results": measured}
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
