"""policy_loss forward + backward on a million tokens, beside the same loss in eager PyTorch (as
TRL's trainer writes it), under torch.compile, and Liger's.

Bytes counted: log pi, log pi_old, A and the mask read, the loss and the gradient written; the KL
penalty reads log pi_ref too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import ceilings, device, machine, milliseconds, table
from torch import Tensor

from prefuse.kernels.policy import policy_loss

SHAPE = (1024, 1024)
BETA = 0.04
CASES = [("ppo", False), ("ppo", True), ("grpo", True), ("gspo", True), ("cispo", False)]


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
    clip: dict[str, Any] = dict(epsilon=0.2, epsilon_high=0.2) if loss_type == "gspo" else {}
    clip |= dict(ref_logp=ref if beta else None, beta=beta)
    return policy_loss(logp, old, advantages, mask, loss_type=loss_type, **clip).mean()


def liger(loss_type: str, logp, old, ref, advantages, mask, beta: float) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    names = dict(ppo="dapo", grpo="grpo", gspo="grpo", cispo="cispo")
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
        loss_type=names[loss_type],
        importance_sampling_level=level,
        epsilon_high=high,
    )[0]


def methods() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"prefuse": ours, "eager (TRL's formula)": eager}
    found["torch.compile of it"] = torch.compile(eager, dynamic=False)
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return found
    return found | {"Liger": liger}


def rows() -> list[dict]:
    dev = device()
    limit = ceilings()["gbps"]
    torch.manual_seed(0)
    logp, old, ref = (-torch.rand(SHAPE, device=dev) for _ in range(3))
    advantages = torch.randn(SHAPE[0], 1, device=dev)
    mask = torch.rand(SHAPE, device=dev) < 0.9
    out = []
    for loss_type, with_kl in CASES:
        given = (loss_type, logp.requires_grad_(), old, ref, advantages, mask, BETA * with_kl)
        double: Any = [x.double() if torch.is_tensor(x) and x is not mask else x for x in given]
        loss = eager(*double)
        exact, (wanted,) = loss.detach(), torch.autograd.grad(loss, logp)
        moved = logp.numel() * (21 + 12 + 4 * with_kl)
        for name, method in methods().items():
            try:
                run = partial(_step, method, given)
                loss, grad = run()
            except Exception as error:  # no compiler on the machine, a peer that refuses
                out.append(
                    {"loss": loss_type, "KL": with_kl, "method": name, "error": repr(error)[:80]}
                )
                continue
            off = (grad - wanted).abs().max() / wanted.abs().max()
            ms = milliseconds(run)
            out.append(
                {
                    "loss": loss_type,
                    "KL": with_kl,
                    "method": name,
                    "tokens": logp.numel(),
                    "ms": ms,
                    "GB/s": moved / ms / 1e6,
                    "% of copy": 100 * moved / ms / 1e6 / limit,
                    "relative error of loss": float((loss - exact).abs() / exact.abs()),
                    "of gradient": float(off),
                }
            )
    return out


def _step(method: Callable[..., Tensor], given: tuple) -> tuple[Tensor, Tensor]:
    loss = method(*given)
    return loss.detach(), torch.autograd.grad(loss, given[1])[0]


if __name__ == "__main__":
    print(json.dumps(machine()))
    print(table(rows()))
