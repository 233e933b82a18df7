"""The optimizer step, top to bottom."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from .activations import offloaded
from .batch import PackedBatch, pack
from .data import Example
from .dist import Ranks
from .guards import finite, interruptible, naming_lost_ranks, not_finite
from .objectives import Method
from .report import Meter, Report
from .resume import Checkpoints
from .schedule import Steps, share_out
from .sharding import reduce_at, reshard


def train(
    config,
    method: Method,
    scorer: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Steps,
    evaluation: Callable[[int], dict[str, float]] | None,
    ranks: Ranks,
    report: Report,
    meter: Meter,
) -> None:
    """Trains `scorer` in place: batch -> scores -> objective -> step, with logs and checkpoints.

    evaluation: what is measured on held-out data, by the steps done.
    """
    learning_rate = make_scheduler(optimizer, config, schedule.total_steps)
    modules = {"model": scorer, **method.modules}
    given = config, modules, optimizer, learning_rate, schedule, ranks, report, meter
    checkpoints = Checkpoints(*given)
    start = checkpoints.begin()
    scorer.train()

    if evaluation and config.eval_on_start and not start:
        report.metrics(0, evaluation(0))
        meter.clear()

    stop, due, step = 0, False, start
    with (
        report.page(),
        report.progress(config.disable_tqdm) as progress,
        interruptible() as interrupted,
        naming_lost_ranks(ranks, lambda: f"step {step + 1}"),
    ):
        bar = progress.add_task("training", total=schedule.total_steps, completed=start, status="")
        ahead = None
        for step in range(start, schedule.total_steps):
            micro_batches, batches = ahead or (schedule.step(step), None)
            losses = backward(config, method, scorer, micro_batches, ranks, meter, batches)
            grad_norm = clip(scorer, config)
            ahead = None
            if schedule.known_ahead and step + 1 < schedule.total_steps:  # as the GPU works
                rows = schedule.step(step + 1)
                ahead = rows, packed(config, rows, ranks)
            if not finite(losses, grad_norm, ranks):
                again = partial(gradient_norm, config, method, scorer, ranks)
                raise not_finite(step, losses, grad_norm, micro_batches, again, ranks)
            meter.add({"grad_norm": grad_norm[None]})
            rate = float(learning_rate.get_last_lr()[0])
            optimizer.step()
            learning_rate.step()
            optimizer.zero_grad()

            done = step + 1
            method.after_step(done)
            progress.update(bar, completed=done)
            if logs(config, done, schedule):
                values = meter.read()
                epoch = done / schedule.steps_per_epoch
                report.metrics(done, {**values, "learning_rate": rate, "epoch": epoch})
                progress.update(bar, status=f"{values['tokens_per_second']:.0f} tokens/s")
                meter.clear()
            if evaluation and evaluates(config, done, schedule):
                values = evaluation(done)
                report.metrics(done, values)
                meter.started += values["eval_runtime"]
            stop = stop or ranks.largest(interrupted())
            due = due or bool(stop or config.save_steps and done % config.save_steps == 0)
            if due and schedule.resumable(done):
                due = False
                saved = checkpoints.save(done, last=bool(stop))
                if stop:
                    name = signal.Signals(stop).name
                    report.say(f"interrupted after step {done}; saved {saved} ({name})")
                    raise KeyboardInterrupt if stop == signal.SIGINT else SystemExit(128 + stop)
            checkpoints.poll(done, wait=done == schedule.total_steps)


def packed(config, micro_batches: list[list[Example]], ranks: Ranks) -> list[PackedBatch]:
    """On this rank's device."""
    return [pack(rows, config.layout == "shared").to(ranks.device) for rows in micro_batches]


