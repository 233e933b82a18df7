"""The loss of each token of a policy-gradient method, its derivative and its counters, in one pass.

With u the log-ratio log pi - log pi_old (of a token, or of what it belongs to), R = exp(u), A the
advantage, w a weight and k = log pi - log pi_ref, a token that `mask` keeps has

    loss = w rule(u, log pi, A) + kl_coef KL(k, R)

and one that it leaves out has 0, with no gradient, whatever stands there. The rules:

    clip            -min(min(R, cap) A, clamp(R, low, high) A)
    detached_clip   -sg(clamp(R, low, high)) A log pi
    soft            -4 / tau sigmoid(tau (R - 1)) A, tau = low if A > 0 else high

u counts as LARGEST_EXPONENT at most. A rule is a function of plain PyTorch; these three have a
kernel as well, which computes loss, d loss / d log pi and d loss / d u together. Bytes a token:
log pi, log pi_old, A, loss, derivative at 4 and the mask: 21; backward 12 more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kl import ESTIMATORS, LARGEST_EXPONENT
from .launch import _C, choose_impl, device_guard, differentiated_once, has_values, tl, triton

Rule = Callable[..., Tensor]

BLOCK = 1024  # tokens that share a row of counters
# what the counters are, summed over the tokens that count; a row of them ends with the loss's sum
COUNTERS = ("tokens", "clipped_low", "clipped_high", "kl_to_old", "kl")


def exp_ratio(u: Tensor) -> Tensor:
    """R = exp(u), u at most LARGEST_EXPONENT."""
    return u.clamp(max=LARGEST_EXPONENT).exp()


def clip(
    u: Tensor, logp: Tensor, advantages: Tensor, low: float, high: float, cap: float
) -> Tensor:
    """-min(min(R, cap) A, clamp(R, low, high) A)."""
    ratio = exp_ratio(u)
    plain = ratio.clamp(max=cap) * advantages
    return -torch.minimum(plain, ratio.clamp(low, high) * advantages)


def detached_clip(
    u: Tensor, logp: Tensor, advantages: Tensor, low: float, high: float, cap: float
) -> Tensor:
    """-sg(clamp(R, low, high)) A log pi."""
    return -exp_ratio(u).clamp(low, high).detach() * advantages * logp


def soft(
    u: Tensor, logp: Tensor, advantages: Tensor, low: float, high: float, cap: float
) -> Tensor:
    """-4 / tau sigmoid(tau (R - 1)) A, tau = low if A > 0 else high."""
    tau = torch.where(advantages > 0, low, high)
    return -4 / tau * (tau * torch.expm1(u.clamp(max=LARGEST_EXPONENT))).sigmoid() * advantages


KERNEL_RULES: dict[Rule, int] = {clip: 0, detached_clip: 1, soft: 2}
KERNEL_KL = {"k1": 1, "k2": 2, "k3": 3, "ratio_k3": 4}


class Tokens(NamedTuple):
    """What a pass reads: [M] each, of one floating-point dtype but for the mask."""

    logp: Tensor
    advantages: Tensor
    old_logp: Tensor | None  # or log_ratio
    log_ratio: Tensor | None
    mask: Tensor | None  # bool
    weight: Tensor | None
    ref_logp: Tensor | None


class Settings(NamedTuple):
    rule: Rule
    low: float
    high: float
    cap: float
    kl: str | None  # a key of ESTIMATORS; needs ref_logp
    kl_coef: float


def reference(x: Tokens, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """surrogate(), in the dtype of the log-probs."""
    mask = torch.ones_like(x.logp, dtype=torch.bool) if x.mask is None else x.mask
    # before any arithmetic: 0 times what a masked token holds, such as NaN, would not be 0
    kept = {
        name: torch.where(mask, value, 0.0)
        for name, value in x._asdict().items()
        if value is not None and name != "mask"
    }
    logp, advantages = kept["logp"], kept["advantages"]
    u = kept["log_ratio"] if x.log_ratio is not None else logp - kept["old_logp"]
    loss = s.rule(u, logp, advantages, s.low, s.high, s.cap)
    if x.weight is not None:
        loss = loss * kept["weight"]
    ratio = exp_ratio(u)
    kl = torch.zeros_like(loss)
    if s.kl is not None:
        kl = ESTIMATORS[s.kl](logp - kept["ref_logp"], ratio)
        loss = loss + s.kl_coef * kl
    hard = s.rule is not soft
    low = (ratio < s.low) & (advantages < 0) & hard
    high = (ratio > s.high) & (advantages > 0) & hard
    to_old = torch.expm1(u.clamp(max=LARGEST_EXPONENT)) - u
    counters = torch.stack(
        [torch.where(mask, value, 0).sum() for value in (mask, low, high, to_old, kl)]
    )
    loss = torch.where(mask, loss, 0.0)
    return loss, loss.sum(), counters.detach()


@triton.jit
def _less_1(x, e):
    # e - 1 for e = exp(x), without the cancellation near x = 0
    p = x * (1.0 / 40320.0) + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.5, p * x * x + x, e - 1.0)


@triton.jit
def _load(x, token, here, keep, whole):
    # A mask that differs by token would cost the wide loads; so would the end of the tokens.
    if whole:
        value = tl.load(x + token)
    else:
        value = tl.load(x + token, mask=here, other=0.0)
    return tl.where(keep, value, 0.0)


@triton.jit
def _store(x, token, here, value, whole):
    if whole:
        tl.store(x + token, value)
    else:
        tl.store(x + token, value, mask=here)


@triton.jit
def _rule(lp, a, ratio, ratio_1, slope, low, high, cap, RULE: tl.constexpr):
    """A token's loss, its derivative in u and that in log pi."""
    by_ratio = tl.zeros_like(lp)
    by_logp = tl.zeros_like(lp)
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    if RULE == 0:
        plain = tl.minimum(ratio, cap) * a
        held = clipped * a
        value = -tl.minimum(plain, held)
        inside = (ratio >= low) & (ratio <= high)
        moves = tl.where(plain <= held, ratio <= cap, inside)
        by_ratio = tl.where(moves, -slope * a, 0.0)
    elif RULE == 1:
        by_logp = -clipped * a
        value = by_logp * lp
    else:
        tau = tl.where(a > 0, low, high)
        x = tau * ratio_1
        tail = tl.exp(-tl.abs(x))
        gate = tl.where(x > 0, 1.0, tail) / (1.0 + tail)
        value = -4.0 / tau * gate * a
        by_ratio = -4.0 * tail / ((1.0 + tail) * (1.0 + tail)) * slope * a
    return value, by_ratio, by_logp


