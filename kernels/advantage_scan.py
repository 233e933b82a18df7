"""The scan behind advantage.py: V, A and G in one number, what an action sees after itself.

    c = gamma ((1 - lam) V_{k+1} + lam G_{k+1}) + rewards at observations in between
    G = r + c,  A = G - V

and c one token earlier is affine in c: gamma lam (r + c) + gamma (1 - lam) V at an action, r + c
at an observation. Affine maps compose associatively, so a sequence is a reverse scan of
(slope, offset), with slope 0 where it ends; two lambdas are two such scans side by side. Bytes a
token: r, V, mask read, A, G written = 17, log pi and log pi_ref 8 more; `steps` adds a few passes
that spread the results over each step's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantage_parts import Packed, layout, reverse_scan, shaped_rewards
from .launch import _C, device_guard, stream_of, tl, triton

BLOCK = 1024  # tokens of a Triton program's step


def reference(p: Packed) -> tuple[Tensor, Tensor]:
    """Advantages and returns of token actions, in plain PyTorch and the dtype of the rewards."""
    ids, acts, last, next_acts = layout(p)
    rewards = shape_rewards(p)
    values = torch.zeros_like(rewards) if p.values is None else p.values
    next_values = torch.where(next_acts, F.pad(values[1:], (0, 1)), 0.0)
    if p.bootstrap is not None:
        rewards = rewards + torch.where(last, p.gamma * p.bootstrap[ids], 0.0)

    def returns(lam: Tensor | float) -> Tensor:
        decay = p.gamma * (lam[ids] if isinstance(lam, Tensor) else torch.full_like(rewards, lam))
        slope = torch.where(last, 0.0, torch.where(next_acts, decay, 1.0))
        found = reverse_scan(slope, rewards + (p.gamma - decay) * next_values)
        return torch.where(acts, found, 0.0)

    target = returns(p.lam)
    advantages = torch.where(acts, target - values, 0.0)
    return advantages, target if p.critic_lam is None else returns(p.critic_lam)


def shape_rewards(p: Packed) -> Tensor:
    if p.logp is None or p.ref_logp is None:
        return p.rewards
    return shaped_rewards(p.rewards, p.logp, p.ref_logp, p.mask, kl_coef=p.kl_coef)


@triton.jit
def _compose(later_slope, later_offset, slope, offset):
    # Slope 0, a sequence's end, lets nothing through: not even a NaN, which 0 * NaN would.
    return slope * later_slope, tl.where(slope == 0, offset, slope * later_offset + offset)


@triton.jit
def _scan_block(rewards, next_values, next_acts, ends, at_end, gamma, lam, carried):
    """G of a block's tokens, each slope G' + offset, and the first of them."""
    decay = gamma * lam
    offset = rewards + tl.where(next_acts, (gamma - decay) * next_values, 0.0)
    offset += tl.where(ends, at_end, 0.0)
    slope = tl.where(ends, 0.0, tl.where(next_acts, decay, 1.0))
    slope, offset = tl.associative_scan((slope, offset), 0, _compose, reverse=True)
    total = tl.where(slope == 0, offset, slope * carried + offset)
    first = tl.arange(0, total.shape[0]) == 0
    return total, tl.sum(tl.where(first, total, 0.0), 0)


@triton.jit
def _sum_parts(parts, arrived, statistics, BLOCK: tl.constexpr):
    """The last program adds up the parts of all, in their order: the same bits in every run."""
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for k in tl.static_range(3):
            lanes = tl.zeros([BLOCK], tl.float64)
            for first in range(0, tl.num_programs(0), BLOCK):
                other = first + tl.arange(0, BLOCK)
                known = other < tl.num_programs(0)
                lanes += tl.load(parts + 3 * other + k, mask=known, other=0.0, volatile=True)
            tl.store(statistics + k, tl.sum(lanes, 0))


@triton.jit
def _gae_kernel(
    rewards,
    values,
    mask,
    bootstrap,
    cu_seqlens,
    logp,
    ref_logp,
    lams,
    critic_lams,
    advantages,
    returns,
    parts,
    arrived,
    statistics,
    gamma,
    lam,
    critic_lam,
    kl_coef,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_LAMS: tl.constexpr,
    HAS_CRITIC_LAMS: tl.constexpr,
    TWO_LAMBDAS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence, block by block from its end."""
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    if HAS_LAMS:
        lam = tl.load(lams + sequence)
    if HAS_CRITIC_LAMS:
        critic_lam = tl.load(critic_lams + sequence)
    at_end = 0.0
    if HAS_BOOTSTRAP:
        at_end = gamma * tl.load(bootstrap + sequence)
    carried = 0.0
    critic_carried = 0.0
    count = tl.full([], 0.0, tl.float64)
    sum_ = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for done in range(0, end - begin, BLOCK):
        token = end - done - BLOCK + tl.arange(0, BLOCK)
        here = token >= begin
        ends = token + 1 == end
        acts = here
        next_acts = here & (token + 1 < end)
        if HAS_MASK:
            acts = tl.load(mask + token, mask=here, other=0) != 0
            next_acts = tl.load(mask + token + 1, mask=next_acts, other=0) != 0
        reward = tl.load(rewards + token, mask=here, other=0.0)
        if HAS_KL:
            reward -= kl_coef * (
                tl.load(logp + token, mask=acts, other=0.0)
                - tl.load(ref_logp + token, mask=acts, other=0.0)
            )
        next_value = tl.zeros([BLOCK], tl.float32)
        if HAS_VALUES:
            next_value = tl.load(values + token + 1, mask=next_acts, other=0.0)
        total, carried = _scan_block(
            reward, next_value, next_acts, ends, at_end, gamma, lam, carried
        )
        target = total
        if TWO_LAMBDAS:
            target, critic_carried = _scan_block(
                reward, next_value, next_acts, ends, at_end, gamma, critic_lam, critic_carried
            )
        tl.store(returns + token, tl.where(acts, target, 0.0), mask=here)
        if HAS_VALUES:
            value = tl.load(values + token, mask=acts, other=0.0)
            advantage = tl.where(acts, total - value, 0.0)
            tl.store(advantages + token, advantage, mask=here)
            if HAS_STATISTICS:
                exact = advantage.to(tl.float64)
                count += tl.sum(acts.to(tl.int32), 0)
                sum_ += tl.sum(exact, 0)
                squares += tl.sum(exact * exact, 0)
    if HAS_STATISTICS:
        tl.store(parts + 3 * sequence, count)
        tl.store(parts + 3 * sequence + 1, sum_)
        tl.store(parts + 3 * sequence + 2, squares)
        tl.debug_barrier()
        _sum_parts(parts, arrived, statistics, BLOCK)


