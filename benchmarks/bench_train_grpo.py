"""Whole optimizer steps of GRPO without the sampling, prefuse beside TRL, at GSM8K's lengths.

    python benchmarks/bench_train_grpo.py --output RESULT              # 0.5b and 1.5b
    python benchmarks/bench_train_grpo.py --beta 0 0.04 --output RESULT

Qwen2.5's architectures with random weights; 8 random completions of every prompt, of the lengths of
GSM8K's questions and answers (lengths.json), with random rewards. What is timed is all that follows
sampling and judging: advantages, the reference's log-probs where there is a KL (--beta above 0),
loss, backward, clipping and fused AdamW; by prefuse's online schedule, learner and training loop
and by TRL's GRPOTrainer. Neither scores the policy before the update, which is on-policy. The
completions are handed to prefuse as if an engine had sampled them; to TRL in place of
`_generate_and_score_completions`, padded and scored by TRL's own functions. Settings, turns and
precision are as in bench_train_dpo.py. Real tokens are prompt + completion, the prompt of every
completion: padding counts for neither, and prefuse computes a prompt once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import train_prefuse
import train_trl
from common import device
from lengths import read
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
from prefuse.trainer.dist import start
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.policy import policy
from prefuse.trainer.loop import make_optimizer
from prefuse.trainer.offline import compile_layers, placed, prepare
from prefuse.trainer.online import Models, OnlineSchedule
from prefuse.trainer.online_config import GRPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.report import Meter
from prefuse.trainer.rollout import Completion, Sampling
from prefuse.trainer.sampling import Sampler, Source, Sources
from prefuse.trainer.scores import Scorer

G = 8  # completions of a prompt
LONGEST = 512  # of a completion


class Group(NamedTuple):
    prompt: np.ndarray
    completions: list[np.ndarray]
    rewards: np.ndarray  # [G] float64


def random_groups(shape: Shape, count: int, longest: int = LONGEST) -> list[Group]:
    """A row has one answer, so the others of its group are other rows'; longest: of the questions
    and answers that are taken, for a small test."""
    lengths = [x for x in read()["questions"] if max(x) <= longest]
    answers = [answer for _, answer in lengths]
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        prompt = random_tokens(rng, lengths[i % len(lengths)][0], shape)
        completions = [random_tokens(rng, n, shape) for n in rng.choice(answers, G)]
        found.append(Group(prompt, completions, rng.standard_normal(G)))
    return found


def task_of(name: str, shape: Shape, groups: list[Group], batch: int, beta: float) -> Task:
    each = batch // G
    found = [
        [(len(g.prompt) + len(c), len(c)) for g in groups[i : i + each] for c in g.completions]
        for i in range(0, len(groups), each)
    ]
    tokens = [sum(n for n, _ in sequences) for sequences in found]
    forwards = 3 + (beta > 0)
    return Task(name, tokens, [forwards * forward_flops(shape, x) for x in found])


class Engine:
    """Samples what there is, in the prompts' order."""

    def __init__(self, groups: list[Group]):
        self.groups = iter(groups)

    def generate(self, prompts, n, sampling, seeds):

        unknown = np.float32(np.nan)
        return [
            [Completion(c, np.full(len(c), unknown), True) for c in next(self.groups).completions]
            for _ in prompts
        ]

    def update_weights(self, model) -> None:
        pass

    def close(self) -> None:
        pass


def judge_of(groups: list[Group], meter) -> SimpleNamespace:
    """Gives a window the rewards that there are."""

    def judge(window, step: int) -> None:
        found = np.concatenate([groups[p.index].rewards for p in window.prompts])
        window.rewards = torch.from_numpy(found)
        window.parts = window.rewards[:, None]

    return SimpleNamespace(judge=judge, meter=meter)


def run_prefuse(
    shape: Shape,
    groups: list[Group],
    batch: int,
    precision: str,
    beta: float,
    setting: Prefuse,
    clock: Clock,
) -> float:
    """Optimizer steps of the trainer's own schedule, learner and loop; the first one's gradient
    norm."""

    ranks = start()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **train_prefuse.options(folder, precision, setting, clock),
            per_device_train_batch_size=setting.size,
            gradient_accumulation_steps=batch // setting.size,
            reward_funcs=["length"],  # never asked
            num_generations=G,
            max_completion_length=LONGEST,
            beta=beta,
        )
        model = random_model(shape, PRECISIONS[precision][0], ATTENTION)
        scorer = placed(config, Scorer(model, config.layout).eval(), ranks)
        reference = None
        if beta:
            reference = Scorer(deepcopy(model), config.layout).eval().requires_grad_(False)
            compile_layers(config, reference)
        prepare(config, scorer)
        models, controls, meter = Models(scorer, scorer, reference), Controls(beta), Meter(ranks)
        learner = policy(config, controls, ranks.total)
        prompts = [Prompt(i, g.prompt, "", {}, f"prompt {i}") for i, g in enumerate(groups)]
        engine = Source(Engine(groups), G, Sampling())
        sampler = Sampler(config, prompts, Sources((engine,)), ranks)
        given = sampler, judge_of(groups, meter), learner, models, controls, ranks
        schedule = OnlineSchedule(config, *given)  # type: ignore[arg-type]
        run = config, learner.method, scorer, make_optimizer(scorer, config), schedule, ranks
        return train_prefuse.steps(*run, clock, meter=meter)


