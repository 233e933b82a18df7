"""Advantages without a critic: one number per completion, from the completions of its prompt.

Completions are packed by prompt: group g is rewards cu_groups[g] to cu_groups[g+1], cu_groups
[G+1] int32, as everywhere here. Groups may differ in size. A NaN reward is a completion that no
one could score: it enters no baseline and gets advantage 0, as in TRL. So does a completion whose
group holds nothing to compare it with: alone, or all rewards equal. Nothing is divided by an
epsilon alone.

Results are detached, [S], float32 (float64 for float64 rewards); spread them over the completions'
tokens with segment_spread. A statistic of the *batch* means all ranks and micro-batches: functions
that need one take `reduce`, see whitening.py.

An estimator is one function; name it in ESTIMATORS, at the end, under the name it has in verl's
`adv_estimator` or TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .advantage import discounted_returns, gae, shaped_gae, vapo_gae
from .launch import expect, has_values
from .segments import check_boundaries, segment_ids, segment_max, segment_sum
from .vtrace import vtrace
from .whitening import Reduce, mean_and_variance, whiten, whitening_statistics


class Groups(NamedTuple):
    """Rewards of completions, [S] each, float64: groups are small, and sums of squares large."""

    rewards: Tensor  # 0 where there is none
    scored: Tensor  # bool: the reward is not NaN
    count: Tensor  # scored completions of the group
    ids: Tensor
    cu_groups: Tensor
    dtype: torch.dtype

    def sum(self, x: Tensor) -> Tensor:
        """Over the group's scored completions, at each completion."""
        return segment_sum(torch.where(self.scored, x, 0.0), self.cu_groups)[self.ids]

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.count.clamp(min=1)

    def largest(self, x: Tensor) -> Tensor:
        return segment_max(torch.where(self.scored, x, -torch.inf), self.cu_groups)[self.ids]

    def differ(self) -> Tensor:
        """Whether the group has two scored completions with different rewards."""
        return (self.count > 1) & (self.largest(self.rewards) != -self.largest(-self.rewards))

    def deviation(self) -> Tensor:
        """r - mean, and 0 where that says nothing."""
        known = self.scored & self.differ()
        return torch.where(known, self.rewards - self.mean(self.rewards), 0.0)

    def normalised(self, epsilon: float) -> Tensor:
        """(r - mean) / (std + epsilon), with the unbiased std of the group."""
        deviation = self.deviation()
        variance = self.sum(deviation**2) / (self.count - 1).clamp(min=1)
        return torch.where(deviation == 0, 0.0, deviation / (variance.sqrt() + epsilon))


def _groups(rewards: Tensor, cu_groups: Tensor, least: int = 2, every: bool = False) -> Groups:
    """Checked. every: all groups need `least` completions, not only the largest."""
    expect(
        rewards.dim() == 1 and rewards.is_floating_point(),
        "rewards",
        "a 1-D floating-point tensor",
        f"{rewards.dtype} of shape {tuple(rewards.shape)}",
        "Pack the completions group by group",
    )
    check_boundaries("cu_groups", cu_groups, len(rewards), rewards.device)
    if has_values(cu_groups) and cu_groups.device.type == "cpu" and len(rewards):
        sizes = [n for n in cu_groups.diff().tolist() if n]
        size = min(sizes) if every else max(sizes)
        wanted = f"{'groups' if every else 'a group'} of at least {least} completions"
        remedy = "Sample more completions per prompt, or take an estimator without groups"
        expect(size >= least, "cu_groups", wanted, f"{size} per prompt", remedy)
    scored = ~rewards.isnan()
    exact = torch.where(scored, rewards.detach(), 0.0).double()
    ids = segment_ids(cu_groups, len(rewards))
    count = segment_sum(scored.double(), cu_groups)[ids]
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return Groups(exact, scored, count, ids, cu_groups, dtype)


def _statistics(x: Tensor, weight: Tensor | None, reduce: Reduce | None) -> Tensor:
    statistics = whitening_statistics(x, weight)
    return statistics if reduce is None else reduce(statistics)


def _per_completion(name: str, x: Tensor, like: Tensor) -> Tensor:
    expect(x.shape == like.shape, name, f"shape {tuple(like.shape)}", tuple(x.shape))
    return x.detach().double()


def penalized_rewards(
    rewards: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: Tensor | float,
) -> Tensor:
    """RLOO's reward, arXiv:2402.14740: r - kl_coef sum_t (log pi - log pi_ref), [S].

    logp, ref_logp, mask: [T], packed by cu_seqlens [S+1]. The KL of a sequence is a sum, not a
    mean, and may be negative on a sample.
    """
    k = logp.detach() - ref_logp.detach()
    k = k if mask is None else torch.where(mask, k, 0.0)
    return rewards.detach() - kl_coef * segment_sum(k, cu_seqlens)


