"""Per-token log-probabilities, entropy and more from logits that already exist.

With x = softcap(logits) / temperature and target y (sums over the vocabulary):

    logp = x_y - log sum exp(x)          d logp    / d x_v = [v = y] - p_v
    lse = log sum exp(x)                 d lse     / d x_v = p_v
    entropy = -sum p log p               d entropy / d x_v = -p_v (log p_v + entropy)

Bytes moved: one read of the logits forward, one read and one write backward; with
`inplace_backward` the gradient takes the logits' memory. token_stats.py has the arithmetic.
Where the logits do not exist yet, `linear_logp` never makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fold import Logits, fold_backward, fold_forward
from .launch import choose_impl, differentiated_once, expect, has_values
from .token_stats import (
    OUTPUTS,
    TokenStats,
    coefficients,
    finalize,
    merge,
    parts_for,
    target_anchor,
)


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logp",),
) -> TokenStats:
    """Plain PyTorch; float64 stays float64, anything narrower is computed in float32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    x = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(x, dim=-1)
    stats = {"logp": log_p.gather(1, targets[:, None]).squeeze(1)}
    if "entropy" in outputs:
        p = log_p.exp()
        stats["entropy"] = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    if "lse" in outputs:
        stats["lse"] = x.logsumexp(-1)
    with torch.no_grad():
        if "mean_logit" in outputs:
            stats["mean_logit"] = x.mean(-1)
        if "log_sum_sq" in outputs:
            stats["log_sum_sq"] = (2 * log_p).logsumexp(-1)
        if "top1" in outputs:
            stats["top1"] = x.gather(1, targets[:, None]).squeeze(1) >= x.amax(-1)
    return TokenStats(**stats)


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, inverse_temperature, softcap, outputs, inplace, impl):
        raw_target = logits.gather(1, targets[:, None]).squeeze(1)
        anchor = target_anchor(raw_target, 1.0, softcap)
        block = Logits(logits, targets, anchor, inverse_temperature, softcap=softcap)
        sums = merge(fold_forward(impl, block, parts_for(outputs)))
        stats = finalize(sums, anchor, inverse_temperature, logits.shape[1], outputs)
        ctx.save_for_backward(logits, targets, inverse_temperature, anchor, sums)
        ctx.softcap, ctx.inplace, ctx.impl, ctx.overwritten = softcap, inplace, impl, False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in stats[3:] if x is not None))
        return tuple(stats)

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy, grad_lse, *_):
        differentiated_once("token_logp")
        if ctx.overwritten:
            raise RuntimeError(
                "token_logp: a second backward through logits that the first overwrote; "
                "pass inplace_backward=False"
            )
        logits, targets, inverse_temperature, anchor, sums = ctx.saved_tensors
        block = Logits(logits, targets, anchor, inverse_temperature, softcap=ctx.softcap)
        ctx.overwritten = ctx.inplace
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        fold_backward(ctx.impl, block, coefficients(sums, grad_logp, grad_entropy, grad_lse), grad)
        return grad, None, None, None, None, None, None


def token_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = ("logp",),
    inplace_backward: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """log softmax(softcap(logits) / temperature) at the targets, and what else is asked for.

    Args:
        logits: [N, V], float32, bfloat16 or float16 (float64 runs the reference); rows contiguous.
        targets: [N] int64 in [0, V). Pass only the rows that count: there is no ignore index.
        temperature: a positive number, or [N] for one per token; no gradient flows into it.
        softcap: c in c * tanh(logit / c), applied before the temperature; None for none.
        outputs: any of "logp", "entropy", "lse", "mean_logit", "log_sum_sq", "top1".
        inplace_backward: write the gradient over `logits`, whose values are then gone.
        impl: "auto", "reference", "torch", "cpu", "triton" or "cuda".

    Returns:
        TokenStats, float32 [N] each, in nats; None where not asked for.

    Raises:
        ValueError: a shape, dtype or value that does not fit; it names the tensor.
    """
    expect(logits.dim() == 2, "logits", "shape [N, V]", tuple(logits.shape))
    check_softcaps(softcap=softcap)
    inverse_temperature = check_common(targets, temperature, outputs, logits, logits.shape[1])
    if logits.dtype == torch.float64 and impl == "auto":
        impl = "reference"
    impl = choose_impl(impl, logits.device, ("cuda", "triton", "cpu", "torch"))
    if impl == "cpu" and logits.dtype == torch.float16:
        impl = "torch"  # x86 has no half arithmetic worth a kernel
    if impl == "reference":
        return reference(logits, targets, temperature=temperature, softcap=softcap, outputs=outputs)
    check_narrow("logits", logits)
    if logits.stride(-1) != 1 or logits.stride(0) < logits.shape[1]:  # or one row serves several
        logits = logits.contiguous()
    targets = targets.contiguous()  # kernels read by address
    return TokenStats(
        *_TokenLogp.apply(
            logits, targets, inverse_temperature, softcap, tuple(outputs), inplace_backward, impl
        )
    )


def check_common(
    targets: Tensor, temperature: float | Tensor, outputs, rows: Tensor, vocab: int
) -> Tensor:
    """The checks `token_logp` and `linear_logp` share; returns 1 / temperature, float32 [N]."""
    n, device = rows.shape[0], rows.device
    expect(rows.is_floating_point(), "input", "a floating-point dtype", rows.dtype)
    expect(targets.shape == (n,), "targets", f"shape [{n}]", tuple(targets.shape))
    expect(targets.dtype == torch.int64, "targets", "int64", targets.dtype)
    expect(targets.device == device, "targets", f"device {device}", targets.device)
    unknown = set(outputs) - set(OUTPUTS)
    expect(not unknown, "outputs", f"any of {', '.join(OUTPUTS)}", sorted(unknown))
    in_range = ((targets >= 0) & (targets < vocab)).all()
    if device.type == "cpu":
        bad = None if in_range else targets[(targets < 0) | (targets >= vocab)][0].item()
        remedy = "Pass only the rows that count; there is no ignore index"
        expect(bad is None, "targets", f"values in [0, {vocab})", bad, remedy)
    else:  # checked on the device: reading the answer here would wait for the GPU
        torch._assert_async(in_range, f"targets: wanted values in [0, {vocab})")
    return inverse_of(temperature, n, device)


def check_narrow(name: str, x: Tensor) -> None:
    """For implementations whose statistics are float32."""
    remedy = "float64 runs the reference, by impl='auto'"
    expect(x.dtype != torch.float64, name, "at most float32 for this impl", x.dtype, remedy)


def check_softcaps(**softcaps: float | None) -> None:
    """By name. A cap of 0, as some configurations write none, would make every logit 0."""
    for name, cap in softcaps.items():
        expect(cap is None or cap > 0, name, "a positive number, or None for no cap", cap)


def inverse_of(
    temperature: float | Tensor, n: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """1 / temperature of each of n tokens, [n], after its checks."""
    if isinstance(temperature, Tensor):
        expect(
            temperature.shape == (n,), "temperature", f"a number or [{n}]", tuple(temperature.shape)
        )
        if has_values(temperature) and temperature.device.type == "cpu" and n:
            least = temperature.min().item()
            expect(least > 0, "temperature", "positive numbers", f"{least:g} among them")
        return temperature.detach().to(device, dtype).reciprocal()
    expect(temperature > 0, "temperature", "a positive number", temperature)
    return torch.full((n,), 1.0 / temperature, dtype=dtype, device=device)
