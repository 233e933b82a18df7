"""One episode under way: its messages, its tokens, and what stands between two replies.

The policy's replies stay the tokens that were sampled; the chat template gives what follows them.
So a template may only append to what stood before. One that rewrites it (drops the reasoning of
earlier turns, say) is refused.
"""

from __future__ import annotations

import copy
import math
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from .data import template_options, tokenize
from .errors import UserError
from .feedback.call import Failure
from .prompts import Prompt
from .rollout import Completion, Episode
from .rows import Row

Messages = list[dict[str, Any]]
MARK = "\ufdd0"  # stands for a reply; a noncharacter, which no message has and no template trims


class Limits(NamedTuple):
    max_new_tokens: int  # of a turn
    max_turns: int
    max_tokens: float  # of all, the prompt included


class Talk:
    """One episode under way."""

    def __init__(self, tokenizer, prompt: Prompt, stream: int, limits: Limits):
        self.tokenizer, self.prompt, self.stream, self.limits = tokenizer, prompt, stream, limits
        self.environment: Any = None
        self.messages: Messages = []
        self.opening = 0  # how many of the messages were there before the first reply
        self.is_text = False
        self.tokens = prompt.tokens
        self.own = np.zeros(len(prompt.tokens), dtype=bool)
        self.logp = np.full(len(prompt.tokens), np.nan, dtype=np.float32)
        self.rewards: list[float] = []
        self.ends: list[int] = []
        self.end = ""  # the text of the EOS of the last reply
        self.finish_reason = self.failure = ""

    def meet(self, environment: Any) -> None:
        if not callable(getattr(environment, "step", None)):
            raise UserError(f"environment: wanted an object with step(messages); got {environment}")
        self.environment = environment

    def reset(self) -> Any:
        reset = getattr(self.environment, "reset", None)
        row = {"prompt": self.prompt.prompt, **self.prompt.columns}
        return None if reset is None else reset(copy.deepcopy(row))

    def open(self, opening: Any) -> None:
        """What a reset returned, in the place of the prompt."""
        given = opening is not None
        if given:
            opening = _said(opening, "reset")
            row = Row(self.prompt.columns, self.prompt.where)
            tokens = tokenize(self.tokenizer, [opening], [row], add_generation_prompt=True)[0]
            self.tokens, self.own, self.logp = self.tokens[:0], self.own[:0], self.logp[:0]
            self._add(np.asarray(tokens, dtype=np.int64))
        opening = opening if given else self.prompt.prompt
        needed, fits = self._needed(0)
        if not fits and not given:
            raise UserError(
                f"{self.prompt.where}: {needed}; lower max_prompt_length or max_completion_length"
            )
        if not fits or not len(self.tokens):
            raise Failure("wrong length", f"opened with too many tokens, or none ({needed}),")
        self.is_text = isinstance(opening, str)
        self.messages = _as_messages(opening)
        self.opening = len(self.messages)

    def say(self, reply: Completion) -> None:
        """The policy's turn."""
        self._add(reply.tokens, reply.logp)
        self.ends.append(len(self.tokens))
        content = self.tokenizer.decode(reply.tokens, skip_special_tokens=True)
        self.messages = [*self.messages, {"role": "assistant", "content": content}]
        self.end = ""
        if reply.finished:
            self.end = self.tokenizer.convert_ids_to_tokens(int(reply.tokens[-1]))

    def step(self) -> Any:
        return self.environment.step(copy.deepcopy(self.messages))

    def hear(self, result: Any) -> None:
        """What a step returned, and the context of the next turn if there is one."""
        observation, reward, done = _read(result)
        if self.is_text and not isinstance(observation, str):
            raise Failure("wrong type", "returned messages, though the prompt is text,")
        answer = _as_messages(observation) if observation or not done else []
        reason, context = "", np.zeros(0, dtype=np.int64)
        if done:
            reason = "done"
        elif len(self.ends) == self.limits.max_turns:
            reason = "max_turns"
        else:
            context = self._context(observation, answer)
            reason = "" if self._needed(len(context))[1] else "max_tokens"
        self.messages = self.messages + answer
        self.rewards.append(reward)
        self.finish_reason = reason
        if not reason:
            self._add(context)

    def fail(self, note: str, reward: float) -> None:
        if len(self.ends) == len(self.rewards):  # before its turn, which so has no tokens
            self.ends.append(len(self.tokens))
        self.rewards.append(reward)
        self.finish_reason, self.failure = "failed", note

    def episode(self) -> Episode:
        return Episode(
            self.tokens,
            self.own,
            self.logp,
            np.array(self.rewards, dtype=np.float64),
            np.array(self.ends, dtype=np.int64),
            self.finish_reason,
            self.messages[self.opening :],
            self.failure,
        )

    def _context(self, observation: str | Messages, answer: Messages) -> np.ndarray:
        """The tokens between the last reply and the next."""
        if self.is_text and isinstance(observation, str):
            text = observation
        else:
            options = template_options(self.prompt.columns)
            try:
                text = between(self.tokenizer, self.messages, answer, self.end, options)
            except (TemplateError, TypeError) as error:
                story = f"returned messages that the chat template refuses ({error})"
                raise Failure("wrong type", story) from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def _needed(self, more: int) -> tuple[str, bool]:
        """What another turn needs after `more` tokens, and whether that fits."""
        have, new = len(self.tokens) + more, self.limits.max_new_tokens
        story = f"{have} tokens and {new} new ones, where {self.limits.max_tokens} fit"
        return story, have + new <= self.limits.max_tokens

    def _add(self, tokens: np.ndarray, logp: np.ndarray | None = None) -> None:
        """Tokens of the policy's own, or context."""
        own = np.full(len(tokens), logp is not None)
        if logp is None:
            logp = np.full(len(tokens), np.nan, dtype=np.float32)
        self.tokens = np.concatenate([self.tokens, tokens])
        self.own = np.concatenate([self.own, own])
        self.logp = np.concatenate([self.logp, logp])


