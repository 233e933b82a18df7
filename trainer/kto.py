"""`prefuse kto`: losses of completions judged one at a time, and what they compare rewards with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefuse.kernels.objective import Mean, Objective
from prefuse.kernels.preference import UNPAIRED_LOSSES, inputs, unpaired_loss
from prefuse.kernels.preference_parts import Labelled

from .batch import PackedBatch, pack
from .config import KTOConfig
from .critic import ActorCritic, load_critic
from .data import Example
from .dist import Ranks
from .errors import UserError
from .kto_data import kto_examples, mismatched, partners, prompt_of, up_to_prompt
from .objectives import Method, Reference, sequence_logps
from .offline import referenced, run

COLUMNS = ("label", "reward", "value")  # of the data, where a loss reads them
CRITIC = "dro_v"  # learns the value itself
DECAY = 0.9  # of BCO's moving averages; the paper names none


class Shift(NamedTuple):
    """What rewards are compared with: before a step's losses, of them, and after the step."""

    value: Callable[[], Tensor]
    before_step: Callable[[Any, list[PackedBatch]], None]
    observe: Callable[[Tensor, Tensor], None] = lambda rewards, label: None
    after_step: Callable[[int], None] = lambda done: None
    module: nn.Module | None = None
    metrics: Callable[[], dict[str, Mean]] = dict


def judged_columns(loss_type: str) -> tuple[str, ...]:
    """The columns of the data, besides its texts, that a loss reads."""
    needed = inputs(UNPAIRED_LOSSES[loss_type], Labelled)
    needed = tuple(name for name in COLUMNS if name in needed)
    return tuple(name for name in needed if name != "value" or loss_type != CRITIC)


def run_kto(config: KTOConfig, go=None) -> None:
    """`prefuse kto`; go: in place of `run`, with its arguments."""
    columns = judged_columns(config.loss_type)
    if config.loss_type == "kto" and config.precomputes:
        raise UserError(
            "--precompute_ref_log_probs, --ref_log_probs_cache: --loss_type kto asks the reference "
            "about completions of other prompts, new ones in every step; drop the flag or choose "
            "another loss"
        )

    def tokenize(rows, tokenizer):
        return kto_examples(rows, tokenizer, config.max_length, columns)

    def make(config: KTOConfig, scorer, examples: list[Example], ranks: Ranks, report) -> Method:
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.world
        if config.loss_type == "kto" and rows < 2:
            raise UserError(
                "--per_device_train_batch_size: --loss_type kto compares the completions of an "
                "optimizer step with those of other prompts; wanted 2 rows or more, got 1"
            )
        return referenced(
            config, scorer, examples, ranks, report,
            lambda reference: dro(reference, examples, config.hyperparameters)
            if config.loss_type == CRITIC
            else method(
                reference, examples, config.loss_type, config.hyperparameters, ranks,
                config.max_length,
            ),
        )  # fmt: skip

    (go or run)(
        config, "kto", tokenize, make, beside=load_critic if config.loss_type == CRITIC else None
    )


def method(
    reference: Reference,
    examples: list[Example],
    loss_type: str,
    hyperparameters: dict[str, Any],
    ranks: Ranks,
    max_length: int | None = None,
) -> Method:
    """An unpaired loss on packed completions; `examples` by their index."""
    columns = judged_columns(loss_type)
    shift = None
    if loss_type == "kto":
        shift = divergence(reference, examples, ranks, max_length)
    elif loss_type == "bco":
        shift = moving_average(ranks)

    def objective(scorer: Any, batch: PackedBatch) -> Objective:
        logp = sequence_logps(scorer, batch)
        numbers = batch.judged.reshape(len(batch.examples), len(columns)).unbind(1)
        given: dict[str, Any] = dict(zip(columns, numbers, strict=True))
        if "label" in given:
            given["label"] = given["label"] > 0
        if shift is not None:
            given["shift"] = shift.value()
        found = unpaired_loss(
            logp, loss_type=loss_type, ref_logp=reference(batch), **given, **hyperparameters
        )
        if "label" not in given:
            return found
        rewards, label = found.metrics["rewards"], given["label"]
        assert isinstance(rewards, Tensor)
        metrics = _by_label("rewards", rewards, label) | _by_label("logps", logp.detach(), label)
        if shift is not None:
            shift.observe(rewards, label)
            metrics |= shift.metrics()
        return found._replace(metrics=metrics)

    if shift is None:
        return Method(objective, "sequence")
    modules = {} if shift.module is None else {"shift": shift.module}
    return Method(objective, "sequence", shift.after_step, modules, shift.before_step)


