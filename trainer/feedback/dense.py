"""Rewards of tokens and of stretches of text, in the place of one number for a completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .call import Failure


@dataclass(frozen=True)
class Spans:
    """A completion's rewards of stretches of its text: (end, reward), ..

    end: how many characters of the completion come before the stretch's end, from 1. The reward is
    paid at the token in which the last of them lies.
    """

    rewards: Sequence[tuple[int, float]]


Dense = np.ndarray | Spans  # [L], a number a token; or of stretches


def total(dense: Dense) -> float:
    """What a completion gets in all."""
    if isinstance(dense, Spans):
        return math.fsum(reward for _, reward in dense.rewards)
    return math.fsum(dense.tolist())


def read_dense(value: Any, tokens: int, completion: Any) -> Dense:
    """What a function gave for a completion of so many tokens; a Failure if it does not fit."""
    if isinstance(value, Spans):
        return _read_spans(value, text_of(completion))
    if len(value) != tokens:
        story = f"returned {len(value)} numbers for a completion of {tokens} tokens"
        raise Failure("wrong count", story)
    return np.array([_finite(x) for x in value], dtype=np.float64)


def _read_spans(spans: Spans, text: str) -> Spans:
    found = []
    for pair in spans.rewards:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise Failure("wrong type", f"returned {pair!r} in Spans, not (end, reward),")
        end, reward = pair
        if isinstance(end, bool) or not isinstance(end, (int, np.integer)):
            raise Failure("wrong type", f"returned a span's end {end!r}, not a whole number,")
        if not 1 <= end <= len(text):
            story = f"returned a span that ends at {end} of a text of {len(text)} characters"
            raise Failure("out of text", story)
        found.append((int(end), _finite(reward)))
    return Spans(tuple(found))


def _finite(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (bool, int, float)):
        raise Failure("wrong type", f"returned {value!r} among a completion's numbers")
    if not math.isfinite(value):
        raise Failure("not finite", f"returned {value} among a completion's numbers")
    return float(value)


def text_of(completion: Any) -> str:
    """A completion's text, whether it is text or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def to_json(value: float | Dense) -> Any:
    """For the cache."""
    if isinstance(value, Spans):
        return {"spans": [list(pair) for pair in value.rewards]}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if math.isnan(value) else value


def of_json(value: Any) -> float | Dense:
    if isinstance(value, dict):
        return Spans(tuple((end, reward) for end, reward in value["spans"]))
    if isinstance(value, list):
        return np.array(value, dtype=np.float64)
    return math.nan if value is None else float(value)


def on_tokens(dense: Dense, tokens: np.ndarray, tokenizer) -> np.ndarray:
    """Rewards of a completion's tokens, [L]."""
    if isinstance(dense, np.ndarray):
        return dense
    placed = np.zeros(len(tokens))
    ends = [end for end, _ in dense.rewards]
    for place, (_, reward) in zip(places(ends, tokens, tokenizer), dense.rewards, strict=True):
        placed[place] += reward
    return placed


def places(ends: Sequence[int], tokens: np.ndarray, tokenizer) -> list[int]:
    """The tokens in which the characters before `ends` lie; of a character of several, the last.

    The text of a prefix of the tokens is a prefix of theirs but for a character that is cut, so the
    first prefix whose text has the characters is found by halving. Where a vocabulary lacks several
    characters in a row and spells them in bytes, the token may be that of a later one of them.
    """
    prefix, found, low = _Prefix(tokens, tokenizer), {}, 0
    for end in sorted(set(ends)):
        if end > len(prefix.whole):
            raise UserError(f"a span ends at {end} of a text of {len(prefix.whole)} characters")
        high, stride = len(tokens), 1  # low is too short, high long enough
        while low + stride < high:  # most spans end soon after the one before
            if prefix.has(end, low + stride):
                high = low + stride
            else:
                low, stride = low + stride, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            if prefix.has(end, middle):
                high = middle
            else:
                low = middle
        found[end], low = high - 1, high - 1
        prefix.pass_over(high)
    return [found[end] for end in ends]


class _Prefix:
    """Texts of prefixes, each decoded from a few tokens before one whose text is known."""

    CONTEXT = range(4, 8)  # tokens; one of four begins a character

    def __init__(self, tokens: np.ndarray, tokenizer):
        self.tokens, self.tokenizer = tokens, tokenizer
        self.whole = self._text(0, len(tokens))
        self.start, self.shown, self.known = 0, "", 0  # whole[: known] ends with shown

    def has(self, end: int, count: int) -> bool:
        """Whether the first `count` tokens have the characters before `end`."""
        known, more = self._more(count)
        return more[: end - known] == self.whole[known:end]

    def pass_over(self, count: int) -> None:
        """Later prefixes are decoded from about here on, unless a character is cut."""
        known, more = self._more(count)
        reached = known + len(more)
        if reached == self.known or not self.whole.startswith(more, known):
            return
        for start in (max(0, count - size) for size in self.CONTEXT):
            shown = self._text(start, count)
            if shown and self.whole.endswith(shown, 0, reached):
                self.start, self.shown, self.known = start, shown, reached
                return

    def _more(self, count: int) -> tuple[int, str]:
        """What comes after the characters that are known, of which there may be none."""
        text = self._text(self.start, count)
        if text.startswith(self.shown):
            return self.known, text[len(self.shown) :]
        return 0, self._text(0, count)

    def _text(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.tokens[start:stop], skip_special_tokens=True)
