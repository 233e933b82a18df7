"""Attention over one packed row: causal inside each segment, whole over a shared prefix.

A pack of T tokens holds S segments, `cu_seqlens [S+1]`. Segment s may continue a prefix segment
`parent[s]`: its token t attends to its own segment up to t and to all of the parent, that is

    out_t = sum_j softmax_j(scale * q_t . k_j) v_j     over j in own(t), j <= t, and j in prefix(t)

which splits over the two key sets. With (out1, lse1) and (out2, lse2) the attention and log-sum-exp
over each set alone,

    lse = log(e^lse1 + e^lse2),   share = e^(lse2 - lse),   out = (1 - share) out1 + share out2

Two calls of a variable-length flash kernel: one causal over every segment; one not causal, with a
query segment per prefix (all its children, adjacent) against the prefix. Nothing is copied per
child and no mask exists. The backward of a flash kernel rebuilds p_tj = e^(scale q_t . k_j - lse_t)
and ds_tj = p_tj (dout_t . v_j - dout_t . out_t) from what it is given: given the *merged* out and
lse, each call returns exactly its keys' part of the whole gradient, so dq, dk and dv are sums.

FLOPs: 4 D per (query, key) pair and query head forward, 10 D backward. Bytes: q, k, v, out, dout,
dq, dk and dv once each, and one pass over the children's out for the merge. On a GPU a flash
backward sums dq with atomics unless `torch.use_deterministic_algorithms(True)`.

On a CPU each call is a loop over segments of torch's own flash kernel, grouped query heads served
by stride. The kernels for a GPU ("flash_attn", "torch") are thin wrappers of the same form.

Papers: arXiv:2205.14135, arXiv:2307.08691 (FlashAttention 1, 2); arXiv:2402.05099 (the split of a
shared prefix).

Shapes: T tokens, Hq query heads, Hkv key heads (Hq is a multiple of it), D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_merge import merge
from .launch import differentiated_once, expect, has_values
from .prefix import PrefixTable, check_layout
from .prefix import prefix_table as prefix_table  # callers import both from here

try:
    from flash_attn import flash_attn_interface
except ImportError:
    flash_attn_interface: Any = None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: PrefixTable | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Dense softmax per segment in the input's dtype; the oracle, and float32 on a GPU."""
    scores_scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = cu_seqlens.tolist()
    parents = prefix.parent if prefix is not None else (-1,) * (len(bounds) - 1)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    outs = []
    for (start, stop), p in zip(pairwise(bounds), parents, strict=True):
        shared = slice(bounds[p], bounds[p + 1]) if p >= 0 else slice(0, 0)
        own = slice(start, stop)
        segment_keys = torch.cat([keys[shared], keys[own]])
        segment_values = torch.cat([values[shared], values[own]])
        scores = torch.einsum("qhd,khd->hqk", q[own], segment_keys) * scores_scale
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(keys[shared]))
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, segment_values))
    return torch.cat(outs) if outs else values + 0 * (q.sum() + k.sum())


class Segments(NamedTuple):
    """What one flash call is about: entry i lets queries cu_q[i]:cu_q[i+1] see keys of cu_k."""

    cu_q: Tensor  # [n+1] int32
    cu_k: Tensor  # [n+1] int32
    max_q: int
    max_k: int
    causal: bool
    scale: float