def dro(reference: Reference, examples: list[Example], hyperparameters: dict[str, Any]) -> Method:
    """DRO-V: one squared error for the policy and for a critic that reads the prompt alone.

    The policy's gradient is divided by tau, as the paper writes it: -(r - V) grad l + tau / 2 grad
    rho^2. Else it would vanish with tau beside the critic's.
    """

    def objective(both: ActorCritic, batch: PackedBatch) -> Objective:
        logp = sequence_logps(both.actor, batch)
        prompts = [up_to_prompt(examples[i]) for i in batch.indices]
        value = both.critic(pack(prompts, share=False).to(batch.tokens.device))
        paced = logp.detach() + (logp - logp.detach()) / hyperparameters["tau"]
        found = unpaired_loss(
            paced,
            loss_type=CRITIC,
            ref_logp=reference(batch),
            reward=batch.judged.reshape(len(batch.examples)),
            value=value,
            **hyperparameters,
        )
        return found._replace(metrics={**found.metrics, "values": value.detach()})

    return Method(objective, "sequence")


def divergence(
    reference: Reference, examples: list[Example], ranks: Ranks, max_length: int | None
) -> Shift:
    """KTO's z0: the mean log-ratio of completions of other prompts, over the whole step.

    A first pass without gradients takes it, over ranks and micro-batches: a completion's partner
    is one of the step's, so that no split of the rows changes it.
    """
    # log-ratios, how many, of how many rows
    total = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    @torch.no_grad()
    def take(scorer: Any, batches: list[PackedBatch]) -> None:
        mine = [batch.indices for batch in batches]
        step = gathered([i for rows in mine for i in rows], ranks)
        found = partners([prompt_of(examples[i]).tobytes() for i in step])
        other = {i: examples[step[k]] for i, k in zip(step, found, strict=True) if k is not None}
        sums = torch.zeros_like(total)
        for rows, batch in zip(mine, batches, strict=True):
            mixed = [mismatched(examples[i], other[i], max_length) for i in rows if i in other]
            packed = pack(mixed, share=False).to(batch.tokens.device)
            ratio = sequence_logps(scorer, packed) - reference(packed)
            sums[0] += ratio.double().sum()
            sums[1] += len(mixed)
            sums[2] += len(rows)
        total.copy_(ranks.summed(sums))

    return Shift(
        value=lambda: total[0] / total[1].clamp(min=1),
        before_step=take,
        metrics=lambda: {
            "kl": Mean(total[0].clamp(min=0), total[1]),
            "mismatched": Mean(total[1], total[2]),
        },
    )


def moving_average(ranks: Ranks) -> Shift:
    """BCO's delta: half the sum of the moving averages of desirable and of undesirable rewards.

    They are those of the steps before, so that no pass more is needed; 0 before the first.
    """
    module = _Averages().to(ranks.device)
    sums: list[Tensor] = []

    def observe(rewards: Tensor, label: Tensor) -> None:
        rewards, good = rewards.double(), label.double()
        parts = (rewards * good, rewards * (1 - good), good, 1 - good)
        sums.append(torch.stack([part.sum() for part in parts]))

    def after_step(done: int) -> None:
        total, count = ranks.summed(torch.stack(sums).sum(0)).view(2, 2)
        new, share = total / count.clamp(min=1), 1 - DECAY * (module.seen > 0).double()
        module.means.copy_(torch.where(count > 0, module.means.lerp(new, share), module.means))
        module.seen.add_(count)

    return Shift(
        value=lambda: module.means.mean(),
        before_step=lambda scorer, batches: sums.clear(),
        observe=observe,
        after_step=after_step,
        module=module,
        metrics=lambda: {"reward_shift": Mean(module.means.mean(), torch.ones(()))},
    )


class _Averages(nn.Module):
    """Of desirable and of undesirable rewards, and how many were seen."""

    means: Tensor
    seen: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))


def gathered(own: list[int], ranks: Ranks) -> list[int]:
    """The numbers that all ranks have, in order."""
    counts = torch.zeros(ranks.world, dtype=torch.float64)
    counts[ranks.rank] = len(own)
    ends = ranks.total(counts).long().cumsum(0).tolist()
    found = torch.zeros(ends[-1], dtype=torch.float64)
    found[ends[ranks.rank] - len(own) : ends[ranks.rank]] = torch.tensor(own, dtype=torch.float64)
    return sorted(int(x) for x in ranks.total(found).tolist())


def _by_label(name: str, values: Tensor, label: Tensor) -> dict[str, Mean]:
    return {
        f"{name}/{side}": Mean(torch.where(which, values, 0.0).sum(), which.sum())
        for side, which in (("chosen", label), ("rejected", ~label))
    }
