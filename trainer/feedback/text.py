"""Rewards that read a completion's text or length: format, length, repetition."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch

from prefuse.kernels.credit import soft_overlong as dapo_overlong

from ..errors import UserError

THINK_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"


def texts(completions: Sequence) -> list[str]:
    """What the model wrote, of completions that are text or messages (tool results left out)."""
    return [
        completion
        if isinstance(completion, str)
        else "\n".join(content(m) for m in completion if m.get("role", "assistant") == "assistant")
        for completion in completions
    ]


def content(message: dict) -> str:
    """The text of a message, whose content may be a list of typed parts, or None in a tool call."""
    given = message.get("content") or ""
    if isinstance(given, str):
        return given
    return "".join(part.get("text", "") for part in given if isinstance(part, dict))


def shown(prompt) -> str:
    """A prompt as text: a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{m.get('role', 'user')}: {content(m)}" for m in prompt)


def format(completions, *, pattern: str = THINK_ANSWER, **_) -> list[float]:
    """1 where the whole completion matches `pattern`: <think>..</think> <answer>..</answer>."""
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(text) is not None) for text in texts(completions)]


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"format: wanted pattern, a regular expression; got {pattern!r}: {error}"
        ) from None


def length(completion_ids, *, target: int = 0, scale: float = 100.0, **_) -> list[float]:
    """-|tokens - target| / scale: with target 0, a penalty on length."""
    return [-abs(len(ids) - target) / scale for ids in completion_ids]


def soft_overlong(completion_ids, *, max_length: int = 256, cache: int = 64, **_) -> list[float]:
    """DAPO's penalty: 0 up to max_length - cache tokens, falling to -1 at max_length."""
    lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.float64)
    return dapo_overlong(lengths, max_length=max_length, cache=cache).tolist()


def repetition(completion_ids, *, ngram_size: int = 3, max_penalty: float = -1.0, **_):
    """max_penalty times the share of n-grams of tokens that occurred before (arXiv:2502.03373)."""
    rewards = []
    for ids in completion_ids:
        total = len(ids) - ngram_size + 1
        ngrams = {tuple(ids[i : i + ngram_size]) for i in range(total)}
        rewards.append(max_penalty * (1 - len(ngrams) / total) if total > 0 else 0.0)
    return rewards
