"""Lengths in tokens of real rows, so that a benchmark needs neither data nor tokenizer.

    PREFUSE_DATA=data python benchmarks/lengths.py        # writes benchmarks/lengths.json

`pairs`: of HH-RLHF preference pairs, drawn at random: [prompt, chosen, rejected], by Qwen2's
tokenizer and prefuse's own rules (EOS appended, rows over max_length cut at their end, pairs
skipped that are identical or have nothing but a prompt left). `questions`: of GSM8K rows:
[question, answer], the answer with its EOS. A benchmark's token ids are random.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("lengths.json")
MAX_LENGTH = 1024
PAIRS, QUESTIONS = 2048, 1536  # about 45 KB


def drawn(rows: list, count: int) -> list:
    """The same ones every time, and the first of them whatever the count."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def pair_lengths(data: Path, tokenizer, count: int) -> tuple[list[list[int]], dict[str, int]]:
    """Of `count` rows, less those skipped; and what became of the rows."""
    from prefuse.trainer.data import pair_examples
    from prefuse.trainer.rows import load_rows

    rows = drawn(load_rows(str(data / "prefs" / "hh_rlhf_train.jsonl")), count)
    examples, ledger = pair_examples(rows, tokenizer, MAX_LENGTH)
    found = []
    for example in examples:
        prompt = int((~example.sequences[0].scored).sum())
        found.append([prompt, *(int(s.scored.sum()) for s in example.sequences)])
    told = ledger.as_dict()
    return found, {k: told[k] for k in ("truncated", "identical", "prompt_fills_max_length")}


def question_lengths(data: Path, tokenizer, count: int) -> list[list[int]]:
    lines = (data / "verifiable" / "gsm8k_train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in drawn(lines, count)]
    asked, told = (tokenizer([row[c] for row in rows])["input_ids"] for c in ("question", "answer"))
    return [[len(q), len(a) + 1] for q, a in zip(asked, told, strict=True)]


def measured(data: Path, pairs: int = PAIRS, questions: int = QUESTIONS) -> dict[str, Any]:
    from prefuse.trainer.model import load_tokenizer

    tokenizer = load_tokenizer(str(data / "tokenizers" / "qwen2"))
    lengths, left_out = pair_lengths(data, tokenizer, pairs)
    return {
        "written by": "benchmarks/lengths.py",
        "tokenizer": "Qwen2",
        "max_length": MAX_LENGTH,
        "rows drawn of HH-RLHF": pairs,
        "of these cut at max_length, or skipped": left_out,
        "pairs": lengths,
        "questions": question_lengths(data, tokenizer, questions),
    }


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFUSE_DATA"))
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or PREFUSE_DATA must name the folder of data")
    text = json.dumps(measured(args.data), separators=(",", ":"))
    for cut in ('"pairs"', '"questions"', '"tokenizer"'):
        text = text.replace(cut, "\n" + cut)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
