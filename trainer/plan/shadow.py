"""Stand-ins for our own attention and head that compute nothing and hold what those hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from prefuse.kernels.head_plan import DEFAULT_BUDGET, plan
from prefuse.kernels.tiled_head import (
    BACKWARD_TILE,
    CONVERTED_ENTRIES,
    FORWARD_TILE,
    MAX_ROWS,
    for_device,
    tile_width,
)

from .live import LiveBytes

ATTENTION = "prefuse_shadow"


class Attended(NamedTuple):
    """children: tokens that also see a prefix; prefixes: tokens of these. rectangle: of the padded
    layout, whose kernel keeps whole heads of keys, and a mask where its rows differ in length."""

    children: int
    prefixes: int
    rectangle: bool
    mask: bool
    device: torch.device


class Watch(NamedTuple):
    """Where the layers are in a timeline: each attends once forward and once backward. between:
    where the forward pass ends."""

    live: LiveBytes
    attended: Attended
    forward: list[int]
    backward: list[int]
    between: list[int]


def attention(module, query, key, value, attention_mask, *, shadow: Watch, **_):
    mask = None
    if shadow.attended.rectangle:
        times = query.shape[1] // key.shape[1]
        if times > 1:
            key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        if shadow.attended.mask:
            mask = query.new_empty((len(query), 1, query.shape[2], query.shape[2]))
    return _Attention.apply(query, key, value, mask, shadow).transpose(1, 2), None


def no_mask(*args, **kwargs) -> None:
    return None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, no_mask)


class _Attention(torch.autograd.Function):
    """q [B, Hq, T, D], k and v [B, Hkv, T, D] -> [B, Hq, T, D], laid out tokens first."""

    @staticmethod
    def forward(ctx, q, k, v, mask, watch: Watch):
        watch.forward.append(len(watch.live.timeline))
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
        lse = torch.empty(q.shape[:3])
        if watch.attended.children:
            part = q.new_empty((watch.attended.children, q.shape[1], v.shape[3]))
            held = [part, *(torch.empty(part.shape) for _ in range(2 if _wide(q) else 1))]
            del held
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.watch = watch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        ctx.watch.backward.append(len(ctx.watch.live.timeline))
        q, k, v, out, _, _ = ctx.saved_tensors
        about = ctx.watch.attended
        held = [dout.contiguous()]
        wide = q.dtype if about.device.type == "cuda" else torch.float32
        if wide != q.dtype:  # the kernel for CPUs works in float32
            held += [torch.empty(x.shape) for x in (q, k, v, out, dout)]
        grads = [torch.empty(x.shape, dtype=wide) for x in (q, k, v)]
        if about.children:
            held.append(q.new_empty((about.children, *q.shape[1::2]), dtype=wide))
            held += [q.new_empty((about.prefixes, *k.shape[1::2]), dtype=wide) for _ in range(2)]
        return *(g.to(q.dtype) for g in grads), None, None


def _wide(q: Tensor) -> bool:
    return q.dtype != torch.float32


class HeadWork(NamedTuple):
    """tokens: scored, of all ranks that share the vocabulary. inline: the loss is of each token
    alone, its gradient made in the forward pass."""

    tokens: int
    budget: int | None
    inline: bool
    device: torch.device
    live: LiveBytes

    def operand(self, hidden: Tensor) -> torch.dtype:
        """Of the matrix products: as kernels/head_plan.py has it."""
        if self.device.type == "cpu":
            return torch.float32
        cast = torch.is_autocast_enabled("cpu")  # where the fake tensors are
        return torch.get_autocast_dtype("cpu") if cast else hidden.dtype

    def stash(self, hidden: Tensor) -> torch.dtype:
        exact = hidden.dtype == self.operand(hidden) == torch.float32
        return torch.float32 if exact else torch.bfloat16

    def width(self, rows: int, entries: int, sizes: dict[str, int]) -> int:
        return min(tile_width(rows, for_device(sizes, self.device)), entries)

    def sums(self, rows: int, entries: int) -> Tensor:
        """Of a run that keeps its exponentials: every tile's row sums, and them in one."""
        tiles = -(-entries // self.width(max(rows, 1), entries, FORWARD_TILE))
        return torch.empty((2 * tiles, 6, rows))

    def gathered(self, hidden: Tensor) -> Tensor:
        own = self.tokens == len(hidden)
        return hidden if own else hidden.new_empty((self.tokens, hidden.shape[1]))

    def own(self, gradient: Tensor, n: int) -> Tensor:
        """Of this rank's tokens, where all ranks' are gathered: a sum over ranks, scattered."""
        if n == len(gradient):
            return gradient
        padded = torch.empty_like(gradient)
        return padded.new_empty((n, gradient.shape[1]))


def head(hidden: Tensor, weight: Tensor, work: HeadWork) -> Tensor:
    """Log-probs, or losses, [tokens] of hidden states [n, H] of this rank's own tokens."""
    function = _Inline if work.inline and torch.is_grad_enabled() else _Head
    return function.apply(hidden, weight, work)


class BroughtHead(torch.autograd.Function):
    """All ranks' entries [ranks * v, H]: where the weight is fewer bytes than their tokens."""

    @staticmethod
    def forward(ctx, part, ranks: int):
        ctx.entries = len(part)
        return part.new_empty((ranks * len(part), part.shape[1]))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad.new_empty((ctx.entries, grad.shape[1])), None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, work: HeadWork):
        with work.live.making("head"):
            entries, n = len(weight), work.tokens
            rows, stash = work.gathered(hidden), work.stash(hidden)
            operand = rows.to(work.operand(hidden))
            learns = any(ctx.needs_input_grad)
            given: dict[str, Any] = dict(budget_bytes=work.budget, device=work.device)
            keeps = plan(n, entries, operand.dtype, **given).stash_rows if learns else 0
            kept = torch.empty((keeps, entries), dtype=stash)
            longest = min(MAX_ROWS, n if stash != torch.float32 else n - keeps)
            scratch = torch.empty(longest * work.width(max(longest, 1), entries, FORWARD_TILE))
            held = [operand, scratch, work.sums(min(keeps, MAX_ROWS), entries)]
            del operand, scratch, held
            if learns:
                ctx.save_for_backward(rows, weight)
            ctx.kept, ctx.work, ctx.own = kept, work, len(hidden)
            return torch.empty(n)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        work: HeadWork = ctx.work
        with work.live.making("head"):
            rows, weight = ctx.saved_tensors
            entries, run = len(weight), min(work.tokens, MAX_ROWS)
            operand = rows.to(work.operand(rows))
            d_hidden = torch.empty(rows.shape)
            d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            width = work.width(max(run, 1), entries, BACKWARD_TILE)
            held = [torch.empty(width * run if len(ctx.kept) < work.tokens else 0)]
            if weight.dtype != operand.dtype:
                whole = len(ctx.kept) == work.tokens and ctx.kept.dtype == operand.dtype
                cast = max(width, min(CONVERTED_ENTRIES, entries)) if whole else width
                held.append(torch.empty((cast, weight.shape[1]), dtype=operand.dtype))
            at_once = weight.dtype == operand.dtype and run == work.tokens
            if weight.dtype != torch.float32 and not at_once:  # a tile's sum
                held.append(torch.empty((width, weight.shape[1])))
            if d_weight is not None:
                held.append(torch.empty_like(operand))  # times a factor a token
            del held, operand
            out = torch.zeros_like(rows)
            del d_hidden
            return work.own(out, ctx.own), d_weight, None


