"""Rewards for mathematics: the final answer of a completion against the row's `answer`."""

from __future__ import annotations

import re
from fractions import Fraction

from .rewards_text import texts

ANSWER = re.compile(r"(?:^|\n)[ \t]*A[ \t]*:|\banswer\b(?:\s+is\b)?\s*[:=]?", re.IGNORECASE)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s?/\s?(?P<over>\d+(?:\.\d+)?))?"
)
LONGEST_NUMBER = 400  # characters; Python refuses to read integers beyond 4300 digits
TIDY = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        ("[\u2212\u2013]", "-"),
        (r"\\[,!;: ]|[\u00a0\u2009\u202f*]", ""),
        (r"\{,\}", ","),
        (r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2"),
        (r"\\?[$€£¥]\s?-\s?(?=[\d.])", "-"),
        (r"-\s?\\?[$€£¥]\s?(?=[\d.])", "-"),
        (r"\\?[$€£¥]", " "),
    )
)


def gsm8k(completions, answer, **_) -> list[float | None]:
    """1 where the final number is that of `answer`: after ####, boxed, "answer is", or the last."""
    golds = [None if gold is None else final_number(str(gold)) for gold in answer]
    found = [final_number(text) for text in texts(completions)]
    return [
        None if gold is None else float(number == gold)
        for number, gold in zip(found, golds, strict=True)
    ]


def final_number(text: str) -> Fraction | None:
    """The number a solution ends with, by the clearest mark that it has."""
    for pattern, by in TIDY:
        text = pattern.sub(by, text)
    if "####" in text:
        return _first(text.rpartition("####")[2])
    inside = boxed(text)
    if inside is not None:
        return _first(inside)
    for mark in reversed(list(ANSWER.finditer(text))):
        number = _first(text[mark.end() :].lstrip().partition("\n")[0])
        if number is not None:
            return number
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _first(text: str) -> Fraction | None:
    match = NUMBER.search(text)
    return _value(match) if match else None


def _value(match: re.Match) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    over = Fraction(match["over"] or 1)
    if over == 0:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or "")) / over
    return -value if match["sign"] else value


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close, in one pass over the text."""
    last, opened = None, []
    for match in re.finditer(r"\\[{}\\]|(\\f?boxed\s*)?\{|\}", text):
        token = match[0]
        if token == "}" and opened:
            start = opened.pop()
            if start is not None:
                last = text[start : match.start()]
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end() if match[1] else None)
    return last
