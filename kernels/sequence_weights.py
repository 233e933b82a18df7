"""Weights of tokens [M] for log-probs of sequences other than their plain sum.

A preference loss takes l(y) = sum_t log pi(y_t); methods that change what a completion's log-prob
is weigh its tokens: segment_sum(weights * logp, cu_seqlens), alike under pi and pi_ref. Sequences
are packed with boundaries cu_seqlens [S+1]; all weights are detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import expect
from .segments import check_boundaries, segment_ids, segment_spread


def discounted(cu_seqlens: Tensor, total: int, *, gamma: float) -> Tensor:
    """CPL's segments, arXiv:2310.13639: gamma^t, t from 0 at a sequence's first token."""
    expect(0 < gamma <= 1, "gamma", "a number in (0, 1]", gamma)
    return torch.pow(gamma, _place(cu_seqlens, total).float())


def length_desensitised(cu_seqlens: Tensor, total: int, shared: Tensor, *, alpha: float) -> Tensor:
    """LD-DPO, arXiv:2409.06411: 1 up to token `shared` of a sequence, alpha beyond it.

    shared: [S], the length of the shorter completion of a sequence's pair: `shared_lengths`.
    """
    expect(0 <= alpha <= 1, "alpha", "a number in [0, 1]", alpha)
    beyond = _place(cu_seqlens, total) >= _of_tokens(shared, cu_seqlens, total)
    return torch.where(beyond, alpha, 1.0)


def subsampled(
    cu_seqlens: Tensor, total: int, shared: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """SamPO, arXiv:2406.10957: 1 at `shared` random tokens of each sequence, 0 at the others.

    shared: as in `length_desensitised`, so that both sums of a pair have as many terms. Draw once
    for pi and pi_ref.
    """
    lot = torch.rand(total, generator=generator, device=cu_seqlens.device, dtype=torch.float64)
    ids = segment_ids(cu_seqlens, total)
    # sorted by sequence, and at random within each: the first `shared` of a sequence are drawn
    order = (ids + lot).argsort()
    drawn = _place(cu_seqlens, total) < _of_tokens(shared, cu_seqlens, total)
    return torch.zeros(total, device=cu_seqlens.device).scatter(0, order, drawn.float())


def shared_lengths(cu_seqlens: Tensor) -> Tensor:
    """The shorter length of each pair, for both [S]; sequences are chosen, rejected, chosen, ..."""
    lengths = cu_seqlens.diff()
    expect(len(lengths) % 2 == 0, "cu_seqlens", "pairs of sequences", f"{len(lengths)} of them")
    return lengths.view(-1, 2).amin(1).repeat_interleave(2)


def _place(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each token's place in its sequence, from 0."""
    check_boundaries("cu_seqlens", cu_seqlens, total, cu_seqlens.device)
    start = cu_seqlens[:-1][segment_ids(cu_seqlens, total)]
    return torch.arange(total, device=cu_seqlens.device) - start


def _of_tokens(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    wanted = (len(cu_seqlens) - 1,)
    expect(tuple(x.shape) == wanted, "shared", wanted, tuple(x.shape))
    return segment_spread(x, cu_seqlens, total)
