"""Divergences by name, from log-probabilities: the formulas as they stand, in plain PyTorch.

Each function takes log p_S and log p_T [..., V] of a student S and a teacher T and one number,
its `weight` (beta or alpha; the two KLs have none), and sums over the last dimension, in nats.
A probability of 0 on both sides counts as 0; where a divergence is infinite, so is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .divergence_pass import Rule
from .launch import expect
from .token_stats import TokenStats


def forward_kl(logp: Tensor, teacher_logp: Tensor, weight: float = 0.0) -> Tensor:
    """Forward KL: sum_v p_T (log p_T - log p_S) = KL(T || S).

    Mass-covering: distillation's usual choice.
    """
    return _expected_gap(teacher_logp, logp)


def reverse_kl(logp: Tensor, teacher_logp: Tensor, weight: float = 0.0) -> Tensor:
    """Reverse KL: sum_v p_S (log p_S - log p_T) = KL(S || T).

    Mode-seeking: the KL of RLHF, where T is the reference policy.
    """
    return _expected_gap(logp, teacher_logp)


def jsd(logp: Tensor, teacher_logp: Tensor, weight: float = 0.5) -> Tensor:
    """GKD's JSD, arXiv:2306.13649: b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S.

    b is `beta`; at 0 and 1 the name stands for the two KLs, as in TRL, and not for the limits.
    """
    seen = (logp > -math.inf) | (teacher_logp > -math.inf)
    log_s, log_t = torch.where(seen, logp, 0), torch.where(seen, teacher_logp, 0)
    mixture = torch.logaddexp(log_t + math.log(weight), log_s + math.log1p(-weight))
    teacher_side = _expected_gap(teacher_logp, mixture)
    return weight * teacher_side + (1 - weight) * _expected_gap(logp, mixture)


def alpha(logp: Tensor, teacher_logp: Tensor, weight: float = 0.5) -> Tensor:
    """Alpha-divergence, arXiv:2309.16240: (1 - sum_v p_S^(1-a) p_T^a) / (a (1 - a)).

    a is `alpha`, between 0, which is the reverse KL, and 1, the forward one.
    """
    seen = (logp > -math.inf) & (teacher_logp > -math.inf)
    log_s, log_t = torch.where(seen, logp, 0), torch.where(seen, teacher_logp, 0)
    affinity = torch.where(seen, ((1 - weight) * log_s + weight * log_t).exp(), 0).sum(-1)
    return (1 - affinity) / (weight * (1 - weight))


def tvd(logp: Tensor, teacher_logp: Tensor, weight: float = 0.0) -> Tensor:
    """Total variation, arXiv:2307.15190: sum_v |p_T - p_S| / 2.

    Symmetric, at most 1, and not squared near 0: where p_T = p_S an entry has no gradient.
    """
    return (teacher_logp.exp() - logp.exp()).abs().sum(-1) / 2


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (forward_kl, reverse_kl, jsd, alpha, tvd)
}


def _expected_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), 0 where p is 0: with the selection before the product, or the
    gradient there would be 0 * inf."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def rule_of(kind: str, beta: float, alpha: float) -> Rule:
    """The divergence that the options mean: the ends of beta and alpha are the two KLs."""
    expect(kind in DIVERGENCES, "kind", f"one of {', '.join(DIVERGENCES)}", repr(kind))
    expect(0 <= beta <= 1, "beta", "a number in [0, 1]", beta)
    expect(0 <= alpha <= 1, "alpha", "a number in [0, 1]", alpha)
    if kind == "jsd" and beta in (0, 1):
        return Rule("reverse_kl" if beta else "forward_kl", 0.0)
    if kind == "alpha" and alpha in (0, 1):
        return Rule("forward_kl" if alpha else "reverse_kl", 0.0)
    return Rule(kind, {"jsd": beta, "alpha": alpha}.get(kind, 0.0))


def final_log_probs(
    logits: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """log softmax(softcap(logit_scale * logits) / temperature), float32 or float64."""
    z = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(z / scale, dim=-1)


def topk_divergence(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    tail: bool = True,
) -> Tensor:
    """Top-k divergence, SDPO arXiv:2601.20802: the K entries kept, and the rest as one bucket.

    logp, teacher_logp: [N, K], of the student and of the teacher at the same K distinct entries
    (the teacher's top k, usually), true log-probabilities over the whole vocabulary. Returns [N]
    in nats, differentiable in logp, at most the divergence over the whole vocabulary; with
    `tail=False` it is that of the two distributions renormalised over the K entries.

    A tail's probability is what K others leave of 1, known to the dtype's rounding and no better:
    it counts as that rounding (1.2e-7 in float32) at least, and then has no gradient, where the
    true gradient would grow without bound.
    """
    rule = rule_of(kind, beta, alpha)
    shape = tuple(logp.shape)
    expect(logp.dim() == 2 and shape[1] > 0, "logp", "shape [N, K]", shape)
    expect(teacher_logp.shape == logp.shape, "teacher_logp", shape, tuple(teacher_logp.shape))
    expect(logp.is_floating_point(), "logp", "a floating-point dtype", logp.dtype)
    wide = torch.float64 if logp.dtype == torch.float64 else torch.float32
    sides = _with_tail if tail else _renormalised
    log_s, log_t = sides(logp.to(wide)), sides(teacher_logp.detach().to(wide))
    return DIVERGENCES[rule.kind](log_s, log_t, rule.weight)


def _with_tail(logp: Tensor) -> Tensor:
    """[N, K + 1]: the last is log(1 - sum exp(logp))."""
    covered = logp.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logp.dtype).eps)
    # log(1 - exp(x)): below -log 2 by log1p, above it by expm1; each takes only its own x
    low = covered < -math.log(2)
    by_log1p = torch.log1p(-torch.where(low, covered, -1.0).exp())
    by_expm1 = torch.log(-torch.expm1(torch.where(low, -0.5, covered)))
    return torch.cat((logp, torch.where(low, by_log1p, by_expm1)), -1)


def _renormalised(logp: Tensor) -> Tensor:
    return logp - logp.logsumexp(-1, keepdim=True)


def self_certainty(stats: TokenStats, vocab_size: int) -> Tensor:
    """Intuitor, arXiv:2505.19590: KL(U || p) = lse - mean_logit - log V, U uniform over V entries.

    stats: of `linear_logp` or `token_logp` with outputs=("lse", "mean_logit"), of the policy that
    sampled the tokens. Returns [N] in nats, detached: it is a reward, and as a loss the policy
    would raise it directly.
    """
    missing = [name for name in ("lse", "mean_logit") if getattr(stats, name) is None]
    remedy = "Pass outputs=('lse', 'mean_logit') to linear_logp or token_logp"
    expect(not missing, "stats", "lse and mean_logit", f"no {' and '.join(missing)}", remedy)
    expect(vocab_size > 0, "vocab_size", "the number of entries", vocab_size)
    assert stats.lse is not None and stats.mean_logit is not None
    return (stats.lse - stats.mean_logit).detach() - math.log(vocab_size)
