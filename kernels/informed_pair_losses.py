"""Pair losses that read more than the pair's own log-probs: margins and preferences of a judge,
divergences, weights, a former policy, statistics of the batch.

Notation as in pair_losses.py. What a loss reads is a field of `Pair`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect
from .objective import Objective
from .preference_parts import Pair, logistic, objective, smoothed, soft


def sppo(pair: Pair, *, beta: float = 0.1) -> Objective:
    """SPPO, arXiv:2405.00675 eq. 4.7: (rho(w) - t)^2 + (rho(l) + t)^2, t = (p - 1/2) / beta.

    p is the preference for w, beta the paper's 1 / eta.
    """
    chosen, rejected = pair.log_ratios()
    target = (pair.need("preference") - 0.5) / beta
    loss = (chosen - target) ** 2 + (rejected + target) ** 2
    return objective(loss, beta * chosen, beta * rejected)


def mmpo(pair: Pair, *, beta: float = 0.1, gamma: float = 1.0) -> Objective:
    """MMPO, arXiv:2410.03145: p h(z) + (1 - p) h(-z), z = beta delta, p = sigmoid(gamma margin).

    With win rates against the current policy for rewards it is the loss of DNO, arXiv:2404.03715.
    """
    chosen, rejected = pair.log_ratios()
    p = (gamma * pair.need("margin")).sigmoid()
    return objective(soft(beta * (chosen - rejected), p), beta * chosen, beta * rejected)


def osp(pair: Pair, *, beta: float = 0.1) -> Objective:
    """OSP, arXiv:2405.14103: p h(beta delta) + (1 - p) h(-beta delta), p the preference for w."""
    chosen, rejected = pair.log_ratios()
    loss = soft(beta * (chosen - rejected), pair.need("preference"))
    return objective(loss, beta * chosen, beta * rejected)


def rpo(pair: Pair, *, beta: float = 0.1, eta: float = 1.0) -> Objective:
    """Reward-aware PO, arXiv:2406.11704: KL(Bernoulli p || Bernoulli sigmoid(beta delta)).

    p = sigmoid(eta margin). MMPO's gradient, with a least value of 0.
    """
    chosen, rejected = pair.log_ratios()
    target = eta * pair.need("margin")
    p = target.sigmoid()
    loss = soft(beta * (chosen - rejected), p) - soft(target, p)
    return objective(loss, beta * chosen, beta * rejected)


def wpo(pair: Pair, *, beta: float = 0.1) -> Objective:
    """WPO, arXiv:2406.11827: sg(exp(weight(w) + weight(l))) h(beta delta).

    weight(y) = mean_t (log pi - log sum_v p_v^2): completions unlike the policy's own count less.
    As in the paper and TRL; the authors' code holds the product of the weights at 1 at most.
    """
    chosen, rejected = pair.log_ratios()
    weight = (pair.need("chosen_weight") + pair.need("rejected_weight")).detach().exp()
    loss = weight * logistic(beta * (chosen - rejected))
    return objective(loss, beta * chosen, beta * rejected)


def tdpo1(pair: Pair, *, beta: float = 0.1) -> Objective:
    """TDPO1, arXiv:2404.11999: h(beta (delta - (D(l) - D(w)))), D = sum_t KL(pi_ref || pi)."""
    chosen, rejected = pair.log_ratios()
    kl = pair.need("rejected_kl") - pair.need("chosen_kl")
    return objective(logistic(beta * (chosen - rejected - kl)), beta * chosen, beta * rejected)


def tdpo2(pair: Pair, *, beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """TDPO2, arXiv:2404.11999: h(beta (delta - alpha (D(l) - sg D(w)))), D as in TDPO1."""
    chosen, rejected = pair.log_ratios()
    kl = alpha * (pair.need("rejected_kl") - pair.need("chosen_kl").detach())
    return objective(logistic(beta * (chosen - rejected - kl)), beta * chosen, beta * rejected)


def tpo(
    pair: Pair, *, beta: float = 0.01, nll_coef: float = 1.0, label_smoothing: float = 0.0
) -> Objective:
    """TPO, arXiv:2405.16681: h(beta (l(w) - l(l))) - nll_coef l(g) / |g|, g a gold completion.

    CPO with the likelihood term on a third completion. No reference model.
    """
    z = beta * (pair.chosen - pair.rejected)
    loss = smoothed(logistic, z, label_smoothing) + nll_coef * _gold_nll(pair)
    return objective(loss, beta * pair.chosen, beta * pair.rejected)


def tpo_l(
    pair: Pair,
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> Objective:
    """TPO-L, arXiv:2405.16681: h(beta (m(w) - m(l)) - gamma) - nll_coef m(g), m = l / |y|.

    SimPO with the likelihood of a gold completion g.
    """
    chosen, rejected = pair.mean_logps()
    z = beta * (chosen - rejected) - gamma
    loss = smoothed(logistic, z, label_smoothing) + nll_coef * _gold_nll(pair)
    return objective(loss, beta * chosen, beta * rejected)


def _gold_nll(pair: Pair) -> Tensor:
    return -pair.need("gold") / pair.need("gold_len")


def xpo(pair: Pair, *, beta: float = 0.1, alpha: float = 1e-5) -> Objective:
    """XPO, arXiv:2405.21046: p h(z) + (1 - p) h(-z) + alpha l(x), z = beta delta.

    p is the preference for w, 1 for a label; x is a completion that pi_ref sampled: the plus sign
    lowers what the reference says already.
    """
    chosen, rejected = pair.log_ratios()
    loss = soft(beta * (chosen - rejected), pair.need("preference"))
    loss = loss + alpha * pair.need("explored")
    return objective(loss, beta * chosen, beta * rejected)


def inpo(pair: Pair, *, eta: float = 0.0075, tau: float = 0.0025) -> Objective:
    """INPO, arXiv:2407.00617: (d - (tau / eta) d_ref - (1 - tau / eta) d_prev - 1 / (2 eta))^2.

    d = l(w) - l(l), under pi, pi_ref and the policy of the round before.
    """
    expect(0 <= tau <= eta and eta > 0, "tau", f"a number from 0 to eta, {eta}", tau)
    share = tau / eta
    anchor = [
        share * pair.need(f"ref_{side}") + (1 - share) * pair.need(f"prev_{side}")
        for side in ("chosen", "rejected")
    ]
    chosen, rejected = pair.chosen - anchor[0], pair.rejected - anchor[1]
    return objective((chosen - rejected - 1 / (2 * eta)) ** 2, eta * chosen, eta * rejected)


def egpo(pair: Pair, *, beta: float = 0.1) -> Objective:
    """Online IPO of EGPO, arXiv:2503.08942: (delta - margin / beta)^2.

    margin = P(w > x) - P(l > x) against a third completion x of the policy.
    """
    chosen, rejected = pair.log_ratios()
    loss = (chosen - rejected - pair.need("margin") / beta) ** 2
    return objective(loss, beta * chosen, beta * rejected)


def beta_dpo(pair: Pair, *, beta: float = 0.1, alpha: float = 0.6) -> Objective:
    """beta-DPO, arXiv:2407.08639: h(b delta), b = beta (1 + alpha (M - M0)), b at least 0.

    M is batch_margin, the mean of beta delta over the global batch; M0 running_margin, its moving
    average; both are detached and one number for all. A batch above the average raises b. The
    authors' code takes delta without beta for both, which is what its alpha of 0.6 is for.
    """
    chosen, rejected = pair.log_ratios()
    ahead = pair.need("batch_margin") - pair.need("running_margin")
    scale = (beta * (1 + alpha * ahead)).clamp(min=0).detach()
    return objective(logistic(scale * (chosen - rejected)), scale * chosen, scale * rejected)


def aot(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """AOT, arXiv:2406.05882: h(beta (d_(k) - d_ref_(k))), d = l(w) - l(l) sorted over the batch.

    Each pair's d meets the reference's of its rank. The batch given is the one sorted, unless
    `matched` [P] holds what `matched_by_rank` finds in the global one.
    """
    policy = pair.chosen - pair.rejected
    reference = pair.need("ref_chosen") - pair.need("ref_rejected")
    matched = pair.optional("matched")
    if matched is None:
        matched = matched_by_rank(policy, reference)
    chosen, rejected = pair.log_ratios()
    loss = smoothed(logistic, beta * (policy - matched.detach()), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def aot_unpaired(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """AOT unpaired, arXiv:2406.05882: h(beta (rho_(k)(w) - rho_(k)(l))), sorted over the batch.

    The batch given is the one sorted: pass the global one. A loss is of a chosen completion and the
    rejected one that it meets.
    """
    chosen, rejected = pair.log_ratios()
    met = rejected.gather(0, same_rank(chosen, rejected))
    loss = smoothed(logistic, beta * (chosen - met), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def matched_by_rank(
    values: Tensor, others: Tensor, start: int = 0, stop: int | None = None
) -> Tensor:
    """For each of `values` [B] the one of `others` [B] with the same rank, detached; for part of
    the batch, those at start:stop."""
    return others.detach().gather(0, same_rank(values, others))[start:stop]


def same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [B] where the one of `others` [B] with the same rank stands."""
    order = values.detach().argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, others.detach().argsort(stable=True))


BATCHWISE = {"aot", "aot_unpaired"}  # whose pairs meet those of the whole batch
_ALL = (sppo, mmpo, osp, rpo, wpo, tdpo1, tdpo2, tpo, tpo_l, xpo, inpo, egpo, beta_dpo)
_ALL += (aot, aot_unpaired)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
