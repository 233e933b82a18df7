"""Weights of tokens for log-probs of sequences: against loops, and LD-DPO against TRL's."""

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.segments import segment_sum
from prefuse.kernels.sequence_weights import (
    discounted,
    length_desensitised,
    shared_lengths,
    subsampled,
)

LENGTHS = [4, 2, 1, 3, 0, 2]
CU = torch.tensor([0, 4, 6, 7, 10, 10, 12], dtype=torch.int32)


def test_discounted():
    found = discounted(CU, 12, gamma=0.5)
    assert_close(found, torch.cat([0.5 ** torch.arange(n).float() for n in LENGTHS]))


def test_length_desensitised():
    """The pairs are 4 and 2, 1 and 3, 0 and 2 tokens long."""
    shared = shared_lengths(CU)
    assert shared.tolist() == [2, 2, 1, 1, 0, 0]
    found = length_desensitised(CU, 12, shared, alpha=0.25)
    assert found.tolist() == [1, 1, 0.25, 0.25, 1, 1, 1, 1, 0.25, 0.25, 0.25, 0.25]


def test_subsampled():
    """As many tokens of each as the shorter one has, every one of them as likely."""
    seed = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [subsampled(CU, 12, shared_lengths(CU), generator=seed) for _ in range(2000)]
    )
    assert set(draws.flatten().tolist()) == {0.0, 1.0}
    for weights in draws[:20]:
        assert segment_sum(weights, CU).tolist() == [2, 2, 1, 1, 0, 0]
    share = draws.mean(0)
    assert_close(share[:4], torch.full((4,), 0.5), atol=0.05, rtol=0)
    assert_close(share[7:10], torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="gamma: wanted a number in"):
        discounted(CU, 12, gamma=0.0)
    with pytest.raises(ValueError, match="alpha: wanted a number in"):
        length_desensitised(CU, 12, shared_lengths(CU), alpha=2.0)
    with pytest.raises(ValueError, match=r"shared: wanted \(6,\); got \(3,\)"):
        subsampled(CU, 12, torch.ones(3))
    with pytest.raises(ValueError, match="cu_seqlens: wanted pairs of sequences; got 5 of them"):
        shared_lengths(CU[:-1])
    with pytest.raises(ValueError, match="cu_seqlens: wanted boundaries that rise"):
        discounted(CU, 11, gamma=0.5)
