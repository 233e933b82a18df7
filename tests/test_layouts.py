"""Packed with shared prefixes, packed, padded: three layouts of one computation."""

import numpy as np
import pytest
import torch
from tiny import (
    assert_same_gradients,
    gradients,
    in_float64,
    ragged_pairs,
    relative_error,
    scorer_of,
    sequence,
    tiny_model,
)
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface

from prefuse.kernels.preference import BATCHWISE, LOSSES, inputs, preference_loss
from prefuse.trainer import objectives
from prefuse.trainer.attention import packed_attention_mask
from prefuse.trainer.batch import pack
from prefuse.trainer.data import Example, Sequence
from prefuse.trainer.errors import UserError
from prefuse.trainer.model import HeadOptions
from prefuse.trainer.scores import probe

LAYOUTS = ("shared", "packed", "padded")
MODELS = [("Llama", False), ("Llama", True), ("Qwen2", False), ("Qwen2", True)]
EXAMPLES, JUDGED = ragged_pairs(), ragged_pairs(judged=True)


def plain_logps(model, sequence) -> torch.Tensor:
    """Scored log-probs of one sequence by the model's own logits, one forward for itself."""
    tokens = torch.from_numpy(sequence.tokens)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    logp = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
    return logp[torch.from_numpy(sequence.scored)[1:]]


def oracle(model, reference, name: str) -> torch.Tensor:
    """Sum of the losses of EXAMPLES in float64, one sequence at a time."""
    if name == "sft":
        return -sum(plain_logps(model, s).sum() for e in EXAMPLES for s in e.sequences)
    loss = 0
    for example in JUDGED:
        logps = [plain_logps(model, s).sum()[None] for s in example.sequences]
        with torch.no_grad():
            refs = [plain_logps(reference, s).sum()[None] for s in example.sequences]
        lengths = [torch.tensor([s.scored.sum()]) for s in example.sequences]
        kwargs = dict(loss_type=name, chosen_len=lengths[0], rejected_len=lengths[1])
        for column in objectives.judged_columns(name):
            kwargs[column] = torch.tensor(example.judged)
        loss = loss + preference_loss(*logps, *refs, **kwargs).loss.sum()
    return loss


def method_of(name: str, reference, layout: str):
    if name == "sft":
        return objectives.sft()
    frozen = scorer_of(reference, layout) if "ref_chosen" in inputs(LOSSES[name]) else None
    return objectives.dpo(frozen and objectives.live_reference(frozen), name, {})


TRAINABLE = [
    name
    for name, loss in LOSSES.items()
    if objectives.PROVIDED | set(objectives.JUDGED) >= set(inputs(loss)) and name not in BATCHWISE
]
CASES = {(name, *model) for name in ("sft", "sigmoid", "ipo", "simpo") for model in MODELS}
CASES |= {(name, "Llama", True) for name in TRAINABLE}
# These weigh by the exponential of a log-ratio, and that is known to float32's rounding of the
# log-probs it is a difference of, not to float32's rounding of itself.
EXPONENTIAL = {"discopop", "fdpo_alpha", "fdpo_forward_kl"}


@pytest.mark.parametrize("name, family, tie", sorted(CASES))
def test_layouts_give_the_same_loss_and_gradients(name, family, tie):
    """In float32 to 1e-6, and in float64 to 1e-12, of a float64 oracle."""
    model = in_float64(tiny_model(family, tie=tie))
    reference = in_float64(tiny_model(family, tie=tie, seed=1))
    scorer_of(model, "padded"), scorer_of(reference, "padded")
    wanted = oracle(model, reference, name)
    wanted.backward()
    wanted_gradients = gradients(model)
    for layout in LAYOUTS:
        loss, found = by_layout(model, reference, name, layout)
        assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        assert_same_gradients(found, wanted_gradients, 1e-12)
    tolerance = 1e-6
    if name in EXPONENTIAL:
        with torch.no_grad():
            logps = [plain_logps(model, s).sum() for e in EXAMPLES for s in e.sequences]
        tolerance = torch.finfo(torch.float32).eps * float(torch.stack(logps).abs().max())
    model, reference = (tiny_model(family, tie=tie, seed=seed) for seed in (0, 1))
    for layout in LAYOUTS:
        loss, found = by_layout(model, reference, name, layout)
        assert_close(loss.double(), wanted.detach(), rtol=tolerance, atol=0)
        assert relative_error(found, wanted_gradients) <= tolerance


def by_layout(model, reference, name: str, layout: str):
    model.zero_grad()
    method = method_of(name, reference, layout)
    judged = name != "sft" and objectives.judged_columns(name)
    batch = pack(JUDGED if judged else EXAMPLES, layout == "shared")
    objective = method.objective(scorer_of(model, layout), batch)
    objective.loss.sum().backward()
    return objective.loss.sum().detach(), gradients(model)


def full_rows(batch) -> list[list[int]]:
    """What each token of a pack has before it and is: the sequence that ends there."""
    bounds = batch.cu_seqlens.tolist()
    tokens = batch.tokens.tolist()
    ends = []
    for s, parent in enumerate(batch.parent.tolist()):
        before = tokens[bounds[parent] : bounds[parent + 1]] if parent >= 0 else []
        own = tokens[bounds[s] : bounds[s + 1]]
        ends += [before + own[: i + 1] for i in range(len(own))]
    return ends