def rloo(rewards: Tensor, cu_groups: Tensor) -> Tensor:
    """RLOO, arXiv:2402.14740: r_i - mean of the others' r = K / (K - 1) (r_i - mean of all r).

    Raises: a group has one completion, which leaves no others.
    """
    groups = _groups(rewards, cu_groups, every=True)
    factor = groups.count / (groups.count - 1).clamp(min=1)
    return (factor * groups.deviation()).to(groups.dtype)


def grpo(
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    scale: str = "group",
    epsilon: float = 1e-4,
    reduce: Reduce | None = None,
) -> Tensor:
    """GRPO, arXiv:2402.03300: (r - group mean) / (std + epsilon), std unbiased (ddof 1).

    scale: whose std, as TRL's `scale_rewards`: "group", "batch" (of all rewards, which needs
    `reduce` on several ranks; arXiv:2508.08221) or "none". epsilon is TRL's; verl has 1e-6.
    """
    scales = ("group", "batch", "none")
    expect(scale in scales, "scale", f"one of {', '.join(scales)}", repr(scale))
    groups = _groups(rewards, cu_groups)
    if scale == "group":
        return groups.normalised(epsilon).to(groups.dtype)
    deviation = groups.deviation()
    if scale == "batch":
        statistics = _statistics(groups.rewards, groups.scored, reduce)
        std = mean_and_variance(statistics)[1].sqrt()
        deviation = torch.where(std > 0, deviation / (std + epsilon), 0.0)
    return deviation.to(groups.dtype)


def dr_grpo(rewards: Tensor, cu_groups: Tensor) -> Tensor:
    """Dr. GRPO, arXiv:2503.20783: r - group mean, with no std: hard and easy prompts weigh alike.

    Its loss divides by a constant, not by lengths: policy_loss(loss_type="dr_grpo").
    """
    return grpo(rewards, cu_groups, scale="none")


def reinforce(
    rewards: Tensor, baseline: Tensor | float | None = None, *, reduce: Reduce | None = None
) -> Tensor:
    """REINFORCE, Williams 1992: r - baseline, the mean of the batch if None.

    baseline: a number, [] (whitening.moving_mean keeps one over steps) or [S]; 0 for raw rewards.
    """
    scored = ~rewards.isnan()
    exact = torch.where(scored, rewards.detach(), 0.0).double()
    if baseline is None:
        baseline = mean_and_variance(_statistics(exact, scored, reduce))[0]
    advantages = torch.where(scored, exact - baseline, 0.0)
    return advantages.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def remax(rewards: Tensor, greedy_rewards: Tensor, cu_groups: Tensor | None = None) -> Tensor:
    """ReMax, arXiv:2310.10505: r - r(greedy completion of the prompt).

    greedy_rewards: [S], or [G] with cu_groups; 0 advantage where it is NaN. Decode greedily with
    the same stop rules.
    """
    if cu_groups is not None:
        check_boundaries("cu_groups", cu_groups, len(rewards), rewards.device)
        groups = len(cu_groups) - 1
        got = tuple(greedy_rewards.shape)
        expect(got == (groups,), "greedy_rewards", f"shape ({groups},)", got)
        greedy_rewards = greedy_rewards[segment_ids(cu_groups, len(rewards))]
    baseline = _per_completion("greedy_rewards", greedy_rewards, rewards)
    return reinforce(torch.where(baseline.isnan(), torch.nan, rewards), baseline)


def opo(rewards: Tensor, lengths: Tensor, cu_groups: Tensor) -> Tensor:
    """OPO, arXiv:2505.23585: r - sum_j n_j r_j / sum_j n_j over the group, n the lengths in tokens.

    The baseline of least variance if a completion's squared gradient grows like its length.
    """
    groups = _groups(rewards, cu_groups)
    n = _per_completion("lengths", lengths, rewards)
    baseline = groups.sum(n * groups.rewards) / groups.sum(n).clamp(min=1)
    known = groups.scored & groups.differ()
    return torch.where(known, groups.rewards - baseline, 0.0).to(groups.dtype)


def gpg(
    rewards: Tensor,
    cu_groups: Tensor,
    *,
    informative: bool = False,
    f_norm: float = 1.0,
    reduce: Reduce | None = None,
) -> Tensor:
    """GPG, arXiv:2504.02546: B / M (r - group mean) / f_norm, B completions in the batch.

    M counts rewards that are not 0, as in verl; or, `informative`, completions of groups whose
    rewards differ, the only ones with a gradient.
    """
    groups = _groups(rewards, cu_groups)
    counted = groups.differ() if informative else groups.rewards != 0
    batch, counting, _ = _statistics(counted.double(), groups.scored, reduce).unbind()
    advantages = batch / counting.clamp(min=1) * groups.deviation() / f_norm
    return advantages.to(groups.dtype)


