"""What a run will take: memory by phase and class, FLOPs and time of a step, from config.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from . import lora
from .config import DPOConfig, KTOConfig, RewardConfig, SFTConfig, TrainConfig
from .learners import checks
from .objectives import needs_reference
from .online_config import OnlineConfig, OnlineDPOConfig, PPOConfig, RAFTConfig
from .plan.device import Device
from .plan.trace import Sizes, Step, Traced, totals, trace
from .plan.work import Work

Bytes = dict[str, int]  # by class


class Phase(NamedTuple):
    name: str
    held: Bytes

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Cost(NamedTuple):
    """Of an optimizer step, on one rank. useful: by the convention for model FLOPs, 6 N a real
    token and the attention's; done: what is computed, which shares prefixes, scores only what is
    trained on, recomputes. moved: bytes of all but matrix products; sent: over the network."""

    real_tokens: int
    packed_tokens: int
    scored_tokens: int
    useful: float
    done: float
    moved: float
    sent: float


class Estimate(NamedTuple):
    phases: list[Phase]
    cost: Cost
    sizes: Sizes
    work: Work
    micro_batches: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


class Models(NamedTuple):
    """heads: of what is trained. reference: "live" in every step, "before" training, "window" for
    samples, or None; apart: it has weights of its own."""

    heads: tuple[str, ...]
    reference: str | None
    apart: bool
    inline: bool


def models_of(config: TrainConfig) -> Models:
    """What the configuration's command keeps in memory."""
    heads, reference = ("lm",), None
    if isinstance(config, RewardConfig):
        heads = ("score",)
    elif isinstance(config, PPOConfig):
        heads = ("lm", "score", "score") if config.cost_funcs else ("lm", "score")
    elif isinstance(config, KTOConfig) and config.loss_type == "dro_v":
        heads = ("lm", "score")
    if isinstance(config, OnlineConfig) and checks.needs_reference(config):
        reference = "live" if isinstance(config, OnlineDPOConfig) else "window"
    elif isinstance(config, KTOConfig) or (
        isinstance(config, DPOConfig) and needs_reference(config.loss_type)
    ):
        reference = "before" if config.precomputes else "live"
    own = config.use_peft and getattr(config, "ref_model_name_or_path", None) is None
    return Models(heads, reference, not own, isinstance(config, SFTConfig | RAFTConfig))


class Run(NamedTuple):
    """A configuration with what it needs to be estimated. work: of the largest micro-batch, and of
    the largest batch that is only scored; micro_batches: of a step on this rank."""

    config: Any
    model_config: Any
    device: Device
    ranks: int
    work: Callable[[Any], tuple[Work, Work, int]]


def estimate(run: Run) -> Estimate:
    config = run.config
    work, scored, micro_batches = run.work(config)
    models, how = models_of(config), Shards.of(config, run.ranks, run.device)
    again = config.gradient_checkpointing_policy if config.gradient_checkpointing else None
    step = Step(
        dtype=how.compute,
        autocast=bool(config.bf16) and config.dtype == "float32",
        checkpointing=again,
        padded=config.layout == "padded",
        budget=None if config.head_budget_mb is None else config.head_budget_mb << 20,
        device=run.device.kind,
        heads=models.heads,
        reference=models.reference == "live",
        inline=models.inline,
        ranks=run.ranks if how.head else 1,
        second=micro_batches > 1,
        adapt=partial(lora.attach, config) if config.use_peft else None,
    )
    traced = trace(run.model_config, work, step)
    static = _static(config, models, traced.sizes, how)
    phases = []
    if models.reference == "before":
        before = step._replace(heads=(), reference=True, second=False)
        phases.append(_scoring(trace(run.model_config, scored, before), how))
    if isinstance(config, OnlineConfig):
        phases.append(_rollout(run, static, traced.sizes, how, micro_batches))
    phases.append(_largest("forward and backward", traced, static, how))
    gradients = {"gradients": _learnt(models, traced.sizes, how)}
    phases.append(Phase("optimizer step", static | gradients))
    cost = _cost(run, traced, work, micro_batches, step, models, how)
    return Estimate(phases, cost, traced.sizes, work, micro_batches)


