"""Completions of prompts for online training: who samples how many, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .dist import Ranks
from .experience import Window
from .online_config import NashMDConfig, OnlineConfig, OnlineDPOConfig, PolicyConfig
from .prompts import Prompt
from .rollout import Completion, Engine, Sampling, make_engine


class Source(NamedTuple):
    """Samples `count` completions of every prompt.

    model: whose weights the engine follows; the policy's if None.
    salt: of the seeds; two sources of one prompt do not draw alike.
    """

    engine: Engine
    count: int
    sampling: Sampling
    model: nn.Module | None = None
    salt: str = ""


class Sources(NamedTuple):
    """Of the completions that may be trained on, and of those that are only judged."""

    own: tuple[Source, ...]
    others: tuple[Source, ...] = ()

    def close(self) -> None:
        for engine in {id(s.engine): s.engine for s in (*self.own, *self.others)}.values():
            engine.close()


def sources(config: OnlineConfig, policy: nn.Module, reference, tokenizer) -> Sources:
    """Those of the command; reference: a Scorer, where the run has one."""
    each = config.num_generations
    sampling = Sampling(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        eos_token_ids=(tokenizer.eos_token_id,),
    )

    def engine(model: nn.Module = policy, **options) -> Engine:
        return make_engine(config.engine, model, tokenizer, **options)  # type: ignore[arg-type]

    def of_policy(count: int, salt: str = "") -> Source:
        return Source(engine(), count, sampling, salt=salt)

    if isinstance(config, NashMDConfig):
        mixed = engine(mixture=(reference.model, config.mixture_coef))
        return Sources((of_policy(each),), (Source(mixed, each, sampling, salt="mixture"),))
    if isinstance(config, OnlineDPOConfig) and config.loss_type == "xpo":
        explorer = Source(
            engine(reference.model), each // 2, sampling, reference.model, "reference"
        )
        return Sources((of_policy(each // 2), explorer))
    if isinstance(config, OnlineDPOConfig) and config.loss_type == "egpo":
        return Sources((of_policy(2),), (of_policy(each - 2, "opponent"),))
    own = of_policy(each)
    if isinstance(config, PolicyConfig) and config.advantage == "remax":
        greedy = replace(sampling, temperature=0.0)
        return Sources((own,), (Source(own.engine, 1, greedy, salt="greedy"),))
    return Sources((own,))


def seed_of(seed: int, occasion: str, prompt: Prompt) -> int:
    """Of what is sampled for a prompt on an occasion."""
    key = f"{seed} {occasion} {prompt.index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")


class Sampler:
    """Windows of completions. Prompts come in a new order every epoch; what is sampled for one
    depends on the seed, the epoch and the weights alone, not on ranks or an interruption.

    between: called with the window's number when the others are sampled and before its own are.
    """

    def __init__(
        self,
        config: OnlineConfig,
        prompts: list[Prompt],
        sources: Sources,
        ranks: Ranks,
        between: Callable[[int], None] | None = None,
    ):
        self.config, self.prompts, self.ranks, self.between = config, prompts, ranks, between
        self.sources = sources
        completions = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.size = completions * config.num_mini_batches // config.num_generations
        self.drawn = 0  # windows so far, which a checkpoint holds

    def sample(self, policy: nn.Module) -> Window:
        """This rank's part of the next window, by the weights as they are."""
        number = self.drawn
        self.drawn += 1
        first = (number * self.ranks.world + self.ranks.rank) * self.size
        places = [divmod(p, len(self.prompts)) for p in range(first, first + self.size)]
        chosen = [(epoch, self.prompts[self._order(epoch)[at]]) for epoch, at in places]
        others = None
        if self.sources.others:
            others = self._window(chosen, self.sources.others, policy, number)
        if self.between is not None:
            self.between(number)
        window = self._window(chosen, self.sources.own, policy, number)
        window.others = others
        return window

    def _window(
        self,
        chosen: list[tuple[int, Prompt]],
        sources: tuple[Source, ...],
        policy: nn.Module,
        number: int,
    ) -> Window:
        """A prompt's completions are those of the first source, then of the second."""
        prompts, found = [prompt for _, prompt in chosen], []
        for source in sources:
            seeds = [
                seed_of(self.config.seed, f"{epoch} {source.salt}".strip(), prompt)
                for epoch, prompt in chosen
            ]
            source.engine.update_weights(policy if source.model is None else source.model)
            tokens = [prompt.tokens for prompt in prompts]
            found.append(source.engine.generate(tokens, source.count, source.sampling, seeds))
        completions: list[Completion] = [
            completion
            for groups in zip(*found, strict=True)
            for part in groups
            for completion in part
        ]
        each = sum(source.count for source in sources)
        return Window(prompts, completions, each, self.config.per_device_train_batch_size, number)

    def _order(self, epoch: int) -> list[int]:
        if not self.config.shuffle_dataset:
            return list(range(len(self.prompts)))
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()
