"""Divergences between a student's and a teacher's logits that already exist.

Bytes moved: forward two reads of both logits, backward one read of both and one write; the sums
and the gradient are divergence_pass.py's. Where the logits do not exist yet, `linear_divergence`
never makes all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence_kinds import DIVERGENCES, final_log_probs, rule_of
from .divergence_pass import Side, Tile, gradient, statistics
from .launch import choose_impl, differentiated_once, expect, has_values
from .logp import check_softcaps, inverse_of
from .tiled_head import for_device, run_slices

# bytes of both heads' float32 logits of a run of tokens: enough of them to reuse the weights read
ROW_TILE = {"cpu": 256 << 20, "cuda": 2 << 30}


def reference(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> Tensor:
    """Plain PyTorch, the formulas as they stand; float64 stays float64, the rest is float32."""
    rule = rule_of(kind, beta, alpha)
    log_s = final_log_probs(logits, temperature, softcap, logit_scale)
    log_t = final_log_probs(
        teacher_logits.detach(), temperature, teacher_softcap, teacher_logit_scale
    )
    return DIVERGENCES[rule.kind](log_s, log_t, rule.weight)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher_logits, inverse_temperature, shapes, rule, impl):
        tile = _whole_tile(logits, teacher_logits, inverse_temperature, shapes)
        stats = [statistics(impl, tile.rows(run), rule) for run in _token_runs(logits)]
        stats = torch.cat(stats, 1)
        ctx.save_for_backward(logits, teacher_logits, inverse_temperature, stats)
        ctx.shapes, ctx.rule, ctx.impl = shapes, rule, impl
        return stats[3].clone()

    @staticmethod
    def backward(ctx, *grads):
        differentiated_once("token_divergence")
        logits, teacher_logits, inverse_temperature, stats = ctx.saved_tensors
        tile = _whole_tile(logits, teacher_logits, inverse_temperature, ctx.shapes)
        out = torch.empty_like(logits)
        for run in _token_runs(logits):
            gradient(ctx.impl, tile.rows(run), ctx.rule, stats[:, run].contiguous(), out[run])
        return out.mul_(grads[0][:, None]), None, None, None, None, None


def _whole_tile(logits: Tensor, teacher_logits: Tensor, inverse_temperature, shapes) -> Tile:
    (scale, softcap), (teacher_scale, teacher_softcap) = shapes
    return Tile(
        Side(logits, None, scale, softcap),
        Side(teacher_logits, None, teacher_scale, teacher_softcap),
        inverse_temperature,
    )


def _token_runs(logits: Tensor) -> list[slice]:
    """Runs of tokens whose logits may be copied in float32."""
    longest = for_device(ROW_TILE, logits.device) // (8 * max(logits.shape[1], 1))
    return run_slices(len(logits), 0, max(1, longest))


def token_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """`linear_divergence` from logits that exist: [N, V] each, of any floating-point dtypes.

    Returns [N] in nats, float32 (float64 of float64 logits, which run the reference), with a
    gradient in `logits` alone. A logit of -inf on both sides (a padded vocabulary) counts as 0.
    """
    rule = rule_of(kind, beta, alpha)
    check_softcaps(softcap=softcap, teacher_softcap=teacher_softcap)
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        expect(x.dim() == 2, name, "shape [N, V]", tuple(x.shape))
        expect(x.is_floating_point(), name, "a floating-point dtype", x.dtype)
    check_alike("logits", logits, teacher_logits, 0)
    check_alike("logits", logits, teacher_logits, 1)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    inverse_temperature = inverse_of(temperature, len(logits), logits.device, wide)
    if impl == "auto" and (wide == torch.float64 or not has_values(logits)):
        impl = "reference"
    impl = choose_impl(impl, logits.device, ("triton", "cpu", "torch"))
    if impl == "reference":
        return reference(
            logits, teacher_logits, kind=kind, beta=beta, alpha=alpha, temperature=temperature,
            softcap=softcap, logit_scale=logit_scale, teacher_softcap=teacher_softcap,
            teacher_logit_scale=teacher_logit_scale,
        )  # fmt: skip
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, teacher_logits))
    shapes = ((logit_scale, softcap), (teacher_logit_scale, teacher_softcap))
    return _TokenDivergence.apply(*dense, inverse_temperature, shapes, rule, impl)


def check_alike(name: str, student: Tensor, teacher: Tensor, dim: int) -> None:
    """The teacher's size along `dim`, and its device, are the student's."""
    wanted, got = student.shape[dim], teacher.shape[dim]
    remedy = "Slice both to the vocabulary they share" if name != "hidden" else ""
    expect(got == wanted, f"teacher_{name}", f"{wanted} at dimension {dim}", got, remedy)
    expect(
        teacher.device == student.device, f"teacher_{name}", f"on {student.device}", teacher.device
    )
