"""Whole optimizer steps of DPO, prefuse beside TRL, at HH-RLHF's lengths.

    python benchmarks/bench_train_dpo.py --output RESULT            # 0.5b and 1.5b
    python benchmarks/bench_train_dpo.py --shape 7b --output RESULT

Qwen2.5's architectures with random weights, random tokens in pairs of real lengths (lengths.json).
A step is policy and reference on the same pairs, loss, backward, clipping and fused AdamW, by
prefuse's training loop and by TRL's DPOTrainer, in the same precision: `bfloat16` is weights,
gradients and AdamW's moments in bfloat16, `mixed` is all of them in float32, under autocast. Each
system's settings are searched in short runs; then the two take turns, each freed before the next is
built. Real tokens are prompt + chosen and prompt + rejected: padding counts for neither, and a
prompt counts twice, though prefuse computes it once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import train_prefuse
import train_trl
from lengths import MAX_LENGTH, read
from train_common import (
    PRECISIONS,
    SHAPES,
    Clock,
    Shape,
    System,
    Task,
    forward_flops,
    random_model,
    random_tokens,
)
from train_compare import SEARCHED, parsed, run_all
from train_prefuse import Prefuse
from train_trl import TRL

from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.data import Example, Sequence
from prefuse.trainer.dist import start
from prefuse.trainer.loop import autocast, make_optimizer
from prefuse.trainer.objectives import dpo, live_reference
from prefuse.trainer.offline import compile_layers, placed, prepare
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.scores import Scorer

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens of prompt, chosen, rejected


def random_pairs(shape: Shape, count: int, longest: int = MAX_LENGTH) -> list[Pair]:
    """Of HH-RLHF's lengths; longest: of the pairs that are taken, for a small test."""
    lengths = [x for x in read()["pairs"] if x[0] + max(x[1:]) <= longest]
    rng = np.random.default_rng(0)
    drawn = [lengths[i % len(lengths)] for i in range(count)]
    return [tuple(random_tokens(rng, n, shape) for n in x) for x in drawn]  # type: ignore[misc]


def task_of(name: str, shape: Shape, pairs: list[Pair], batch: int) -> Task:
    steps = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    sequences = [[(len(p) + len(c), len(c)) for p, *both in s for c in both] for s in steps]
    tokens = [sum(n for n, _ in found) for found in sequences]
    flops = [(3 + 1) * forward_flops(shape, found) for found in sequences]
    return Task(name, tokens, flops)


def examples_of(pairs: list[Pair]) -> list:

    made = []
    for index, (prompt, *both) in enumerate(pairs):
        whole = [np.concatenate([prompt, x]) for x in both]
        sequences = tuple(Sequence(x, np.arange(len(x)) >= len(prompt)) for x in whole)
        made.append(Example(index, sequences, f"pair {index}"))
    return made


def run_prefuse(
    shape: Shape,
    pairs: list[Pair],
    batch: int,
    precision: str,
    setting: Prefuse,
    clock: Clock,
    between: Callable[[int], None] = lambda done: None,
) -> float:
    """Optimizer steps of the trainer's own loop; the first one's gradient norm. between: called
    after each step with their number."""

    ranks = start()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            **train_prefuse.options(folder, precision, setting, clock),
            per_device_train_batch_size=batch,
            max_tokens_per_micro_batch=setting.size,
        )
        model = random_model(shape, PRECISIONS[precision][0], ATTENTION)
        scorer = placed(config, Scorer(model, config.layout).eval(), ranks)
        frozen = Scorer(deepcopy(model), config.layout).eval().requires_grad_(False)
        compile_layers(config, frozen)
        score = live_reference(frozen)
        prepare(config, scorer)

        def reference(packed):
            with autocast(config, ranks):
                return score(packed)

        method = dpo(reference, config.loss_type, config.hyperparameters)
        optimizer = make_optimizer(scorer, config)
        schedule = Schedule(examples_of(pairs), config, ranks)
        return train_prefuse.steps(
            config, method, scorer, optimizer, schedule, ranks, clock, between
        )


def run_trl(
    shape: Shape, pairs: list[Pair], batch: int, precision: str, setting: TRL, clock: Clock
) -> float:
    import trl
    from datasets import Dataset

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # the rows are tokens

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(rows)

        def _compute_loss(self, model, inputs, return_outputs):
            clock.computed += inputs["input_ids"].numel()
            return super()._compute_loss(model, inputs, return_outputs)

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = [dict(zip(names, (x.tolist() for x in pair), strict=True)) for pair in pairs]
    rows: Any = Dataset.from_list(found)
    dtype, mixed = PRECISIONS[precision]
    with tempfile.TemporaryDirectory() as folder, train_trl.alone():
        model = random_model(shape, dtype, setting.attention)
        trainer = Trainer(
            model=model,
            ref_model=deepcopy(model),
            args=trl.DPOConfig(
                **train_trl.options(folder, setting, batch, clock, mixed), max_length=MAX_LENGTH
            ),
            train_dataset=rows,
            processing_class=train_trl.tokenizer(),
        )
        return train_trl.train(trainer, clock)


def systems_of(name: str, pairs: list[Pair], task: Task, args) -> list[System]:
    """prefuse's micro-batches are whole steps, halves and quarters of the largest one."""
    longest = max(2 * len(prompt) + len(c) + len(r) for prompt, c, r in pairs)
    sizes = [max(longest, -(-max(task.tokens) // parts)) for parts in (1, 2, 4)]
    searched: list = train_prefuse.stages(sizes, "tokens", args.compile)
    given = SHAPES[name], pairs, args.batch, args.precision
    found = [System("prefuse", searched, partial(run_prefuse, *given))]
    if not args.alone:
        train_trl.load("DPOTrainer")
        micros = {"tiny": [4, 2], "7b": [4, 2, 8]}.get(name, [8, 4, 16, 2])
        searched = train_trl.stages(args.batch, micros, args.compile)
        found.append(System("TRL", searched, partial(run_trl, *given)))
    return found


def jobs(args) -> Iterator[tuple[Task, list[System]]]:
    for name in args.shape:
        count = args.batch * max(sum(SEARCHED), args.warmup + args.steps)
        pairs = random_pairs(SHAPES[name], count, 256 if name == "tiny" else MAX_LENGTH)
        task = task_of(f"DPO, {name}", SHAPES[name], pairs, args.batch)
        yield task, systems_of(name, pairs, task, args)


def main(given: list[str] | None = None) -> None:
    args = parsed(__doc__, 32, given)
    run_all("DPO: whole optimizer steps", jobs(args), args, batch=f"{args.batch} pairs a step")


if __name__ == "__main__":
    main()
