"""Weights and masks of tokens: by hand, against loops, and without asking a tensor for a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels.policy_weights import (
    covariance,
    high_entropy_mask,
    masked_quantile,
    off_policy_mask,
    rollout_weight,
    select_clip_cov,
    select_kl_cov,
)

CU = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
MASK = torch.tensor([True, True, False, True, True])
# ratios pi_old / pi_rollout of 2, 1/4, (masked) 9, 3, and one the engine could not give
ROLLOUT = torch.tensor([-0.5, -1.0, -2.0, -0.25, torch.nan])
OLD = torch.tensor([2.0, 0.25, 9.0, 3.0, 1.0]).log() + ROLLOUT.nan_to_num(-3.0)


@pytest.mark.parametrize(
    "mode, wanted",
    [
        ("token_truncate", [2.0, 0.5, 1.0, 2.5, 1.0]),
        ("token_mask", [2.0, 0.0, 1.0, 0.0, 1.0]),
        ("sequence_truncate", [0.5, 0.5, 0.5, 2.5, 2.5]),
        ("sequence_mask", [0.5, 0.5, 0.5, 0.0, 0.0]),
    ],
)
def test_rollout_weight(mode, wanted):
    found = rollout_weight(OLD, ROLLOUT, MASK, CU, mode=mode, low=0.5, high=2.5)
    assert_close(found, torch.tensor(wanted))


def test_off_policy_mask():
    """Mean drifts 0.4 and 0.1: the first sequence goes where its advantage is negative."""
    rollout = torch.tensor([-0.7, -0.5, 9.0, -0.8, torch.nan])
    logp = torch.tensor([-1.0, -1.0, 0.0, -1.0, 5.0])
    for sign in (1, -1):
        advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]) * sign
        found = off_policy_mask(logp, rollout, advantages, MASK, CU, threshold=0.2)
        assert_close(found, (advantages >= 0) | torch.tensor([False, False, False, True, True]))


def test_covariance():
    logp, a = torch.tensor([1.0, 3.0, 9.0, 4.0, 4.0]), torch.tensor([0.0, 1.0, 7.0, 0.0, 3.0])
    found = covariance(logp, a, MASK)
    assert_close(found, torch.tensor([2.0, 0.0, 0.0, -1.0, 2.0]))
    assert_close(covariance(logp, a, MASK, (torch.tensor(3.0), torch.tensor(1.0))), found)


def test_selections():
    """KL-Cov takes the largest; Clip-Cov a random share of those inside its bounds."""
    cov, mask = torch.randn(1000), torch.rand(1000) < 0.5
    found = select_kl_cov(cov, mask, fraction=0.1)
    n = int(0.1 * int(mask.sum()))
    assert found.sum() == n and found[mask].sum() == n
    assert cov[found].min() >= cov[mask & ~found].max()
    seed = torch.Generator().manual_seed(0)
    found = select_clip_cov(cov, mask, fraction=0.1, low=0.5, high=1.0, generator=seed)
    inside = mask & (cov > 0.5) & (cov < 1.0)
    assert found.sum() == n < inside.sum() and not (found & ~inside).any()
    again = select_clip_cov(
        cov, mask, fraction=0.1, low=0.5, high=1.0, generator=seed.manual_seed(0)
    )
    assert torch.equal(found, again)
    few = select_clip_cov(cov, mask, fraction=1.0, low=0.5, high=1.0)
    assert torch.equal(few, inside)
    assert select_kl_cov(cov, mask, fraction=1e-6).sum() == 1


@pytest.mark.parametrize("q", [0.0, 0.3, 0.8, 1.0])
def test_quantile(q):
    x, mask = torch.rand(101), torch.rand(101) < 0.6
    assert_close(masked_quantile(x, mask, q), x[mask].quantile(q))
    assert masked_quantile(x, torch.zeros(101, dtype=torch.bool), q) == float("inf")


def test_high_entropy_mask():
    entropy, mask = torch.rand(1000), torch.rand(1000) < 0.5
    found = high_entropy_mask(entropy, mask, fraction=0.2)
    assert abs(int(found.sum()) - 0.2 * int(mask.sum())) <= 1 and not found[~mask].any()
    threshold = masked_quantile(entropy, mask, 0.8)
    parts = [
        high_entropy_mask(e, m, fraction=0.2, threshold=threshold)
        for e, m in zip(entropy.chunk(3), mask.chunk(3), strict=True)
    ]
    assert torch.equal(torch.cat(parts), found)


def test_no_value_is_asked_for():
    with FakeTensorMode() as mode:
        x, mask = mode.from_tensor(torch.rand(5)), mode.from_tensor(MASK)
        for select in (select_clip_cov, select_kl_cov):
            assert select(covariance(x, x, mask), mask).shape == (5,)
        assert high_entropy_mask(x, mask).shape == (5,)
        assert rollout_weight(x, x, mask).shape == (5,)


def test_bad_input():
    with pytest.raises(ValueError, match="mode: wanted one of token_truncate"):
        rollout_weight(OLD, ROLLOUT, mode="clip")
    with pytest.raises(ValueError, match="low: wanted from 0 to below high, 1.0; got 2.0"):
        rollout_weight(OLD, ROLLOUT, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="cu_seqlens: wanted the boundaries"):
        rollout_weight(OLD, ROLLOUT, mode="sequence_mask")
    with pytest.raises(ValueError, match="fraction: wanted a number in"):
        high_entropy_mask(OLD, fraction=0.0)
    with pytest.raises(ValueError, match="fraction: wanted a number in"):
        select_kl_cov(OLD, fraction=2.0)