def _read(result: Any) -> tuple[str | Messages, float, bool]:
    """What a step returned, or a Failure."""
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        story = f"returned {_shown(result)}, not (observation, reward, done),"
        raise Failure("wrong type", story)
    observation, reward, done = result
    if not isinstance(done, (bool, np.bool_)):
        raise Failure("wrong type", f"returned {_shown(done)}, not whether it is done,")
    if observation is None and done:
        observation = ""
    try:
        number = float(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    if number is None or isinstance(reward, str):
        raise Failure("wrong type", f"returned the reward {_shown(reward)}, not a number,")
    if not math.isfinite(number):
        raise Failure("not finite", f"returned the reward {number}")
    return _said(observation, "step"), number, bool(done)


def _said(value: Any, function: str) -> str | Messages:
    """Text or messages, or a Failure."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value):
        return copy.deepcopy(value)  # it may go on writing to its own
    story = f"returned {_shown(value)} from {function}, not text or a list of messages,"
    raise Failure("wrong type", story)


def _as_messages(said: str | Messages) -> Messages:
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"


def between(
    tokenizer, messages: list[dict], answer: list[dict], end: str, options: dict[str, Any]
) -> str:
    """The text after the last of `messages`, a reply, up to where the next reply begins.

    answer: the messages between the two. end: the text of the EOS that the policy sampled after
    its reply, or "" where it sampled none. options: of the template.
    """
    *before, reply = messages

    def text(shown: list[dict], add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )

    asked, closed = text(before, True), text(messages)
    opened = text(messages + answer, True)
    _appends(asked, closed)
    _appends(closed, opened)
    _, found, tail = text([*before, {**reply, "content": MARK}]).rpartition(MARK)
    if not found:
        raise UserError("the chat template does not show an assistant's content as it is")
    if end and end in tail:
        tail = tail.partition(end)[2]
    return tail + opened[len(closed) :]


def _appends(before: str, after: str) -> None:
    if after.startswith(before):
        return
    at = len(commonprefix([before, after]))
    raise UserError(
        "the chat template rewrites what stood before when a conversation goes on, so earlier "
        f"turns could not stay as they were sampled: {before[at : at + 40]!r} becomes "
        f"{after[at : at + 40]!r}. Use a template that only appends, such as one that keeps the "
        "reasoning of earlier turns, or its own option for that in a column chat_template_kwargs"
    )