def passk(
    rewards: Tensor, cu_groups: Tensor, *, scale: str = "none", epsilon: float = 1e-6
) -> Tensor:
    """Pass@k, arXiv:2503.19595: the group's best gets its lead over the second, the others 0.

    scale: "none", or "group" to divide by std + epsilon (verl's grpo_passk by default).

    Raises: a group has one completion, which leads no one.
    """
    expect(scale in ("group", "none"), "scale", "one of group, none", repr(scale))
    groups = _groups(rewards, cu_groups, every=True)
    best = groups.scored & (groups.rewards == groups.largest(groups.rewards))
    second = groups.largest(torch.where(best, -torch.inf, groups.rewards))
    leads = best & (groups.sum(best.double()) == 1) & groups.differ()
    lead = torch.where(leads, groups.rewards - second, 0.0)
    if scale == "group":
        variance = groups.sum(groups.deviation() ** 2) / (groups.count - 1).clamp(min=1)
        lead = torch.where(leads, lead / (variance.sqrt() + epsilon), 0.0)
    return lead.to(groups.dtype)


def pass_at_k(rewards: Tensor, cu_groups: Tensor, *, k: int) -> Tensor:
    """Pass@k training, arXiv:2508.10751: (E[pass | i in the k] - rho) / sqrt(rho (1 - rho)).

    Over all k of the group's n completions, c of them correct: rho = 1 - C(n-c, k) / C(n, k); a
    correct one passes whatever the others are, a wrong one unless the other k-1 are wrong too.
    k = 1 is GRPO with the biased std. 0 where all or none of the groups of k pass.

    rewards: 1 where correct, 0 where wrong.

    Raises: a group has fewer than k completions; on a CPU, a reward that is neither 0 nor 1.
    """
    expect(k >= 1, "k", "at least 1", k)
    groups = _groups(rewards, cu_groups, least=k, every=True)
    if has_values(rewards) and rewards.device.type == "cpu":
        graded = groups.rewards[(groups.rewards != 0) & (groups.rewards != 1)]
        remedy = "Reward correctness alone, with a weight of 1"
        expect(not len(graded), "rewards", "0 or 1", sorted(set(graded.tolist()))[:3], remedy)
    n, c = groups.count, groups.sum(groups.rewards)

    def none_correct(n: Tensor, wrong: Tensor, drawn: int) -> Tensor:
        """C(wrong, drawn) / C(n, drawn)."""
        factors = [(wrong - i).clamp(min=0) / (n - i).clamp(min=1) for i in range(drawn)]
        return torch.stack([torch.ones_like(n), *factors]).prod(0)

    fails = none_correct(n, n - c, k)
    deviation = (fails * (1 - fails)).sqrt()
    others_fail = none_correct(n - 1, n - c - 1, k - 1)
    lead = fails - torch.where(groups.rewards == 0, others_fail, 0.0)
    known = groups.scored & (fails > 0) & (fails < 1)
    return torch.where(known, lead / deviation, 0.0).to(groups.dtype)


def spo(wins: Tensor, cu_groups: Tensor) -> Tensor:
    """SPO, arXiv:2401.04056: mean over j != i in the group of P(y_i beats y_j), less 1/2.

    wins: [S, K], K the largest group: P(completion i beats the j-th of its group), in [0, 1].
    The entry of a completion with itself and columns beyond its group are not read.

    Raises: a group has one completion, which beats no one.
    """
    shape = f"{wins.dtype} of shape {tuple(wins.shape)}"
    expect(wins.dim() == 2 and wins.is_floating_point(), "wins", "floats of shape [S, K]", shape)
    first = wins[:, 0] if wins.shape[1] else wins.new_zeros(len(wins))
    groups = _groups(torch.zeros_like(first), cu_groups, every=True)
    others = groups.count - 1
    place = torch.arange(len(wins), device=wins.device) - cu_groups[groups.ids]
    column = torch.arange(wins.shape[1], device=wins.device)
    met = (column < groups.count[:, None]) & (column != place[:, None])
    won = torch.where(met, wins.detach().double(), 0.0).sum(1)
    return torch.where(others > 0, won / others.clamp(min=1) - 0.5, 0.0).to(groups.dtype)