class Flash(NamedTuple):
    """A variable-length flash attention; the rest of this file is the same for each of them.

    forward(q, k, v, segments) -> out, lse [Hq, Tq]
    backward(dout, q, k, v, out, lse, segments) -> dq, dk, dv

    Queries of an entry without keys may get any out, lse and dq; keys without queries get zeros.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _slices(segments: Segments):
    """(rows, keys) of each entry that has keys; the rows may be empty."""
    bounds = zip(pairwise(segments.cu_q.tolist()), pairwise(segments.cu_k.tolist()), strict=True)
    return [(slice(*q), slice(*k)) for q, k in bounds if k[0] < k[1]]


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] -> [Hkv, H / Hkv, T, D], a view: key heads as a batch serve grouped queries."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _cpu_forward(q, k, v, segments):
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # As the kernel accumulates: double for double, float for everything narrower.
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=statistics)
    out_view, lse_view = _by_kv_head(out, kv_heads), lse.unflatten(0, (kv_heads, group))
    q, k, v = (_by_kv_head(x, kv_heads) for x in (q, k, v))
    k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    causal, scale = segments.causal, segments.scale
    for rows, keys in _slices(segments):
        if rows.start == rows.stop:
            continue
        out_view[:, :, rows], lse_view[:, :, rows] = flash(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
        )
    return out, lse


def _cpu_backward(dout, q, k, v, out, lse, segments):
    kv_heads, group, dtype = k.shape[1], q.shape[1] // k.shape[1], q.dtype
    # Without bf16 instructions the kernel's bf16 backward is 5 times slower than its float32 one.
    dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dq, dk, dv = (_by_kv_head(x, kv_heads) for x in grads)
    dout, q, k, v, out = (_by_kv_head(x, kv_heads) for x in (dout, q, k, v, out))
    k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
    lse = lse.unflatten(0, (kv_heads, group))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    causal, scale = segments.causal, segments.scale
    for rows, keys in _slices(segments):
        if rows.start == rows.stop:
            dk[:, :, keys], dv[:, :, keys] = 0, 0
            continue
        given = [dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]]
        given += [out[:, :, rows], lse[:, :, rows]]
        dq[:, :, rows], dk_heads, dv_heads = flash(*given, 0.0, causal, scale=scale)
        torch.sum(dk_heads, 1, keepdim=True, out=dk[:, :, keys])
        torch.sum(dv_heads, 1, keepdim=True, out=dv[:, :, keys])
    dq, dk, dv = (grad.to(dtype) for grad in grads)
    return dq, dk, dv


def _torch_forward(q, k, v, segments):
    *bounds, causal, scale = segments
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *bounds, dropout_p=0.0, is_causal=causal, return_debug_mask=False, scale=scale
    )
    return out, lse


def _torch_backward(dout, q, k, v, out, lse, segments):
    *bounds, causal, scale = segments
    # Both belong to dropout, which is off; torch.nn.attention.varlen fills them in the same way.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *bounds, 0.0, causal, rng_state, unused, scale=scale
    )


def _flash_attn_forward(q, k, v, segments):
    """flash-attn >= 2.7. Written from its source; not run yet."""
    *bounds, causal, scale = segments
    out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
        q, k, v, *bounds, dropout_p=0.0, softmax_scale=scale, causal=causal
    )
    return out, lse


def _flash_attn_backward(dout, q, k, v, out, lse, segments):
    """flash-attn >= 2.7. Written from its source; not run yet."""
    *bounds, causal, scale = segments
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=causal, softcap=0.0)
    options |= dict(window_size_left=-1, window_size_right=-1, alibi_slopes=None)
    options |= dict(deterministic=torch.are_deterministic_algorithms_enabled())
    flash_attn_interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, *bounds, **options
    )
    return grads


# Best first: "auto" takes the first that fits.
KERNELS = {
    "cpu": Flash(_cpu_forward, _cpu_backward),
    "flash_attn": Flash(_flash_attn_forward, _flash_attn_backward),
    "torch": Flash(_torch_forward, _torch_backward),
}


def _obstacle(impl: str, q: Tensor, v: Tensor) -> str | None:
    """Why `impl` cannot take these tensors, or None if it can."""
    head_size = q.shape[-1]
    if v.shape[-1] != head_size:
        return f"value heads must have the queries' size ({head_size}), not {v.shape[-1]}"
    if impl == "cpu":
        return None if q.device.type == "cpu" else f"it takes CPU tensors, not {q.device.type}"
    if q.device.type != "cuda":
        return f"it takes CUDA tensors, not {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16, not {q.dtype}; cast, or run under autocast"
    if head_size % 8 or head_size > 256:
        return f"the head size must be a multiple of 8 up to 256, not {head_size}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs an Ampere GPU (sm_80) or newer"
    if impl == "flash_attn" and flash_attn_interface is None:
        return "flash-attn is not installed; `pip install prefuse[flash]`"
    return None


def _choose(impl: str, q: Tensor, v: Tensor) -> str:
    """As launch.choose_impl, for libraries' kernels, which also depend on dtype and head size."""
    if impl == "auto":
        return next((name for name in KERNELS if _obstacle(name, q, v) is None), "reference")
    choices = ("auto", "reference", *KERNELS)
    expect(impl in choices, "impl", f"one of {', '.join(choices)}", repr(impl))
    obstacle = None if impl == "reference" else _obstacle(impl, q, v)
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}. impl='auto' always can")
    return impl


