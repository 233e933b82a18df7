"""Other people's fused heads, each called at its best settings, for bench_linear_logp.py.

A peer that needs what is not here is a row with that reason. `upstream` tells whether its gradient
can have any factor per token, as losses of reinforcement learning and of pairs need; the others
know their loss, or sum it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """`logp(hidden, weight, targets, upstream)` gives log-probs [N]; or, where its loss is its own,
    a number whose gradient is that of log-probs weighted by `upstream`'s form of the factors."""

    name: str
    logp: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gemms: int  # forward and backward
    frozen_gemms: int = 0  # with a frozen weight, if it is worth measuring
    upstream: str = "any"  # or "ones", "per sequence": which factors a token's gradient can have
    weights: tuple[str, ...] = ("same",)  # dtypes of weight: "same" as hidden, "float32"
    forward: bool = True  # whether it is worth measuring without gradients
    ours: bool = False


def naive(h: Tensor, w: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return -F.cross_entropy((h @ w.t()).float(), y, reduction="none")


def peers(size: str) -> list[Head]:
    """Those that run on the device: without a GPU, plain PyTorch's and TRL's. "tiny" compiles
    nothing."""
    found = [Head("naive logits", naive, 3, 2)]
    if _installed("trl"):
        found.append(Head("TRL fused head", _trl, 4, 3, weights=("same", "float32")))
    found.append(Head("torch linear_cross_entropy", _torch, 4, 3))
    if torch.cuda.is_available():
        found += _on_a_gpu()
    if size != "tiny":  # last, for a compiler takes the time of the others
        compiled: Any = torch.compile(naive, dynamic=False)
        found.append(Head("torch.compile of it", compiled, 3, forward=False))
    return found


def _on_a_gpu() -> list[Head]:
    found = []
    if _installed("cut_cross_entropy"):
        found += [
            Head("CCE, unfiltered", _cce(None), 4, 3),
            Head("CCE", _cce("high"), 4, 3),
        ]
    if _installed("liger_kernel"):
        found += [
            Head("Liger scaled CE", _liger_scaled, 4),
            Head("Liger scaled CE, chunks", _liger_chunks, 4),
            Head("Liger FLCE, per token", _liger_fused("none", 1), 4, 3),
            Head("Liger FLCE, per token, chunks x 8", _liger_fused("none", 8), 4, 3),
            Head("Liger FLCE, sum only", _liger_fused("sum", 1), 3, 2, "ones", forward=False),
            Head(
                "Liger FLCE, sum only, chunks x 8",
                _liger_fused("sum", 8),
                3,
                0,
                "ones",
                forward=False,
            ),
            Head("Liger GRPO head", _liger_grpo, 4, upstream="per sequence", forward=False),
        ]
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _trl(h, w, y, _):
    from trl.kernels import ChunkedLogProbFunction

    # 32768 columns a tile, no optional outputs: as its trainers call it
    return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]


def _torch(h, w, y, _):
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has none; 2.13 does")
    from torch.nn import LinearCrossEntropyOptions

    options: Any = LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(h, w, y, reduction="none", options=options)  # type: ignore


def _cce(eps: str | None):
    def logp(h, w, y, _):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(h, w, y, reduction="none", filter_eps=eps)

    return logp


def _liger_scaled(h, w, y, _):
    """On Hopper its CuTe kernels, which need nvidia-cutlass-dsl."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return -Function.apply(h, w, y)


def _liger_chunks(h, w, y, _):
    """What it runs on GPUs without those kernels."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    found = module._FusedLinearPPOFallbackFunction.apply(h, w, y, 1.0, -100, False)
    return -(found[0] if isinstance(found, tuple) else found)


def _liger_fused(reduction: str, chunks: int):
    """With d weight summed in float32, where its default is bfloat16, and larger chunks of tokens
    than its default, for more memory."""

    def logp(h, w, y, _):
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

        options = (None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)
        options += (False, False, False, None, None, chunks)
        found: Any = Function.apply(h, w, y, *options)
        return -found[0]

    return logp


SEQUENCES = 8


def per_sequence(upstream: Tensor) -> Tensor:
    """The factors that a policy gradient has on the policy: one per sequence, over all tokens."""
    tokens = len(upstream) // SEQUENCES
    return upstream[::tokens][:SEQUENCES].repeat_interleave(tokens) / len(upstream)


def _liger_grpo(h, w, y, upstream):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    ids = y.view(SEQUENCES, -1)
    advantages = per_sequence(upstream).view(SEQUENCES, -1)[:, 0] * len(upstream)
    found = loss(h.view(*ids.shape, -1), w, ids, torch.ones_like(ids), advantages)
    return -(found[0] if isinstance(found, tuple) else found)
