"""(model, PackedBatch) -> TokenStats: hidden states by the model, the rest by the fused head."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefuse.kernels.head_plan import plan
from prefuse.kernels.linear_logp import linear_logp, linear_token_loss
from prefuse.kernels.vocab_shard import whole_head

from .attention import Opaque, ask_for_no_mask
from .batch import PackedBatch, pack, pad
from .data import Example, Sequence
from .errors import UserError
from .lora import base_of, without_adapters
from .model import head_options, output_head
from .sharding import is_sharded, local_rows
from .weights import copied


class Scorer(nn.Module):
    """A model that scores packed batches. FSDP wraps it whole, so that a head it shards is
    gathered, and its gradient reduced, by its own hooks around `forward`; a head in shards of our
    own (sharding.py) is read as it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: str = "shared",
        head_budget: int | None = None,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.model: PreTrainedModel = model
        self.layout = layout
        self.head_budget = head_budget
        self.temperature = temperature
        self.options = head_options(model)

    def plan(self, device: torch.device) -> str:
        """How the head will run, in words."""
        weight = output_head(self.model).weight
        most = plan(
            1 << 40, len(weight), weight.dtype, budget_bytes=self.head_budget, device=device
        )
        return (
            f"stash of up to {most.stash_bytes >> 20} MiB, the exponentials of {most.stash_rows} "
            "scored tokens a micro-batch; the rest is recomputed"
        )

    def forward(
        self, batch: PackedBatch, outputs: tuple[str, ...] = ("logp",), token_loss=None, extras=()
    ):
        """TokenStats of the scored tokens; with `token_loss`, its loss [M] and the TokenStats."""
        rows = hidden_states(self.model, self.layout, batch)[batch.score_rows]
        head = output_head(self.model)
        weight, place = local_rows(head.weight)
        options = dict(
            self.options._asdict(),
            bias=None if head.bias is None else local_rows(head.bias)[0],
            outputs=outputs,
            temperature=self.temperature,
            budget_bytes=self.head_budget,
            group=place,
        )
        if token_loss is None:
            return linear_logp(rows, weight, batch.targets, **options)
        return linear_token_loss(rows, weight, batch.targets, token_loss, *extras, **options)

    def own_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits [L, V] of one sequence, by its public forward."""
        head = output_head(self.model)
        weight, place = local_rows(head.weight)
        if place is not None:  # it would not know what to do with a part of its rows
            bias = None if head.bias is None else local_rows(head.bias)[0]
            every, biases = whole_head(weight, bias, place)
            head.forward = lambda input: F.linear(input.to(every.dtype), every, biases)
        kwargs = {}
        if self.layout != "padded":
            ends = [0, len(tokens)]
            kwargs["cu_seq_lens_q"] = torch.tensor(ends, dtype=torch.int32, device=tokens.device)
        try:
            out = self.model(input_ids=tokens[None], use_cache=False, **kwargs)
        finally:
            if place is not None:
                del head.forward
        return out.logits[0].float() / self.temperature


class Unadapted:
    """A scorer without its adapters: a reference that costs a pass and no memory."""

    def __init__(self, scorer: nn.Module):
        self.scorer = scorer

    @property
    def layout(self):
        return self.scorer.layout

    def __call__(self, batch, *options):
        with torch.no_grad(), without_adapters(self.scorer):
            return self.scorer(batch, *options)

    @cached_property
    def model(self) -> Any:
        """A model object for samplers, on the same tensors; where those are in shards on copies, so
        that it is a collective call."""
        model: Any = self.scorer.model
        return copied(model, model.dtype, adapted=False) if is_sharded(model) else base_of(model)


def hidden_states(model: PreTrainedModel, layout: str, batch: PackedBatch) -> Tensor:
    """Final hidden states [T, H] of the packed tokens, whatever the layout."""
    body = model.base_model
    if layout == "padded":
        rectangle = pad(batch, pad_token_id=0)
        out = body(
            input_ids=rectangle.input_ids,
            attention_mask=rectangle.attention_mask,
            use_cache=False,
        )
        return out.last_hidden_state.flatten(0, 1)[rectangle.rows]
    out = body(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        use_cache=False,  # with a cache, packed rows would mix
        cu_seq_lens_q=batch.cu_seqlens,
        prefix=Opaque(batch.prefix),
    )
    ask_for_no_mask(model)
    return out.last_hidden_state[0]


def probe_examples(vocab: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int):
        return torch.randint(vocab, (n,), generator=generator).numpy()

    examples = []
    for index, (prompt, tails) in enumerate(((5, (4, 7)), (3, (6, 2)))):
        shared = draw(prompt)
        sequences = []
        for tail in tails:
            tokens = torch.cat([torch.from_numpy(shared), torch.from_numpy(draw(tail))]).numpy()
            scored = torch.ones(len(tokens), dtype=torch.bool).numpy()
            scored[0] = False
            sequences.append(Sequence(tokens, scored))
        examples.append(Example(index, tuple(sequences)))
    return examples


@torch.no_grad()
def probe(scorer: Scorer, device: torch.device, tolerance: float = 1e-3) -> float:
    """Stops a run whose layout or head would compute something else than the model does.

    Scores a few short sequences packed, and each alone through the model's own logits; then
    changes one sequence and asks that no other moves. Returns the largest difference in nats.
    """
    model = scorer.model
    vocab = output_head(model).weight.shape[0]
    examples = probe_examples(vocab)
    share = scorer.layout == "shared"
    batch = pack(examples, share).to(device)
    packed = scorer(batch).logp
    alone = []
    for example in examples:
        for sequence in example.sequences:
            tokens = torch.from_numpy(sequence.tokens).to(device)
            logits = scorer.own_logits(tokens)
            alone.append(logits[:-1].log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1))
    if not all(x.isfinite().all() for x in alone):
        raise UserError(
            "probe: the model's own log-probs are not finite, so its weights are broken; load "
            "another, or look at its dtype"
        )
    difference = float((packed - torch.cat(alone)).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"probe: packed log-probs differ from the model's own by {difference:.2g} nats "
            f"(allowed {tolerance:.0e}), so its attention or its head is not what the packed path "
            "computes; pass --layout padded, or report the model"
        )
    first = examples[0].sequences[0]  # all others stand after it, where causal attention looks back
    first.tokens[-2] = (first.tokens[-2] + 1) % vocab
    changed = scorer(pack(examples, share).to(device)).logp
    leak = float((changed - packed)[int(first.scored.sum()) :].abs().max())
    if leak != 0:
        raise UserError(
            f"probe: changing one packed sequence moved another by {leak:.2g} nats; sequences "
            "mix. Pass --layout padded"
        )
    return difference
