"""Models with a head of scores: loaded, read at tokens of a packed batch, called as a reward."""

from __future__ import annotations

from collections.abc import Sequence as Several
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from .attention import ATTENTION
from .batch import PackedBatch, pack
from .data import Example, Sequence
from .errors import UserError
from .lora import labels_of
from .model import can_share_prefixes, config_of, from_files, load_tokenizer
from .reward_data import answer, read_at_end, step_tokens
from .rows import Row
from .scores import hidden_states, probe_examples


class Scores(NamedTuple):
    """Of the scored tokens: what the model's own head says, and ODIN's second head."""

    values: Tensor  # [M] or [M, A], in float32 or better
    length: Tensor | None = None  # [M]
    weights: tuple[Tensor, Tensor] | None = None  # of the two heads


class RewardScorer(nn.Module):
    """A model that says a number at every scored token; FSDP wraps it whole.

    `length_head` is ODIN's second head: trained beside the model's own, and not exported with it.
    """

    def __init__(self, model: PreTrainedModel, layout: str, length_head: nn.Linear | None = None):
        super().__init__()
        self.model: Any = model
        self.layout = layout
        self.length_head = length_head

    def plan(self, device: torch.device) -> str:
        """What there is instead of a vocabulary, in words."""
        return f"{self.model.config.num_labels} a scored token"

    def forward(self, batch: PackedBatch) -> Scores:
        rows = hidden_states(self.model, self.layout, batch)[batch.token_rows]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        head, second = self.model.score, self.length_head
        with torch.autocast(rows.device.type, enabled=False):  # a margin is a small difference
            bias = None if head.bias is None else head.bias.to(rows.dtype)
            values = F.linear(rows, head.weight.to(rows.dtype), bias)
            values = values.squeeze(1) if values.shape[1] == 1 else values
            if second is None:
                return Scores(values)
            length = F.linear(rows, second.weight.to(rows.dtype)).squeeze(1)
        return Scores(values, length, (head.weight.clone(), second.weight.clone()))

    def own_score(self, tokens: Tensor, **options) -> Tensor:
        """What the model itself says of a sequence [1, L], by its public forward."""
        return self.model(input_ids=tokens, use_cache=False, **options).logits[0]


def load_scores(
    name: str,
    *,
    num_labels: int | None,
    dtype: torch.dtype,
    layout: str,
    seed: int = 0,
    pad_token_id: int | None = None,
    trust_remote_code: bool = False,
    zeros: bool = False,
    in_shards: bool = False,
) -> PreTrainedModel:
    """A saved model with its head; or a causal one with a fresh head of small numbers.

    num_labels: how many numbers it says; None takes a saved model as it is. zeros: the fresh head
    says 0. in_shards: without its weights if `shard` can read them.
    """
    try:
        labels = labels_of(name)
        config = config_of(name, trust_remote_code)
        saved = any("SequenceClassification" in a for a in config.architectures or ())
        if not saved or labels is not None:
            config.num_labels = labels or (1 if num_labels is None else num_labels)
        said = logging.get_verbosity()
        logging.set_verbosity(said if saved else logging.ERROR)  # of the head that is new
        try:
            model = from_files(
                AutoModelForSequenceClassification,
                name,
                config,
                in_shards,
                () if saved else ("score.weight",),
                dtype=dtype,
                attn_implementation=None if layout == "padded" else ATTENTION,
                trust_remote_code=trust_remote_code,
            )
        finally:
            logging.set_verbosity(said)
        saved = saved or labels is not None
    except Exception as error:
        raise UserError(f"{name}: no model with a head of scores loads from it: {error}") from error
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{name}: wanted a causal model with a linear head `score`; {type(model).__name__} has "
            "none"
        )
    if num_labels is not None and head.out_features != num_labels:
        raise UserError(
            f"{name}: wanted a head of {num_labels} numbers, as the loss reads; got "
            f"{head.out_features}. Begin from a causal model, or one with such a head"
        )
    if not saved:
        nn.init.zeros_(head.weight) if zeros else fresh_head(head, seed)
    text = model.config.get_text_config()
    model.config.pad_token_id = text.pad_token_id = (
        text.pad_token_id if pad_token_id is None else pad_token_id
    )
    model.config.use_cache = False
    return model


def fresh_head(head: nn.Linear, seed: int) -> nn.Linear:
    """Small numbers, the same for the same seed: standard deviation 1 / sqrt(hidden size + 1)."""
    generator = torch.Generator().manual_seed(seed)
    std = (head.in_features + 1) ** -0.5
    with torch.no_grad():
        drawn = torch.empty(head.weight.shape).normal_(0, std, generator=generator)
        head.weight.copy_(drawn)
    return head


