"""--dry_run: a run from its flags to its first step, without weights and without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from . import lora, online
from .attention import ATTENTION
from .config import TrainConfig, updated
from .data import Example
from .dist import Ranks
from .errors import UserError
from .estimate import Run, estimate
from .judging import functions
from .learners import checks
from .loop import make_optimizer, make_scheduler
from .model import can_share_prefixes, check_vocabulary, config_of, load_tokenizer
from .offline import prepare, train_and_held_out
from .plan.device import Device
from .plan.text import told
from .plan.work import largest, uniform
from .schedule import Schedule
from .scores import Scorer
from .sharding import shard, sharding_of


def model_config(config: TrainConfig) -> Any:
    """config.json, with nothing dropped out."""
    name = config.model_name_or_path
    try:
        return config_of(name, config.trust_remote_code)
    except Exception as error:
        raise UserError(f"--model_name_or_path {name}: no config.json loads: {error}") from error


def for_device(config, device: Device):
    """As offline.resolve would set it there."""
    gpu = device.kind.type == "cuda"
    return updated(config, bf16=gpu) if config.bf16 is None else config


@contextmanager
def pretended(count: int) -> Iterator[Ranks]:
    """The first of `count` ranks; the others never answer, and nothing waits for them."""
    if count == 1:
        yield Ranks(0, 1, torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Ranks(0, count, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def walk_rows(
    config: TrainConfig, name: str, tokenize, make_method, load=None, beside=None, *, device, count
) -> None:
    """In place of offline.run."""
    config = for_device(config, device)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    train_rows, eval_rows = train_and_held_out(config)
    examples, ledger = tokenize(train_rows, tokenizer)
    ledgers = {"data": ledger}
    if eval_rows:
        held_out, ledgers["held-out data"] = tokenize(eval_rows, tokenizer)
        examples = examples + held_out
    for data, found in ledgers.items():
        for line in found.lines():
            print(f"{data}: {line}")
    with pretended(count) as ranks:
        config = _model(config, tokenizer, examples, ranks)
        schedule = Schedule(examples, config, ranks)
        print(f"schedule: {schedule.total_steps} steps, {schedule.steps_per_epoch} an epoch")
        run = Run(config, model_config(config), device, count, partial(largest, examples, ranks))
        found = estimate(run)
    print(told(run, found))


def walk_online(config, *, device: Device, count: int) -> None:
    """In place of online.run_online."""
    checks.check(config)
    config = for_device(config, device)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    prompts, held_out, ledgers = online._prompts(config, tokenizer, functions(config))
    for data, found in ledgers.items():
        for line in found.lines():
            print(f"{data}: {line}")
    longest = [online._longest(p, config) for p in prompts + held_out]
    with pretended(count) as ranks:
        config = _model(config, tokenizer, longest, ranks)
        prompt = max(len(p.tokens) for p in prompts)
        row = max(e.n_tokens for e in longest)
        work = lambda c: uniform(c, row, prompt)  # noqa: E731
        run = Run(config, model_config(config), device, count, work)
        found = estimate(run)
    print(told(run, found))


def _model(config, tokenizer, examples: list[Example], ranks: Ranks):
    """The model's classes, adapters, shards, optimizer and scheduler, on no device."""
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(
            model_config(config), dtype=getattr(torch, config.dtype), attn_implementation=ATTENTION
        )
    check_vocabulary(made, tokenizer, examples, config.model_name_or_path)
    longest = max(len(s.tokens) for e in examples for s in e.sequences)
    obstacle = None if config.layout == "padded" else can_share_prefixes(made, longest)
    if obstacle:
        print(f"layout: padded, because the model has {obstacle}")
        config = updated(config, layout="padded")
    adapters = lora.attach(config, made)
    if adapters:
        print(adapters)
    scorer = Scorer(made, config.layout)
    prepare(config, scorer)
    if ranks.world > 1:
        scorer = shard(scorer, ranks, sharding_of(config, ranks))
    make_scheduler(make_optimizer(scorer, config), config, 1)
    mine = sum(getattr(p, "_local_tensor", p).numel() for p in scorer.parameters())
    whole = sum(p.numel() for p in scorer.parameters())
    print(
        f"model: {type(made).__name__}, {whole} parameters, "
        f"{mine} of them on rank 0 of {ranks.world}"
    )
    return config
