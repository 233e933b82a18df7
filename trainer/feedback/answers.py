"""The final answer of a solution, as text and as a number, and whether two of them are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

MARK = re.compile(
    r"(?:^|\n)[ \t]*A[ \t]*:|\bfinal[ \t]+answer\b|(?:^|\n)[#* \t]*answer[* \t]*:?[* \t]*\n|"
    r"\b(?:answer|option|choice)\b(?:[ \t]+(?:to|for|of|in)\b[^.:\n]{0,60}?)?[ \t*]*"
    r"(?:\b(?:is|was|(?:should|must|would|will)[ \t]+be)\b|[:=])",
    re.IGNORECASE,
)
BETWEEN = re.compile(  # a mark and the answer
    r"(?:[\s*:=]|\b(?:is|should|must|would|will|be|just|thus|therefore|simply|indeed|definitely|still|"
    r"exactly|equal|to)\b)+",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?(?:(?P<whole>\d{1,40})\s+(?=\d{1,40}\s?/\s?\d))?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s?/\s?(?P<over>\d+(?:\.\d+)?))?"
)
WORKED = re.compile(  # a sum before its result, as 20 - 5 =
    r"(?:(?:[\d.,\s()+/x×÷·^%-]|\\(?:times|cdot|div)(?![a-zA-Z]))*=)+(?=\s*-?\s*[.\d])"
)
LONGEST = 2000  # characters of an answer; beyond it only the same letters are the same
LONGEST_NUMBER = 400  # characters; Python refuses to read integers beyond 4300 digits
MATH = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL
)


def _rules(*rules: tuple[str, Any]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), by) for pattern, by in rules)


PLAIN = _rules(  # of numbers in running text
    ("[\u2212\u2013]", "-"),
    (r"\\[,!;: ]|[\u00a0\u2009\u202f*]", ""),
    (r"\{,\}", ","),
    (r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2"),
    (r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2"),
    (r"\\?[$€£¥]\s?-\s?(?=[\d.])", "-"),
    (r"-\s?\\?[$€£¥]\s?(?=[\d.])", "-"),
    (r"\\?[$€£¥]", " "),
)
UNICODE = {
    "\u03c0": r"\\pi",
    "\u221e": r"\\infty",
    "\u00d7": r"\\times",
    "\u00b7": r"\\cdot",
    "\u2264": r"\\le",
    "\u2265": r"\\ge",
    "\u222a": r"\\cup",
    "\u221a": r"\\sqrt",
    "\u00b1": r"\\pm",
    "\u00b2": "^2",
    "\u00b3": "^3",
}
NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
WORDS = {word: value for value, word in enumerate(NAMES.split())}
BASE = re.compile(r"(\w+)_(\d+)")
LATEX = _rules(  # of a formula, whose spaces still part its words
    ("[\u2212\u2013]", "-"),
    *((letter, by + " ") for letter, by in UNICODE.items()),
    (r"\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", ""),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","),
    (r"(?<=\d)(?:\\[, ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[!,;: ]|\\q?quad\b|[~\u00a0\u2009\u202f]", " "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mathrm|textbf|textit|textrm|mbox|mathbf|operatorname|emph)\b\s*\{", r"\\text{"),
    (
        r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b|°",
        lambda m: m[0] if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", m.string) else "",
    ),
    (r"\\?[$%€£]", ""),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}"),
    (r"^\s*\\text\{\s*([^{}]*?)\s*\}\s*$", r"\1"),
    (r"(?<=[\d}])\s*(?:\\text\{[^{}]*\}(?:\s*\^\s*\{?-?\d\}?)?\s*)+$", ""),
    (r"(?<=[\d}])\s+(?:(?!and\b|or\b)[a-zA-Z]{2,}(?:\^\{?\d\}?)?[\s/]*){1,3}\.?\s*$", ""),
    (r"^\s*[a-zA-Z](?:_\{?\w\}?)?(?:\([a-zA-Z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*(?!.*=)", ""),
    (r"[.,;:\s]+$|^\s+", ""),
)
SPACELESS = _rules(  # of a formula that is compared letter by letter
    (r"\\text\{([^{}]*)\}", r"\1"),
    (r"\\ ", " "),
    (r"(?<!\d)[\s~]+|[\s~]+(?!\d)", ""),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^\(([a-zA-Z])\)$", r"\1"),
    (r"\\(?:leq|geq|neq)(?![a-zA-Z])", lambda m: m[0][:-1]),
)


def _apply(rules, text: str) -> str:
    for pattern, by in rules:
        text = pattern.sub(by, text)
    return text


def final_number(text: str) -> Fraction | None:
    """The number a solution ends with, by the clearest mark that it has."""
    text = _apply(PLAIN, answered(text))
    hashed = after_hashes(text)
    if hashed is not None:
        return _first(hashed)
    inside = boxed(text)
    if inside is not None:
        return _first(inside)
    for line in _after_marks(text):
        number = _first(line)
        if number is not None:
            return number
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def answered(text: str) -> str:
    """What stands in the last <answer>, closed or not; without one all of it."""
    _, opened, rest = text.rpartition("<answer>")
    return rest.partition("</answer>")[0].strip() if opened else text


def after_hashes(text: str) -> str | None:
    """What follows the last ####, unless that is a heading above more text."""
    before, hashes, rest = text.rpartition("####")
    line, _, more = rest.strip().partition("\n")
    if not hashes or before.endswith("#") or (more.strip() and not re.match(r"\W{0,4}\d", line)):
        return None
    return line


