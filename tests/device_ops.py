"""Every op once, on a device of choice: what the tests of a GPU run.

Inputs are drawn on the CPU in float64 and moved; `run` gives outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import registry_cases
import torch
from torch import Tensor

from prefuse.kernels import group_advantage as groups
from prefuse.kernels import segments, whitening
from prefuse.kernels.advantage import discounted_returns, gae, shaped_gae, vapo_gae
from prefuse.kernels.divergence import linear_divergence, token_divergence
from prefuse.kernels.linear_logp import linear_logp, linear_token_loss
from prefuse.kernels.logp import token_logp
from prefuse.kernels.objective import Mean
from prefuse.kernels.policy import policy_loss
from prefuse.kernels.registry import METHODS
from prefuse.kernels.token_stats import OUTPUTS
from prefuse.kernels.vtrace import vtrace

ON_GPU = torch.cuda.is_available()
Batch = dict[str, Tensor]


class Op(NamedTuple):
    given: Batch
    learnt: tuple[str, ...]
    call: Callable[[Batch], tuple[Tensor | None, ...]]


def run(op: Op, device: str = "cpu", dtype: torch.dtype | None = torch.float32) -> list[Tensor]:
    """Outputs, then the gradients of what is learnt under an upstream that differs by entry."""
    given = {k: x.to(device, dtype if x.is_floating_point() else None) for k, x in op.given.items()}
    for name in op.learnt:
        given[name] = given[name].detach().clone().requires_grad_()
    found = [x for x in op.call(given) if x is not None]
    reached = [x for x in found if x.requires_grad]
    grads: list[Tensor | None] = []
    if op.learnt:
        upstream = [torch.linspace(-1, 2, x.numel(), device=device).view(x.shape) for x in reached]
        total = sum((x * u.to(x.dtype)).sum() for x, u in zip(reached, upstream, strict=True))
        leaves = [given[k] for k in op.learnt]
        grads += torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [x.detach() for x in (*found, *grads) if x is not None]


def objective(name: str) -> Op:
    case = registry_cases.case(name)

    def call(x: Batch) -> tuple[Tensor, ...]:
        found = case.call(x)
        metrics = (
            part
            for metric in found.metrics.values()
            for part in (metric if isinstance(metric, Mean) else (metric,))
        )
        return (found.loss, *metrics)

    return Op(case.given, case.learnt, call)


# On a GPU enough for many blocks at a time; on a CPU small, for kernels may be interpreted.
LENGTHS = [1, 0, 2, 70_000, 3, 4096, 0, *range(1, 900, 7), 33_000] if ON_GPU else [1, 0, 40, 9, 3]
SIZES = [4, 8, 2, 5, *[8] * 60] if ON_GPU else [4, 2, 5, 3]  # of groups of completions


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tokens() -> Batch:
    """Packed sequences, with observations in between."""
    torch.manual_seed(0)
    total, count = sum(LENGTHS), len(LENGTHS)
    names = ("rewards", "values", "logp", "ref_logp", "old_logp", "x")
    given = {name: 0.5 * torch.randn(total, dtype=torch.float64) for name in names}
    given |= dict(bootstrap=torch.randn(count).double(), lam=torch.rand(count).double())
    return given | dict(mask=torch.rand(total) < 0.8, cu_seqlens=bounds(LENGTHS))


def completions() -> Batch:
    torch.manual_seed(0)
    count = sum(SIZES)
    lengths = torch.randint(1, 9, (count,))
    given = dict(rewards=torch.randint(0, 2, (count,)).double(), lengths=lengths.double())
    given |= dict(columns=torch.randn(count, 3).double(), weights=torch.rand(3).double())
    given |= dict(wins=torch.rand(count, max(SIZES)).double())
    given |= dict(process=torch.randn(int(lengths.sum())).double())
    return given | dict(cu_groups=bounds(SIZES), cu_seqlens=bounds(lengths.tolist()))


def _impl(x: Batch) -> str:
    """Left to themselves, scans are in float32."""
    return "reference" if x["rewards"].dtype == torch.float64 else "auto"


def _packed(x: Batch, *names: str) -> dict[str, Any]:
    given = {name: x[name] for name in (*names, "rewards", "values", "cu_seqlens", "mask")}
    return given | dict(impl=_impl(x))


def _vtrace(x: Batch) -> tuple[Tensor, ...]:
    given = (x[name] for name in ("rewards", "values", "cu_seqlens", "logp"))
    return vtrace(*given, mask=x["mask"], bootstrap=x["bootstrap"])


_PAIR = ("logp", "ref_logp")
SCANS: dict[str, Callable[[Batch], tuple[Tensor, ...]]] = {
    "gae": lambda x: gae(**_packed(x, "bootstrap"), gamma=0.99),
    "gae, two lambdas": lambda x: gae(**_packed(x, "lam"), critic_lam=1.0),
    "shaped_gae": lambda x: shaped_gae(**_packed(x, "bootstrap", *_PAIR), lam=1.0),
    "shaped_gae, two lambdas": lambda x: shaped_gae(**_packed(x, *_PAIR), critic_lam=1.0),
    "vapo_gae": lambda x: vapo_gae(**_packed(x)),
    "vtrace": lambda x: _vtrace(x),
    "reward_to_go": lambda x: (discounted_returns(x["rewards"], x["cu_seqlens"], impl=_impl(x)),),
    "reinforce_plus_plus": lambda x: (
        groups.reinforce_plus_plus(x["rewards"], x["cu_seqlens"], mask=x["mask"]),
    ),
    "whiten": lambda x: (whitening.whiten(x["x"], mask=x["mask"]),),
}
ESTIMATES: dict[str, Callable[[Batch], Tensor]] = {
    **{
        name: lambda x, f=groups.ESTIMATORS[name]: f(x["rewards"], x["cu_groups"])
        for name in ("rloo", "grpo", "dr_grpo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline")
    },
    "reinforce": lambda x: groups.reinforce(x["rewards"]),
    "remax": lambda x: groups.remax(x["rewards"], x["lengths"]),
    "opo": lambda x: groups.opo(x["rewards"], x["lengths"], x["cu_groups"]),
    "pass_at_k": lambda x: groups.pass_at_k(x["rewards"], x["cu_groups"], k=2),
    "spo": lambda x: groups.spo(x["wins"], x["cu_groups"]),
    "gdpo": lambda x: groups.gdpo(x["columns"], x["weights"], x["cu_groups"]),
    "prime": lambda x: groups.prime(x["process"], x["rewards"], x["cu_seqlens"], x["cu_groups"]),
}
SUMS: dict[str, Callable[..., Tensor]] = {
    name: getattr(segments, name)
    for name in ("segment_sum", "segment_mean", "segment_max", "segment_logsumexp")
}
# by way of kernels, segments and sequence means, each over many blocks
POLICIES = ("ppo", "grpo", "gspo", "cispo", "sapo", "gmpo")


def _policy(name: str) -> Callable[[Batch], tuple[Tensor, ...]]:
    def call(x: Batch) -> tuple[Tensor, ...]:
        given = {k: x[k] for k in ("logp", "old_logp", "ref_logp", "mask", "cu_seqlens")}
        options = dict(beta=0.1, kl="ratio_k3", loss_type=name)
        found = policy_loss(**given, advantages=x["rewards"], **options)
        return (found.loss, *(m.total for m in found.metrics.values()))

    return call


def head_inputs() -> Batch:
    torch.manual_seed(0)
    n, v, h = (700, 5003, 64) if ON_GPU else (9, 300, 8)
    given = {k: torch.randn(n, h).double() for k in ("hidden", "teacher_hidden")}
    given |= {k: torch.randn(v, h).double() / 4 for k in ("weight", "teacher_weight")}
    upstream = torch.randn(n).double() * (torch.rand(n) < 0.7)  # some tokens have no gradient
    given |= dict(bias=torch.randn(v).double(), upstream=upstream)
    return given | dict(targets=torch.randint(v, (n,)))


def _fused(x: Batch, **options) -> tuple[Tensor | None, ...]:
    found = linear_logp(x["hidden"], x["weight"], x["targets"], x["bias"], **options)
    return (found.logp * x["upstream"], *found[1:])


def _inline(x: Batch) -> tuple[Tensor, ...]:
    loss = lambda stats, upstream: -stats.logp * upstream  # noqa: E731
    given = (x["hidden"], x["weight"], x["targets"], loss, x["upstream"])
    return (linear_token_loss(*given, bias=x["bias"])[0].sum(),)


def _logits(x: Batch, name: str) -> Tensor:
    return x[f"{name}hidden"] @ x[f"{name}weight"].t()


def _diverging(x: Batch, **options) -> tuple[Tensor]:
    given = (x[k] for k in ("hidden", "weight", "teacher_hidden", "teacher_weight"))
    return (linear_divergence(*given, **options) * x["upstream"],)


HEADS: dict[str, Callable[[Batch], tuple[Tensor | None, ...]]] = {
    "linear_logp, stash": lambda x: _fused(x, mode="stash"),
    "linear_logp, recompute": lambda x: _fused(x, mode="recompute", temperature=0.7),
    "linear_logp, every output": lambda x: _fused(x, outputs=OUTPUTS, softcap=5.0),
    "linear_token_loss": _inline,
    "token_logp": lambda x: tuple(token_logp(_logits(x, ""), x["targets"], outputs=OUTPUTS)),
    "linear_divergence, stash": lambda x: _diverging(x, kind="reverse_kl", mode="stash"),
    "linear_divergence, recompute": lambda x: _diverging(x, kind="jsd", mode="recompute"),
    "token_divergence": lambda x: (token_divergence(_logits(x, ""), _logits(x, "teacher_")),),
}

MAKE: dict[str, Callable[[], Op]] = {
    **{name: lambda name=name: objective(name) for name in METHODS},
    **{
        f"{name}, {sum(LENGTHS)} tokens": lambda name=name: Op(tokens(), ("logp",), _policy(name))
        for name in POLICIES
    },
    **{f"estimate {name}": lambda f=f: Op(tokens(), (), f) for name, f in SCANS.items()},
    **{
        f"estimate {name}": lambda f=f: Op(completions(), (), lambda x: (f(x),))
        for name, f in ESTIMATES.items()
    },
    **{
        name: lambda f=f: Op(tokens(), ("x",), lambda x: (f(x["x"], x["cu_seqlens"]),))
        for name, f in SUMS.items()
    },
    **{name: lambda f=f: Op(head_inputs(), ("hidden", "weight"), f) for name, f in HEADS.items()},
}
