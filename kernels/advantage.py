"""Generalised advantage estimates and discounted returns over packed sequences.

GAE (arXiv:1506.02438) over the *actions* of a sequence, k = 1..K, with V_{K+1} = bootstrap:

    delta_k = r_k + gamma V_{k+1} - V_k
    A_k     = delta_k + gamma lam A_{k+1},  A_{K+1} = 0
    G_k     = A_k + V_k

An action is a token, or, given `steps`, all of a step's tokens (macro actions, arXiv:2410.02743;
turns, arXiv:2410.02089): V_k is the value at its first token, r_k is the *sum* of its rewards, and
its tokens share A_k and G_k. Tokens with mask False are observations (tool output, prompt). They
are no actions and take no time: the next action's V and A reach the previous action undiscounted,
as in verl. A reward at an observation counts, undiscounted, for the action before it (verl drops
it): r_k sums the rewards from the first token of action k up to the first token of action k+1. A
reward before the first action was earned by none and reaches none. Observations get A = G = 0;
their values do not matter.

The returns may have a lambda of their own (decoupled GAE, arXiv:2503.01491), and each sequence its
own (arXiv:2504.05118). Rewards may be shaped on the way, r_k - kl_coef (log pi - log pi_ref) at the
tokens of actions, and the advantages' count, sum and sum of squares come along: then whitening
needs no pass to find them.

advantage_scan.py has the scan that computes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .advantage_parts import Packed, check_packed
from .advantage_scan import Results, reference, scan, shape_rewards
from .launch import choose_impl, expect, has_values
from .segments import check_steps, segment_ids, segment_sum
from .whitening import whitening_statistics


def _estimate(packed: Packed, steps: Tensor | None, impl: str, statistics: bool) -> Results:
    """By the implementation that `impl` and the tensors ask for."""
    if steps is not None:
        check_steps(steps, packed.cu_seqlens, len(packed.rewards), wait=True)
    if impl == "auto" and not has_values(packed.rewards):
        impl = "reference"
    impl = choose_impl(impl, packed.rewards.device, ("cuda", "triton", "cpu"))
    with torch.no_grad():
        if steps is not None:
            return _estimate_steps(packed, steps, impl, statistics)
        if impl != "reference":
            return scan(packed, impl, statistics)
        advantages, returns = reference(packed)
        sums = whitening_statistics(advantages, packed.mask) if statistics else None
        return Results(advantages, returns, sums)


def _estimate_steps(packed: Packed, steps: Tensor, impl: str, statistics: bool) -> Results:
    """To a step's first action its later tokens are like observations, once rewards are shaped."""
    ids = segment_ids(steps, len(packed.rewards))
    acts = torch.ones_like(ids, dtype=torch.bool) if packed.mask is None else packed.mask
    before = acts.cumsum(0) - acts.long()  # actions before each token
    first = acts & (before == before[steps[ids]])
    packed = packed._replace(rewards=shape_rewards(packed), mask=first, logp=None, ref_logp=None)
    found = _estimate(packed, None, impl, False)

    def spread(x: Tensor) -> Tensor:  # only the step's first action is not 0: the sum is that
        return segment_sum(x, steps)[ids].where(acts, 0.0)

    assert found.advantages is not None  # there are values
    advantages = spread(found.advantages)
    sums = whitening_statistics(advantages, acts) if statistics else None
    return Results(advantages, spread(found.returns), sums)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: Tensor | float = 0.95,
    critic_lam: Tensor | float | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    steps: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """GAE, arXiv:1506.02438: A_k = delta_k + gamma lam A_{k+1}, delta_k = r_k + gamma V' - V_k.

    Advantages and returns of packed sequences, each [T], float32 and detached.

    Args:
        rewards: [T].
        values: [T], the critic's value before each token.
        cu_seqlens: [S+1] int32; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
        gamma, lam: in [0, 1]; lam may be [S], one for each sequence.
        critic_lam: that of the returns, if not lam: G_k = V_k + the advantage at critic_lam.
        mask: [T] bool, False at observations; all True if omitted.
        bootstrap: [S], V of the state after each sequence: the critic's where it was truncated,
            0 where it terminated; all 0 if omitted.
        steps: [N+1] int32, boundaries of the steps (macro actions, turns) in the packed tokens;
            every token is in one step and no step crosses a sequence. Checking that waits for
            the GPU. A step's value is that at its first action: see credit.step_values.
        impl: "cuda", "triton", "cpu" (C++) or "reference", which keeps float64.
    """
    packed = check_packed(
        rewards,
        values,
        cu_seqlens,
        mask=mask,
        bootstrap=bootstrap,
        gamma=gamma,
        lam=lam,
        critic_lam=critic_lam,
    )
    found = _estimate(packed, steps, impl, False)
    assert found.advantages is not None  # there are values
    return found.advantages, found.returns