def _after_marks(text: str) -> Iterator[str]:
    """What stands in the line after each "answer is", the last first."""
    end = len(text)
    for mark in reversed(list(MARK.finditer(text))):
        rest = text[mark.end() : end]
        between = BETWEEN.match(rest)
        yield rest[between.end() if between else 0 :].lstrip().partition("\n")[0]
        end = mark.start()


def _first(text: str) -> Fraction | None:
    match = NUMBER.search(_result(text))
    return _value(match) if match else None


def _result(text: str) -> str:
    """A plain text, from behind the sum that it begins with if there is one."""
    worked = WORKED.match(text)
    return text[worked.end() :] if worked and len(NUMBER.findall(worked[0])) > 1 else text


def _value(match: re.Match) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    over = Fraction(match["over"] or 1)
    if over == 0:
        return None
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or "")) / over
    value += int(match["whole"] or 0)
    return -value if match["sign"] else value


def final_answer(text: str, numeric: bool = False) -> str | None:
    r"""The formula a solution ends with: \boxed, after ####, "answer is", or the last one.

    numeric: a number is looked for, so words without one are not the answer.
    """
    own = answered(text)
    tagged, text = own is not text, own
    inside = boxed(text)
    if inside is not None:
        return boxed(inside) or inside
    hashed = after_hashes(text)
    if hashed is not None:
        return hashed
    for line in _after_marks(text):
        found = _stated(line, numeric)
        if found:
            return found
    if tagged and not numeric and not MATH.search(text):
        return text or None
    return _last(text, numeric)


def _stated(line: str, numeric: bool) -> str | None:
    """The answer in a line that follows a mark: a formula, a number or a sentence."""
    formula = MATH.search(line)
    inside = next(group for group in formula.groups() if group).strip() if formula else ""
    if inside and not numeric:
        return inside
    if re.search(r"\d", inside) and not NUMBER.match(_apply(PLAIN, line)):
        return inside
    sentence = re.split(r"\.(?:\s|$)", line.replace("**", ""))[0].strip()
    if not numeric or number(tidy(sentence)) is not None:
        return sentence
    found = NUMBER.search(_result(_apply(PLAIN, sentence)))
    return found[0] if found else None


def _last(text: str, numeric: bool) -> str | None:
    """The last formula, or the last number where it stands after it or there is none.

    numeric: a formula has to be a number, behind its last sign of equality.
    """
    formula, end = None, 0
    for match in MATH.finditer(text):
        found = next(group for group in match.groups() if group)
        found = re.split(r"=|\\approx", found)[-1] if numeric else found
        if not numeric or number(tidy(found[:LONGEST])) is not None:
            formula, end = found, match.end()
    numbers = list(NUMBER.finditer(_apply(PLAIN, text[end:]))) if numeric or not formula else ()
    return numbers[-1][0] if numbers else formula


def gold_answer(text: str) -> str:
    """The answer in a reference: its box, what follows its ####, or "answer is", or all of it."""
    inside = boxed(text)
    if inside is not None:
        return inside
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return next((_stated(line, False) or line for line in _after_marks(text)), "") or text.strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close."""
    spans = boxes(text)
    return text[slice(*spans[-1])] if spans else None


def boxed_together(text: str) -> str | None:
    r"""The contents of several \boxed{...} that stand in one line with the last."""
    spans = boxes(text)
    first = text.rfind("\n", 0, spans[-1][0]) if spans else 0
    before, together = len(text), []
    for start, end in reversed(spans):
        if first < start and end < before:  # not inside another
            together.append(text[start:end])
            before = start
    return ", ".join(reversed(together)) if len(together) > 1 else None


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the content of every \boxed{...} starts and ends, in one pass over the text."""
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []
    for match in re.finditer(r"\\[{}\\]|(\\(?:boxed|fbox)\s*)?\{|\}|\\boxed\s+(\w+)", text):
        token = match[0]
        if match[2]:
            found.append(match.span(2))
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                found.append((start, match.start()))
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end() if match[1] else None)
    return found


def tidy(text: str) -> str:
    """LaTeX without what does not change its meaning: spacing, units, `x =` before it."""
    return _apply(LATEX, text)


def spaceless(text: str) -> str:
    """A tidy formula for comparing letter by letter."""
    return _apply(SPACELESS, text).casefold()


def choice(text: str) -> str | None:
    r"""The letter of a tidy "(B)", "(B) 4", "\text{(B)} 4" or "B. 4"."""
    match = re.match(r"(?:\\text\{\s*)?\(([A-J])\)|([A-J])(?=[).:]\s|$)", text)
    return match and (match[1] or match[2])


def number(text: str) -> Fraction | None:
    """The value of a tidy formula that is nothing but a number, fraction or mixed number."""
    text = text.replace("\\ ", " ").strip().removeprefix("+")
    if text.casefold() in WORDS:
        return Fraction(WORDS[text.casefold()])
    repeating = re.fullmatch(
        r"(-?)(\d{0,40})\.(\d{0,40})\\(?:overline|bar)\{?(\d{1,40})\}?", spaceless(text)
    )
    if repeating:
        sign, whole, first, again = repeating.groups()
        shift = 10 ** len(first)
        value = int(whole + first or 0) + Fraction(int(again), 10 ** len(again) - 1)
        return -value / shift if sign else value / shift
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
