"""Rewards of sequences, segments and steps turned into rewards of tokens, and rules on rewards.

Token rewards are [T], for the estimators of advantage.py, which hand a reward at an observation to
the action before it. Segments are given by int32 boundaries that tile the packed tokens [N+1]: a
completion's are cu_seqlens [S+1]. An empty segment has no token: its reward is left out, and all
others keep their sum. Everything is detached; the dtype is that of the scores.

Turn rewards of execution feedback (arXiv:2410.02089) are at_ends(outcome, cu_seqlens) - 0.2 *
at_ends(no_code, turns), and gae takes the turns as its `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import expect
from .segments import check_boundaries, segment_ids, segment_max, segment_sum


def at_ends(scores: Tensor, boundaries: Tensor, total: int) -> Tensor:
    """Rewards at the end, arXiv:2203.02155: r_t = score of the segment whose last token t is, [T].

    scores: [N]; boundaries: [N+1], of sequences, sentences, lines, turns; total: T.
    """
    _check_scores("scores", scores, boundaries, total)
    ids = segment_ids(boundaries, total)
    last = torch.arange(total, device=ids.device) + 1 == boundaries[ids + 1]
    return torch.where(last, scores.detach()[ids], 0.0)


def over_spans(scores: Tensor, boundaries: Tensor, total: int) -> Tensor:
    """RELC's inner reward, arXiv:2401.07382: r_t = score of the span that token t is in, [T].

    Text2Grad (arXiv:2505.22338) has -1, 0, 1. Here the tokens' rewards sum to score times length.
    """
    _check_scores("scores", scores, boundaries, total)
    return scores.detach()[segment_ids(boundaries, total)]


def fine_grained(
    scores: Sequence[Tensor], boundaries: Sequence[Tensor], weights: Sequence[float], total: int
) -> Tensor:
    """Fine-Grained RLHF, arXiv:2306.01693: r_t = sum_k w_k sum_j R_k(j) [t ends segment j of k].

    One entry a reward model k: its scores [N_k], its own segments [N_k + 1], its weight.
    """
    expect(len(scores) > 0, "scores", "at least one reward model's", "none")
    for name, given in (("boundaries", boundaries), ("weights", weights)):
        expect(len(given) == len(scores), name, f"{len(scores)} entries", len(given))
    parts = zip(scores, boundaries, weights, strict=True)
    return torch.stack([w * at_ends(s, bounds, total) for s, bounds, w in parts]).sum(0)


def attention_credit(
    rewards: Tensor,
    attention: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 1.0,
) -> Tensor:
    """ABC, arXiv:2402.00782: r_t = beta alpha_t r + (1 - beta) r [t is last], sum_t alpha_t = 1.

    Args:
        rewards: [S], of the reward model.
        attention: [T], of its last layer from the token it scores at to token t, mean over heads;
            not negative.
        mask: [T] bool, False at tokens that are not the response's: they get no share, and alpha
            is the attention renormalised over the others. Where it is 0 in all, r goes to the end.
    """
    total = len(attention)
    _check_scores("rewards", rewards, cu_seqlens, total)
    expect(0 <= beta <= 1, "beta", "a number in [0, 1]", beta)
    weight = attention.detach().to(rewards.dtype)
    weight = weight if mask is None else torch.where(mask, weight, 0.0)
    ids = segment_ids(cu_seqlens, total)
    whole = segment_sum(weight, cu_seqlens)[ids]
    end = at_ends(torch.ones_like(rewards), cu_seqlens, total)
    share = torch.where(whole > 0, weight / whole.where(whole > 0, 1.0), end)
    return (beta * share + (1 - beta) * end) * rewards.detach()[ids]


def aggregate_steps(scores: Tensor, cu_steps: Tensor, *, how: str = "min") -> Tensor:
    """PRM scores as one reward, arXiv:2311.05821: min, product, mean, max or last of them; [S].

    scores: [N] of steps, packed by sequence: cu_steps [S+1]. No steps: 0.
    """
    expect(how in AGGREGATIONS, "how", f"one of {', '.join(AGGREGATIONS)}", repr(how))
    _check_scores("scores", scores, None, len(scores))
    check_boundaries("cu_steps", cu_steps, len(scores), scores.device)
    return AGGREGATIONS[how](scores.detach(), cu_steps)


def _product(scores: Tensor, cu_steps: Tensor) -> Tensor:
    ids, empty = segment_ids(cu_steps, len(scores)), cu_steps.diff() == 0
    products = scores.new_ones(len(empty)).scatter_reduce(0, ids, scores, "prod")
    return torch.where(empty, 0.0, products)


def _last(scores: Tensor, cu_steps: Tensor) -> Tensor:
    ids = segment_ids(cu_steps, len(scores))
    last = torch.arange(len(scores), device=ids.device) + 1 == cu_steps[ids + 1]
    return segment_sum(torch.where(last, scores, 0.0), cu_steps)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": lambda scores, cu_steps: -segment_max(-scores, cu_steps),
    "product": _product,
    "mean": lambda scores, cu_steps: segment_sum(scores, cu_steps) / cu_steps.diff().clamp(min=1),
    "max": segment_max,
    "last": _last,
}


def line_rewards(
    scores: Tensor,
    lines: Tensor,
    outcomes: Tensor,
    cu_seqlens: Tensor,
    total: int,
    *,
    coef: float = 1.0,
    max_lines: float = 1.0,
) -> Tensor:
    """PRM for code, arXiv:2410.17621: r_t = coef w PRM [t ends a line] + R [t is last].

    w = min(1, max_lines / lines of the completion): dense rewards grow with every line written, so
    a completion gets at most max_lines lines' worth; 1 pays their mean, inf has no cap.

    Args:
        scores: [N], of the prefix up to each line's end; lines: [N+1], none crosses a sequence.
        outcomes: [S], R; cu_seqlens: [S+1].
    """
    expect(max_lines > 0, "max_lines", "a positive number", max_lines)
    dense = at_ends(scores, lines, total)
    count = segment_sum(at_ends(torch.ones_like(scores), lines, total), cu_seqlens)
    weight = coef * (max_lines / count.clamp(min=1)).clamp(max=1)
    sparse = at_ends(outcomes, cu_seqlens, total)
    return weight[segment_ids(cu_seqlens, total)] * dense + sparse


def step_contributions(
    contributions: Tensor,
    steps: Tensor,
    total: int,
    grounded: Tensor | None = None,
    rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """SPA, arXiv:2505.20732: r_t = alpha c_j + beta g_j at the last token of step j.

    Args:
        contributions: [N], c, that the progress head gives each step; steps: [N+1].
        grounded: [N], g: whether the environment carried the action out.
        rewards, cu_seqlens: [S] and [S+1]. Given, what sum c misses of a sequence's reward is
            shared by its steps in equal parts, so that the contributions do sum to it.
    """
    _check_scores("contributions", contributions, steps, total)
    placed = at_ends(contributions, steps, total)
    if rewards is not None:
        expect(cu_seqlens is not None, "cu_seqlens", "boundaries, which `rewards` needs", None)
        assert cu_seqlens is not None
        _check_scores("rewards", rewards, cu_seqlens, total)
        ends = at_ends(torch.ones_like(contributions), steps, total)
        missing = rewards.detach() - segment_sum(placed, cu_seqlens)
        each = missing / segment_sum(ends, cu_seqlens).clamp(min=1)
        placed = placed + ends * each[segment_ids(cu_seqlens, total)]
    placed = alpha * placed
    return placed if grounded is None else placed + beta * at_ends(grounded, steps, total)


def ngram_steps(boundaries: Tensor, total: int, *, size: int) -> Tensor:
    """MA-RLHF's n-grams, arXiv:2410.02743: macro actions of `size` tokens, [N+1] int32 steps.

    boundaries: [S+1], of sequences or turns, which no step crosses; the last of each may be short.
    """
    expect(size >= 1, "size", "1 or more", size)
    check_boundaries("boundaries", boundaries, total, boundaries.device)
    place = torch.arange(total, device=boundaries.device)
    place = place - boundaries[segment_ids(boundaries, total)]
    return _steps_from(place % size == 0)


def perplexity_steps(logp: Tensor, boundaries: Tensor) -> Tensor:
    """MA-RLHF's perplexity rule, arXiv:2410.02743: a step goes on while it falls, [N+1] int32.

    So a macro action begins at the tokens less likely than the one before, and at boundaries
    [S+1], of sequences or turns. logp: [T], of the reference.
    """
    total = len(logp)
    check_boundaries("boundaries", boundaries, total, logp.device)
    ids = segment_ids(boundaries, total)
    first = torch.arange(total, device=logp.device) == boundaries[ids]
    return _steps_from(first | (logp.detach() < logp.detach().roll(1)))


def _steps_from(starts: Tensor) -> Tensor:
    return F.pad(starts.nonzero().squeeze(1), (0, 1), value=len(starts)).int()


def step_values(
    values: Tensor, steps: Tensor, mask: Tensor | None = None, *, how: str = "mean"
) -> Tensor:
    """MA-RLHF's values, arXiv:2410.02743: V_j = sum_t sigma_t V_t over step j's actions; [T].

    For `gae(rewards, step_values(values, steps), cu_seqlens, steps=steps)`. how: "first" action,
    "mean" (its code's "equal"), "last" ("unit") or "position", sigma_t ~ 1 / t, t = 1, 2, ..

    Its code weighs a step's rewards by sigma too, which thins a reward at the end of a long step;
    gae sums them, as the paper does.
    """
    wanted = ("first", "mean", "last", "position")
    expect(how in wanted, "how", f"one of {', '.join(wanted)}", repr(how))
    check_boundaries("steps", steps, len(values), values.device)
    acts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    ids = segment_ids(steps, len(values))
    rank = acts.cumsum(0)
    rank = rank - (rank - acts.long())[steps[ids]]  # 1, 2, .. over the step's actions
    count = segment_sum(acts.to(values.dtype), steps)[ids]
    weight = {
        "first": lambda: (rank == 1).to(values.dtype),
        "mean": lambda: torch.ones_like(values),
        "last": lambda: (rank == count).to(values.dtype),
        "position": lambda: 1 / rank.clamp(min=1).to(values.dtype),
    }[how]()
    weight = torch.where(acts, weight, 0.0)
    value = segment_sum(weight * torch.where(acts, values.detach(), 0.0), steps)
    norm = segment_sum(weight, steps)
    return (value / norm.where(norm > 0, 1.0))[ids]


def soft_overlong(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """DAPO, arXiv:2503.14476 eq. 13: 0 up to max_length - cache, falling to -1 at max_length; [S].

    Added to the reward. lengths: in tokens; beyond max_length it stays -1.
    """
    expect(0 < cache <= max_length, "cache", f"more than 0 and at most {max_length}", cache)
    over = lengths - (max_length - cache)
    return -(over / cache).clamp(0, 1)


def missing_eos(
    rewards: Tensor, finished: Tensor, *, penalty: float = -1.0, replace: bool = True
) -> Tensor:
    """EOS rule of arXiv:2403.17031: r where the completion ended, else the penalty; [S].

    replace=False adds the penalty to r, as TRL's missing_eos_penalty subtracts its own.
    """
    expect(finished.dtype == torch.bool, "finished", "bool", finished.dtype)
    instead = torch.full_like(rewards, penalty) if replace else rewards.detach() + penalty
    return torch.where(finished, rewards.detach(), instead)


def lagrangian(
    advantages: Tensor, cost_advantages: Tensor, log_multiplier: Tensor | float
) -> Tensor:
    """Safe RLHF, arXiv:2310.12773: (A_R - lambda A_C) / (1 + lambda), lambda = exp(log_multiplier).

    Each stream's rewards carry half of the KL penalty: r - kl / 2 and c + kl / 2.
    """
    log_multiplier = torch.as_tensor(log_multiplier, dtype=advantages.dtype)
    cost = log_multiplier.to(advantages.device).sigmoid()  # lambda / (1 + lambda)
    return ((1 - cost) * advantages - cost * cost_advantages).detach()


def update_log_multiplier(
    log_multiplier: Tensor, excess_cost: Tensor | float, *, rate: float, largest: float = 5.0
) -> Tensor:
    """Safe RLHF, arXiv:2310.12773 eq. 31: ln lambda + rate lambda J_C, lambda at most `largest`.

    excess_cost: J_C, the mean cost of an episode less the budget d, a moving average
    (whitening.moving_mean), updated before the policy. The steps grow with lambda: without a bound
    it overflows in a few updates of an unsatisfiable budget.
    """
    expect(largest > 0, "largest", "a positive number", largest)
    moved = log_multiplier + rate * log_multiplier.exp() * excess_cost
    return moved.clamp(max=math.log(largest))


def _check_scores(name: str, scores: Tensor, boundaries: Tensor | None, total: int) -> None:
    expect(
        scores.dim() == 1 and scores.is_floating_point(),
        name,
        "a 1-D floating-point tensor",
        f"{scores.dtype} of shape {tuple(scores.shape)}",
    )
    if boundaries is not None:
        check_boundaries("boundaries", boundaries, total, scores.device)
        segments = len(boundaries) - 1
        expect(len(scores) == segments, name, f"{segments} entries", len(scores))
