"""Policy-gradient losses by name, with a KL penalty, an entropy bonus, a correction for the rollout
policy, and an average. policy_losses.py has each loss, surrogate.py the pass that computes it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .kl import ESTIMATORS
from .launch import expect
from .objective import Mean, Objective
from .policy_losses import LOSSES
from .policy_parts import Actions, Surrogate
from .policy_weights import rollout_weight
from .preference_parts import hyperparameters
from .segments import check_boundaries, check_steps, segment_spread, segment_sum
from .surrogate import COUNTERS, Settings, Tokens, surrogate

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
# read off once: torch.compile does not trace introspection
_KNOWN = {loss: hyperparameters(loss) for loss in LOSSES.values()}
_FIELDS = {f.name for f in fields(Actions)} - {"impl"}


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_type: str = "ppo",
    aggregation: str | None = None,
    max_length: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    full_kl: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weight: Tensor | None = None,
    rollout_mode: str = "token_truncate",
    rollout_bounds: tuple[float, float] = (0.0, 2.0),
    impl: str = "auto",
    **others: Any,
) -> Objective:
    """A policy-gradient loss of tokens, packed [M] or padded [B, L]:

        weight * loss_type(R, A) + beta KL(pi || pi_ref) - entropy_coef * entropy

    Args:
        logp: log pi of the sampled tokens, in nats, at the sampling temperature.
        old_logp: the same of the policy the step began with; logp itself, detached, if None.
        advantages: of each token, or of each sequence [S]; detached.
        mask: bool, True at the policy's own tokens. The others (prompt, tool output, padding) have
            no loss, no gradient and no part in any mean. All True if None.
        ref_logp: of the reference policy, for a KL penalty, and for its metric if beta is 0.
        rollout_logp: of the engine that sampled, as it reported them: the loss is multiplied by
            rollout_weight(old_logp, rollout_logp), with rollout_mode and rollout_bounds, unless it
            has a correction of its own. A NaN, which it did not report, is a ratio of 1.
        cu_seqlens: [S+1] int32 boundaries of packed sequences; of [B, L] each row is one.
        loss_type: a key of LOSSES.
        aggregation: one of AGGREGATIONS, the loss's own if None: the mean over all tokens, or over
            sequences of their token means, token sums, or token sums / max_length.
        beta, kl: coefficient and estimator of the KL penalty; kl.py says what the gradient of each
            is. full_kl, per token, is an exact divergence (divergence.py) to use instead.
        entropy, entropy_coef: per token; averaged as the loss is.
        weight: per token, detached: of policy_weights.py, or your own. It does not weigh the KL
            and the entropy, and a token of weight 0 still counts in the means.
        others: what else the loss reads, under its name in `Actions` (steps, reward, ...), and its
            hyperparameters.

    Returns:
        Objective: of unit "token" or "sequence", with its count and metrics.

    Raises:
        ValueError: an unknown loss or hyperparameter; a tensor that is missing or misshapen.
    """
    expect(loss_type in LOSSES, "loss_type", f"one of {', '.join(LOSSES)}", repr(loss_type))
    expect(kl in ESTIMATORS, "kl", f"one of {', '.join(ESTIMATORS)}", repr(kl))
    loss = LOSSES[loss_type]
    known = _KNOWN[loss]
    for name in others:
        wanted = f"an input or a hyperparameter of {loss_type}: {', '.join(known)}"
        expect(name in known or name in _FIELDS, name, wanted, name)
    given: dict[str, Any] = dict(old_logp=old_logp, advantages=advantages, mask=mask)
    given |= dict(rollout_logp=rollout_logp)
    given |= dict(ref_logp=ref_logp, full_kl=full_kl, entropy=entropy, weight=weight)
    given |= {name: others[name] for name in others if name in _FIELDS and name != "steps"}
    logp, cu_seqlens, given = _packed(logp, cu_seqlens, given)
    ref_logp, full_kl, entropy, weight = (
        given.pop(name) for name in ("ref_logp", "full_kl", "entropy", "weight")
    )
    expect(entropy_coef == 0 or entropy is not None, "entropy", "a tensor", None)
    missing = beta != 0 and ref_logp is None and full_kl is None
    expect(not missing, "ref_logp", "a tensor, or full_kl, for a beta that is not 0", None)
    steps = others.get("steps")
    if steps is not None and cu_seqlens is not None:
        check_steps(steps, cu_seqlens, len(logp))
    x = Actions(logp, cu_seqlens=cu_seqlens, steps=steps, impl=impl, **given)
    s = loss(x, **{name: value for name, value in others.items() if name in known})

    for more in (weight, _correction(x, rollout_mode, rollout_bounds, s.corrects_rollout)):
        if more is not None:
            s = s._replace(weight=more if s.weight is None else s.weight * more)
    estimator = kl if full_kl is None and ref_logp is not None else None
    per_token, total, means = _token_losses(x, s, ref_logp, estimator, beta)
    summed = per_token, total
    if full_kl is not None:
        per_token = per_token + beta * x.kept(full_kl)
        means["kl"] = x.kept(full_kl).detach().sum()
    if entropy is not None:
        per_token = per_token - entropy_coef * x.kept(entropy)
        means["entropy"] = x.kept(entropy).detach().sum()
    count = means.pop("tokens")
    metrics = {_METRICS.get(name, name): Mean(total, count) for name, total in means.items()}
    objective = _aggregate(per_token, count, x, aggregation or s.aggregation, max_length)
    return objective._replace(
        metrics=metrics, summed=summed if objective.loss is summed[0] else None
    )


def _token_losses(
    x: Actions, s: Surrogate, ref_logp: Tensor | None, estimator: str | None, beta: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of each token with its KL penalty, their sum, and those of COUNTERS."""
    tokens = Tokens(
        x.logp,
        x.need("advantages") if s.advantages is None else s.advantages,
        x.old_logp,
        s.log_ratio,
        x.mask,
        s.weight,
        ref_logp,
    )
    settings = Settings(s.rule, s.low, s.high, s.cap, estimator, beta)
    per_token, total, counters = surrogate(tokens, settings, x.impl)
    means = dict(zip(COUNTERS, counters.unbind(), strict=True))
    if s.low == s.high:  # a ratio that is held at one number is not clipped
        means |= dict.fromkeys(("clipped_low", "clipped_high"), torch.zeros_like(counters[0]))
    if estimator is None:
        del means["kl"]
    return per_token, total, {str(name): counted for name, counted in means.items()}


