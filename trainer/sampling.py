"""Completions of prompts for online training: who samples how many, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .dist import Ranks
from .environments import load_environment, rollout_turns
from .experience import Window
from .online_config import NashMDConfig, OnlineConfig, OnlineDPOConfig, PolicyConfig
from .prompts import Prompt
from .rollout import Completion, Engine, Episode, Sampling, make_engine


class Source(NamedTuple):
    """Samples `count` completions of every prompt.

    model: whose weights the engine follows; the policy's if None.
    salt: of the seeds; two sources of one prompt do not draw alike.
    play: how they come about where the policy talks to environments.
    """

    engine: Engine
    count: int
    sampling: Sampling
    model: nn.Module | None = None
    salt: str = ""
    play: Callable[..., list[list[Episode]]] | None = None

    def sample(self, prompts: list[Prompt], seeds: list[int]) -> list[list[Completion]]:
        """`count` completions of each prompt, by the weights that the engine has."""
        if self.play is not None:
            episodes = self.play(self.engine, prompts, self.count, self.sampling, seeds)
            return [[episode.completion() for episode in group] for group in episodes]
        tokens = [prompt.tokens for prompt in prompts]
        return self.engine.generate(tokens, self.count, self.sampling, seeds)


class Sources(NamedTuple):
    """Of the completions that may be trained on, and of those that are only judged."""

    own: tuple[Source, ...]
    others: tuple[Source, ...] = ()

    def close(self) -> None:
        for engine in {id(s.engine): s.engine for s in (*self.own, *self.others)}.values():
            engine.close()


def sources(config: OnlineConfig, policy: nn.Module, reference, tokenizer, talk) -> Sources:
    """Those of the command; reference: a Scorer, where the run has one; talk: what `play` gave."""
    each = config.num_generations
    sampling = Sampling(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        eos_token_ids=ends_of(policy, tokenizer),
    )

    def engine(model: nn.Module = policy, **options) -> Engine:
        return make_engine(config.engine, model, tokenizer, **options)  # type: ignore[arg-type]

    own = Source(engine(), each, sampling, play=talk)
    if isinstance(config, NashMDConfig):
        mixed = engine(mixture=(reference.model, config.mixture_coef))
        return Sources((own,), (own._replace(engine=mixed, salt="mixture"),))
    if isinstance(config, OnlineDPOConfig) and config.loss_type == "xpo":
        half, model = own._replace(count=each // 2), reference.model
        explorer = half._replace(engine=engine(model), model=model, salt="reference")
        return Sources((half, explorer))
    if isinstance(config, OnlineDPOConfig) and config.loss_type == "egpo":
        opponents = own._replace(count=each - 2, salt="opponent")
        return Sources((own._replace(count=2),), (opponents,))
    if isinstance(config, PolicyConfig) and config.advantage == "remax":
        greedy = replace(sampling, temperature=0.0)
        return Sources((own,), (own._replace(count=1, sampling=greedy, salt="greedy"),))
    return Sources((own,))


def ends_of(model, tokenizer) -> tuple[int, ...]:
    """The tokenizer's EOS and those of the model's generation settings: a chat model may end its
    turns with another token."""
    settings = getattr(model, "generation_config", None)
    given = getattr(settings, "eos_token_id", None)
    more = [] if given is None else [given] if isinstance(given, int) else list(given)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


def seed_of(seed: int, occasion: str, prompt: Prompt) -> int:
    """Of what is sampled for a prompt on an occasion."""
    key = f"{seed} {occasion} {prompt.index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")


def play(config: OnlineConfig, tokenizer) -> Callable[..., list[list[Episode]]] | None:
    """Episodes with the environment of the command line, if it names one."""
    if config.environment is None:
        return None
    make = load_environment(config.environment)

    def episodes(engine, prompts, count, sampling, seeds) -> list[list[Episode]]:
        given = (engine, tokenizer, prompts, count, sampling, seeds, make, config.max_turns)
        return rollout_turns(
            *given,
            config.max_episode_length,
            on_failure=config.reward_failure,
            timeout=config.reward_timeout,
        )

    return episodes


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
        places = [divmod(place, len(self.prompts)) for place in self._places(number)]
        chosen = [(epoch, self.prompts[self._order(epoch)[at]]) for epoch, at in places]
        others = None
        if self.sources.others:
            others = self._window(chosen, self.sources.others, policy, number)
        if self.between is not None:
            self.between(number)
        window = self._window(chosen, self.sources.own, policy, number)
        window.others = others
        return window

    def _places(self, number: int) -> list[int]:
        """Of this rank's prompts in the order of all epochs. The ranks share each optimizer step's,
        where a step has whole prompts, so that their number does not change what it learns from."""
        parts = self.config.num_mini_batches
        parts = 1 if self.size % parts else parts
        share, world = self.size // parts, self.ranks.world
        starts = [
            ((number * parts + part) * world + self.ranks.rank) * share for part in range(parts)
        ]
        return [place for start in starts for place in range(start, start + share)]

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
            found.append(source.sample(prompts, seeds))
        completions: list[Completion] = [
            completion
            for groups in zip(*found, strict=True)
            for part in groups
            for completion in part
        ]
        each = sum(source.count for source in sources)
        foreign = sum(source.count for source in sources if source.model is not None)
        rows = self.config.per_device_train_batch_size
        return Window(prompts, completions, each, rows, number, foreign)

    def _order(self, epoch: int) -> list[int]:
        if not self.config.shuffle_dataset:
            return list(range(len(self.prompts)))
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()
