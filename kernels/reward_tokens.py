"""Losses of models that judge token by token, step by step, or in words.

Tokens are packed end to end: [M], with boundaries cu_seqlens [S+1]. h(z) = -log sigmoid(z). Tokens
that `mask` leaves out have loss 0 and no gradient, and do not count as units.

A judge that writes before it scores (Critique-out-Loud, arXiv:2408.11791) is two of these losses,
each with its own mask, unit and weight: `token_nll` on the critique's tokens, and `bradley_terry`
on the rewards read after it. A judge that only writes (GenRM, arXiv:2410.12832) is `token_nll` on
the verdict, or `verdict_pair`; its STaR-DPO form is DPO on whole judgements, right against wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect
from .objective import Objective
from .preference_parts import objective, soft
from .reward_parts import (
    check_bool,
    check_probability,
    check_shape,
    full,
    label_loss,
    mean_over,
)
from .segments import segment_ids, segment_sum


def bradley_terry_returns(
    chosen_rewards: Tensor,
    chosen_cu_seqlens: Tensor,
    rejected_rewards: Tensor,
    rejected_cu_seqlens: Tensor,
    preference: Tensor | None = None,
    *,
    random_labels: float = 0.1,
) -> Objective:
    """Reward per token, arXiv:1706.03741 eq. 1: -log [(1 - q) sigmoid(R_w - R_l) + q / 2].

    chosen_rewards, rejected_rewards: rewards of tokens [M], [N]; R sums them, it is no mean.
    chosen_cu_seqlens, rejected_cu_seqlens: int32 [P+1].
    preference: probability [P] that w is better, 1 if None; the paper's 1/2 for equally good.
    random_labels: q, the chance that a label is thrown by a coin; 0.1 in the paper. Inside the
        logarithm, unlike label smoothing: a label that the model finds impossible loses its pull.

    Unit: pair.
    """
    wanted = "a probability below 1"
    expect(0 <= random_labels < 1, "random_labels", wanted, random_labels)
    chosen = segment_sum(chosen_rewards, chosen_cu_seqlens)
    rejected = segment_sum(rejected_rewards, rejected_cu_seqlens)
    check_shape("rejected_cu_seqlens", rejected_cu_seqlens, chosen_cu_seqlens.shape)
    z = chosen - rejected
    if random_labels == 0:
        return objective(label_loss(z, preference, 0.0), chosen, rejected)

    def surprise(z: Tensor) -> Tensor:
        return -((1 - random_labels) * z.sigmoid() + random_labels / 2).log()

    if preference is None:
        return objective(surprise(z), chosen, rejected)
    check_shape("preference", preference, z.shape)
    check_probability("preference", preference)
    p = preference.to(z.dtype)
    return objective(p * surprise(z) + (1 - p) * surprise(-z), chosen, rejected)


def time_smoothness(rewards: Tensor, cu_seqlens: Tensor) -> Objective:
    """Smooth rewards, arXiv:2409.00717: sum_t (r_t - r_{t+1})^2 within each sequence.

    rewards [M], cu_seqlens int32 [S+1]. Added to `bradley_terry_returns` of the same rewards, with
    a weight. A sequence of one token, or none, counts 0. Unit: sequence.
    """
    returns = segment_sum(rewards, cu_seqlens)
    r, ids = full(rewards), segment_ids(cu_seqlens, len(rewards))
    before, before_ids = (torch.cat([x[:1], x[:-1]]) for x in (r, ids))
    steps = torch.where(ids == before_ids, r - before, 0).square()
    return Objective(segment_sum(steps, cu_seqlens), "sequence", {"rewards": returns.detach()})


def prm(scores: Tensor, labels: Tensor, mask: Tensor) -> Objective:
    """Process reward model, arXiv:2305.20050: cross-entropy at the separators that end a step.

    scores: [M], the logit that a step is good (of two tokens "+" and "-": the difference of their
        logits); or [M, C] logits of C classes.
    labels: for scores [M], bool or a probability [M], such as the share of continuations that end
        right (Math-Shepherd, arXiv:2312.08935); for [M, C], int64 [M] or probabilities [M, C].
    mask: bool [M]: a separator with a label. What labels hold elsewhere does not matter.

    Unit: token.
    """
    expect(scores.dim() in (1, 2), "scores", "[M] or [M, C]", tuple(scores.shape))
    check_bool("mask", mask)
    check_shape("mask", mask, scores.shape[:1])
    classes = scores.dim() == 2
    if classes and labels.dim() == 1:
        expect(labels.dtype == torch.int64, "labels", "int64 classes", labels.dtype)
    check_shape("labels", labels, scores.shape if labels.dim() == 2 else scores.shape[:1])
    s = full(scores).masked_fill(~(mask[:, None] if classes else mask), 0)
    kept = labels.masked_fill(~(mask[:, None] if labels.dim() == 2 else mask), 0)
    if not classes or labels.dim() == 2:
        check_probability("labels", kept)
    if not classes:
        loss = soft(s, kept.to(s.dtype))
        right = (s > 0) == (kept > 0.5)
    elif labels.dim() == 1:
        loss = -s.log_softmax(1).gather(1, kept[:, None]).squeeze(1)
        right = s.argmax(1) == kept
    else:
        loss = -(kept.to(s.dtype) * s.log_softmax(1)).sum(1)
        right = s.argmax(1) == kept.argmax(1)
    return Objective(
        loss.masked_fill(~mask, 0),
        "token",
        {"rewards/accuracies": mean_over(right.float(), mask)},
        mask.sum(),
    )


def implicit_prm(
    logp: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, correct: Tensor, *, beta: float = 0.05
) -> Objective:
    """PRIME's reward model, arXiv:2502.01456: y h(R) + (1 - y) h(-R), R = beta sum_t (l_t - l_t').

    logp, ref_logp: l and l' [M], log-probs of the scored tokens under the model and its reference.
    cu_seqlens: int32 [S+1]. correct: y [S], bool or a probability that the answer is right.

    Trained on outcomes alone, its beta (l_t - l_t') is a reward per token. Unit: sequence.
    """
    expect(beta > 0, "beta", "a positive number", beta)
    check_shape("ref_logp", ref_logp, logp.shape)
    rewards = beta * segment_sum(full(logp) - full(ref_logp), cu_seqlens)
    check_shape("correct", correct, rewards.shape)
    check_probability("correct", correct)
    right = ((rewards > 0) == (correct > 0.5)).float()
    return Objective(
        soft(rewards, correct.to(rewards.dtype)),
        "sequence",
        {"rewards": rewards.detach(), "rewards/accuracies": right},
    )


def token_nll(logp: Tensor, mask: Tensor) -> Objective:
    """Verdict or critique in words, arXiv:2410.12832, arXiv:2408.11791: -logp where mask.

    logp [M] of the scored tokens, mask bool [M]: the verdict's tokens, or the critique's. Unit:
    token.
    """
    check_bool("mask", mask)
    check_shape("mask", mask, logp.shape)
    loss = -full(logp).masked_fill(~mask, 0)
    return Objective(loss, "token", {"logps": mean_over(-loss, mask)}, mask.sum())


def verdict_pair(first: Tensor, second: Tensor, preference: Tensor) -> Objective:
    """Pairwise verdict, arXiv:2410.12832: p h(l_A - l_B) + (1 - p) h(l_B - l_A).

    first, second: l_A and l_B [P], log-probs of the verdicts that the first, the second is better.
    preference: p [P], bool or a probability that the first is.

    The cross-entropy of the verdict among the two alone; `token_nll` is that among all tokens. A
    judge may prefer a place: train on both orders. Unit: pair.
    """
    expect(first.dim() == 1, "first", "[P], one number per pair", tuple(first.shape))
    check_shape("second", second, first.shape)
    z = full(first) - full(second)
    loss = label_loss(z, preference, 0.0)
    right = ((z > 0) == (preference > 0.5)).float()
    return Objective(
        loss,
        "pair",
        {"verdicts/accuracies": right, "verdicts/margins": z.detach()},
    )


def both_orders(
    first: Tensor, second: Tensor, swapped_first: Tensor, swapped_second: Tensor
) -> Tensor:
    """A judge's preference without its bias for a place: [sigmoid(d) + sigmoid(d')] / 2, detached.

    first, second: log-probs [P] of the verdicts for answers 1 and 2, shown in that order;
    swapped_first, swapped_second: for the same answers 1 and 2, shown the other way round. The
    probabilities are averaged, not their logits. A `preference` for any loss.
    """
    d, swapped = (full(a) - full(b) for a, b in ((first, second), (swapped_first, swapped_second)))
    return ((d.sigmoid() + swapped.sigmoid()) / 2).detach()


_ALL = (bradley_terry_returns, time_smoothness, prm, implicit_prm, token_nll, verdict_pair)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
