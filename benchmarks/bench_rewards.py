"""Verifiers of mathematics on real solutions: how many a second, and how often they are right.

    PREFUSE_DATA=... python benchmarks/bench_rewards.py --out benchmarks/results \
        [--verdicts SOLUTIONS.jsonl ...]

From the data folder: GSM8K's solutions by `gsm8k`, MATH-500's by `accuracy`, each against its own
answer and against that of the next row, which is wrong unless the two are the same text.
A file of verdicts has rows of `completion`, `answer` and `verdict`: what another verifier, or a
person, said of a model's solution. `gsm8k` reads files whose names begin so, `math` the others, and
math-verify both, as it is when it is called alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from common import machine, table
from math_verify import parse, verify

from prefuse.trainer.feedback import symbolic as rewards_symbolic
from prefuse.trainer.feedback.maths import accuracy, gsm8k, math


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def measured(name: str, verify: Callable, completions: list, answers: list, wanted: list) -> dict:
    """The time of one pass, without answers remembered from another, and what it says."""
    rewards_symbolic.equal.cache_clear()
    start = time.perf_counter()
    found = verify(completions, answers)
    seconds = time.perf_counter() - start
    agree = sum(f == float(w) for f, w in zip(found, wanted, strict=True))
    wrong = [f for f, w in zip(found, wanted, strict=True) if f != float(w)]
    return {
        "solutions": name,
        "verifier": verify.__name__,
        "count": len(found),
        "per second": len(found) / seconds,
        "agreement": f"{agree / len(found):.2%}",
        "right here alone": sum(f == 1 for f in wrong),
        "wrong here alone": sum(f == 0 for f in wrong),
    }


def math_verify(completions: list[str], answers: list[str]) -> list[float]:
    """What the package says by itself, given whole solutions."""
    found = []
    for completion, answer in zip(completions, answers, strict=True):
        gold = parse(answer if "\n" in answer else f"${answer}$")
        found.append(float(verify(gold, parse(completion))))
    return found


def own_and_next(name: str, verify: Callable, solutions: list, answers: list) -> list[dict]:
    shifted = answers[1:] + answers[:1]
    same = [a == b for a, b in zip(answers, shifted, strict=True)]
    return [
        measured(f"{name}, own answer", verify, solutions, answers, [True] * len(answers)),
        measured(f"{name}, next row's answer", verify, solutions, shifted, same),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("PREFUSE_DATA"))
    parser.add_argument("--verdicts", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # math-verify tells of every answer that it cannot read
    folder = Path(options.data) / "verifiable"
    load, start = os.getloadavg()[0], time.perf_counter()
    math(["\\boxed{\\sqrt{8}}"], ["2\\sqrt{2}"])
    started = time.perf_counter() - start  # its process imports sympy
    rows = read(folder / "gsm8k_train.jsonl")[: options.count]
    finals = [row["answer"].rpartition("#### ")[2] for row in rows]
    results = own_and_next("GSM8K", gsm8k, [row["answer"] for row in rows], finals)
    rows = read(folder / "math500.jsonl")[: options.count]
    results += own_and_next(
        "MATH-500", accuracy, [r["solution"] for r in rows], [r["answer"] for r in rows]
    )
    for file in options.verdicts:
        rows = read(file)
        mine = gsm8k if file.name.startswith("gsm8k") else math
        columns = [[row[name] for row in rows] for name in ("completion", "answer", "verdict")]
        results += [measured(file.stem, v, *columns) for v in (mine, math_verify)]
    info = {**machine(), "math_verify": version("math-verify"), "sympy": version("sympy")}
    info |= {"load before": round(load, 1), "seconds to start": round(started, 2)}
    print(table(results))
    if options.out is not None:
        text = json.dumps({"machine": info, "results": results}, indent=1)
        (options.out / "rewards_cpu.json").write_text(text + "\n")
        head = "\n".join(f"- {name}: {value}" for name, value in info.items())
        page = f"# Verifiers of mathematics\n\n{head}\n\n{table(results)}\n"
        (options.out / "rewards_cpu.md").write_text(page)


if __name__ == "__main__":
    main()