class Results(NamedTuple):
    """statistics: [3] float64, of whitening_statistics over the advantages of actions."""

    advantages: Tensor | None  # None without values
    returns: Tensor
    statistics: Tensor | None


def _scalar(x: Tensor | float | None) -> float:
    return x if isinstance(x, float) else 0.0


def _pointer(x: Tensor | float | None) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else 0


def _arguments(p: Packed, out: Results) -> _C.GaeArguments:
    critic_lam = p.lam if p.critic_lam is None else p.critic_lam
    return _C.GaeArguments(
        _pointer(p.rewards),
        _pointer(p.values),
        _pointer(p.mask),
        _pointer(p.bootstrap),
        _pointer(p.cu_seqlens),
        _pointer(p.logp),
        _pointer(p.ref_logp),
        _pointer(p.lam),
        _pointer(critic_lam),
        _pointer(out.advantages),
        _pointer(out.returns),
        _pointer(out.statistics),
        len(p.rewards),
        len(p.cu_seqlens) - 1,
        p.gamma,
        _scalar(p.lam),
        _scalar(critic_lam),
        p.kl_coef,
    )


def _launch_cpu(p: Packed, out: Results) -> None:
    _C.gae_cpu(_arguments(p, out), torch.get_num_threads())


def _launch_cuda(p: Packed, out: Results) -> None:
    words = _C.gae_cuda_scratch(len(out.returns))
    scratch = torch.empty(words, dtype=torch.int64, device=out.returns.device)
    with device_guard(out.returns):
        _C.gae_cuda(_arguments(p, out), scratch.data_ptr(), stream_of(out.returns))