def draw_examples(rng: np.random.Generator, ways: int) -> list[Example]:
    """Rows of `ways` sequences over a vocabulary so small that common prefixes are everywhere."""
    examples = []
    for index in range(int(rng.integers(1, 7))):
        prompt = rng.integers(0, 3, rng.integers(0, 6))
        rows = [
            np.concatenate([prompt, rng.integers(0, 3, rng.integers(1, 8))]) for _ in range(ways)
        ]
        masks = [(rng.random(len(r)) < 0.6) & (np.arange(len(r)) > 0) for r in rows]
        sequences = (Sequence(r.astype(np.int64), m) for r, m in zip(rows, masks, strict=True))
        examples.append(Example(index, tuple(sequences)))
    return examples


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_every_scored_token_is_predicted_from_what_precedes_it(ways, share):
    rng = np.random.default_rng(0)
    for _ in range(60):
        examples = draw_examples(rng, ways)
        batch = pack(examples, share)
        ends = full_rows(batch)
        sequences = [s for e in examples for s in e.sequences]
        wanted = [
            (sequence.tokens[:place].tolist(), sequence.tokens[place])
            for sequence in sequences
            for place in np.flatnonzero(sequence.scored)
        ]
        assert [ends[r] for r in batch.score_rows] == [before for before, _ in wanted]
        assert batch.targets.tolist() == [target for _, target in wanted]
        assert batch.score_cu_seqlens.diff().tolist() == [s.scored.sum() for s in sequences]
        assert batch.positions.tolist() == [len(end) - 1 for end in ends]
        assert batch.n_tokens == sum(len(s.tokens) for s in sequences)
        assert len(batch.tokens) <= batch.n_tokens and (share or not (batch.parent >= 0).any())
        assert batch.count("token") == len(wanted) and batch.count("group") == len(examples)


def test_a_shared_prefix_stands_once():
    prompt = np.arange(2, 12)
    pair = [sequence(np.concatenate([prompt, tail]), 10) for tail in ([20, 21], [22])]
    batch = pack([Example(0, tuple(pair))])
    assert batch.tokens.tolist() == [*range(2, 12), 20, 21, 22]
    assert batch.parent.tolist() == [-1, 0, 0]
    assert batch.score_rows.tolist() == [9, 10, 9] and batch.targets.tolist() == [20, 21, 22]
    assert batch.n_tokens == 23


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sft", "sigmoid"])
def test_an_empty_batch_has_zero_gradients(name, layout):
    """A rank with nothing to do still takes part in every collective of the backward."""
    model = tiny_model()
    method = method_of(name, tiny_model(seed=1), layout)
    objective = method.objective(scorer_of(model, layout), pack([], layout == "shared"))
    assert objective.loss.shape == (0,)
    objective.loss.sum().backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_row(layout):
    model = tiny_model()
    example = Example(0, (sequence(np.array([5, 6, 7, 8]), 1),))
    scorer = scorer_of(model, layout)
    got = scorer(pack([example], layout == "shared")).logp
    assert_close(got, plain_logps(scorer_of(model, "padded").model, example.sequences[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Qwen3", "Gemma"])
def test_probe_passes_on_good_models(family, layout):
    changes = {"head_dim": 8} if family in ("Gemma", "Qwen3") else {}
    scorer = scorer_of(tiny_model(family, **changes), layout).eval()
    assert probe(scorer, torch.device("cpu")) < 1e-5


def mixing(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that sees the whole pack as one sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_probe_stops_a_model_whose_sequences_mix(layout):
    AttentionInterface.register("mixing", mixing)
    AttentionMaskInterface.register("mixing", packed_attention_mask)
    scorer = scorer_of(tiny_model(), layout).eval()
    scorer.model.set_attn_implementation("mixing")
    with pytest.raises(UserError, match="differ from the model's own.*--layout padded"):
        probe(scorer, torch.device("cpu"))


def test_probe_sees_a_leak_too_small_for_the_comparison():
    scorer = scorer_of(tiny_model(), "packed").eval()
    scorer.model.set_attn_implementation("mixing")
    with pytest.raises(UserError, match="changing one packed sequence moved another"):
        probe(scorer, torch.device("cpu"), tolerance=float("inf"))


@pytest.mark.parametrize("options", [HeadOptions(logit_scale=0.5), HeadOptions(softcap=0.5)])
def test_probe_stops_a_wrong_head(options):
    scorer = scorer_of(tiny_model()).eval()
    scorer.options = options
    with pytest.raises(UserError, match="its attention or its head"):
        probe(scorer, torch.device("cpu"))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.3}),
        ("FalconH1", dict(lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)),
    ],
)
def test_head_options_are_those_of_the_model(family, changes):
    """Some scale their logits, some divide them: the probe would stop a wrong sign."""
    layout = "padded" if family == "FalconH1" else "shared"
    scorer = scorer_of(tiny_model(family, tie=True, **changes), layout).eval()
    assert scorer.options.logit_scale == pytest.approx(0.3, rel=0.2)
    assert probe(scorer, torch.device("cpu")) < 1e-5
