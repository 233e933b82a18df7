"""Rewards for mathematics: the final answer of a completion against the row's reference."""

from __future__ import annotations

from fractions import Fraction

from ..errors import UserError
from . import symbolic
from .answers import (
    BASE,
    LONGEST,
    answered,
    boxed_together,
    choice,
    final_answer,
    final_number,
    gold_answer,
    number,
    spaceless,
    tidy,
)
from .text import texts


def gsm8k(completions, answer, **_) -> list[float | None]:
    """1 where the final number is that of `answer`: after ####, boxed, "answer is", or the last."""
    golds = [None if gold is None else final_number(str(gold)) for gold in answer]
    found = [final_number(text) for text in texts(completions)]
    return [
        None if gold is None else float(number == gold)
        for number, gold in zip(found, golds, strict=True)
    ]


def math(completions, answer, **_) -> list[float | None]:
    r"""1 where the final answer, \boxed or after "answer is", equals `answer` as mathematics."""
    if not symbolic.available():
        raise UserError("the rewards math and accuracy want math-verify: pip install math-verify")
    return [
        None if gold is None else float(_solves(text, str(gold)))
        for text, gold in zip(texts(completions), answer, strict=True)
    ]


def accuracy(completions, solution, **_) -> list[float | None]:
    """The same against `solution`, whose final answer is the reference."""
    return math(completions, solution)


def _solves(text: str, gold: str) -> bool:
    wanted = gold_answer(gold)
    found = final_answer(text, numeric=number(tidy(wanted[:LONGEST])) is not None)
    if found is not None and same(wanted, found):
        return True
    several = boxed_together(answered(text)) if "," in wanted else None
    return several is not None and same(wanted, several)


def same(gold: str, answer: str) -> bool:
    """Whether two formulas are the same letters, number, or mathematics."""
    if max(len(gold), len(answer)) > LONGEST:
        return gold == answer
    percent = ("%" in gold) - ("%" in answer)
    gold, answer = tidy(gold), tidy(answer)
    if not answer:
        return False
    wanted, found = number(gold), number(answer)
    if wanted is not None and found is not None:
        return wanted == found or (percent != 0 and wanted == found * Fraction(100) ** percent)
    if spaceless(gold) == spaceless(answer):
        return True
    letters = choice(gold), choice(answer)
    if None not in letters and len(gold) <= 3:
        return letters[0] == letters[1]
    if all(BASE.fullmatch(spaceless(text)) for text in (gold, answer)):
        return False  # numerals like 42_7 whose letters differ
    return symbolic.equal(gold, answer)
