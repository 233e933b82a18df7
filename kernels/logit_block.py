"""What the Triton kernels of logits share: a block loaded, made final but for the temperature."""

from __future__ import annotations

import math

from .launch import tl, triton

LOG2E, LN2 = tl.constexpr(1 / math.log(2)), tl.constexpr(math.log(2))  # exp2 is one instruction


@triton.jit
def final_block(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z x scale, softcapped, in float32; and the softcap's slope there."""
    z *= scale
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        # tanh through exp(-2|z|): exact at both ends, no overflow
        decay = tl.exp(-2.0 * tl.abs(z / softcap))
        t = (1.0 - decay) / (1.0 + decay)
        t = tl.where(z < 0, -t, t)
        slope = 1.0 - t * t
        z = t * softcap
    return z, slope


@triton.jit
def logit_block(raw, bias, columns, inside, scale, softcap,
                HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """(raw + bias), made final."""
    z = tl.load(raw + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    return final_block(z, scale, softcap, HAS_SOFTCAP)
