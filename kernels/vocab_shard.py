"""A vocabulary split over ranks: each holds some rows of the head, and none ever sees the others.

A token's softmax needs its target's logit, which one rank knows, and the sums of all ranks'
exponentials: a SUM of [N] and a gather of [6, N] numbers in the forward pass, a SUM of [N, H] in
the backward one (of d hidden; d weight stays where the weight is). Where every rank has tokens of
its own, their hidden states and targets are gathered before, and d hidden is scattered after: that
moves N x H numbers, where gathering the head moves V x H. Where these are fewer bytes the head is
what moves, for one call. (Vocabulary-parallel cross-entropy, arXiv:1909.08053; here without its
MAX, and for any loss.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .launch import expect
from .token_stats import TokenStats, merge

# torch 2.13's names, else those before; None where torch was built without distributed
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)


class VocabShard(NamedTuple):
    """Which of the vocabulary's entries this rank's weight holds, and who has the others.

    own_tokens: every rank gives tokens of its own, as in data parallelism; otherwise all give the
        same, as in tensor parallelism, and the same upstream gradients.
    partial: d hidden is left as this rank's part of a sum, which the caller makes.
    """

    group: Any  # a ProcessGroup
    start: int
    total: int
    own_tokens: bool = False
    partial: bool = False

    @classmethod
    def of(cls, group, entries: int, device: torch.device | str, **options) -> VocabShard:
        """Of ranks that hold the vocabulary in their order, `entries` of it here; they are asked
        how many they have."""
        counts = gather_counts(group, entries, device)
        rank = dist.get_rank(group)
        return cls(group, sum(counts[:rank]), sum(counts), **options)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def most(self) -> int:
        """Entries of a rank where all have about as many: ranks must plan alike."""
        return -(-self.total // self.ranks)

    def summed(self, x: Tensor) -> Tensor:
        """In place, over ranks."""
        dist.all_reduce(x, group=self.group)
        return x

    def everyone(self, x: Tensor) -> Tensor:
        """[R, ...], in the order of ranks."""
        out = x.new_empty((self.ranks * len(x), *x.shape[1:]))
        all_gather(out, x.contiguous(), group=self.group)
        return out.view(self.ranks, *x.shape)

    def merged(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Row sums [6, n] of this rank's entries -> those of all entries, bit for bit the same on
        every rank; and of each rank [R, 6, n]."""
        parts = self.everyone(own)
        return merge(parts), parts


def gather_counts(group, count: int, device: torch.device | str) -> list[int]:
    """Every rank's number, on the host."""
    own = torch.tensor([count], device=device)
    found = own.new_empty(dist.get_world_size(group))
    all_gather(found, own, group=group)
    return found.tolist()


def as_shard(group, weight: Tensor) -> VocabShard:
    """From what `linear_logp` takes as `group`."""
    if not isinstance(group, VocabShard):
        return VocabShard.of(group, len(weight), weight.device)
    inside = 0 <= group.start and group.start + len(weight) <= group.total
    wanted = f"{len(weight)} entries from start {group.start} within {group.total}"
    expect(inside, "group", wanted, tuple(group[1:3]))
    return group


