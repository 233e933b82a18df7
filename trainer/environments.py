"""Multi-turn rollouts: the policy talks to environments, each sample to one of its own.

An environment is an object with
    step(messages) -> (observation, reward, done), called after each reply, the last of `messages`;
    reset(row) -> what the conversation opens with, or None for the row's prompt; may be left out.
Observations and openings are text or a list of messages. Either function may be `async`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from prefuse.kernels.credit import at_ends

from .engines.noise import stream
from .errors import UserError
from .feedback.call import Caller, Failure
from .feedback.load import found, parts
from .prompts import Prompt
from .rollout import Engine, Episode, Sampling
from .turns import Limits, Messages, Talk


class Environment(Protocol):
    """What is required; see the head of this file for `reset`."""

    def step(self, messages: Messages) -> tuple[str | Messages, float, bool]: ...


def turn_rewards(episodes: Sequence[Episode]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of all turns [N], and cu_turns [N + 1] int32, where they part the episodes' own
    tokens laid end to end: what credit.at_ends takes, and cu_turns advantage.gae as its steps."""
    lengths = [np.diff(np.concatenate([[0], e.own.cumsum()])[e.ends], prepend=0) for e in episodes]
    cu_turns = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int32)
    return np.concatenate([np.zeros(0), *(e.rewards for e in episodes)]), cu_turns


def token_rewards(episode: Episode) -> np.ndarray:
    """Of its own tokens: a turn's reward at the turn's last; 0 for an environment that failed."""
    given, cu_turns = (torch.from_numpy(x) for x in turn_rewards([episode]))
    return at_ends(given.nan_to_num(nan=0.0), cu_turns, int(cu_turns[-1])).numpy()


def load_environment(spec: str | Callable[..., Environment]) -> Callable[[], Environment]:
    """What makes an environment: package.module.name or file.py:name of a class or function.

    After a `?` come options of it: "games.py:Maze?size=5".
    """
    path, options = parts(spec) if isinstance(spec, str) else ("", {})
    if isinstance(spec, str) and "." not in path:
        raise UserError(f"{spec}: wanted package.module.name or file.py:name of an environment")
    make: Any = found(path) if isinstance(spec, str) else spec
    if not callable(make) or inspect.isclass(make) and not hasattr(make, "step"):
        raise UserError(
            f"{spec}: wanted a class with step(messages), or a function that makes such an object"
        )
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise UserError(f"{spec}: cannot be made with {options or 'no options'}: {error}") from None
    except ValueError:
        pass  # of a builtin, which shows no signature
    return lambda: make(**options)  # type: ignore[return-value]


def rollout_turns(
    engine: Engine,
    tokenizer,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int],
    make_environment: Callable[[], Environment],
    max_turns: int,
    max_tokens: int | None = None,
    *,
    on_failure: Literal["stop", "skip", "zero"] = "stop",
    timeout: float = 60.0,
    max_concurrency: int = 32,
) -> list[list[Episode]]:
    """n episodes of each prompt, in order; all that go on take their next turn together.

    A turn is up to sampling.max_new_tokens long, and begins only where so many still fit into
    max_tokens, which counts the prompt and every turn; None is the model's context. An observation
    that no turn follows is among the messages but not the tokens. An environment that raises, takes
    longer than `timeout` seconds for a call or returns something else than it should is a failure:
    "zero" ends its episode with a reward of 0, "skip" with NaN.
    """
    limits = Limits(sampling.max_new_tokens, max_turns, _room(engine, max_tokens))
    _check(n, prompts, seeds, max_turns)
    talks = [
        Talk(tokenizer, prompt, stream(seed, k), limits)
        for prompt, seed in zip(prompts, seeds, strict=True)
        for k in range(n)
    ]
    calls = _Calls(on_failure, timeout, max_concurrency)
    calls(talks, lambda talk: make_environment, Talk.meet)
    calls(talks, lambda talk: talk.reset, Talk.open)
    for turn in range(max_turns):
        live = [talk for talk in talks if not talk.finish_reason]
        if not live:
            break
        turn_seeds = [stream(talk.stream, turn) for talk in live]
        replies = engine.generate([talk.tokens for talk in live], 1, sampling, turn_seeds)
        for talk, (reply,) in zip(live, replies, strict=True):
            talk.say(reply)
        calls(live, lambda talk: talk.step, Talk.hear)
    episodes = [talk.episode() for talk in talks]
    return [episodes[i : i + n] for i in range(0, len(episodes), n)]


class _Calls:
    """Calls of environments, `at_once` at a time, and what becomes of those that fail."""

    def __init__(self, on_failure: str, timeout: float, at_once: int):
        if on_failure not in ("stop", "skip", "zero"):
            raise UserError(f"on_failure: wanted stop, skip or zero; got {on_failure!r}")
        if not timeout > 0 or at_once < 1:
            raise UserError(
                "wanted a timeout above 0 seconds and max_concurrency of 1 or more; got "
                f"{timeout} and {at_once}"
            )
        self.on_failure, self.timeout, self.at_once = on_failure, timeout, at_once
        self.caller = Caller(timeout, at_once)

    def __call__(
        self,
        talks: list[Talk],
        begin: Callable[[Talk], Callable[[], Any]],
        take: Callable[[Talk, Any], None],
    ) -> None:
        talks = [talk for talk in talks if not talk.finish_reason]
        for first in range(0, len(talks), self.at_once):
            some, hung = talks[first : first + self.at_once], False
            started = [self.caller.start(begin(talk), {}, False) for talk in some]
            for talk, call in zip(some, started, strict=True):
                try:
                    take(talk, call.result())
                except Failure as failure:
                    self._failed(talk, failure)
                    hung |= failure.kind == "timed out"
            if hung:  # what hangs keeps its slot, and others need one
                self.caller = Caller(self.timeout, self.at_once)

    def _failed(self, talk: Talk, failure: Failure) -> None:
        where = f"{talk.prompt.where}, turn {len(talk.rewards) + 1}"
        note = f"the environment {failure.story} on {where}"
        if self.on_failure == "stop":
            raise UserError(
                f"{note}. Fix the environment or the row, or go on without: --reward_failure "
                "skip, or zero"
            ) from failure
        talk.fail(note, 0.0 if self.on_failure == "zero" else math.nan)


def _room(engine: Engine, max_tokens: int | None) -> float:
    context = getattr(engine, "context", None) or math.inf
    if max_tokens is not None and max_tokens > context:
        raise UserError(
            f"max_tokens: wanted at most the model's context of {context}; got {max_tokens}"
        )
    return context if max_tokens is None else max_tokens


def _check(n: int, prompts, seeds, max_turns: int) -> None:
    if n < 1 or max_turns < 1:
        raise UserError(f"wanted 1 or more samples and max_turns; got {n} and {max_turns}")
    if len(seeds) != len(prompts):
        raise UserError(f"seeds: wanted one for each of {len(prompts)} prompts; got {len(seeds)}")
