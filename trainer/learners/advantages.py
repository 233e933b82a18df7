"""Rewards of completions -> advantages of sequences or tokens, by the estimator's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefuse.kernels import group_advantage as group
from prefuse.kernels.advantage import discounted_returns
from prefuse.kernels.advantage_parts import shaped_rewards
from prefuse.kernels.credit import at_ends, lagrangian
from prefuse.kernels.whitening import Reduce

from ..win_rates import win_rates


@dataclass(frozen=True)
class Judged:
    """Completions [S] of this rank, prompt by prompt, with M scored tokens in all."""

    rewards: Tensor  # [S] float64, weighted; NaN where no reward was given
    parts: Tensor  # [S, F], of every reward function
    weights: Tensor  # [F]
    cu_groups: Tensor  # [G + 1] int32: the completions of a prompt
    cu_seqlens: Tensor  # [S + 1] int32: the scored tokens of a completion
    reduce: Reduce  # statistics of this rank -> of all
    scale: str = "group"  # of the grpo estimator
    wins: Tensor | None = None  # [G, K, L]: P(a completion beats one that it meets)
    pass_k: int = 1  # of the pass_at_k estimator
    others: Tensor | None = None  # [G, L]: rewards of completions that are not trained on
    costs: Tensor | None = None  # [S]
    logp: Tensor | None = None  # [M], with ref_logp: for a KL penalty in the reward
    ref_logp: Tensor | None = None
    kl_coef: float = 0.0

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def penalized(self) -> Tensor:
        """[S], less the KL of the sequence."""
        if self.logp is None or self.ref_logp is None:
            return self.rewards
        pair = self.logp.double(), self.ref_logp.double()
        return group.penalized_rewards(self.rewards, *pair, self.cu_seqlens, kl_coef=self.kl_coef)

    def of_tokens(self) -> Tensor:
        """[M]: the reward at a completion's last token, the KL at every token."""
        rewards = at_ends(self.rewards.nan_to_num(nan=0.0), self.cu_seqlens, self.tokens)
        if self.logp is None or self.ref_logp is None:
            return rewards
        pair = self.logp.double(), self.ref_logp.double()
        return shaped_rewards(rewards, *pair, kl_coef=self.kl_coef)

    @property
    def judged(self) -> Tensor:
        """bool [M]: tokens of completions with a reward."""
        return torch.repeat_interleave(~self.rewards.isnan(), self.lengths.long())

    @property
    def tokens(self) -> int:
        return int(self.cu_seqlens[-1])


def nash(x: Judged) -> Tensor:
    """Nash-MD, arXiv:2312.00886: P(y > y') - 1/2, y' of the mixture, less the KL still to come.

    The KL of a token is the later tokens' too: without those it is no gradient of the sequence's.
    """
    assert x.wins is not None
    won = win_rates(x.wins, among_themselves=False)
    return discounted_returns(replace(x, rewards=won - 0.5).of_tokens(), x.cu_seqlens)


def spo(x: Judged) -> Tensor:
    """SPO, arXiv:2401.04056: the mean over the group's others of P(y beats y'), less 1/2."""
    assert x.wins is not None
    lead = win_rates(x.wins, among_themselves=True) - 0.5
    return replace(x, rewards=lead.nan_to_num(nan=0.0)).penalized()


def remax(x: Judged) -> Tensor:
    assert x.others is not None
    return group.remax(x.penalized(), x.others[:, 0], x.cu_groups)


ESTIMATORS: dict[str, Callable[[Judged], Tensor]] = {
    "grpo": lambda x: group.grpo(x.penalized(), x.cu_groups, scale=x.scale, reduce=x.reduce),
    "dr_grpo": lambda x: group.dr_grpo(x.penalized(), x.cu_groups),
    "rloo": lambda x: group.rloo(x.penalized(), x.cu_groups),
    "opo": lambda x: group.opo(x.penalized(), x.lengths.double(), x.cu_groups),
    "gpg": lambda x: group.gpg(x.penalized(), x.cu_groups, reduce=x.reduce),
    "grpo_passk": lambda x: group.passk(x.penalized(), x.cu_groups),
    "pass_at_k": lambda x: group.pass_at_k(x.rewards, x.cu_groups, k=x.pass_k),
    "gdpo": lambda x: group.gdpo(x.parts, x.weights, x.cu_groups, reduce=x.reduce),
    "spo": spo,
    "remax": remax,
    "nash": nash,
    "reinforce": lambda x: group.reinforce(x.penalized(), reduce=x.reduce),
    "reinforce_plus_plus": lambda x: group.reinforce_plus_plus(
        x.of_tokens(), x.cu_seqlens, mask=x.judged, reduce=x.reduce
    ),
    "reinforce_plus_plus_baseline": lambda x: group.reinforce_plus_plus_baseline(
        x.penalized(), x.cu_groups, x.lengths.double(), reduce=x.reduce
    ),
}
COMPARE = {"spo", "nash"}  # those of wins
OF_TOKENS = {"reinforce_plus_plus", "nash"}
NEED_GROUPS = {"rloo", "grpo", "dr_grpo", "opo", "gpg", "grpo_passk", "pass_at_k", "gdpo", "spo"}


def advantages(name: str, judged: Judged, log_multiplier: float = 0.0) -> Tensor:
    """Of every scored token [M], float32; a sequence's advantage is that of its tokens.

    Where there are costs, those of rewards and of costs are mixed by Safe RLHF's multiplier; the
    KL penalty is in both, so its weight does not depend on it.
    """
    found = _estimate(name, judged)
    if judged.costs is None:
        return found
    costs = replace(judged, rewards=judged.costs, costs=None, kl_coef=-judged.kl_coef)
    return lagrangian(found, _estimate(name, costs), log_multiplier)


def _estimate(name: str, judged: Judged) -> Tensor:
    found = ESTIMATORS[name](judged).float()
    if name in OF_TOKENS:
        return found
    return torch.repeat_interleave(found, judged.lengths.long())
