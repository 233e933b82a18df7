"""DPO steps per second on a CPU, prefuse beside TRL, on real preference pairs in one run.

    PREFUSE_DATA=data python benchmarks/bench_dpo_vs_trl.py --output benchmarks/results/dpo_vs_trl

Both train the same Llama-shaped model (random weights, GPT-2's tokenizer) on the same pairs with
the same effective batch, a live reference model, AdamW and clipping. Tokens are those of the rows,
prompt + chosen and prompt + rejected after truncation; padding and shared prefixes count for
neither. Loading and tokenisation are left out; the first optimizer step is the warm-up. TRL is
run at every micro-batch size given and judged by its best (grouping by length, which would spare it
padding, Transformers refuses for preference rows, and padding_free is switched off in TRL 1.16).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, table

MODEL: dict[str, Any] = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8)
HEADS: dict[str, Any] = dict(num_attention_heads=8, num_key_value_heads=4)


def make_model(folder: Path, tokenizer_folder: Path) -> int:
    """Saves the model and the tokenizer; returns the number of parameters."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL,
        **HEADS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def take_pairs(data: Path, tokenizer_folder: Path, count: int, max_length: int) -> list[dict]:
    """The first pairs that both systems train on whole rows of."""
    from prefuse.trainer.data import pair_examples
    from prefuse.trainer.model import load_tokenizer
    from prefuse.trainer.rows import load_rows

    tokenizer = load_tokenizer(str(tokenizer_folder))
    rows = load_rows(str(data / "prefs" / "hh_rlhf_train.jsonl"))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()[: 2 * count]
    rows = [rows[i] for i in order]
    kept = {e.where for e in pair_examples(rows, tokenizer, max_length)[0]}
    columns = ("chosen", "rejected")
    return [{c: r.columns[c] for c in columns} for r in rows if r.where in kept][:count]


def run_prefuse(model: Path, pairs: list[dict], args, bf16: bool) -> dict:
    """Real tokens a second of optimizer steps through the trainer's own loop."""
    from prefuse.trainer.cli import main

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        flags = [
            *("dpo", "--model_name_or_path", str(model), "--dataset_name", str(file)),
            *("--output_dir", f"{folder}/out", "--max_length", str(args.max_length)),
            *("--per_device_train_batch_size", str(args.batch), "--num_train_epochs", "1"),
            *("--logging_steps", "1", "--save_steps", "0", "--bf16", str(bf16)),
            *("--learning_rate", "1e-6", "--disable_tqdm"),
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            main(flags)
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][1:]
    seconds = sum(s["num_tokens"] / s["tokens_per_second"] for s in steps)
    return {"tokens": sum(s["num_tokens"] for s in steps), "seconds": seconds}


def run_trl(model: Path, pairs: list[dict], args, bf16: bool, micro: int) -> dict:
    """The same of TRL's DPOTrainer, timed between the ends of its optimizer steps."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        ends: list[float]
        tokens: list[int]

        def on_train_begin(self, *_, **__):
            self.ends, self.tokens = [], [0]

        def on_step_end(self, *_, **__):
            self.ends.append(time.perf_counter())
            self.tokens.append(0)

    clock = Clock()

    class Counting(trl.DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            clock.tokens[-1] += int(inputs["attention_mask"].sum())
            return super()._compute_loss(model, inputs, return_outputs)

    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            bf16=bf16,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=args.max_length,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.batch // micro,
            num_train_epochs=1,
            learning_rate=1e-6,
            logging_steps=1000,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = Dataset.from_list(pairs)
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    # the first step is the warm-up; the last entry of tokens was opened after the last step
    return {"tokens": sum(clock.tokens[1:-1]), "seconds": clock.ends[-1] - clock.ends[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFUSE_DATA"))
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="pairs an optimizer step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--search_pairs", type=int, default=48, help="to find TRL's best setting")
    parser.add_argument("--bf16_pairs", type=int, default=96, help="bfloat16 is slow on most CPUs")
    both = ["float32", "bfloat16"]
    parser.add_argument("--precisions", nargs="+", choices=both, default=both)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or PREFUSE_DATA must name the folder of data")
    torch.set_num_threads(os.cpu_count() or 1)
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        tokenizer = args.data / "tokenizers" / "gpt2"
        parameters = make_model(model, tokenizer)
        pairs = take_pairs(args.data, tokenizer, args.pairs, args.max_length)
        measured, search = compare(model, pairs, args)
    info = {
        **here,
        "peer": "trl 1.16.0",
        "model": f"Llama, {parameters / 1e6:.1f}M parameters, {MODEL | HEADS}",
        "data": f"{len(pairs)} HH-RLHF pairs, max_length {args.max_length}, {args.batch} a step",
    }
    text = "\n".join(
        [
            "# DPO: prefuse beside TRL",
            "",
            "; ".join(f"{k} {v}" for k, v in info.items()) + ".",
            "Written by benchmarks/bench_dpo_vs_trl.py.",
            "",
            table(measured),
            "",
            f"TRL's settings, on {args.search_pairs} pairs:",
            "",
            table(search),
        ]
    )
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": info, "results": measured, "search": search}
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text + "\n")


def compare(model: Path, pairs: list[dict], args) -> tuple[list[dict], list[dict]]:
    """TRL's best setting by a short search per precision, then both on all pairs."""
    search, measured = [], []
    for precision in args.precisions:
        bf16 = precision == "bfloat16"
        for micro in args.micro:
            run = run_trl(model, pairs[: args.search_pairs], args, bf16, micro)
            speed = run["tokens"] / run["seconds"]
            search.append({"precision": precision, "micro-batch": micro, "tokens/s": speed})
            print(search[-1], flush=True)
        best = max((s for s in search if s["precision"] == precision), key=lambda s: s["tokens/s"])
        rows = pairs[: args.bf16_pairs] if bf16 else pairs
        ours = run_prefuse(model, rows, args, bf16)
        theirs = run_trl(model, rows, args, bf16, best["micro-batch"])
        speeds = [run["tokens"] / run["seconds"] for run in (ours, theirs)]
        measured.append(
            {
                "precision": precision,
                "pairs": len(rows),
                "prefuse tokens/s": speeds[0],
                "TRL tokens/s": speeds[1],
                "ratio": speeds[0] / speeds[1],
            }
        )
        print(measured[-1], flush=True)
    return measured, search


if __name__ == "__main__":
    main()