@torch.no_grad()
def probe_scores(scorer: RewardScorer, device: torch.device, tolerance: float = 1e-3) -> float:
    """Stops a run whose packed scores are not the model's own, or whose sequences mix."""
    model = scorer.model
    vocab, pad = model.get_input_embeddings().weight.shape[0], model.config.pad_token_id
    examples = probe_examples(vocab)
    for example in examples:
        for s in example.sequences:
            s.tokens[-1] += s.tokens[-1] == pad  # where the model looks for the last token
            s.tokens[-1] %= vocab
    share = scorer.layout == "shared"
    batch = pack(examples, share).to(device)
    packed = scorer(batch).values
    ends = batch.score_cu_seqlens[1:].long() - 1
    alone = []
    for example in examples:
        for s in example.sequences:
            tokens = torch.from_numpy(s.tokens).to(device)[None]
            bounds = torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=device)
            options = {} if scorer.layout == "padded" else {"cu_seq_lens_q": bounds}
            own = scorer.own_score(tokens, **options)
            alone.append(own.to(packed.dtype).reshape(packed.shape[1:]))
    difference = float((packed[ends] - torch.stack(alone)).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"probe: packed scores differ from the model's own by {difference:.2g} (allowed "
            f"{tolerance:.0e}); pass --layout padded, or report the model"
        )
    first = examples[0].sequences[0]
    first.tokens[-2] = (first.tokens[-2] + 1) % vocab
    changed = scorer(pack(examples, share).to(device)).values
    leak = float((changed - packed)[int(first.scored.sum()) :].abs().max())
    if leak != 0:
        raise UserError(
            f"probe: changing one packed sequence moved another by {leak:.2g}; sequences mix. Pass "
            "--layout padded"
        )
    return difference


class RewardModel:
    """A saved reward model as a reward function of TRL's signature.

    It has its own tokenizer: texts are tokenized anew, so the policy's may be another.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        step_separator: str = "\n",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        self.device, dtype = placed_on(path, device, dtype)
        self.tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        self.batch_size, self.separator = batch_size, step_separator
        options: dict[str, Any] = dict(
            num_labels=None, dtype=dtype, pad_token_id=self.tokenizer.pad_token_id
        )
        model = load_scores(path, layout="shared", **options)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20)
        layout = "padded" if can_share_prefixes(model, longest) else "shared"
        if layout == "padded":
            model = load_scores(path, layout=layout, **options)
        self.scorer = RewardScorer(model, layout).to(self.device).eval().requires_grad_(False)
        self.__name__ = f"reward_model({path})"

    def __call__(
        self, prompts: Several, completions: Several, completion_ids=None, **_columns
    ) -> list[float]:
        """A number for each completion; of a model with several, the first is the reward."""
        pad = self.tokenizer.pad_token_id
        read = [read_at_end(*answer, pad) for answer in self._answers(prompts, completions)]
        return [float(v.reshape(-1)[0]) for v in self._scores(read, prompts)]

    def tokens(self, prompts: Several, completions: Several) -> list[Tensor]:
        """The score after every token of each completion."""
        read = [
            Sequence(tokens, np.arange(len(tokens)) >= start)
            for tokens, start in self._answers(prompts, completions)
        ]
        return self._scores(read, prompts)

    def steps(self, prompts: Several[str], completions: Several[list[str]]) -> list[Tensor]:
        """The probability that each step is good, of a process model trained with `prm`."""
        read = []
        for prompt, steps in zip(prompts, completions, strict=True):
            tokens, ends = step_tokens(self.tokenizer, prompt, steps, self.separator)
            read.append(Sequence(tokens, np.isin(np.arange(len(tokens)), ends)))
        return [v.sigmoid() for v in self._scores(read, prompts)]

    def _answers(self, prompts: Several, completions: Several) -> list[tuple[np.ndarray, int]]:
        return [
            answer(self.tokenizer, prompt, completion, Row({}, f"completion {i}"))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    @torch.no_grad()
    def _scores(self, sequences: list[Sequence], prompts: Several) -> list[Tensor]:
        found: list[Tensor] = []
        for k in range(0, len(sequences), self.batch_size):
            places = range(k, min(k + self.batch_size, len(sequences)))
            groups = [list(g) for _, g in groupby(places, key=lambda i: str(prompts[i]))]
            examples = [Example(i[0], tuple(sequences[j] for j in i)) for i in groups]
            batch = pack(examples, self.scorer.layout == "shared").to(self.device)
            values = self.scorer(batch).values.cpu()
            found += values.split(batch.score_cu_seqlens.diff().tolist())
        return found


def placed_on(
    path: str, device: str | torch.device | None, dtype: torch.dtype | str
) -> tuple[torch.device, torch.dtype]:
    """The GPU of this rank unless told otherwise; by number, as each thread has a current one."""
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{path}: dtype: wanted float32, bfloat16 or float16; got {dtype}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen, dtype