@triton.jit
def _penalty(k, u, ratio, slope, KL: tl.constexpr):
    """A token's KL, its derivative in u, which is at most LARGEST_EXPONENT, and that in log pi."""
    by_ratio = tl.zeros_like(k)
    largest = tl.full(k.shape, 80.0, tl.float32)
    if KL == 4:  # the product with the ratio is what must not overflow
        largest = 80.0 - tl.maximum(u, 0.0)
    back = tl.minimum(-k, largest)
    back_1 = _less_1(back, tl.exp(back))
    k3 = back_1 + k
    k3_slope = tl.where(-k <= largest, -back_1, 1.0)
    if KL == 1:
        kl = k
        by_logp = tl.full(k.shape, 1.0, tl.float32)
    elif KL == 2:
        kl = 0.5 * k * k
        by_logp = k
    elif KL == 3:
        kl = k3
        by_logp = k3_slope
    else:
        kl = ratio * k3
        by_logp = ratio * k3_slope
        by_ratio = slope * k3
    return kl, by_ratio, by_logp


@triton.jit
def _surrogate_kernel(
    logp,
    advantages,
    old_logp,
    log_ratio,
    mask,
    weight,
    ref_logp,
    loss,
    d_logp,
    d_ratio,
    sums,
    tokens,
    low,
    high,
    cap,
    kl_coef,
    RULE: tl.constexpr,
    KL: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    token = first + tl.arange(0, BLOCK)
    here = token < tokens
    whole = first + BLOCK <= tokens
    keep = here
    if HAS_MASK:
        if whole:
            keep = tl.load(mask + token) != 0
        else:
            keep = tl.load(mask + token, mask=here, other=0) != 0
    lp = _load(logp, token, here, keep, whole)
    a = _load(advantages, token, here, keep, whole)
    if HAS_RATIO:
        u = _load(log_ratio, token, here, keep, whole)
    else:
        u = lp - _load(old_logp, token, here, keep, whole)
    bounded = tl.minimum(u, 80.0)
    ratio = tl.exp(bounded)
    ratio_1 = _less_1(bounded, ratio)
    slope = tl.where(u <= 80.0, ratio, 0.0)  # of the ratio in u
    value, by_ratio, by_logp = _rule(lp, a, ratio, ratio_1, slope, low, high, cap, RULE)
    if HAS_WEIGHT:
        w = _load(weight, token, here, keep, whole)
        value *= w
        by_ratio *= w
        by_logp *= w
    kl = tl.zeros_like(lp)
    if KL > 0:
        k = lp - _load(ref_logp, token, here, keep, whole)
        kl, kl_by_ratio, kl_by_logp = _penalty(k, bounded, ratio, slope, KL)
        value += kl_coef * kl
        by_ratio += kl_coef * kl_by_ratio
        by_logp += kl_coef * kl_by_logp
    value = tl.where(keep, value, 0.0)
    _store(loss, token, here, value, whole)
    if HAS_GRAD:
        if HAS_RATIO:
            _store(d_ratio, token, here, tl.where(keep, by_ratio, 0.0), whole)
            _store(d_logp, token, here, tl.where(keep, by_logp, 0.0), whole)
        else:
            _store(d_logp, token, here, tl.where(keep, by_logp + by_ratio, 0.0), whole)
    row = sums + program * 6
    tl.store(row, tl.sum(keep.to(tl.float32), 0))
    if RULE == 2:
        tl.store(row + 1, 0.0)
        tl.store(row + 2, 0.0)
    else:
        tl.store(row + 1, tl.sum((keep & (ratio < low) & (a < 0)).to(tl.float32), 0))
        tl.store(row + 2, tl.sum((keep & (ratio > high) & (a > 0)).to(tl.float32), 0))
    tl.store(row + 3, tl.sum(tl.where(keep, ratio_1 - u, 0.0), 0))
    tl.store(row + 4, tl.sum(tl.where(keep, kl, 0.0), 0))
    tl.store(row + 5, tl.sum(value, 0))


def _launch_triton(x: Tokens, s: Settings, loss, d_logp, d_ratio, sums) -> None:
    with device_guard(loss):
        _surrogate_kernel[(len(sums),)](
            x.logp,
            x.advantages,
            x.old_logp,
            x.log_ratio,
            x.mask,
            x.weight,
            x.ref_logp,
            loss,
            d_logp,
            d_ratio,
            sums,
            len(loss),
            # a whole number would be compiled in
            *map(float, (s.low, s.high, s.cap, s.kl_coef)),
            RULE=KERNEL_RULES[s.rule],
            KL=KERNEL_KL[s.kl] if s.kl else 0,
            HAS_RATIO=x.log_ratio is not None,
            HAS_MASK=x.mask is not None,
            HAS_WEIGHT=x.weight is not None,
            HAS_GRAD=d_logp is not None,
            BLOCK=BLOCK,
        )


def _launch_cpu(x: Tokens, s: Settings, loss, d_logp, d_ratio, sums) -> None:
    arguments = _C.PolicyArguments(
        *(
            0 if array is None else array.data_ptr()
            for array in (
                *(x.logp, x.old_logp, x.log_ratio, x.advantages, x.mask, x.weight, x.ref_logp),
                *(loss, d_logp, d_ratio, sums),
            )
        ),
        len(loss),
        KERNEL_RULES[s.rule],
        s.low,
        s.high,
        s.cap,
        KERNEL_KL[s.kl] if s.kl else 0,
        s.kl_coef,
    )
    _C.policy_cpu(arguments, torch.get_num_threads())


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, log_ratio, x: Tokens, s: Settings, impl: str):
        x = x._replace(logp=logp, log_ratio=log_ratio)
        x = _each(x, Tensor.contiguous)
        loss = torch.empty_like(x.logp)
        wanted = any(ctx.needs_input_grad)
        d_logp = torch.empty_like(loss) if wanted else None
        d_ratio = torch.empty_like(loss) if wanted and log_ratio is not None else None
        sums = loss.new_empty(-(-len(loss) // BLOCK), len(COUNTERS) + 1)
        if len(loss):
            (_launch_cpu if impl == "cpu" else _launch_triton)(x, s, loss, d_logp, d_ratio, sums)
        ctx.save_for_backward(d_logp, d_ratio)
        counters, total = sums.sum(0).split([len(COUNTERS), 1])
        ctx.mark_non_differentiable(counters)
        ctx.set_materialize_grads(False)  # or zeros are made for what nobody used
        return loss, total[0], counters

    @staticmethod
    def backward(ctx, *grads):
        differentiated_once("policy_loss")
        d_logp, d_ratio = ctx.saved_tensors
        of_loss, of_sum, _ = grads
        upstream = of_loss if of_sum is None else of_sum
        if of_loss is not None and of_sum is not None:
            upstream = of_loss + of_sum
        by_ratio = None if d_ratio is None else upstream * d_ratio
        return upstream * d_logp, by_ratio, None, None, None


def surrogate(x: Tokens, s: Settings, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Losses [M] and their sum, differentiable in logp and log_ratio; COUNTERS [5], detached.

    float64 log-probs, and rules without a kernel, take the reference; else all is float32.
    impl: "cpu" (C++), "triton" or "reference".
    """
    double = x.logp.dtype == torch.float64
    plain = double or not has_values(x.logp)
    if s.rule not in KERNEL_RULES or (plain and impl == "auto"):
        impl = "reference"
    impl = choose_impl(impl, x.logp.device, ("triton", "cpu"))
    dtype = torch.float64 if double and impl == "reference" else torch.float32
    x = _each(x, lambda a: a if a.dtype == torch.bool else a.to(dtype))
    if impl == "reference":
        return reference(x, s)
    return _Surrogate.apply(x.logp, x.log_ratio, _each(x, Tensor.detach), s, impl)


def _each(x: Tokens, change: Callable[[Tensor], Tensor]) -> Tokens:
    return x._replace(**{n: change(a) for n, a in x._asdict().items() if a is not None})


def _aot(**constants: int | bool) -> tuple:
    arrays = ("logp", "advantages", "old_logp", "log_ratio", "weight", "ref_logp")
    types = dict.fromkeys((*arrays, "loss", "d_logp", "d_ratio", "sums"), "*fp32")
    types |= dict.fromkeys(("low", "high", "cap", "kl_coef"), "fp32") | {"mask": "*i1"}
    return _surrogate_kernel, types, constants | {"BLOCK": BLOCK}, 4


AOT = [
    _aot(RULE=rule, KL=kl, HAS_RATIO=ratio, HAS_MASK=True, HAS_WEIGHT=True, HAS_GRAD=True)
    for rule, kl, ratio in ((0, 0, False), (0, 4, True), (1, 3, False), (2, 2, True), (2, 1, False))
]