def prepared(trainer, groups: list[Group], micro: int) -> dict[str, torch.Tensor]:
    """What GRPOTrainer makes of sampled completions before it learns from them: padded, with
    advantages, and the reference's log-probs if it reads them."""
    from trl.trainer.utils import pad

    where = device()
    prompts = [torch.from_numpy(g.prompt) for g in groups for _ in g.completions]
    completions = [torch.from_numpy(c) for g in groups for c in g.completions]
    made: dict[str, torch.Tensor] = {}
    for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        made[f"{name}_ids"] = pad(rows, 0, side).to(where)
        made[f"{name}_mask"] = pad([torch.ones_like(x) for x in rows], 0, side).to(where)
    rewards = torch.from_numpy(np.stack([g.rewards for g in groups])).float().to(where)
    centred = rewards - rewards.mean(1, keepdim=True)
    made["advantages"] = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    made["num_items_in_batch"] = made["completion_mask"].sum()
    if trainer.beta:
        ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
        mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
        keep = made["completion_ids"].size(1)
        with torch.no_grad():
            score = trainer._get_per_token_logps_and_entropies
            made["ref_per_token_logps"] = score(trainer.ref_model, ids, mask, keep, micro)[0]
    return made


def run_trl(
    shape: Shape,
    groups: list[Group],
    batch: int,
    precision: str,
    beta: float,
    setting: TRL,
    clock: Clock,
) -> float:
    import trl
    from datasets import Dataset
    from trl.trainer import grpo_trainer

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            chosen = [groups[int(row["prompt"])] for row in inputs[::G]]
            return prepared(self, chosen, setting.micro)

        def _compute_loss(self, model, inputs):
            clock.computed += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
            return super()._compute_loss(model, inputs)

    dtype, mixed = PRECISIONS[precision]
    with tempfile.TemporaryDirectory() as folder, train_trl.alone():
        model = random_model(shape, dtype, setting.attention)
        given = train_trl.options(folder, setting, batch, clock, mixed)
        given |= dict(num_generations=G, max_completion_length=LONGEST, beta=beta)
        reference = deepcopy(model) if beta else None  # else it would be looked for on the hub
        with patch.object(grpo_trainer, "create_model_from_path", lambda *_, **__: reference):
            trainer = Trainer(
                model=model,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=trl.GRPOConfig(**given, shuffle_dataset=False),
                train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
                processing_class=train_trl.tokenizer(),
            )
        return train_trl.train(trainer, clock)


def systems_of(name: str, groups: list[Group], beta: float, args) -> list[System]:
    sizes = [n for n in (args.batch, args.batch // 2, args.batch // 4) if n and n % G == 0]
    searched: list = train_prefuse.stages(sizes, "completions", args.compile)
    given = SHAPES[name], groups, args.batch, args.precision, beta
    found = [System("prefuse", searched, partial(run_prefuse, *given))]
    if not args.alone:
        train_trl.load("GRPOTrainer")
        micros = {"tiny": [8, 4], "7b": [8, 4, 16]}.get(name, [32, 16, 64, 8])
        searched = train_trl.stages(args.batch, micros, args.compile)
        found.append(System("TRL", searched, partial(run_trl, *given)))
    return found


def jobs(args) -> Iterator[tuple[Task, list[System]]]:
    steps = max(sum(SEARCHED), args.warmup + args.steps)
    for name in args.shape:
        longest = 128 if name == "tiny" else LONGEST
        groups = random_groups(SHAPES[name], args.batch // G * steps, longest)
        for beta in args.beta:
            told = f"GRPO, {name}, beta {beta:g}"
            task = task_of(told, SHAPES[name], groups, args.batch, beta)
            yield task, systems_of(name, groups, beta, args)


def main(given: list[str] | None = None) -> None:
    args = parsed(__doc__, 128, given, beta=(0.0,))
    if args.batch % G:
        raise SystemExit(f"--batch: wanted a multiple of {G}, a prompt's completions")
    told = f"{args.batch} completions a step, {G} of a prompt"
    run_all("GRPO: whole optimizer steps, sampling left out", jobs(args), args, batch=told)


if __name__ == "__main__":
    main()