def _launch_triton(p: Packed, out: Results) -> None:
    sequences, device = len(p.cu_seqlens) - 1, out.returns.device
    parts = arrived = None
    if out.statistics is not None:
        parts = torch.empty(3 * sequences, dtype=torch.float64, device=device)
        arrived = torch.zeros(1, dtype=torch.int32, device=device)
    with device_guard(out.returns):
        _gae_kernel[(sequences,)](
            p.rewards,
            p.values,
            p.mask,
            p.bootstrap,
            p.cu_seqlens,
            p.logp,
            p.ref_logp,
            p.lam if isinstance(p.lam, Tensor) else None,
            p.critic_lam if isinstance(p.critic_lam, Tensor) else None,
            out.advantages,
            out.returns,
            parts,
            arrived,
            out.statistics,
            p.gamma,
            _scalar(p.lam),
            _scalar(p.critic_lam),
            p.kl_coef,
            HAS_VALUES=p.values is not None,
            HAS_MASK=p.mask is not None,
            HAS_BOOTSTRAP=p.bootstrap is not None,
            HAS_KL=p.logp is not None,
            HAS_LAMS=isinstance(p.lam, Tensor),
            HAS_CRITIC_LAMS=isinstance(p.critic_lam, Tensor),
            TWO_LAMBDAS=p.critic_lam is not None,
            HAS_STATISTICS=out.statistics is not None,
            BLOCK=BLOCK,
        )


_LAUNCH = {"cpu": _launch_cpu, "cuda": _launch_cuda, "triton": _launch_triton}


def scan(packed: Packed, impl: str, statistics: bool = False) -> Results:
    """Results of token actions, by a kernel; float32."""
    tensors = {name: _aligned(x) for name, x in packed._asdict().items() if isinstance(x, Tensor)}
    packed = packed._replace(**tensors)
    returns = torch.empty_like(packed.rewards)
    advantages = None if packed.values is None else torch.empty_like(returns)
    # whole where there are tokens: a kernel writes all three
    fresh = torch.empty if len(returns) else torch.zeros
    sums = fresh(3, dtype=torch.float64, device=returns.device) if statistics else None
    out = Results(advantages, returns, sums)
    if len(returns):
        _LAUNCH[impl](packed, out)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous from a 16-byte boundary, as the wide loads want it; floats as float32."""
    x = (x.float() if x.is_floating_point() else x).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


_FLAGS = ("VALUES", "MASK", "BOOTSTRAP", "KL", "LAMS", "CRITIC_LAMS", "STATISTICS")
AOT = [
    (
        _gae_kernel,
        {
            "rewards": "*fp32",
            "values": "*fp32",
            "mask": "*i1",
            "bootstrap": "*fp32",
            "cu_seqlens": "*i32",
            "logp": "*fp32",
            "ref_logp": "*fp32",
            "lams": "*fp32",
            "critic_lams": "*fp32",
            "advantages": "*fp32",
            "returns": "*fp32",
            "parts": "*fp64",
            "arrived": "*i32",
            "statistics": "*fp64",
            "gamma": "fp32",
            "lam": "fp32",
            "critic_lam": "fp32",
            "kl_coef": "fp32",
        },
        {f"HAS_{flag}": everything or flag in _FLAGS[:3] for flag in _FLAGS}
        | {"TWO_LAMBDAS": everything, "BLOCK": BLOCK},
        4,
    )
    for everything in (False, True)
]