class _Inline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, work: HeadWork):
        with work.live.making("head"):
            rows, stash, entries = work.gathered(hidden), work.stash(hidden), len(weight)
            operand = rows.to(work.operand(hidden))
            d_hidden = torch.empty_like(rows)
            d_weight = torch.empty(weight.shape) if ctx.needs_input_grad[1] else None
            budget = work.budget or for_device(DEFAULT_BUDGET, work.device)
            run = max(1, min(work.tokens, MAX_ROWS, budget // (entries * stash.itemsize)))
            held = [torch.empty((run, entries), dtype=stash)]
            fold = [work.sums(run, entries)]
            if stash != torch.float32:
                fold.append(torch.empty(run * work.width(run, entries, FORWARD_TILE)))
            del fold
            width = work.width(run, entries, BACKWARD_TILE)
            if weight.dtype != operand.dtype:
                cast = max(width, min(CONVERTED_ENTRIES, entries))
                cast = cast if stash == operand.dtype else width
                held.append(torch.empty((cast, rows.shape[1]), dtype=operand.dtype))
            held += [torch.empty((run, rows.shape[1])) for _ in range(3)]
            del held, operand
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.work, ctx.own, ctx.dtype = work, len(hidden), weight.dtype
            return torch.empty(work.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        with ctx.work.live.making("head"):
            d_hidden, d_weight = ctx.saved_tensors
            d_hidden = torch.empty_like(d_hidden)
            if d_weight is not None:
                d_weight = torch.empty_like(d_weight).to(ctx.dtype)
            return ctx.work.own(d_hidden, ctx.own), d_weight, None