class Shards(NamedTuple):
    """Of a module's numbers a rank holds 1/shards; of the head 1/ranks, where `head`."""

    ranks: int
    shards: int
    head: bool
    dtype: torch.dtype
    compute: torch.dtype  # of gathered weights
    gathers: bool
    keeps: bool  # gathered layers, for the backward pass
    offloads: bool

    @classmethod
    def of(cls, config: TrainConfig, ranks: int, device: Device) -> Shards:
        dtype = compute = getattr(torch, config.dtype)
        gathers = ranks > 1
        if gathers and config.fsdp_param_dtype:
            compute = getattr(torch, config.fsdp_param_dtype)
        elif gathers and config.bf16 and device.kind.type == "cuda":
            compute = torch.bfloat16
        group = config.fsdp_group_size or min(ranks, device.node)
        shards = {"full": ranks, "hsdp": group, "none": 1}[config.fsdp]
        head = gathers and config.fsdp == "full" and config.shard_head
        keeps = not config.fsdp_reshard_after_forward
        return cls(ranks, shards, head, dtype, compute, gathers, keeps, config.fsdp_cpu_offload)

    def own(self, sizes: Sizes, each: float) -> int:
        """This rank's part of numbers of `each` bytes, one for every weight."""
        split = sizes.head if self.head and sizes.split else 0
        rest = 0 if self.offloads and self.gathers else (sizes.weights - split) / self.shards
        return round(each * (rest + split / self.ranks))


def _of(kind: str, sizes: Sizes) -> Sizes:
    """A critic or reward model has a head of numbers in place of the vocabulary's."""
    if kind == "lm" or sizes.tied:
        return sizes
    frozen = sizes.trained < sizes.weights
    trained = sizes.trained - (0 if frozen else sizes.head)
    return sizes._replace(weights=sizes.weights - sizes.head, trained=trained, split=False, head=0)


def _learnt(models: Models, sizes: Sizes, how: Shards) -> int:
    """This rank's part of a number for everything that is trained."""
    kinds = (_of(kind, sizes) for kind in models.heads)
    return round(sum(how.own(s, how.dtype.itemsize) * s.trained / s.weights for s in kinds))


def _static(config, models: Models, sizes: Sizes, how: Shards) -> Bytes:
    """What is there through the whole step."""
    each = how.dtype.itemsize
    held = {"weights": sum(how.own(_of(kind, sizes), each) for kind in models.heads)}
    held["optimizer"] = (config.optim == "adamw_torch") * 2 * _learnt(models, sizes, how)
    if models.reference in ("live", "window") and models.apart:
        held["reference weights"] = how.own(sizes, each)
    return held


def _scoring(traced: Traced, how: Shards) -> Phase:
    """Before training: two models, and no optimizer."""
    own = how.own(traced.sizes, how.dtype.itemsize)
    held = {"weights": own, "reference weights": own}
    return _largest("reference scoring", traced, held, how)


def _largest(name: str, traced: Traced, static: Bytes, how: Shards) -> Phase:
    """The moment of a timeline that holds the most, with what is held at all moments."""
    sizes, share = traced.sizes, 1.0
    around: Bytes = {}
    if how.gathers:
        share = how.dtype.itemsize / how.compute.itemsize / how.shards * (not how.offloads)
        split = sizes.head if how.head and sizes.split else 0
        layers = sizes.layers if how.keeps else 2 * sizes.layer
        root = sizes.weights - sizes.layers - split
        # one layer's weights travel while two are there; its gradients, and their sum in float32
        around["gathered layers"] = how.compute.itemsize * (layers + sizes.layer + root)
        around["gradients on their way"] = sizes.layer * (how.compute.itemsize + 4)

    def at(moment: Bytes) -> Bytes:
        found = totals(moment)
        found["gradients"] = round(share * found.get("gradients", 0)) + found.pop(
            "head gradients", 0
        )
        return found

    held = max((at(m) for m in traced.timeline), key=lambda m: sum(m.values()))
    return Phase(name, {k: v for k, v in {**static, **around, **held}.items() if v})


