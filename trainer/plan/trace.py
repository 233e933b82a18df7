"""A training step on fake tensors: what it holds, operation by operation, of a model of any size.

The model's own code runs, at its real shapes, so that what its layers keep for the backward pass
need not be known here. Where all layers are alike three are run, and the middle one repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, initialization

from prefuse.kernels.vocab_shard import weight_moves

from .. import activations
from ..errors import UserError
from ..sharding import decoder_layers
from .live import MOVED, LiveBytes
from .shadow import ATTENTION, Attended, BroughtHead, HeadWork, Watch, head
from .work import Work

FEW = 3  # layers that are run where all are alike


class Step(NamedTuple):
    """How a step runs. heads: of the models trained, "lm" or "score" each. reference: that another
    model, or with adapt the policy without adapters, scores the batch too. ranks: that share the
    vocabulary, 1 where the head is whole. second: gradients are there from another micro-batch.
    adapt: puts adapters into a model."""

    dtype: torch.dtype
    autocast: bool
    checkpointing: str | None  # its policy
    padded: bool
    budget: int | None
    device: torch.device
    heads: tuple[str, ...] = ("lm",)
    reference: bool = False
    inline: bool = False
    ranks: int = 1
    second: bool = False
    adapt: Callable[[Any], Any] | None = None


class Sizes(NamedTuple):
    """Numbers of a model, whole: all of it, what is trained, its layers, one of them, head and
    embedding. tied: these are one. split: the head can be in shards of its own."""

    weights: int
    trained: int
    layers: int
    layer: int
    head: int
    embedding: int
    tied: bool
    split: bool
    depth: int


class Traced(NamedTuple):
    timeline: list[dict[str, int]]  # without weights; MOVED is a running count
    sizes: Sizes


def trace(config: Any, work: Work, step: Step) -> Traced:
    """config: of a causal language model."""
    text, depth = config.get_text_config(), config.get_text_config().num_hidden_layers
    few = FEW if depth > FEW and _alike(text) else depth
    live = LiveBytes(recording=True)
    attended = Attended(
        0 if step.padded else work.children, work.prefixes, step.padded,
        work.tokens != work.rows * work.longest, step.device,
    )  # fmt: skip
    watch = Watch(live, attended, [], [], [])
    with FakeTensorMode(), initialization.no_init_weights():
        sizes = measure(build(config, step._replace(ranks=1), few), few, depth)
        share = step.ranks if sizes.split else 1
        step = step._replace(ranks=share)
        models = [build(config, step, few) for _ in step.heads]
        reference = None
        if step.reference:
            own = models and step.adapt
            reference = models[0] if own else build(config, step, few).requires_grad_(False)
        with live:
            for model in models:
                _own(model, live, step)
            if reference is not None and reference not in models:
                for p in reference.parameters():
                    live.reclass(p, "weights")
            live.moved = 0
            try:
                _run(models, reference, work, step, watch)
            except Exception as error:
                raise UserError(
                    f"estimate: {type(models[0]).__name__} does not run without numbers "
                    f"({type(error).__name__}: {str(error).splitlines()[0]}), so what its layers "
                    "keep is not known beforehand. Run a few steps and look at memory_gib"
                ) from error
    timeline = stretched(live.timeline, watch, few, depth)
    if step.second and few < depth:  # gradients of layers that were not run
        rest = (depth - few) * sizes.layer * step.dtype.itemsize * sizes.trained // sizes.weights
        timeline = [_plus(moment, {"gradients": rest}) for moment in timeline]
    return Traced(timeline, sizes)


def build(config, step: Step, depth: int) -> Any:
    config = deepcopy(config)
    config.get_text_config().num_hidden_layers = depth
    kinds = getattr(config.get_text_config(), "layer_types", None)
    if kinds:
        config.get_text_config().layer_types = kinds[:depth]
    with unset_fake_temporarily(), torch.device("meta"):  # peft swaps tensors, never fake ones
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=step.dtype, attn_implementation=ATTENTION
        )
        if step.adapt:
            step.adapt(model)
    _make_fake(model)
    model.config.use_cache = False
    if step.ranks > 1:
        _keep_a_part(model, step.ranks)
    if step.checkpointing:
        activations.checkpoint(model, step.checkpointing)
    return model.train()


def _make_fake(model: nn.Module) -> None:
    """Tensors of no device become fake ones of the CPU's; those that are one stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is None:
                    continue
                if id(x) not in made:
                    fake = torch.empty(x.shape, dtype=x.dtype)
                    known = isinstance(x, nn.Parameter)
                    made[id(x)] = nn.Parameter(fake, x.requires_grad) if known else fake
                held[name] = made[id(x)]


