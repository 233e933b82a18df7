"""The final answer of a solution, as text and as a number, and whether two of them are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MARK = re.compile(
    r"(?:^|\n)[ \t]*A[ \t]*:|\banswer\b(?:\s+is\b)?\s*(?:simply\b|therefore\b)?\s*[:=]?",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s?/\s?(?P<over>\d+(?:\.\d+)?))?"
)
LONGEST = 2000  # characters of an answer; beyond it only the same letters are the same
LONGEST_NUMBER = 400  # characters; Python refuses to read integers beyond 4300 digits
MATH = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL
)


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), by) for pattern, by in rules)


PLAIN = _rules(  # of numbers in running text
    ("[\u2212\u2013]", "-"),
    (r"\\[,!;: ]|[\u00a0\u2009\u202f*]", ""),
    (r"\{,\}", ","),
    (r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2"),
    (r"\\?[$€£¥]\s?-\s?(?=[\d.])", "-"),
    (r"-\s?\\?[$€£¥]\s?(?=[\d.])", "-"),
    (r"\\?[$€£¥]", " "),
)
BASE = re.compile(r"(\w+)_(\d+)")
LATEX = _rules(  # of a formula, whose spaces still part its words
    ("[\u2212\u2013]", "-"),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","),
    (r"\\[!,;:]|\\q?quad\b|[\u00a0\u2009\u202f]", " "),
    (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mathrm|textbf|textit|textrm|mbox|mathbf|operatorname|emph)\b\s*\{", r"\\text{"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b|°", ""),
    (r"\\?[$%€£]", ""),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}"),
    (r"^\s*\\text\{\s*([^{}]*?)\s*\}\s*$", r"\1"),
    (r"(?<=[\d}])\s*\\text\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$", ""),
    (r"(?<=[\d}])\s+(?:(?!and\b|or\b)[a-zA-Z]{2,}(?:\^\{?\d\}?)?[\s/]*){1,3}\.?\s*$", ""),
    (r"^\s*[a-zA-Z](?:_\{?\w\}?)?(?:\([a-zA-Z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*(?!.*=)", ""),
    (r"[.,;:\s]+$|^\s+", ""),
)
SPACELESS = _rules(  # of a formula that is compared letter by letter
    (r"\\text\{([^{}]*)\}", r"\1"),
    (r"[\s~]|\\ ", ""),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^\(([a-zA-Z])\)$", r"\1"),
    (r"\\(?:leq|geq|neq)(?![a-zA-Z])", lambda m: m[0][:-1]),  # type: ignore[list-item]
)


def _apply(rules, text: str) -> str:
    for pattern, by in rules:
        text = pattern.sub(by, text)
    return text


def final_number(text: str) -> Fraction | None:
    """The number a solution ends with, by the clearest mark that it has."""
    text = _apply(PLAIN, text)
    if "####" in text:
        return _first(text.rpartition("####")[2])
    inside = boxed(text)
    if inside is not None:
        return _first(inside)
    for line in _after_marks(text):
        number = _first(line)
        if number is not None:
            return number
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _after_marks(text: str) -> Iterator[str]:
    """What stands in the line after each "answer is", the last first."""
    end = len(text)
    for mark in reversed(list(MARK.finditer(text))):
        yield text[mark.end() : end].lstrip().partition("\n")[0]
        end = mark.start()


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


def final_answer(text: str) -> str | None:
    r"""The formula a solution ends with: \boxed, after ####, "answer is", a last $..$ or number."""
    inside = boxed(text)
    if inside is not None:
        return boxed(inside) or inside
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    for line in _after_marks(text):
        formula = MATH.search(line)
        if formula:
            return next(group for group in formula.groups() if group)
        line = re.split(r"\.(?:\s|$)", line.replace("**", ""))[0].strip()
        if line:
            return line
    formulas = MATH.findall(text)
    if formulas:
        return next(group for group in formulas[-1] if group)
    numbers = list(NUMBER.finditer(_apply(PLAIN, text)))
    return numbers[-1][0] if numbers else None


def gold_answer(text: str) -> str:
    """The answer in a reference: its box, what follows its ####, or all of it."""
    inside = boxed(text)
    if inside is not None:
        return inside
    return text.rpartition("####")[2].strip() if "####" in text else text.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close, in one pass over the text."""
    last, opened = None, []
    for match in re.finditer(r"\\[{}\\]|(\\(?:boxed|fbox)\s*)?\{|\}|\\boxed\s+(\w+)", text):
        token = match[0]
        if match[2]:
            last = match[2]
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                last = text[start : match.start()]
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end() if match[1] else None)
    return last


def tidy(text: str) -> str:
    """LaTeX without what does not change its meaning: spacing, units, `x =` before it."""
    return _apply(LATEX, text)


def spaceless(text: str) -> str:
    """A tidy formula for comparing letter by letter."""
    return _apply(SPACELESS, text).casefold()


def number(text: str) -> Fraction | None:
    """The value of a tidy formula that is nothing but a number, fraction or mixed number."""
    text = text.replace("\\ ", " ").strip().removeprefix("+")
    mixed = re.fullmatch(
        r"(-?)\s*(\d{1,40})?\s*\\frac\{\s*(-?\d{1,40})\s*\}\{\s*(\d{1,40})\s*\}", text
    )
    if mixed:
        sign, whole, top, bottom = mixed.groups()
        if int(bottom) == 0 or (whole and top.startswith("-")):
            return None
        value = int(whole or 0) + Fraction(int(top), int(bottom))
        return -value if sign else value
    match = NUMBER.fullmatch(text.replace("- ", "-"))
    return _value(match) if match else None