def backward(
    config,
    method: Method,
    scorer: nn.Module,
    micro_batches: list[list[Example]],
    ranks: Ranks,
    meter: Meter,
    batches: list[PackedBatch] | None = None,
) -> list[torch.Tensor]:
    """Leaves on the parameters the gradient of the mean loss over all ranks and micro-batches;
    returns this rank's losses, summed by micro-batch. batches: the micro-batches, if packed."""
    batches = batches or packed(config, micro_batches, ranks)
    units = global_units(method, batches, ranks)
    with autocast(config, ranks):
        method.before_step(scorer, batches)
    losses = []
    for batch in batches:
        with autocast(config, ranks), offloaded(config.activation_offloading):
            objective = method.objective(scorer, batch)
        loss = objective.sum()
        reduce_at(scorer, last=batch is batches[-1])
        (loss / units).backward()
        losses.append(loss.detach())
        meter.add({"loss": objective.loss, **objective.metrics})
        meter.tokens += batch.n_tokens
    return losses


def make_optimizer(scorer: nn.Module, config) -> torch.optim.Optimizer:
    """AdamW with no decay on vectors, or SGD; a critic may have a learning rate of its own."""
    reshard(scorer)
    own = getattr(config, "critic_learning_rate", None)
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in scorer.named_parameters():
        if p.requires_grad:
            kinds.setdefault((name.startswith("critic."), p.dim() <= 1), []).append(p)
    groups = [
        {
            "params": parameters,
            "weight_decay": 0.0 if vectors else config.weight_decay,
            "lr": own if critics and own is not None else config.learning_rate,
        }
        for (critics, vectors), parameters in sorted(kinds.items(), key=lambda item: item[0])
    ]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def make_scheduler(optimizer, config, total_steps: int):
    warmup = config.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
    kind = config.lr_scheduler_type
    kind = "constant_with_warmup" if kind == "constant" and warmup else kind
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def global_units(method: Method, batches, ranks: Ranks) -> float:
    """How many units (tokens, pairs, ...) the optimizer step has, over ranks and micro-batches."""
    count = sum(batch.count(method.unit) for batch in batches)
    return max(1.0, ranks.total(torch.tensor([float(count)], dtype=torch.float64)).item())


def autocast(config, ranks: Ranks):
    if config.bf16 and config.dtype == "float32":
        return torch.autocast(ranks.device.type, dtype=torch.bfloat16)
    return nullcontext()


def clip(scorer: nn.Module, config) -> torch.Tensor:
    """Clips the gradient's global norm; returns what it was."""
    limit = config.max_grad_norm if config.max_grad_norm > 0 else float("inf")
    norm = clip_grad_norm_(scorer.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gradient_norm(config, method: Method, scorer, ranks: Ranks, micro_batches) -> float:
    """Of these micro-batches alone; leaves no gradient."""
    scorer.zero_grad()
    backward(config, method, scorer, micro_batches, ranks, Meter(ranks))
    norm = float(clip(scorer, config))
    scorer.zero_grad()
    return norm


def logs(config, done: int, schedule: Steps) -> bool:
    first = config.logging_first_step and done == 1
    return first or done % config.logging_steps == 0 or done == schedule.total_steps


def evaluates(config, done: int, schedule: Steps) -> bool:
    if config.eval_strategy == "steps":
        return done % config.eval_steps == 0
    each = schedule.steps_per_epoch
    return config.eval_strategy == "epoch" and round(round(done / each) * each) == done


@torch.no_grad()
def evaluate(
    config, method: Method, scorer: nn.Module, examples: list[Example], ranks: Ranks, done: int = 0
) -> dict[str, float]:
    """The objective's means over held-out examples."""
    meter = Meter(ranks)
    scorer.eval()
    size = config.per_device_eval_batch_size
    rows = [examples[i : i + size] for i in range(0, len(examples), size)]
    batches = packed(config, share_out(rows, ranks), ranks)
    with autocast(config, ranks):
        method.before_step(scorer, batches)
    for batch in batches:
        with autocast(config, ranks):
            objective = method.objective(scorer, batch)
        meter.add({"loss": objective.loss, **objective.metrics})
        meter.tokens += batch.n_tokens
    reshard(scorer)
    scorer.train()
    values = meter.read()
    values["runtime"] = values["num_tokens"] / values["tokens_per_second"]
    return {f"eval_{name}": value for name, value in values.items()}
