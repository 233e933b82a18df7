"""Divergences between a student's and a teacher's next-token distributions, over the vocabulary.

    forward_kl   KL(T || S) = sum_v p_T (log p_T - log p_S)
    reverse_kl   KL(S || T) = sum_v p_S (log p_S - log p_T)
    jsd          b KL(T || M) + (1 - b) KL(S || M),  M = b T + (1 - b) S
    alpha        (1 - sum_v p_S^(1-a) p_T^a) / (a (1 - a))
    tvd          sum_v |p_T - p_S| / 2

in nats, per token, with p = softmax(logits / temperature); only the student gets a gradient.

`linear_divergence` starts from hidden states and never holds the logits of all tokens. A run of
tokens at a time it makes both heads' logits (GEMMs 1 and 2, float32 results), whose rows
divergence_pass.py turns into sums and into G = d value / d logits. With upstream gradient g [N],

    d hidden = g * (G @ weight)           GEMM 3
    d weight = G.T @ (g * hidden)         GEMM 4, one writer per tile, fixed order

so any loss of these divergences costs four vocabulary GEMMs when G is kept ("stash": V elements a
token, bfloat16 for 16-bit inputs) and six when it is made again ("recompute"). A frozen weight or
hidden skips its GEMM; tokens with no upstream gradient skip the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence_kinds import DIVERGENCES, rule_of, self_certainty, topk_divergence
from .divergence_pass import STATISTICS, Rule, Side, Tile, gradient, statistics
from .head_plan import check_head, head_options, needs_gradient, plan
from .launch import differentiated_once, expect, has_values
from .logp import check_softcaps, inverse_of
from .tiled_head import (
    BACKWARD_TILE,
    Head,
    Options,
    RunningSum,
    Scratch,
    add_product,
    column_tiles,
    for_device,
    matmul,
    run_slices,
    tile_width,
)
from .token_divergence import ROW_TILE, check_alike, reference, token_divergence

__all__ = [
    "DIVERGENCES",
    "linear_divergence",
    "reference",
    "self_certainty",
    "token_divergence",
    "topk_divergence",
]

CAST_COLUMNS = 16384  # vocabulary entries whose weights are cast at a time


class _Heads(NamedTuple):
    student: Head
    teacher: Head
    rule: Rule


class _Rows(NamedTuple):
    """The tokens at hand. `kept` is their stashed G, of which `index` picks rows; or None."""

    hidden: Tensor  # [n, H] in the GEMM dtype
    teacher_hidden: Tensor  # [n, H2]
    inverse_temperature: Tensor  # [n]
    stats: Tensor  # [5, n], float32
    kept: Tensor | None = None
    index: Tensor | None = None


def _project(head: Head, hidden: Tensor, columns: slice, out: Tensor) -> Side:
    """A head's raw logits of the columns, into `out` [n, v]."""
    dtype = head.options.dtype
    step = out.shape[1] if head.weight.dtype == dtype else CAST_COLUMNS
    for start in range(0, out.shape[1], max(step, 1)):
        part = slice(start, min(start + step, out.shape[1]))
        weight = head.weight[columns.start + part.start : columns.start + part.stop]
        matmul(hidden, weight.to(dtype).t(), out[:, part])
    bias = None if head.bias is None else head.bias[columns].float().contiguous()
    return Side(out, bias, head.options.logit_scale, head.options.softcap)


def _tile(heads: _Heads, rows: _Rows, columns: slice, out: Tensor, teacher_out: Tensor) -> Tile:
    return Tile(
        _project(heads.student, rows.hidden, columns, out),
        _project(heads.teacher, rows.teacher_hidden, columns, teacher_out),
        rows.inverse_temperature,
    )


