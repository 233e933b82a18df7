"""IFEval's instructions that a program can check (arXiv:2311.07911), with its names and arguments.

Sentences are counted by punctuation and languages told by the langdetect package: an instruction
that cannot be checked here is left out, and a row with none left does not apply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .text import texts


def ifeval(
    completions, instruction_id_list, kwargs, log_metric=None, *, loose: bool = False, **_
) -> list[float | None]:
    """The share of a row's instructions that the completion follows.

    loose: a completion follows an instruction if it does without its first line, its last line or
    its asterisks, as in the paper.
    """
    rewards, unknown = [], 0
    for text, ids, arguments in zip(texts(completions), instruction_id_list, kwargs, strict=True):
        arguments = _read(arguments) if ids else ()
        verdicts = [_follows(text, i, a, loose) for i, a in zip(ids or (), arguments, strict=True)]
        known = [verdict for verdict in verdicts if verdict is not None]
        unknown += len(verdicts) - len(known)
        rewards.append(sum(known) / len(known) if known else None)
    if log_metric is not None:
        log_metric("ifeval/unknown_instructions", unknown)
    return rewards


def _read(arguments: Any) -> list[dict]:
    """A list of keyword arguments, some of them None; it may be stored as JSON."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [{k: v for k, v in (a or {}).items() if v is not None} for a in arguments]


def _follows(text: str, instruction: str, arguments: dict, loose: bool) -> bool | None:
    check = CHECKS.get(instruction)
    if check is None:
        return None
    try:
        verdicts = [
            check(version, **arguments) for version in (_versions(text) if loose else [text])
        ]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"ifeval: {instruction}: wanted other kwargs than {arguments}: {error}"
        ) from None
    if all(verdict is None for verdict in verdicts):
        return None
    return bool(text.strip()) and any(verdicts)


def _versions(text: str) -> list[str]:
    """With and without the first line, the last line and asterisks; nothing follows nothing."""
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    versions = [version.strip() for whole in cut for version in (whole, whole.replace("*", ""))]
    return [version for version in versions if version] or [text]


def _compare(count: int, relation: str, wanted: int) -> bool:
    """The data's two relations."""
    if relation not in ("less than", "at least"):
        raise UserError(f"ifeval: relation: wanted 'less than' or 'at least'; got {relation!r}")
    return count < wanted if relation == "less than" else count >= wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    """Runs of text that end in . ! or ?, not counting initials, abbreviations and decimals."""
    text = re.sub(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|e\.g|i\.e)\.", "", text)
    text = re.sub(r"(?<=\b[A-Z])\.|(?<=\d)\.(?=\d)|\b\w+(?:\.\w+)+", "", text)
    parts = re.split(r"(?<=[.!?])[\"')\]*]*(?:\s+|$)|\n{2,}", text)
    return sum(1 for part in parts if _words(part or ""))


def _paragraphs(text: str, divider: str) -> list[str] | None:
    """Non-empty parts; None if one in the middle is empty."""
    parts = re.split(divider, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part for part in parts if part.strip()]


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _paragraphs(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = re.split(r"\n\n", text)
    count = sum(1 for part in parts if part.strip())
    if nth_paragraph > count or count != num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    first = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return first is not None and first[0].lower() == first_word.lower()


def _language(text: str, language: str) -> bool | None:
    try:
        import langdetect
    except ImportError:
        return None
    langdetect.DetectorFactory.seed = 0  # it samples
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True  # no letters to tell it by: as in the paper's code


def _has_all(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)
    return _compare(len(found), relation, frequency)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    parts = re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


def _highlights(text: str, num_highlights: int) -> bool:
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip().lower()
    spelled = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}
    return re.search(spelled.get(marker, re.escape(marker)), text.lower()) is not None


def _json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _responses(text: str) -> bool:
    parts = _paragraphs(text, r"\*\*\*\*\*\*")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _title(text: str) -> bool:
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text))


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[\w'’-]+", text)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
CHECKS: dict[str, Callable[..., bool | None]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda t: _and(t.isupper(), _language(t, "en")),
    "change_case:english_lowercase": lambda t: _and(t.islower(), _language(t, "en")),
    "combination:repeat_prompt": lambda t, prompt_to_repeat: (
        t.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "combination:two_responses": _responses,
    "detectable_content:number_placeholders": lambda t, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]*\]", t)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda t: any(o in t for o in OPTIONS),
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _has_all,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_sentences": lambda t, num_sentences, relation: _compare(
        _sentences(t), relation, num_sentences
    ),
    "length_constraints:number_words": lambda t, num_words, relation: _compare(
        len(_words(t)), relation, num_words
    ),
    "punctuation:no_comma": lambda t: "," not in t,
    "startend:end_checker": lambda t, end_phrase: (
        t.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
}


def _and(first: bool, second: bool | None) -> bool | None:
    """A false first part settles it, whether or not the second can be told."""
    return second if first else False