_METRICS = {
    "clipped_low": "clip_ratio/low_mean",
    "clipped_high": "clip_ratio/high_mean",
    "kl_to_old": "policy/approx_kl",
}


def _packed(
    logp: Tensor, cu_seqlens: Tensor | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Everything as [M]: [B, L] flattened, numbers of sequences repeated over their tokens."""
    expect(logp.dim() in (1, 2), "logp", "[M] packed or [B, L] padded", tuple(logp.shape))
    shape, length = logp.shape, logp.numel()
    if logp.dim() == 2:
        expect(cu_seqlens is None, "cu_seqlens", "None with [B, L] log-probs", "a tensor")
        cu_seqlens = _row_boundaries(shape[0], shape[1], logp.device)
    elif cu_seqlens is not None:
        check_boundaries("cu_seqlens", cu_seqlens, length, logp.device)
    for name, value in given.items():
        if value is None:
            continue
        place = logp.device
        expect(value.device == place, name, f"a tensor on {place}", value.device)
        kind = name in ("mask", "off_policy", "selected")
        expect(
            (value.dtype == torch.bool) == kind, name, "bool" if kind else "numbers", value.dtype
        )
        if value.shape == shape:
            given[name] = value.reshape(-1)
            continue
        each = -1 if cu_seqlens is None else len(cu_seqlens) - 1
        fits = value.shape in ((each,), (each, 1))
        expect(fits, name, f"{tuple(shape)}, or a number per sequence", tuple(value.shape))
        assert cu_seqlens is not None
        given[name] = segment_spread(value.reshape(-1), cu_seqlens, length)
    logp = logp.reshape(-1)
    if given["old_logp"] is None:
        given["old_logp"] = logp
    for name in set(given) & {"old_logp", "advantages", "ref_logp", "rollout_logp", "weight"}:
        given[name] = None if given[name] is None else given[name].detach()
    return logp, cu_seqlens, given


def _row_boundaries(rows: int, length: int, device: torch.device) -> Tensor:
    if not length:
        return torch.zeros(rows + 1, dtype=torch.int32, device=device)
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


def _correction(
    x: Actions, mode: str, bounds: tuple[float, float], corrected: bool
) -> Tensor | None:
    if x.rollout_logp is None or corrected:
        return None
    return rollout_weight(
        x.old_logp, x.rollout_logp, x.mask, x.cu_seqlens, mode=mode, low=bounds[0], high=bounds[1]
    )


def _aggregate(
    per_token: Tensor, count: Tensor, x: Actions, how: str, max_length: float | None
) -> Objective:
    expect(how in AGGREGATIONS, "aggregation", f"one of {', '.join(AGGREGATIONS)}", repr(how))
    if how == "token-mean":
        return Objective(per_token, "token", {}, count)
    bounds = x.need("cu_seqlens")
    loss = segment_sum(per_token, bounds, impl=x.impl)
    if how == "seq-mean-token-mean":
        lengths = bounds.diff()
        if x.mask is not None:
            lengths = segment_sum(x.mask.to(loss.dtype), bounds, impl=x.impl)
        loss = loss / lengths.clamp(min=1)
    elif how == "seq-mean-token-sum-norm":
        expect((max_length or 0) > 0, "max_length", "a length, to divide sums by", max_length)
        loss = loss / (max_length or 1)
    return Objective(loss, "sequence", {})