def gdpo(
    rewards: Tensor,
    weights: Tensor,
    cu_groups: Tensor,
    *,
    epsilon: float = 1e-4,
    reduce: Reduce | None = None,
) -> Tensor:
    """GDPO, arXiv:2601.05242: whiten over the batch sum_f w_f (r_f - group mean) / (std + epsilon).

    rewards: [S, F], one column a reward function; NaN where one gave none, which leaves the others.
    weights: [F]. Both std are unbiased, as in TRL, whose `normalize_then_sum` this is.
    """
    expect(rewards.dim() == 2, "rewards", "shape [S, F]", tuple(rewards.shape))
    expect(weights.shape == rewards.shape[1:], "weights", rewards.shape[1:], weights.shape)
    columns = [_groups(column, cu_groups) for column in rewards.unbind(1)]
    parts = [
        w * each.normalised(epsilon) for w, each in zip(weights.double(), columns, strict=True)
    ]
    total = torch.stack(parts).sum(0)
    scored = ~rewards.isnan().all(1)
    statistics = _statistics(total, scored, reduce)
    mean, variance = mean_and_variance(statistics)
    white = torch.where(variance > 0, (total - mean) / (variance.sqrt() + epsilon), 0.0)
    return torch.where(scored, white, 0.0).to(columns[0].dtype)


def reinforce_plus_plus(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """REINFORCE++, arXiv:2501.03262: A_t = sum_{s >= t} gamma^(s-t) r_s, whitened over the batch.

    rewards: [T] per token, of advantage_parts.shaped_rewards: the KL penalty is among them.
    Results [T], 0 where mask is False; the batch is the tokens of all ranks.
    """
    impl = "reference" if rewards.dtype == torch.float64 else "auto"  # which keeps float64
    returns = discounted_returns(rewards, cu_seqlens, gamma=gamma, mask=mask, impl=impl)
    return whiten(returns, mask=mask, reduce=reduce)


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    cu_groups: Tensor,
    lengths: Tensor | None = None,
    *,
    reduce: Reduce | None = None,
) -> Tensor:
    """REINFORCE++-baseline, arXiv:2501.03262: r - group mean, whitened over the batch.

    lengths: [S] in tokens. Given, a completion counts once for each, as in verl; else once.
    """
    groups = _groups(rewards, cu_groups)
    weight = groups.scored.double()
    if lengths is not None:
        weight = weight * _per_completion("lengths", lengths, rewards)
    return whiten(groups.deviation(), mask=weight, reduce=reduce).to(groups.dtype)


def prime(
    process_rewards: Tensor,
    outcomes: Tensor,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    *,
    process_coef: float = 1.0,
    outcome_coef: float = 1.0,
    mask: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """PRIME, arXiv:2502.01456: sum_{s >= t} RLOO(process)_s + RLOO(outcome), whitened; [T].

    The process baseline is of completions' mean token rewards, so that a long one does not set it:
    RLOO(process)_s = K / (K - 1) (r_s - mean_j mean_s r), as in the authors' code. That leaves the
    completion itself out only where r_s is its own mean.

    Args:
        process_rewards: [T], beta (log pi_phi - log pi_ref) of the implicit reward model.
        outcomes: [S], the verifier's; completions are packed by cu_seqlens, groups by cu_groups.

    Raises: a group has one completion.
    """
    acts = torch.ones_like(process_rewards, dtype=torch.bool) if mask is None else mask
    process = torch.where(acts, process_rewards.detach(), 0.0).double()
    lengths = segment_sum(acts.double(), cu_seqlens)
    means = segment_sum(process, cu_seqlens) / lengths.clamp(min=1)
    groups = _groups(means, cu_groups, every=True)
    outcome = outcome_coef * rloo(_per_completion("outcomes", outcomes, means), cu_groups)
    ids = segment_ids(cu_seqlens, len(process))
    factor = groups.count / (groups.count - 1).clamp(min=1)
    token = (factor[ids] * (process - groups.mean(means)[ids])).where(acts, 0.0)
    returns = discounted_returns(process_coef * token, cu_seqlens, mask=mask, impl="reference")
    white = whiten((returns + outcome[ids]).where(acts, 0.0), mask=mask, reduce=reduce)
    return white.to(torch.float64 if process_rewards.dtype == torch.float64 else torch.float32)


ESTIMATORS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "gae": gae,
    "shaped_gae": shaped_gae,
    "vapo_gae": vapo_gae,
    "vtrace": vtrace,
    "reward_to_go": discounted_returns,
    "reinforce": reinforce,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "rloo": rloo,
    "remax": remax,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "grpo_passk": passk,
    "pass_at_k": pass_at_k,
    "opo": opo,
    "gpg": gpg,
    "gdpo": gdpo,
    "spo": spo,
    "prime": prime,
}
