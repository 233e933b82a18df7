"""transformers' plain `generate` with left padding, and mixtures of two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..errors import UserError
from ..model import output_head
from ..rollout import Completion, Sampling, check_request, context_of, ended, grouped
from .noise import Request, choose, log_prob, requests_of, row_keys
from .twin import Twin


class GenerateEngine:
    """`model.generate`, rows of like length together.

    mixture: another model and its weight b; tokens come from softmax of (1 - b) z + b z_other at
    the temperature. 0 < b < 1 is the geometric mixture of Nash-MD, b = -beta and b = beta are
    PILAF's pair. Log-probs are the policy's own all the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        mixture: tuple[PreTrainedModel, float] | None = None,
        max_rows: int | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
    ):
        self.twin = Twin(model, "sdpa", dtype)
        self.context, self.cache_bytes = context_of(model), cache_bytes
        self.max_rows = max_rows or (256 if model.device.type == "cuda" else 128)
        self.pad = tokenizer.pad_token_id or 0
        self.mixture, self.other = mixture, None
        if mixture is not None:
            other, _ = mixture
            rows = [output_head(m).weight.shape[0] for m in (model, other)]
            if rows[0] != rows[1]:
                raise UserError(
                    "mixture: wanted two models of one vocabulary; got "
                    f"{rows[0]} and {rows[1]} tokens; use models with the same tokenizer"
                )
            self.other = Twin(other, "sdpa", dtype)

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        check_request(prompts, n, sampling, seeds, self.context)
        requests = requests_of(prompts, n, seeds)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        step = min(
            self.max_rows, max(cache_tokens(self.twin.model, self.cache_bytes) // longest, 1)
        )
        found: dict[int, Completion] = {}
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            found.update(zip(rows, self._batch([requests[i] for i in rows], sampling), strict=True))
        return grouped([found[i] for i in range(len(requests))], n)

    @torch.no_grad()
    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        model = self.twin.model
        width = max(len(r.prompt) for r in requests)
        tokens = torch.full((len(requests), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        chooser = RowChooser(sampling, [r.stream for r in requests], width)
        if self.mixture is not None and self.other is not None:
            chooser.mixed = Mixture(self.other.model, self.mixture[1], mask)
        model.generate(
            input_ids=tokens,  # type: ignore[arg-type]
            attention_mask=mask,
            logits_processor=LogitsProcessorList([chooser]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(sampling.eos_token_ids) or None,
                pad_token_id=self.pad,
            ),
        )
        chosen = torch.stack(chooser.tokens, 1).cpu().numpy()
        logp = torch.stack(chooser.logp, 1).cpu().numpy()
        return [ended(t, p, sampling.eos_token_ids) for t, p in zip(chosen, logp, strict=True)]

    def update_weights(self, model: nn.Module) -> None:
        self.twin.follow(model)  # type: ignore[arg-type]
        if self.mixture is not None and self.other is not None:
            self.other.follow(self.mixture[0])  # a reference may follow the policy

    def close(self) -> None:
        del self.twin, self.other, self.mixture


def cache_tokens(model: PreTrainedModel, cache_bytes: int | None) -> int:
    """The tokens whose keys and values fit in `cache_bytes`; by default half of what is free."""
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 1  # 1 overestimates a Mamba
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    if cache_bytes is None:
        on_gpu = model.device.type == "cuda"
        cache_bytes = torch.cuda.mem_get_info(model.device)[0] // 2 if on_gpu else 1 << 30
    return cache_bytes // token_bytes


class RowChooser(LogitsProcessor):
    """Chooses the next token of every row and leaves `generate` no other; keeps its log-prob."""

    def __init__(self, sampling: Sampling, streams: list[int], prompt_width: int):
        self.sampling, self.prompt_width = sampling, prompt_width
        self.streams = np.array(streams, dtype=np.uint64)
        self.mixed: Mixture | None = None
        self.tokens: list[Tensor] = []
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        keys = None
        if self.sampling.temperature > 0:
            step = np.full(len(self.streams), input_ids.shape[1] - self.prompt_width)
            keys = torch.from_numpy(row_keys(self.streams, step)).to(scores.device)
        tokens, logp = choose(
            scores if self.mixed is None else self.mixed(input_ids, scores), keys, self.sampling
        )
        if self.mixed is not None:
            logp = log_prob(scores.float() / (self.sampling.temperature or 1.0), tokens)
        self.tokens.append(tokens)
        self.logp.append(logp)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class Mixture:
    """(1 - b) z + b z_other of the rows of `generate`; the other model keeps its own cache."""

    def __init__(self, other: PreTrainedModel, weight: float, mask: Tensor):
        self.other, self.weight, self.mask = other, weight, mask
        self.cache = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        unseen = input_ids if self.cache is None else input_ids[:, -1:]
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_(min=0)[:, -unseen.shape[1] :]
        out = self.other(
            input_ids=unseen.to(self.other.device),
            attention_mask=self.mask.to(self.other.device),
            position_ids=positions.to(self.other.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        theirs = out.logits[:, -1].float().to(scores.device)
        return scores.float() * (1 - self.weight) + theirs * self.weight
