"""Completions a second of the two engines of transformers, and of plain sampling by `generate`.

    PREFUSE_DATA=data python benchmarks/bench_rollout.py --output RESULT

stories260k samples completions of GSM8K's questions at temperature 1. The third row is
transformers' own `generate(do_sample=True)` on all rows at once, which returns no log-probs and
whose samples depend on the batch. All take turns, and the median counts. Tokens are those sampled,
up to and with the EOS.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import ROOT, device, in_turns, machine, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefuse.trainer.rollout import Sampling, make_engine


def questions(data: Path, tokenizer, count: int) -> list[np.ndarray]:
    lines = (data / "verifiable" / "gsm8k_train.jsonl").read_text().splitlines()[:count]
    return [np.array(tokenizer(json.loads(line)["question"]).input_ids) for line in lines]


def plain(model, prompts: list[np.ndarray], n: int, sampling: Sampling):
    """All rows at once, left-padded."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts) * n, width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row in range(len(tokens)):
        prompt = torch.from_numpy(prompts[row // n])
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    return lambda: model.generate(
        tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos_token_ids),
        pad_token_id=0,
    )[:, width:]


def main() -> None:
    data, load = Path(args.data), os.getloadavg()[0]
    folder = data / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model.to(device())
    prompts = questions(data, tokenizer, args.prompts)
    sampling = Sampling(args.max_new_tokens, eos_token_ids=(tokenizer.eos_token_id,))
    found: dict[str, int] = {}

    def run(name: str):
        engine = make_engine(name, model, tokenizer)

        def sample() -> None:
            groups = engine.generate(prompts, args.samples, sampling, range(len(prompts)))
            found[name] = sum(len(c.tokens) for group in groups for c in group)

        return sample

    everything = plain(model, prompts, args.samples, sampling)
    theirs = "generate(do_sample=True)"

    def sample_plainly() -> None:
        tokens = everything()
        ended = (tokens == tokenizer.eos_token_id).cumsum(1)
        found[theirs] = int((ended - (tokens == tokenizer.eos_token_id).long() == 0).sum())

    runs: dict[str, Callable[[], object]] = {n: run(n) for n in ("transformers", "generate")}
    runs[theirs] = sample_plainly
    times = in_turns(runs, args.rounds)
    rows = [
        {
            "engine": name,
            "tokens": found[name],
            "seconds": ms / 1000,
            "tokens/s": found[name] / ms * 1000,
        }
        for name, ms in times.items()
    ]
    lengths = [len(p) for p in prompts]
    info = machine() | {"transformers": transformers.__version__}
    info |= {
        "model": "stories260k, float32",
        "prompts": f"{len(prompts)} questions of GSM8K, {min(lengths)} to {max(lengths)} tokens",
        "completions": f"{args.samples} a prompt, up to {args.max_new_tokens} tokens",
        "load average before": f"{load:.1f}",
    }
    publish("Rollouts", info, rows, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("PREFUSE_DATA", ROOT / "data"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    main()
