"""Packed attention inside transformers' models: packed and shared rows equal separate ones."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from prefuse.kernels.attention import prefix_table
from prefuse.trainer.attention import (
    ATTENTION,
    packed_attention_forward,
    packed_attention_mask,
)
from prefuse.trainer.model import load_model
from prefuse.trainer.scores import Scorer, probe

TINY = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tiny_model(family: str, **changes):
    config = getattr(transformers, f"{family}Config")(**TINY | {"num_key_value_heads": 2} | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def pack(prompts: list[int], children: list[list[int]]):
    """tokens, positions, cu_seqlens, parent; children[i] are the lengths that continue prompt i."""
    tokens = [torch.randint(53, (n,)) for n in [*prompts, *sum(children, [])]]
    parent = [-1] * len(prompts) + [i for i, group in enumerate(children) for _ in group]
    starts = [prompts[p] if p >= 0 else 0 for p in parent]
    positions = [torch.arange(len(t)) + s for t, s in zip(tokens, starts, strict=True)]
    return tokens, torch.cat(positions)[None], bounds_of([len(t) for t in tokens]), parent


def rows_of(tokens, parent):
    """The same sequences unshared: [(row, segment, where the segment starts in the row)]."""
    for s, p in enumerate(parent):
        row = tokens[s] if p < 0 else torch.cat([tokens[p], tokens[s]])
        yield row, s, 0 if p < 0 else len(tokens[p])


def loss_and_grads(model, hidden, weights):
    model.zero_grad()
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_packed_model_equals_separate_forwards(family, dtype, checkpointing):
    model = tiny_model(family).train().to(dtype)
    tokens, positions, cu, parent = pack([7, 4, 9], [[3, 5], [1], [2, 8, 6]])
    weights = torch.randn(int(cu[-1]), 32, dtype=dtype)

    model.set_attn_implementation("sdpa")
    alone = [
        model.model(input_ids=row[None], use_cache=False).last_hidden_state[0, start:]
        for row, _, start in rows_of(tokens, parent)
    ]
    wanted = torch.cat(alone)
    wanted_grads = loss_and_grads(model, wanted, weights)

    model.set_attn_implementation(ATTENTION)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = model.model(
        input_ids=torch.cat(tokens)[None],
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=cu,
        prefix=prefix_table(cu, parent),
    ).last_hidden_state[0]
    grads = loss_and_grads(model, packed, weights)

    assert_close(packed, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())
    assert grads.keys() == wanted_grads.keys()
    # A key projection's gradient is the small remainder of large terms: in float32 its error is
    # theirs. In float64 every parameter is held to its own scale (norms still round to float32).
    scales = {name: grad.abs().max().item() for name, grad in wanted_grads.items()}
    for name, grad in grads.items():
        scale = scales[name] if dtype == torch.float64 else max(scales.values())
        assert_close(grad, wanted_grads[name], rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_whole_model_passes_the_table_on(family):
    """`model(...)` and `model.model(...)`, with the table alone or cu_seq_lens_q alone."""
    model = tiny_model(family).eval()
    model.set_attn_implementation(ATTENTION)
    tokens, positions, cu, parent = pack([5, 4], [[], []])
    row = dict(input_ids=torch.cat(tokens)[None], position_ids=positions, use_cache=False)
    hidden = model.model(**row, prefix=prefix_table(cu, parent)).last_hidden_state
    logits = model(**row, cu_seq_lens_q=cu).logits
    assert torch.equal(model.lm_head(hidden), logits)
    model.set_attn_implementation("eager")
    for tokens_of_row, s, _ in rows_of(tokens, parent):
        alone = model(input_ids=tokens_of_row[None], use_cache=False).logits[0]
        assert_close(logits[0, cu[s] : cu[s + 1]], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, attention", [("Gemma2", "eager"), ("Llama", "sdpa")])
def test_padded_layouts_take_the_attention_that_a_model_has(family, attention, tmp_path):
    tiny_model(family, head_dim=8).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, layout="padded")
    assert model.config._attn_implementation == attention
    assert probe(Scorer(model, "padded").eval(), torch.device("cpu")) < 1e-4


def test_models_that_ask_for_more_are_refused():
    tokens, positions, cu, parent = pack([5, 4], [[3], [2]])
    table = prefix_table(cu, parent)
    row = dict(input_ids=torch.cat(tokens)[None], position_ids=positions, use_cache=False)

    def call(model, **options):
        model.set_attn_implementation(ATTENTION)
        return model(**row | dict(prefix=table) | options)

    with pytest.raises(ValueError, match="softcap is not supported"):
        call(tiny_model("Gemma2", head_dim=8))
    with pytest.raises(ValueError, match=r"attention_dropout=0\.5"):
        call(tiny_model("Llama", attention_dropout=0.5).train())
    with pytest.raises(ValueError, match=r"sliding_window: wanted at least the longest row \(8"):
        call(tiny_model("Mistral", sliding_window=7))
    with pytest.raises(ValueError, match="neither cu_seq_lens_q nor prefix"):
        call(tiny_model("Llama"), prefix=None)
    with pytest.raises(ValueError, match="padding mask would be ignored"):
        call(tiny_model("Llama"), attention_mask=torch.ones_like(row["input_ids"]))
    with pytest.raises(ValueError, match="wanted one packed row"):
        call(tiny_model("Llama"), input_ids=row["input_ids"].expand(2, -1))
    with pytest.raises(ValueError, match="attends in chunks of 6 tokens"):
        packed_attention_mask(
            q_length=14, local_size=6, config=type("Config", (), {"attention_chunk_size": 6})
        )
    with pytest.raises(ValueError, match="overlays its own mask"):
        packed_attention_mask(use_vmap=True)
    model = tiny_model("Mistral", sliding_window=8)
    assert call(model).logits.isfinite().all()


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"s_aux": torch.zeros(4)}, "sinks are not supported"),
        ({"position_bias": torch.zeros(1)}, "position bias is not supported"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "attention mask would be ignored"),
        ({"key": torch.zeros(1, 2, 6, 8)}, "6 keys for 5 queries"),
    ],
)
def test_layer_arguments_that_are_refused(asked, message):
    x = torch.zeros(1, 2, 5, 8)
    given = dict(query=x, key=x, value=x, attention_mask=None, cu_seq_lens_q=bounds_of([5])) | asked
    with pytest.raises(ValueError, match=message):
        packed_attention_forward(torch.nn.Module(), **given)
