"""The gradient of one optimizer step by method, layout, head, ranks and accumulation; rank 0 of
tests/test_rank_matrix.py writes those of its world to argv[1]."""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import conftest  # noqa: F401  finds prefuse in a clone that was never installed
import numpy as np
import torch
from tiny import gradients, in_float64, ragged_pairs, scorer_of, tiny_model
from transformers import LlamaForSequenceClassification

from prefuse.trainer import kto, loop, lora, objectives, reward
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.data import Example
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.policy import policy_method
from prefuse.trainer.online_config import GRPOConfig
from prefuse.trainer.report import Meter
from prefuse.trainer.reward_model import RewardScorer
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.scores import Unadapted
from prefuse.trainer.sharding import Sharding, shard

METHODS = ("sft", "dpo", "kto", "reward", "grpo")
LAYOUTS = ("shared", "packed", "padded")
HEADS = {"gathered": False, "sharded": True, "tied": True, "adapters": True}
ACCUMULATIONS = (1, 2, 4)
ROWS = 16  # of a step, of which one is missing; over 4 ranks the last has fewer
# odd; where it is larger than all ranks' tokens hidden states travel, else the head's rows
VOCABULARY = {"gathered": 53, "sharded": 2053, "tied": 2053, "adapters": 53}
ALONE = Ranks(0, 1, torch.device("cpu"))


def examples_of(method: str) -> list[Example]:
    """15 rows, so that a step of 16 is uneven."""
    pairs, rng = ragged_pairs(ROWS - 1), np.random.default_rng(0)
    if method == "dpo":
        return pairs
    if method in ("sft", "kto"):
        judged = lambda e: (float(e.index % 3 > 0),) if method == "kto" else ()  # noqa: E731
        return [Example(e.index, e.sequences[:1], e.where, judged(e)) for e in pairs]
    if method == "reward":
        return [ended(e) for e in pairs]
    return [sampled(e, rng) for e in pairs]


def ended(example: Example) -> Example:
    """Read at the last token of each answer."""
    read = [
        s._replace(scored=np.arange(len(s.tokens)) == len(s.tokens) - 1) for s in example.sequences
    ]
    return Example(example.index, tuple(read), example.where)


def sampled(example: Example, rng: np.random.Generator) -> Example:
    """A group of two completions, with what an online step knows of its tokens."""
    count = sum(int(s.scored.sum()) for s in example.sequences)
    names = ("advantages", "old_logp", "ref_logp", "rollout_logp")
    numbers = {name: rng.normal(size=count).astype(np.float32) for name in names}
    numbers |= {name: numbers[name] * 0.1 - 3.8 for name in names[1:]}
    return Example(example.index, example.sequences, example.where, (), numbers)


def models_of(method: str, layout: str, head: str, ranks: Ranks, dtype: torch.dtype):
    """What is trained, in shards, and the method."""
    how = Sharding(shard_head=HEADS[head])

    def made(seed: int, frozen: bool = False):
        model = tiny_model(tie=head == "tied", seed=seed, vocab_size=VOCABULARY[head])
        model = in_float64(model) if dtype == torch.float64 else model
        if head == "adapters":
            adapt(model)
        return shard(scorer_of(model, layout), ranks, how, frozen)

    if method == "reward":
        scorer = shard(reward_scorer(layout, dtype, head == "adapters"), ranks, how)
        return scorer, reward.method("bradley_terry", {}, ranks, 2)
    policy = made(0)
    if method == "sft":
        return policy, objectives.sft()
    if method == "grpo":
        return policy, policy_method(grpo_config(), Controls(0.04))
    other = Unadapted(policy) if head == "adapters" else made(1, frozen=True)
    if head != "adapters":
        other.requires_grad_(False)
    reference = objectives.live_reference(other)
    if method == "dpo":
        return policy, objectives.dpo(reference, "sigmoid", {})
    return policy, kto.method(reference, examples_of("kto"), "kto", {}, ranks)


def adapt(model) -> None:
    """Adapters that say something: fresh ones multiply by 0."""
    where = dict(lora_target_modules=["all-linear"], lora_r=4)
    lora.attach(DPOConfig("tiny", "rows", "unused", use_peft=True, bf16=False, **where), model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            drawn = torch.empty(p.shape).normal_(0, 0.05, generator=generator)
            p.data = drawn.to(model.dtype)  # which peft leaves in float32


def reward_scorer(layout: str, dtype: torch.dtype, adapters: bool) -> RewardScorer:
    like = tiny_model(vocab_size=53)
    body = scorer_of(like, layout).model
    body.config.num_labels = 1
    model = LlamaForSequenceClassification(body.config)
    model.model.load_state_dict(body.model.state_dict())
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(model.score.weight, 0, 0.1, generator=generator)
    model.set_attn_implementation(body.config._attn_implementation)
    model = in_float64(model) if dtype == torch.float64 else model
    if adapters:
        adapt(model)
    return RewardScorer(model, layout)


def grpo_config() -> GRPOConfig:
    given = dict(per_device_train_batch_size=2, num_generations=2, bf16=False)
    config = GRPOConfig("m", "d", "o", reward_funcs=["x"], beta=0.04, num_iterations=2, **given)
    return config


def gradient(method: str, layout: str, head: str, ranks: Ranks, accumulation: int, dtype):
    scorer, objective = models_of(method, layout, head, ranks, dtype)
    config = DPOConfig(
        "tiny", "rows", "unused", bf16=False, layout=layout, max_steps=1,
        per_device_train_batch_size=ROWS // ranks.world // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    batches = Schedule(examples_of(method), config, ranks).step(0)
    loop.backward(config, objective, scorer, batches, ranks, Meter(ranks))
    return gradients(scorer)


def cases() -> Iterator[tuple[str, str, str, int]]:
    for case in product(METHODS, LAYOUTS, HEADS, ACCUMULATIONS):
        if case[0] != "reward" or case[2] in ("gathered", "adapters"):  # it has no vocabulary
            yield case


def every_case(ranks: Ranks) -> dict:
    found = {}
    for method, layout, head, accumulation in cases():
        given = method, layout, head, ranks, accumulation, torch.float32
        found[method, layout, head, accumulation] = gradient(*given)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = start()
    found = every_case(ranks)
    if ranks.is_main:
        torch.save(found, Path(sys.argv[1]) / f"{ranks.world}.pt")