def _rollout(run: Run, static: Bytes, sizes: Sizes, how: Shards, micro_batches: int) -> Phase:
    """Completions sampled together, as the engines plan them: so many rows, so much cache."""
    config, text = run.config, run.model_config.get_text_config()
    held = dict(static)
    if config.engine in ("openai", "vllm"):  # a server's memory, or what vLLM is told to take
        return Phase("rollout", held)
    if how.gathers:
        held["gathered model"] = sizes.weights * how.dtype.itemsize
    on_gpu = run.device.kind.type == "cuda"
    rows = config.per_device_train_batch_size * micro_batches * config.num_mini_batches
    rows = min(rows, 256 if on_gpu else 128)
    longest = (config.max_prompt_length or 0) + config.max_completion_length
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = rows * longest * 2 * text.num_hidden_layers * heads * width * how.dtype.itemsize
    limit = 1 << 30
    if on_gpu:
        limit = max(0, ((run.device.memory or 1 << 62) - sum(held.values())) // 2)
    held["KV cache"] = min(cache, limit)
    held["logits"] = 3 * rows * text.vocab_size * 4
    return Phase("rollout", held)


def _cost(
    run: Run,
    traced: Traced,
    work: Work,
    micro_batches: int,
    step: Step,
    models: Models,
    how: Shards,
) -> Cost:
    sizes, text = traced.sizes, run.model_config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    body = sizes.weights - sizes.embedding - (0 if sizes.tied else sizes.head)
    attention = 4 * heads * width * sizes.depth  # a pair of query and key, forward
    forward = 2 * body * work.tokens + attention * work.pairs
    done = useful = 0.0
    # adapters leave the weights' own gradients out
    backward = 2 if sizes.trained == sizes.weights else 1
    for kind in models.heads:
        row = 2 * sizes.head if kind == "lm" else 0
        again = step.checkpointing == "full"
        done += forward * (1 + backward + again) + row * work.scored * (2 + backward)
        useful += 6 * (body + row // 2) * work.real + 3 * attention * work.pairs
    if models.reference in ("live", "window"):
        done += forward + 2 * sizes.head * work.scored
    # AdamW reads four numbers a weight and writes three; the gradients' norm and its clipping
    moved = traced.timeline[-1]["moved"] * micro_batches + 10 * _learnt(models, sizes, how)
    sent = 0.0
    if how.gathers and how.shards > 1:
        travels = (1 - 1 / how.shards) * (sizes.weights - (sizes.head if how.head else 0))
        sent = (
            travels * how.compute.itemsize * (1 if how.keeps else 2)
            + 4 * travels * sizes.trained / sizes.weights
        )
        sent *= micro_batches * len(models.heads)
    real, packed, scored = (micro_batches * n for n in (work.real, work.tokens, work.scored))
    return Cost(real, packed, scored, useful * micro_batches, done * micro_batches, moved, sent)


def seconds(found: Estimate, device: Device, config) -> dict[str, float]:
    """Of a step at the device's ceilings: nothing overlaps but the network."""
    wide = config.dtype == "float32" and not config.bf16
    rate = device.tflops_float32 if wide else device.tflops
    parts = {
        "matrix products": found.cost.done / (rate * 1e12),
        "memory": found.cost.moved / (device.gbps * 1e9),
    }
    if device.network_gbps and found.cost.sent:
        network = found.cost.sent / (device.network_gbps * 1e9)
        parts["network beyond these"] = max(0.0, network - sum(parts.values()))
    return parts
