"""How much a step has to do: tokens, pairs of them, rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..batch import PackedBatch, pack
from ..config import KTOConfig, updated
from ..data import Example, Sequence
from ..dist import Ranks
from ..online_config import OnlineConfig, PickingConfig, RAFTConfig
from ..schedule import Schedule


class Work(NamedTuple):
    """What a micro-batch asks of the model. pairs: of a query and a key; real: tokens as the rows
    have them, before prefixes are shared."""

    tokens: int
    scored: int
    real: int
    pairs: int
    children: int
    prefixes: int
    longest: int
    rows: int

    @classmethod
    def of(cls, batch: PackedBatch) -> Work:
        lengths, parent = batch.cu_seqlens.diff().long(), batch.parent
        own = int((lengths * (lengths + 1) // 2).sum())
        has = parent >= 0
        seen = lengths[parent.clamp(min=0)]
        across = int((lengths * seen)[has].sum())
        prefixes = int(lengths[parent[has].unique()].sum())
        tokens, longest = len(batch.tokens), int(lengths.max())
        sizes = int(lengths[has].sum()), prefixes, longest, len(lengths)
        return cls(tokens, batch.n_scored, batch.n_tokens, own + across, *sizes)


def uniform(config, row_tokens: int, prompt_tokens: int) -> tuple[Work, Work, int]:
    """Work of rows that all have `row_tokens`, of which the first `prompt_tokens` are a prompt that
    the answers of a row share and that is not trained on."""
    each, rows = 1, config.per_device_train_batch_size
    if isinstance(config, PickingConfig):
        kept = config.keep_best if isinstance(config, RAFTConfig) else 2
        each, rows = kept, max(1, rows // config.num_generations)
    elif isinstance(config, OnlineConfig):
        each = math.gcd(config.num_generations, rows)
        rows //= each
    elif hasattr(config, "loss_type") and not isinstance(config, KTOConfig):
        each = 2
    micro_batches = config.gradient_accumulation_steps
    if config.max_tokens_per_micro_batch is not None:
        fit = max(1, config.max_tokens_per_micro_batch // (each * row_tokens))
        micro_batches = math.ceil(rows * micro_batches / fit)
        rows = fit

    def batch(count: int) -> Work:
        made = [_example(i, each, row_tokens, prompt_tokens) for i in range(count)]
        return Work.of(pack(made, config.layout == "shared"))

    return batch(rows), batch(config.per_device_eval_batch_size), micro_batches


def _example(index: int, each: int, length: int, prompt: int) -> Example:
    scored = torch.arange(length) >= max(prompt, 1)
    answers = [torch.full((length,), k + 1) for k in range(each)]
    for tokens in answers:
        tokens[:prompt] = 0
    return Example(index, tuple(Sequence(t.numpy(), scored.numpy()) for t in answers))


def largest(examples: list[Example], ranks: Ranks, config) -> tuple[Work, Work, int]:
    """Of the first epoch's micro-batches the largest on any rank, of the batches that are only
    scored the largest, and how many micro-batches a step has."""
    alone = Ranks(0, 1, ranks.device)
    whole = updated(
        config, gradient_accumulation_steps=config.gradient_accumulation_steps * ranks.world
    )
    schedule = Schedule(examples, whole, alone)
    steps = [schedule.step(i) for i in range(min(schedule.steps_per_epoch, schedule.total_steps))]
    most = -(-max(len(batches) for batches in steps) // ranks.world)
    share = config.layout == "shared"
    found = sorted((rows for batches in steps for rows in batches), key=_tokens)[-3:]
    works = [Work.of(pack(rows, share)) for rows in found]
    longest = sorted(examples, key=lambda e: e.n_tokens)[-config.per_device_eval_batch_size :]
    size = lambda w: w.rows * w.longest if config.layout == "padded" else w.tokens  # noqa: E731
    return max(works, key=size), Work.of(pack(longest, share)), most


def _tokens(rows: list[Example]) -> int:
    return sum(e.n_tokens for e in rows)