def _calls(table: PrefixTable, scale: float) -> tuple[Segments, Segments, slice, slice]:
    """The causal call, the prefix call, and the rows and keys of the pack the latter is about.

    Told that no entry has a second query, a flash kernel takes another path for grouped heads,
    which fails for empty entries and lays lse out in another way: so the bounds are 2 at least.
    """
    cu, longest = table.cu_seqlens, max(table.max_segment, 2)
    own = Segments(cu, cu, longest, longest, True, scale)
    shared = Segments(table.cu_q, table.cu_k, max(table.max_q, 2), table.max_k, False, scale)
    return own, shared, slice(*table.queries), slice(*table.keys)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, table: PrefixTable, scale: float, flash: Flash):
        own, shared, rows, keys = _calls(table, scale)
        out, lse = flash.forward(q, k, v, own)
        if rows.stop:
            part = flash.forward(q[rows], k[keys], v[keys], shared)
            merge(out[rows], lse[:, rows], *part, table.has_prefix)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.table, ctx.scale, ctx.flash = table, scale, flash
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        differentiated_once("packed_attention")
        dout = dout.contiguous()
        q, k, v, out, lse = ctx.saved_tensors
        flash, has_prefix = ctx.flash, ctx.table.has_prefix
        own, shared, rows, keys = _calls(ctx.table, ctx.scale)
        dq, dk, dv = flash.backward(dout, q, k, v, out, lse, own)
        if rows.stop:
            # The merged out and lse make the kernel's p and ds those of the whole softmax.
            merged = out[rows], lse[:, rows].contiguous()
            part = flash.backward(dout[rows], q[rows], k[keys], v[keys], *merged, shared)
            if has_prefix is None:
                dq[rows] += part[0]
            else:
                dq[rows] += part[0].masked_fill(~has_prefix[:, None, None], 0)
            dk[keys] += part[1]
            dv[keys] += part[2]
        return dq, dk, dv, None, None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: PrefixTable | None = None,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention inside every segment, and over the whole of the prefix it continues.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], Hq a multiple of Hkv.
        cu_seqlens: [S+1] int32 segment bounds, 0 to T.
        prefix: `prefix_table(cu_seqlens, parent)`, built once per batch. A table without any parent
            is fine, and spares a GPU the sync described under `max_seqlen`.
        scale: of the scores; D ** -0.5 if None.
        max_seqlen: longest segment, used without a table. If None it is read from `cu_seqlens`: on
            a GPU one host sync per call.
        impl: "cpu"; "flash_attn" (the package) or "torch" (its own kernels) on CUDA, for float16
            and bfloat16; "reference", dense per segment, which is also what "auto" falls back to
            for float32 on a GPU: no flash kernel takes it.

    Returns:
        [T, Hq, D] in q's dtype. Under autocast the inputs are cast as torch's own attention does.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, cu_seqlens, prefix)
    if not q.shape[0]:
        return v.repeat_interleave(q.shape[1] // k.shape[1], 1) + 0 * (q.sum() + k.sum())
    chosen = _choose(impl, q, v)
    if chosen == "reference":
        return reference(q, k, v, cu_seqlens, prefix, scale=scale)
    if prefix is None:
        prefix = _plain_table(cu_seqlens, q.shape[0], max_seqlen)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _PackedAttention.apply(q, k, v, prefix, scale, KERNELS[chosen])


def _plain_table(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> PrefixTable:
    """A table of segments without prefixes, from what the device knows."""
    longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
    none = (0, 0)
    return PrefixTable(
        tokens, cu_seqlens, (), longest, longest, none, none, cu_seqlens, cu_seqlens, 0, 0, None
    )


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: PrefixTable | None) -> None:
    expect(q.ndim == 3, "q", "[tokens, heads, head size]", tuple(q.shape))
    tokens, heads, head_size = q.shape
    expect(
        k.ndim == 3 and k.shape[0] == tokens and k.shape[2] == head_size,
        "k",
        f"[{tokens}, key heads, {head_size}], as q",
        tuple(k.shape),
    )
    expect(v.ndim == 3 and v.shape[:2] == k.shape[:2], "v", "k's tokens and heads", tuple(v.shape))
    expect(
        k.shape[1] > 0 and heads % k.shape[1] == 0,
        "q",
        f"a multiple of the {k.shape[1]} key heads",
        f"{heads} heads",
    )
    expect(
        q.is_floating_point() and q.dtype == k.dtype == v.dtype,
        "q, k, v",
        "one floating-point dtype",
        (q.dtype, k.dtype, v.dtype),
    )
    expect(
        cu_seqlens.ndim == 1 and cu_seqlens.numel() > 0 and cu_seqlens.dtype == torch.int32,
        "cu_seqlens",
        "[segments + 1] int32",
        f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}",
        "Pass cu_seqlens.int()",
    )
    places = {x.device for x in (q, k, v, cu_seqlens)}
    expect(len(places) == 1, "q, k, v, cu_seqlens", "one device", sorted(map(str, places)))
    if prefix is not None:
        expect(
            prefix.tokens == tokens and len(prefix.parent) == cu_seqlens.numel() - 1,
            "prefix",
            f"a table of {tokens} tokens in {cu_seqlens.numel() - 1} segments",
            f"{prefix.tokens} tokens in {len(prefix.parent)}",
            "Build it with prefix_table from this batch's cu_seqlens",
        )
        place = prefix.cu_seqlens.device
        expect(
            place == q.device, "prefix", f"tensors on {q.device}", place, "Use prefix.to(device)"
        )
        if place.type == "cpu" and has_values(cu_seqlens) and has_values(prefix.cu_seqlens):
            expect(
                torch.equal(prefix.cu_seqlens, cu_seqlens),
                "prefix",
                "a table of these cu_seqlens",
                "another batch's, as long as this one",
                "Build it with prefix_table from this batch's cu_seqlens",
            )
    elif cu_seqlens.device.type == "cpu":  # a GPU would have to be waited for
        check_layout(cu_seqlens.tolist(), [-1] * (cu_seqlens.numel() - 1))
        end = int(cu_seqlens[-1])
        expect(end == tokens, "cu_seqlens", f"to end at the {tokens} tokens of q", end)
