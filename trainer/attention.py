"""packed_attention as transformers' attention interface: what a model asks for reaches the op, and
what the op cannot honour is refused rather than dropped."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from prefuse.kernels.attention import packed_attention
from prefuse.kernels.launch import expect
from prefuse.kernels.prefix import PrefixTable

ATTENTION = "prefuse"
MASKLESS = "prefuse_maskless"  # the same, for models of which it is known that they need no mask


class Opaque:
    """A batch's table on its way through compiled layers, which look into no attribute of it: a
    tuple they would compile again for every batch."""

    __slots__ = ("table",)

    def __init__(self, table: PrefixTable):
        self.table = table


@torch.compiler.disable  # one opaque op to torch.compile: its loop over segments is not for tracing
def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    prefix: PrefixTable | Opaque | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`packed_attention` with the signature of transformers' attention interface.

    query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None). `cu_seq_lens_q` (or
    `prefix`, which holds it) reaches it as a keyword of the model's call. What a model asks for and
    this cannot honour raises a ValueError rather than being dropped.
    """
    prefix = prefix.table if isinstance(prefix, Opaque) else prefix
    refused = _refusal(query, key, attention_mask, dropout, softcap, s_aux, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if refused is None and not causal:
        refused = "the layer is not causal"
    if refused is None and cu_seq_lens_q is None and prefix is None:
        refused = "neither cu_seq_lens_q nor prefix came with the model's call"
    if refused is not None:
        raise ValueError(
            f"packed attention: {refused}. Call the model on one packed row with "
            "attention_mask=None, use_cache=False and cu_seq_lens_q=..., or use "
            "model.set_attn_implementation('sdpa')"
        )
    if cu_seq_lens_q is None:
        assert prefix is not None
        cu_seq_lens_q = prefix.cu_seqlens
    if sliding_window is not None:
        longest = prefix.longest_row if prefix is not None else max_length_q
        longest = int(cu_seq_lens_q.diff().max()) if longest is None else longest
        expect(
            longest <= sliding_window,
            "sliding_window",
            f"at least the longest row ({longest} tokens)",
            sliding_window,
            "Shorten the rows or use model.set_attn_implementation('sdpa') without packing",
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = packed_attention(q, k, v, cu_seq_lens_q, prefix, scale=scaling, max_seqlen=max_length_q)
    return out.unsqueeze(0), None


def _refusal(query, key, attention_mask, dropout, softcap, s_aux, others: dict) -> str | None:
    """What transformers asks of a layer that packed attention does not do, or None."""
    if query.shape[0] != 1:
        return f"wanted one packed row, got a batch of {query.shape[0]}"
    if key.shape[2] != query.shape[2]:
        return f"{key.shape[2]} keys for {query.shape[2]} queries: a cache or cross-attention"
    if attention_mask is not None:
        return "an attention mask would be ignored"
    if dropout:
        return f"attention dropout is not supported (attention_dropout={dropout})"
    if softcap is not None:
        return f"attention softcap is not supported (attn_logit_softcapping={softcap})"
    if s_aux is not None:
        return "attention sinks are not supported"
    if others.get("position_bias") is not None:
        return "a position bias is not supported"
    return None


def packed_attention_mask(
    *args,
    q_length: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config=None,
    **kwargs,
) -> None:
    """The mask function to register beside `packed_attention_forward`: there is no mask.

    Raises where a mask would have said something that the layer does not hear of again.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if attention_mask is not None:
        reason = "a padding mask would be ignored; pack without padding, attention_mask=None"
    elif use_vmap:
        reason = "the model overlays its own mask on the causal one"
    elif chunk is not None and local_size == chunk and q_length > chunk:
        reason = (
            f"the model attends in chunks of {chunk} tokens, shorter than the pack ({q_length})"
        )
    else:
        return None
    raise ValueError(f"packed attention: {reason}, or use model.set_attn_implementation('sdpa')")


def ask_for_no_mask(model) -> None:
    """After a forward pass whose mask said nothing, as ours always says: transformers, to make the
    next one, would wait for the GPU to look whether rows are packed."""
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation(MASKLESS)


for name in (ATTENTION, MASKLESS):
    AttentionInterface.register(name, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION, packed_attention_mask)
