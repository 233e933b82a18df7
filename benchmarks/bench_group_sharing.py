"""Forward + backward of groups of completions: each prompt once, or once a completion.

    PREFUSE_DATA=data python benchmarks/bench_group_sharing.py --output RESULT

Groups of G sequences of GSM8K's lengths (questions and answers, GPT-2's tokenizer; the tokens are
random), packed with and without shared prefixes, through a random Llama whose body outweighs its
head. The two take turns, and the median counts. Tokens are real ones: a prompt counts once for
every completion, whether it is computed once or G times.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, machine, publish
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.batch import pack
from prefuse.trainer.data import Example, Sequence
from prefuse.trainer.scores import Scorer

SHAPE: dict[str, Any] = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)


def lengths(data: Path, groups: int) -> list[tuple[int, list[int]]]:
    """Of prompts and of G answers to each: other rows' answers, for there is one a row."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "gpt2")
    file = data / "verifiable" / "gsm8k_train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:1000]]
    prompts = [len(ids) for ids in tokenizer([r["question"] for r in rows])["input_ids"]]
    answers = [len(ids) for ids in tokenizer([r["answer"] for r in rows])["input_ids"]]
    rng = np.random.default_rng(0)
    return [
        (prompts[i], rng.choice(answers, args.group).tolist())
        for i in rng.choice(len(rows), groups, replace=False)
    ]


def examples(shape: list[tuple[int, list[int]]]) -> list[Example]:
    rng = np.random.default_rng(1)
    made = []
    for index, (prompt, completions) in enumerate(shape):
        start = rng.integers(0, SHAPE["vocab_size"], prompt)
        sequences = []
        for n in completions:
            tokens = np.concatenate([start, rng.integers(0, SHAPE["vocab_size"], n)])
            sequences.append(Sequence(tokens, np.arange(len(tokens)) >= prompt))
        made.append(Example(index, tuple(sequences)))
    return made


def main() -> None:
    data = Path(args.data)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.model.parameters()) - head  # less the embedding
    given = examples(lengths(data, args.groups))
    scorers = {"packed": Scorer(model, "packed"), "shared prompts": Scorer(model, "shared")}
    batches = {name: pack(given, s.layout == "shared") for name, s in scorers.items()}
    times: dict[str, list[float]] = {name: [] for name in scorers}
    gradients = {}
    for turn in range(args.repeats + 1):
        for name, scorer in scorers.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            (-scorer(batches[name]).logp.mean()).backward()
            if turn:
                times[name].append(time.perf_counter() - start)
            gradients[name] = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
    one, other = gradients.values()
    difference = float((one - other).norm() / one.norm())
    assert difference < 1e-6, difference
    rows = []
    for name, batch in batches.items():
        seconds = sorted(times[name])[len(times[name]) // 2]
        rows.append(
            {
                "layout": name,
                "real tokens": batch.n_tokens,
                "computed": len(batch.tokens),
                "scored": batch.n_scored,
                "ms": 1000 * seconds,
                "real tokens/s": batch.n_tokens / seconds,
            }
        )
    for row in rows:
        row["times packed"] = row["real tokens/s"] / rows[0]["real tokens/s"]
    info = machine() | {"model": f"Llama, body {body / 1e6:.1f}M, head {head / 1e6:.1f}M, float32"}
    info |= {"groups": f"{args.groups} of {args.group}", "gradient difference": difference}
    publish("Groups that share their prompt", info, rows, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("PREFUSE_DATA", ROOT / "data"))
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    main()