class Tokens(NamedTuple):
    """The tokens of all ranks, in their order: how many each has."""

    shard: VocabShard
    counts: list[int]

    @classmethod
    def of(cls, shard: VocabShard, own: Tensor) -> Tokens:
        return cls(shard, gather_counts(shard.group, len(own), own.device))

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def place(self) -> slice:
        """Of this rank's among all."""
        rank = dist.get_rank(self.shard.group)
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def all(self, own: Tensor) -> Tensor:
        """Rows [n, ...] of every rank -> [N, ...], without a gradient."""
        most = max(self.counts)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        found = self.shard.everyone(padded)
        if self.filled(most):
            return found.flatten(0, 1)[: self.total]
        return torch.cat([part[:n] for part, n in zip(found, self.counts, strict=True)])

    def filled(self, most: int) -> bool:
        """Whether only the last of them have fewer than `most`, as of a weight in equal parts."""
        in_order = [min(most, max(0, self.total - k * most)) for k in range(len(self.counts))]
        return self.counts == in_order

    def scattered(self, everything: Tensor) -> Tensor:
        """A part of a sum on every rank [N, ...] -> this rank's rows of the sum [n, ...]."""
        most, start = max(self.counts), 0
        padded = everything.contiguous()
        if self.total < most * len(self.counts):
            padded = everything.new_zeros((len(self.counts), most, *everything.shape[1:]))
            for part, n in zip(padded, self.counts, strict=True):
                part[:n] = everything[start : start + n]
                start += n
            padded = padded.flatten(0, 1)
        out = padded.new_empty((most, *padded.shape[1:]))
        reduce_scatter(out, padded, group=self.shard.group)
        return out[: self.place.stop - self.place.start]

    def all_of(self, option: float | Tensor) -> float | Tensor:
        """Of a number, or of one for each token."""
        return self.all(option) if isinstance(option, Tensor) else option

    def gather(self, own: Tensor, partial: bool) -> Tensor:
        """`all`, with a gradient. partial: a rank's gradient of it is a part of a sum."""
        return _Gather.apply(own, self, partial)

    def mine(self, everything: TokenStats) -> TokenStats:
        """This rank's rows; upstream gradients go to all ranks, together."""
        return TokenStats(*_Mine.apply(self, *everything))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, tokens, partial):
        ctx.tokens, ctx.partial = tokens, partial
        return tokens.all(own)

    @staticmethod
    def backward(ctx, grad):
        tokens = ctx.tokens
        return tokens.scattered(grad) if ctx.partial else grad[tokens.place], None, None


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, *everything):
        ctx.tokens = tokens
        ctx.set_materialize_grads(False)
        found = tuple(None if x is None else x[tokens.place].clone() for x in everything)
        stays = [
            y
            for x, y in zip(everything, found, strict=True)
            if y is not None and not x.requires_grad
        ]
        ctx.mark_non_differentiable(*stays)
        return found

    @staticmethod
    def backward(ctx, *grads):
        given = [g for g in grads if g is not None]
        if not given:
            return None, *grads
        columns = iter(ctx.tokens.all(torch.stack(given, 1)).unbind(1))
        return None, *(None if g is None else next(columns).contiguous() for g in grads)


def whole(own: Tensor, shard: VocabShard, partial: bool = False) -> Tensor:
    """All ranks' entries of a weight or bias; each gets the gradient of its own. partial: a rank's
    gradient is a part of a sum, as of tokens of its own."""
    return Tokens.of(shard, own).gather(own, partial)


def whole_head(
    weight: Tensor, bias: Tensor | None, shard: VocabShard, partial: bool = False
) -> tuple[Tensor, Tensor | None]:
    return whole(weight, shard, partial), None if bias is None else whole(bias, shard, partial)


def weight_moves(tokens: int, hidden: torch.dtype, entries: int, weight: torch.dtype) -> bool:
    """Whether all entries of the weight are fewer bytes than all ranks' rows of hidden states."""
    return tokens * hidden.itemsize > entries * weight.itemsize


def everyones(shard: VocabShard, targets: Tensor, impl: str) -> tuple[Tokens, VocabShard]:
    """The tokens of all ranks, and the shard as it is where all have the same tokens."""
    partial = impl != "reference"  # whose d hidden is whole on every rank
    return Tokens.of(shard, targets), shard._replace(own_tokens=False, partial=partial)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, tokens, padding_idx):
        everyones = tokens.all(ids)
        entries = everyones - tokens.shard.start
        inside = (entries >= 0) & (entries < len(weight))
        everything = weight.new_zeros((len(entries), weight.shape[1]))
        everything[inside] = weight[entries[inside]]
        learnt = inside if padding_idx is None else inside & (everyones != padding_idx)
        ctx.save_for_backward(entries, learnt)
        ctx.tokens, ctx.entries = tokens, len(weight)
        return tokens.scattered(everything)

    @staticmethod
    def backward(ctx, grad):
        entries, learnt = ctx.saved_tensors
        everything = ctx.tokens.all(grad)
        d_weight = grad.new_zeros((ctx.entries, grad.shape[1]))
        d_weight.index_add_(0, entries[learnt], everything[learnt])
        return None, d_weight, None, None


def embedding(
    ids: Tensor, weight: Tensor, shard: VocabShard, padding_idx: int | None = None
) -> Tensor:
    """F.embedding of this rank's own tokens [n] from a weight in shards [v, H] -> [n, H].

    The ids of all ranks are gathered and the rows that they found are scattered: a SUM in which one
    rank has the number and the others 0; where it is fewer bytes the weight is gathered instead.
    As in F.embedding, padding_idx has no gradient.
    """
    tokens = Tokens.of(shard, ids)
    if weight_moves(tokens.total, weight.dtype, shard.total, weight.dtype):
        return F.embedding(ids, whole(weight, shard, partial=True), padding_idx)
    return _Embedding.apply(ids, weight, tokens, padding_idx)