def _keep_a_part(model, ranks: int) -> None:
    """Of the head, and of an embedding tied to it, this rank's entries."""
    whole, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied, learnt = table.weight is whole.weight, whole.weight.requires_grad
    part = whole.weight.new_empty((-(-len(whole.weight) // ranks), whole.in_features))
    whole.weight = nn.Parameter(part, learnt)
    if tied:
        table.weight = whole.weight


def _own(model, live: LiveBytes, step: Step) -> None:
    """Weights and gradients are known as such; a head in shards has gradients of this rank's."""
    part = model.get_output_embeddings().weight if step.ranks > 1 else None
    for p in model.parameters():
        live.reclass(p, "weights")
        if not p.requires_grad:
            continue
        kind = "head gradients" if p is part else "gradients"

        def known(p: Tensor, kind: str = kind) -> None:
            if p.grad is not None:
                live.reclass(p.grad, kind)

        p.register_post_accumulate_grad_hook(known)
        if step.second:
            p.grad = torch.empty_like(p)
            known(p)


def measure(model, few: int, depth: int) -> Sizes:
    """Of a model with `few` of its `depth` layers."""

    def count(module: nn.Module, trained: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    layers, whole, table = decoder_layers(model), model.get_output_embeddings(), None
    table = model.get_input_embeddings()
    ours = sum(count(layer) for layer in layers)
    learnt = sum(count(layer, trained=True) for layer in layers)
    times = depth / few
    tied = whole.weight is table.weight
    split = not tied or type(table).forward is nn.Embedding.forward
    return Sizes(
        weights=count(model) + round(ours * (times - 1)),
        trained=count(model, trained=True) + round(learnt * (times - 1)),
        layers=round(ours * times),
        layer=ours // few,
        head=whole.weight.numel(),
        embedding=table.weight.numel(),
        tied=tied,
        split=split,
        depth=depth,
    )


def _alike(text) -> bool:
    """Whether a layer is as good as another: by kind; experts may come after plain ones."""
    kinds = set(getattr(text, "layer_types", None) or ())
    return len(kinds) <= 1 and not getattr(text, "first_k_dense_replace", None)


def _run(models, reference, work: Work, step: Step, watch: Watch) -> None:
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if step.autocast else nullcontext()
    shape = (work.rows, work.longest) if step.padded else (1, work.tokens)
    tokens = torch.empty(shape, dtype=torch.long)
    positions = torch.empty(shape, dtype=torch.long)
    rows = torch.empty(work.scored, dtype=torch.long)
    live = watch.live

    def logp(model, kind: str, inline: bool) -> Tensor:
        out = model.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False,
            shadow=watch,
        )  # fmt: skip
        hidden = out.last_hidden_state.flatten(0, 1)
        if step.padded:
            hidden = hidden[torch.empty(work.tokens, dtype=torch.long)]
        hidden = hidden[rows]
        if kind == "score":
            return nn.functional.linear(hidden, hidden.new_empty((1, hidden.shape[1]))).float()
        weight, ranks = model.get_output_embeddings().weight, step.ranks
        sizes = ranks * work.scored, hidden.dtype, ranks * len(weight), weight.dtype
        if ranks > 1 and weight_moves(*sizes):
            with live.making("head"):
                weight, ranks = BroughtHead.apply(weight, ranks), 1
        given = HeadWork(work.scored * ranks, step.budget, inline, step.device, live)
        return head(hidden, weight, given)

    losses: list[Tensor] = []
    with cast:
        losses = [logp(m, k, step.inline).sum() for m, k in zip(models, step.heads, strict=True)]
        if reference is not None:
            with torch.no_grad(), live.making("reference scoring"):
                logp(reference, "lm", False)
    live.mark()
    watch.between.append(len(live.timeline))
    if losses:
        torch.stack(losses).sum().backward()
    live.mark()


def stretched(
    timeline: list[dict[str, int]], watch: Watch, few: int, depth: int
) -> list[dict[str, int]]:
    """The timeline of `depth` layers: the middle one of three stands for all between.

    What is added to a class by a layer's period is added again by every copy; in between, the
    first copy or the last holds the most. What no later period takes away, as autocast's copies of
    weights that nothing keeps, goes where the forward pass ends.
    """
    if few == depth:
        return timeline
    between = watch.between[0]
    ends = [f for f in watch.forward if f < between]  # a recomputation attends again
    spans = [(ends[k + 1], ends[k + 2]) for k in range(0, len(ends), few)]
    spans += [watch.backward[k : k + 2] for k in range(0, len(watch.backward), few)]
    periods = [_minus(timeline[stop], timeline[start]) for start, stop in spans]
    left: dict[str, int] = {}
    for period in periods:
        left = _plus(left, period, depth - few)
    left = {k: v for k, v in left.items() if k not in (MOVED, "gradients", "weights")}
    out, offset, at = [], {}, 0
    for (start, stop), period in zip(spans, periods, strict=True):
        if at < between <= start:
            out += [_plus(moment, offset) for moment in timeline[at:between]]
            offset, at = _minus(offset, left), between
        out += [_plus(moment, offset) for moment in timeline[at:stop]]
        for copy in (1, depth - few):
            added = _plus(offset, period, copy)
            out += [_plus(moment, added) for moment in timeline[start:stop]]
        offset, at = _plus(offset, period, depth - few), stop
    return out + [_plus(moment, offset) for moment in timeline[at:]]


def _plus(a: dict[str, int], b: dict[str, int], times: int = 1) -> dict[str, int]:
    return {k: a.get(k, 0) + times * b.get(k, 0) for k in a.keys() | b.keys()}


def _minus(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return _plus(a, b, -1)


def totals(moment: dict[str, int], apart: Sequence[str] = ("weights", MOVED)) -> dict[str, int]:
    """Of a moment, without what is told apart."""
    return {k: v for k, v in moment.items() if k not in apart and v}
