"""What samples completions: one small interface, and the choice of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import UserError

ENGINES = ("auto", "transformers", "generate", "vllm", "openai")


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; its log-probs are those of temperature 1."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive one"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not fits:
                raise UserError(f"{name}: wanted {wanted}; got {getattr(self, name)}")


class Episode(NamedTuple):
    """A conversation of T turns as tokens, the prompt included, [L]."""

    tokens: np.ndarray  # [L] int64
    own: np.ndarray  # [L] bool: sampled by the policy, so trained on; all else is context
    logp: np.ndarray  # [L] float32, of its own tokens as the engine said; NaN elsewhere
    rewards: np.ndarray  # [T] float64; NaN where the environment failed and is skipped
    ends: np.ndarray  # [T] int64: a turn's own tokens end before this place
    finish_reason: str  # done, max_turns, max_tokens or failed
    messages: list[dict]  # what came after the opening: replies and observations
    failure: str = ""  # what went wrong, and on which row

    @property
    def reward(self) -> float:
        return float(self.rewards.sum())

    def completion(self) -> Completion:
        """Its own tokens alone, end to end."""
        done = self.finish_reason == "done"
        return Completion(self.tokens[self.own], self.logp[self.own], done, self)


class Completion(NamedTuple):
    """What came after a prompt."""

    tokens: np.ndarray  # [L] int64, the EOS included where it was sampled
    logp: np.ndarray  # [L] float32 at the temperature, before top-p and the like; NaN if unknown
    finished: bool  # ended by an EOS; False: cut at max_new_tokens
    episode: Episode | None = None  # of several turns, of which these are the policy's own tokens


class Engine(Protocol):
    """Samples from a model whose weights follow the policy's."""

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """n completions of each prompt, in order; a seed for each prompt."""
        ...

    def update_weights(self, model: nn.Module) -> None: ...

    def close(self) -> None: ...


def make_engine(name: str, model: PreTrainedModel, tokenizer, **options) -> Engine:
    """The engine called `name`; options are keyword arguments of its constructor."""
    if name == "auto":
        name = engine_for(model.device, options.get("mixture") is not None)
    if name == "openai":
        from .engines.openai import OpenAIEngine as engine
    elif name == "vllm":
        from .engines.vllm_engine import VLLMEngine as engine
    elif name == "generate":
        from .engines.generate import GenerateEngine as engine
    elif name == "transformers":
        from .engines.continuous import ContinuousEngine as engine
    else:
        raise UserError(f"engine: wanted one of {', '.join(ENGINES)}; got {name}")
    if name != "generate" and options.get("mixture") is not None:
        raise UserError(
            f"engine {name}: it cannot sample from a mixture of two models, which needs their "
            "logits side by side at every token; use the engine 'generate'"
        )
    options = {k: v for k, v in options.items() if k != "mixture" or name == "generate"}
    return engine(model, tokenizer, **options)


def engine_for(device: torch.device, mixed: bool = False) -> str:
    """The faster of transformers' two there, which sample alike; of a mixture, the one that can."""
    return "transformers" if device.type == "cuda" and not mixed else "generate"


def check_request(
    prompts: Sequence[np.ndarray],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int],
    context: int | None,
) -> None:
    """What no engine could do, told before any of them starts."""
    if n < 1:
        raise UserError(f"n: wanted 1 or more completions of a prompt; got {n}")
    if len(seeds) != len(prompts):
        raise UserError(f"seeds: wanted one for each of {len(prompts)} prompts; got {len(seeds)}")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index}: wanted at least one token; got none")
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise UserError(
                f"prompt {index}: its {len(prompt)} tokens and {sampling.max_new_tokens} new ones "
                f"are more than the model's context of {context}; lower max_prompt_length or "
                "max_completion_length"
            )


def context_of(model: PreTrainedModel) -> int | None:
    """The longest sequence of `model`, where its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def grouped(completions: list[Completion], n: int) -> list[list[Completion]]:
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def ended(tokens: np.ndarray, logp: np.ndarray, eos: tuple[int, ...]) -> Completion:
    """Cut after the first EOS."""
    at = np.flatnonzero(np.isin(tokens, eos))
    stop = int(at[0]) + 1 if len(at) else len(tokens)
    return Completion(tokens[:stop].astype(np.int64), logp[:stop], bool(len(at)))
