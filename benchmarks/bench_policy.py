"""policy_loss forward + backward on a million tokens, beside the same loss in eager PyTorch (as
TRL's trainer writes it), under torch.compile, and Liger's. PPO's advantages are those of tokens,
which Liger does not take; the others' are those of completions.

Bytes counted: log pi, log pi_old, A and the mask read, the loss and the gradient written; the KL
penalty reads log pi_ref too. On a GPU "ms" is the time on the device, of replayed CUDA graphs over
inputs that together exceed its L2; "call ms" that of single calls, "wall ms" from call to call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import device
from exact import most_off
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.policy import policy_loss

SHAPES = {"tiny": (8, 64), "cpu": (1024, 1024), "cuda": (1024, 1024)}
BETA = 0.04
SETS = 24  # of inputs, 9 MB each or more
CASES = [("ppo", False), ("grpo", True), ("dapo", True), ("gspo", True), ("cispo", False)]
COMPILED_ON_A_GPU = CASES[:1]  # a compilation takes as long as everything else
LIMITS = {"relative error of loss": 1e-4, "of gradient": 1e-4}
PEER_LIMITS = {"relative error of loss": 1e-2, "of gradient": 1e-2}


def eager(loss_type: str, logp, old, ref, advantages, mask, beta: float) -> Tensor:
    """The mean loss of padded rows, as trl/trainer/grpo_trainer.py computes it."""
    log_ratio = logp - old
    if loss_type == "gspo":
        log_ratio = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_ratio = log_ratio.unsqueeze(-1)
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        per_token = -torch.clamp(ratio, max=5.0).detach() * advantages * logp
    else:
        clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
        per_token = -torch.min(ratio * advantages, clipped * advantages)
    if beta:
        per_token = per_token + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    if loss_type in ("grpo", "gspo"):
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)


def ours(loss_type: str, logp, old, ref, advantages, mask, beta: float) -> Tensor:
    given: dict[str, Any] = dict(ref_logp=ref if beta else None, beta=beta)
    if loss_type in ("gspo", "dapo"):
        given |= dict(epsilon=0.2, epsilon_high=0.2)
    return policy_loss(logp, old, advantages, mask, loss_type=loss_type, **given).mean()


def liger(loss_type: str, logp, old, ref, advantages, mask, beta: float) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    level = "sequence" if loss_type == "gspo" else "token"
    high = 5.0 if loss_type == "cispo" else 0.2
    keep = mask.to(logp.dtype)
    return LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        keep,
        advantages.squeeze(1),
        keep,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
        beta=beta,
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        importance_sampling_level=level,
        epsilon_high=high,
    )[0]


def inputs(size: str, loss_type: str, with_kl: bool) -> tuple:
    shape, dev = SHAPES[size], device()
    logp, old, ref = (-torch.rand(shape, device=dev) for _ in range(3))
    advantages = torch.randn(shape if loss_type == "ppo" else (shape[0], 1), device=dev)
    mask = torch.rand(shape, device=dev) < 0.9
    return loss_type, logp.requires_grad_(), old, ref, advantages, mask, BETA * with_kl


def losses(size: str, loss_type: str, with_kl: bool) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"prefuse": ours, "eager (TRL's formula)": eager}
    if loss_type != "ppo" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    if size == "cpu" or (size == "cuda" and (loss_type, with_kl) in COMPILED_ON_A_GPU):
        found["torch.compile of it"] = torch.compile(eager, dynamic=False)
    return found


def run(loss: Callable[..., Tensor], given: tuple) -> tuple[Tensor, Tensor]:
    value = loss(*given)
    return value.detach(), torch.autograd.grad(value, given[1])[0]


def errors(exact: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> dict[str, float]:
    (loss, gradient), (wanted, slope) = out, exact
    return {
        "relative error of loss": float((loss - wanted).abs() / wanted.abs()),
        "of gradient": most_off(gradient, slope) / float(slope.abs().max()),
    }


def methods(size: str, loss_type: str, with_kl: bool) -> list[Method]:
    torch.manual_seed(0)
    sets = SETS if device().type == "cuda" else 1
    given = [inputs(size, loss_type, with_kl) for _ in range(sets)]
    double: Any = [
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given[0]
    ]
    loss = eager(*double)
    exact = loss.detach(), torch.autograd.grad(loss, double[1])[0]
    return [
        Method(
            name,
            partial(run, method, given[0]),
            partial(errors, exact),
            LIMITS if name == "prefuse" else PEER_LIMITS,
            name == "prefuse",
            copies=tuple(partial(run, method, other) for other in given[1:]),
        )
        for name, method in losses(size, loss_type, with_kl).items()
    ]


def cases(size: str) -> list[Case]:
    found = []
    rows, length = SHAPES[size]
    for loss_type, with_kl in CASES:
        columns: dict[str, Any] = {"loss": loss_type, "KL": with_kl, "tokens": rows * length}
        moved = float(rows * length * (21 + 4 * with_kl))
        name = f"{loss_type}{' with KL' if with_kl else ''}"
        make = partial(methods, size, loss_type, with_kl)
        found.append(Case(name, make, columns, bytes=moved, short=True))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