class ShapedGae(NamedTuple):
    """What `shaped_gae` returns."""

    advantages: Tensor  # [T]
    returns: Tensor  # [T]
    statistics: Tensor  # [3] float64, of the advantages of actions, as of whitening_statistics


def shaped_gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    *,
    kl_coef: float = 0.05,
    gamma: float = 1.0,
    lam: Tensor | float = 0.95,
    critic_lam: Tensor | float | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    steps: Tensor | None = None,
    impl: str = "auto",
) -> ShapedGae:
    """PPO's targets, arXiv:1909.08593: GAE of r_t - kl_coef (log pi - log pi_ref), with statistics.

    One launch: shaped_rewards with k1, gae, whitening_statistics. Then, over ranks and
    micro-batches,

        whiten(found.advantages, all_reduce(found.statistics), mask)

    logp, ref_logp: [T], of the sampled tokens under the policy that sampled them and the reference;
    not read at observations; no penalty if both are None. The other arguments are those of `gae`.
    """
    packed = check_packed(
        rewards,
        values,
        cu_seqlens,
        mask=mask,
        bootstrap=bootstrap,
        gamma=gamma,
        lam=lam,
        critic_lam=critic_lam,
        logp=logp,
        ref_logp=ref_logp,
        kl_coef=kl_coef,
    )
    found = _estimate(packed, steps, impl, True)
    assert found.advantages is not None and found.statistics is not None
    return ShapedGae(found.advantages, found.returns, found.statistics)


def length_adaptive_lam(
    cu_seqlens: Tensor, mask: Tensor | None = None, *, alpha: float = 0.05
) -> Tensor:
    """VAPO's lambda, arXiv:2504.05118: 1 - 1 / (alpha n), n a sequence's actions; [S] float32.

    0 where n <= 1 / alpha (20 tokens at the paper's alpha), where the formula is negative.
    """
    expect(alpha > 0, "alpha", "a positive number", alpha)
    lengths = cu_seqlens.diff().float()
    if mask is not None:
        lengths = segment_sum(mask.float(), cu_seqlens)
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0)


def vapo_gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 0.05,
    critic_lam: Tensor | float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """VAPO, arXiv:2504.05118: GAE with lam = 1 - 1 / (alpha n), returns with critic_lam = 1.

    Arguments and results are those of `gae`.
    """
    lam = length_adaptive_lam(cu_seqlens, mask, alpha=alpha)
    return gae(
        rewards,
        values,
        cu_seqlens,
        gamma=gamma,
        lam=lam,
        critic_lam=critic_lam,
        mask=mask,
        bootstrap=bootstrap,
        impl=impl,
    )


def discounted_returns(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Reward-to-go, arXiv:1506.02438: G_k = r_k + gamma G_{k+1}, GAE's returns at lam = 1.

    [T], float32 and detached. Arguments and the treatment of observations are those of `gae`;
    G_{K+1} = bootstrap.
    """
    packed = check_packed(rewards, None, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=gamma)
    return _estimate(packed, None, impl, False).returns