def _forward(heads: _Heads, rows: _Rows, stash: Tensor | None) -> None:
    """Fills the rows' statistics, and the stash [n, V] with G of the first n rows."""
    vocab, device = len(heads.student.weight), rows.hidden.device
    everything, impl = slice(0, vocab), heads.student.options.impl
    stash_rows = 0 if stash is None else len(stash)
    longest = max(1, for_device(ROW_TILE, device) // (8 * vocab))
    runs = run_slices(len(rows.hidden), stash_rows, longest)
    in_place = stash is not None and stash.dtype == torch.float32
    sizes = [run.stop - run.start for run in runs if not in_place or run.start >= stash_rows]
    scratch = Scratch(max(sizes, default=0), vocab, device)
    teacher_scratch = Scratch(max(run.stop - run.start for run in runs), vocab, device)
    for run in runs:
        n = run.stop - run.start
        store = stash[run] if stash is not None and run.start < stash_rows else None
        out = store if store is not None and in_place else scratch.tile(n, everything)
        hidden, teacher_hidden, inverse = (x[run] for x in rows[:3])
        selected = _Rows(hidden, teacher_hidden, inverse, rows.stats[:, run])
        tile = _tile(heads, selected, everything, out, teacher_scratch.tile(n, everything))
        stats = statistics(impl, tile, heads.rule)
        selected.stats.copy_(stats)
        if store is not None:
            gradient(impl, tile, heads.rule, stats, store)


def _live_runs(rows: _Rows, upstream: Tensor, stash: Tensor | None) -> list[tuple[Tensor, _Rows]]:
    """The tokens with an upstream gradient, by runs that are wholly kept or wholly recomputed:
    their indices, and their rows."""
    stash_rows = 0 if stash is None else len(stash)
    found = []
    for run in run_slices(len(upstream), stash_rows):
        alive = (upstream[run] != 0).nonzero().squeeze(1)
        all_alive = len(alive) == run.stop - run.start
        where = alive + run.start
        hidden, teacher_hidden, inverse_temperature = (
            x[run] if all_alive else x[where] for x in rows[:3]
        )
        kept = stash[run] if stash is not None and run.start < stash_rows else None
        stats = rows.stats[:, where]
        selected = _Rows(hidden, teacher_hidden, inverse_temperature, stats, kept)
        if len(alive):
            found.append((where, selected._replace(index=None if all_alive else alive)))
    return found


def _gradient_tile(heads: _Heads, rows: _Rows, columns: slice, scratch: list[Scratch]) -> Tensor:
    """G of the columns [n, v], in the GEMM dtype."""
    dtype = heads.student.options.dtype
    if rows.kept is not None:
        kept = rows.kept[:, columns]
        return (kept if rows.index is None else kept[rows.index]).to(dtype)
    out, teacher_out = (x.tile(len(rows.hidden), columns) for x in scratch)
    tile = _tile(heads, rows, columns, out, teacher_out)
    grad = out if dtype == torch.float32 else torch.empty_like(out, dtype=dtype)
    gradient(heads.student.options.impl, tile, heads.rule, rows.stats, grad)
    return grad


def _backward(
    heads: _Heads,
    runs: list[tuple[Tensor, _Rows]],
    upstream: Tensor,
    d_hidden: list[Tensor] | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Adds to d_hidden (a float32 [n, H] per run), writes d_weight [V, H] and d_bias [V].

    The vocabulary is the outer loop: a tile of d_weight is summed over the runs in float32 and
    written once.
    """
    vocab, device = len(heads.student.weight), upstream.device
    dtype = heads.student.options.dtype
    longest = max((len(rows.hidden) for _, rows in runs), default=0)
    again = max((len(rows.hidden) for _, rows in runs if rows.kept is None), default=0)
    tile_bytes = for_device(BACKWARD_TILE, device)
    width = min(tile_width(longest, tile_bytes), vocab)
    scratch = [Scratch(again, width, device) for _ in range(2)]
    factors = [upstream[where] for where, _ in runs]
    weighted = [(r.hidden * g[:, None]).to(dtype) for (_, r), g in zip(runs, factors, strict=True)]
    for columns in column_tiles(vocab, longest, tile_bytes):
        weight = heads.student.weight[columns].to(dtype)
        weight_sum = None if d_weight is None else RunningSum(d_weight[columns], False)
        bias_sum = None if d_bias is None else RunningSum(d_bias[columns], False)
        for number, (_, rows) in enumerate(runs):
            grad = _gradient_tile(heads, rows, columns, scratch)
            if d_hidden is not None:
                add_product(d_hidden[number], grad, weight)
            if weight_sum is not None:
                weight_sum.add_product(grad.t(), weighted[number])
            if bias_sum is not None:
                bias_sum.add(torch.mv(grad.float().t(), factors[number]))
            del grad  # or two tiles are held while the next is made
        for total in (weight_sum, bias_sum):
            if total is not None:
                total.write()


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
        inverse_temperature, options, rule, stash_rows,
    ):  # fmt: skip
        heads = _Heads(
            Head(weight, bias, options[0]), Head(teacher_weight, teacher_bias, options[1]), rule
        )
        stash = None
        if stash_rows:
            stash = torch.empty(
                (stash_rows, len(weight)), dtype=_stash_dtype(hidden, options[0]),
                device=hidden.device,
            )  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            stats = inverse_temperature.new_empty((len(STATISTICS), len(hidden)))
            rows = _rows(hidden, teacher_hidden, inverse_temperature, stats, options)
            _forward(heads, rows, stash)
        ctx.save_for_backward(
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
            inverse_temperature, stats,
        )  # fmt: skip
        ctx.options, ctx.rule, ctx.stash = options, rule, stash
        return stats[3].clone()

    @staticmethod
    def backward(ctx, *grads):
        differentiated_once("linear_divergence")
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, inverse, stats = (
            ctx.saved_tensors
        )
        heads = _Heads(
            Head(weight, bias, ctx.options[0]),
            Head(teacher_weight, teacher_bias, ctx.options[1]),
            ctx.rule,
        )
        rows = _rows(hidden, teacher_hidden, inverse, stats, ctx.options)
        upstream = grads[0].float()
        runs = _live_runs(rows, upstream, ctx.stash)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = [torch.zeros_like(r.hidden, dtype=torch.float32) for _, r in runs]
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        _backward(heads, runs, upstream, d_hidden if need_hidden else None, d_weight, d_bias)
        out = None
        if need_hidden:
            out = torch.zeros_like(hidden)
            for (where, _), values in zip(runs, d_hidden, strict=True):
                out[where] = (values * upstream[where, None]).to(hidden.dtype)
        return out, d_weight, d_bias, *[None] * 7


def _rows(hidden: Tensor, teacher_hidden: Tensor, inverse, stats: Tensor, options) -> _Rows:
    return _Rows(hidden.to(options[0].dtype), teacher_hidden.to(options[1].dtype), inverse, stats)


def _stash_dtype(hidden: Tensor, options: Options) -> torch.dtype:
    return torch.float32 if hidden.dtype == options.dtype == torch.float32 else torch.bfloat16


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    mode: str = "auto",
    budget_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence of each token's distributions under two heads, without the logits of all tokens.

    Args:
        hidden: [N, H] of the student; float32, bfloat16 or float16 (float64 runs the reference).
        weight: [V, H] of the student's head; it may be wider than `hidden` (float32 masters).
        teacher_hidden, teacher_weight: [N, H2] and [V, H2]; detached. The same head may serve both:
            its gradient then comes from the student's side alone.
        bias, teacher_bias: [V] or None.
        kind: a key of DIVERGENCES, whose functions have the formulas and the papers.
        beta: of "jsd", the teacher's weight in the mixture. As in TRL, 0 means forward_kl and 1
            reverse_kl, which are not the limits of the formula: those are 0.
        alpha: of "alpha", in [0, 1]; 1 is forward_kl and 0 reverse_kl, and these are its limits.
        temperature: of both, a positive number or [N]. No factor T^2 is applied: multiply by it to
            keep the gradient's size, as in Hinton's distillation.
        softcap, logit_scale: of the student's head, as in linear_logp; the teacher's has its own.
        mode: "stash" keeps V elements a token until backward, "recompute" nothing, "auto" as many
            tokens as fit `budget_bytes`, 4 GiB on a GPU and 1 GiB on a CPU unless given.
        impl: "auto", "reference", "torch", "cpu" or "triton".

    Returns:
        float32 [N], nats, differentiable in hidden, weight and bias under any upstream gradient.

    Raises:
        ValueError: a shape, dtype or value that does not fit; it names the tensor.
    """
    rule = rule_of(kind, beta, alpha)
    check_softcaps(softcap=softcap, teacher_softcap=teacher_softcap)
    check_head(hidden, weight, bias)
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    check_alike("hidden", hidden, teacher_hidden, 0)
    check_alike("weight", weight, teacher_weight, 0)
    if impl == "auto" and not has_values(hidden):
        impl = "reference"
    options = (
        head_options(hidden, logit_scale, softcap, impl),
        head_options(teacher_hidden, teacher_logit_scale, teacher_softcap, impl),
    )
    if options[0].impl == "reference":
        inverse_of(temperature, len(hidden), hidden.device)
        return reference(
            _dense_logits(hidden, weight, bias),
            _dense_logits(teacher_hidden, teacher_weight, teacher_bias),
            kind=kind, beta=beta, alpha=alpha, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, teacher_softcap=teacher_softcap,
            teacher_logit_scale=teacher_logit_scale,
        )  # fmt: skip
    for name, x in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        wide, remedy = (
            x.dtype == torch.float64,
            "float64 students run the reference, by impl='auto'",
        )
        expect(not wide, name, "at most float32 for this impl", x.dtype, remedy)
    inverse_temperature = inverse_of(temperature, len(hidden), hidden.device)
    stash_rows = 0
    if needs_gradient(hidden, weight, bias):
        dtype, size = _stash_dtype(hidden, options[0]), (len(hidden), len(weight))
        chosen = plan(*size, dtype, mode=mode, budget_bytes=budget_bytes, device=hidden.device)
        stash_rows = chosen.stash_rows
    return _LinearDivergence.apply(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, inverse_temperature,
        options, rule, stash_rows,
    )  # fmt: skip


def _dense_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.nn.functional.linear(
        hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    )
