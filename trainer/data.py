"""Rows -> tokens. What is trained on is decided here, once: every sequence leaves with its mask.

Formats are TRL's: `text`, `messages`, `prompt` + `completion`, `prompt` + `chosen` + `rejected`
(the prompt may be implicit), each as strings or as lists of {"role", "content"}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from .errors import UserError
from .rows import Row

MARKERS = re.compile(r"{%-?\s*generation\s*-?%}")  # as transformers reads them


class Sequence(NamedTuple):
    """A sequence and which of its tokens are trained on (the first never is)."""

    tokens: np.ndarray  # [L] int64
    scored: np.ndarray  # [L] bool


@dataclass(frozen=True)
class Example:
    """The sequences of one row: one for SFT, chosen and rejected for a pair."""

    index: int
    sequences: tuple[Sequence, ...]
    where: str = ""
    judged: tuple[float, ...] = ()  # numbers of the row that the loss reads
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # numbers of its scored tokens

    @property
    def n_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)


@dataclass
class Ledger:
    """What became of the rows; printed by every run, so that nothing is dropped silently."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    identical: int = 0
    prompt_fills_max_length: int = 0
    nothing_scored: int = 0
    without_eos: int = 0
    tokens: int = 0
    scored_tokens: int = 0

    def skip(self, whatever_the_length: bool) -> None:
        """A row of which max_length leaves nothing to train on, or any length would."""
        self.nothing_scored += whatever_the_length
        self.prompt_fills_max_length += not whatever_the_length

    def lines(self) -> Iterator[str]:
        yield f"{self.kept} of {self.rows} rows kept, {self.tokens} tokens, " + (
            f"{self.scored_tokens} of them trained on"
        )
        notes = {
            "truncated to max_length": self.truncated,
            "skipped: identical pair": self.identical,
            "skipped: prompt fills max_length": self.prompt_fills_max_length,
            "skipped: nothing to train on, whatever the length": self.nothing_scored,
            "without EOS at the end": self.without_eos,
        }
        for note, count in notes.items():
            yield f"{count} {note}"

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def pair_examples(
    rows: list[Row],
    tokenizer,
    max_length: int | None,
    judged: Iterable[str] = (),
    identical: bool = False,
) -> tuple[list, Ledger]:
    """`chosen` + `rejected` rows, with or without `prompt` -> Examples of (chosen, rejected).

    As in TRL: an implicit prompt is the common prefix of the two; EOS is appended to completions
    that are text; the completion begins where the tokens of prompt and prompt + completion part;
    a row longer than max_length keeps its start, and is skipped if only its prompt is left.
    `judged` are the columns with numbers that the loss reads, a margin or a preference. Identical
    pairs state no preference and are skipped, unless `identical`: the loss learns from them.
    """
    for row in rows:
        for column in judged:
            require_number(row, column)
        require_columns(row, ("chosen", "rejected"))
        kind = _completion_kind(row, "chosen")
        _require(row, "rejected", _completion_kind(row, "rejected"), kind, "as 'chosen' is")
        if row.columns.get("prompt") is not None and kind_of(row, "prompt") != "text":
            _require(row, "chosen", kind, "messages", "as 'prompt' is")
        first = kind_of(rows[0], "chosen")
        _require(row, "chosen", kind, first, f"as in {rows[0].where}")
    ledger = Ledger(rows=len(rows))
    differ = lambda row: row.columns["chosen"] != row.columns["rejected"]  # noqa: E731
    distinct = [row for row in rows if identical or differ(row)]
    ledger.identical = len(rows) - len(distinct)
    parts = [split_prompt(row) for row in distinct]
    prompts = tokenize(tokenizer, [p for p, _, _ in parts], distinct, add_generation_prompt=True)
    chosen = tokenize(tokenizer, [p + c for p, c, _ in parts], distinct)
    rejected = tokenize(tokenizer, [p + r for p, _, r in parts], distinct)
    examples = []
    for i, row in enumerate(distinct):
        is_text = isinstance(row.columns["chosen"], str)
        pair = [np.asarray(x[i], dtype=np.int64) for x in (chosen, rejected)]
        if is_text:
            pair = [_with_eos(ids, tokenizer) for ids in pair]
        prompt = np.asarray(prompts[i], dtype=np.int64)
        start = min(common_prefix(prompt, ids) for ids in pair)
        cut = [ids[:max_length] for ids in pair]
        if min(len(ids) for ids in cut) <= max(start, 1):
            ledger.skip(whatever_the_length=min(len(ids) for ids in pair) <= max(start, 1))
            continue
        if np.array_equal(cut[0], cut[1]) and not identical:
            ledger.identical += 1
            continue
        ledger.truncated += any(len(ids) > len(kept) for ids, kept in zip(pair, cut, strict=True))
        sequences = tuple(_sequence(ids, slice(start, None)) for ids in cut)
        numbers = tuple(float(row.columns[column]) for column in judged)
        examples.append(Example(len(examples), sequences, row.where, numbers))
        _count(ledger, examples[-1], tokenizer)
    return _some(examples, ledger), ledger


def sft_examples(
    rows: list[Row],
    tokenizer,
    max_length: int | None,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> tuple[list, Ledger]:
    """`text`, `messages`, or `prompt` + `completion` rows -> Examples of one sequence.

    With a prompt the completion alone is scored unless `completion_only` is False; a row longer
    than max_length keeps its start, and is skipped if nothing scored is left.
    """
    ledger = Ledger(rows=len(rows))
    examples = []
    for row in rows:
        tokens, scored, is_text = _sft_tokens(row, tokenizer, completion_only, assistant_only)
        if is_text and not (len(tokens) and tokens[-1] == tokenizer.eos_token_id):
            tokens, scored = np.append(tokens, tokenizer.eos_token_id), np.append(scored, True)
        kept = slice(None, max_length)
        if not scored[kept][1:].any():
            ledger.skip(whatever_the_length=not scored[1:].any())
            continue
        ledger.truncated += len(tokens) > len(tokens[kept])
        sequence = _sequence(tokens[kept], scored[kept])
        examples.append(Example(len(examples), (sequence,), row.where))
        _count(ledger, examples[-1], tokenizer)
    return _some(examples, ledger), ledger


def _sft_tokens(row: Row, tokenizer, completion_only, assistant_only):
    """Tokens, which are scored, and whether the row is text (its EOS is ours to append)."""
    columns = row.columns
    if "messages" in columns or "text" in columns:
        column = "messages" if "messages" in columns else "text"
        whole = columns[column]
        if not whole:
            raise UserError(f"{row.where}: {column!r} is empty; fill or remove the row")
        if completion_only:
            raise UserError(
                f"{row.where}: --completion_only_loss wants 'prompt' and 'completion'; got "
                f"{column!r}. Drop the flag, or split the row"
            )
        is_text = kind_of(row, column) == "text"
        return *_whole(row, whole, tokenizer, assistant_only), is_text
    if not {"prompt", "completion"} <= columns.keys():
        raise UserError(
            f"{row.where}: wanted 'text', 'messages', or 'prompt' and 'completion'; got columns "
            f"{sorted(columns)}"
        )
    require_columns(row, ("prompt", "completion"))
    kind = _completion_kind(row, "completion")
    _require(row, "prompt", kind_of(row, "prompt"), kind, "as 'completion' is")
    prompt, completion = columns["prompt"], columns["completion"]
    tokens, scored = _whole(row, prompt + completion, tokenizer, assistant_only)
    alone = tokenize(tokenizer, [prompt], [row], add_generation_prompt=True)[0]
    start = common_prefix(np.asarray(alone), tokens) if completion_only is not False else 0
    return tokens, scored & (np.arange(len(tokens)) >= start), kind == "text"


def _whole(row: Row, whole: Any, tokenizer, assistant_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of text or messages, and which may be scored."""
    if assistant_only:
        return _assistant_mask(row, whole, tokenizer)
    tokens = np.asarray(tokenize(tokenizer, [whole], [row])[0], dtype=np.int64)
    return tokens, np.ones(len(tokens), dtype=bool)


def _assistant_mask(row: Row, messages: Any, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(messages, list):
        raise UserError(f"{row.where}: --assistant_only_loss wants messages; got text")
    if not MARKERS.search(tokenizer.chat_template or ""):
        raise UserError(
            "--assistant_only_loss: the chat template has no {% generation %} markers; add them "
            "around the assistant's content, or drop the flag"
        )
    out = _apply_template(tokenizer, messages, row, return_assistant_tokens_mask=True)
    scored = np.asarray(out["assistant_masks"], dtype=bool)
    return np.asarray(out["input_ids"], dtype=np.int64), scored


def split_prompt(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; an implicit prompt is split off as TRL's extract_prompt does."""
    chosen, rejected = row.columns["chosen"], row.columns["rejected"]
    prompt = row.columns.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, chosen, rejected
    index = 0
    for index in range(min(len(chosen), len(rejected))):  # noqa: B007
        if chosen[index] != rejected[index]:
            if index > 0 and chosen[index - 1] == " ":  # tokens begin with their space
                index -= 1
            break
    if prompt and (isinstance(chosen, str) or not index):  # which would be dropped
        raise UserError(
            f"{row.where}: 'prompt': wanted {'text' if isinstance(chosen, str) else 'messages'}, "
            "as 'chosen' is, or conversations that both begin with it; got "
            f"{type(prompt).__name__}"
        )
    return chosen[:index], chosen[index:], rejected[index:]


def tokenize(tokenizer, texts: list, rows: list[Row], add_generation_prompt=False) -> list:
    """Token ids of strings or message lists, which come from `rows`."""
    if not texts:
        return []
    if isinstance(texts[0], str):
        return tokenizer(texts)["input_ids"]
    option = {"add_generation_prompt": add_generation_prompt}
    return [
        _apply_template(tokenizer, messages, row, **option)["input_ids"] if messages else []
        for messages, row in zip(texts, rows, strict=True)
    ]


def _apply_template(tokenizer, messages: list[dict], row: Row, **options):
    """The tokenizer's chat template, filled in."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{row.where}: the rows are conversations but the tokenizer has no chat template; set "
            "one, or give rows of plain text"
        )
    options = {**template_options(row.columns), **options}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise UserError(f"{row.where}: the chat template refuses the row: {error}") from None


def template_options(columns: dict[str, Any]) -> dict[str, Any]:
    tools = columns.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = columns.get("chat_template_kwargs") or {}
    return {"tools": tools, **options} if tools else dict(options)


def _with_eos(tokens: np.ndarray, tokenizer) -> np.ndarray:
    if len(tokens) and tokens[-1] == tokenizer.eos_token_id:
        return tokens
    return np.append(tokens, tokenizer.eos_token_id)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two sequences have in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _sequence(tokens: np.ndarray, scored: slice | np.ndarray) -> Sequence:
    mask = np.zeros(len(tokens), dtype=bool)
    mask[scored] = True
    mask[0] = False  # nothing predicts the first token
    return Sequence(tokens, mask)


def _count(ledger: Ledger, example: Example, tokenizer) -> None:
    ledger.kept += 1
    ledger.tokens += example.n_tokens
    ledger.scored_tokens += sum(int(s.scored.sum()) for s in example.sequences)
    ledger.without_eos += not all(
        tokenizer.eos_token_id in s.tokens[s.scored][-2:] for s in example.sequences
    )


def _some(examples: list[Example], ledger: Ledger) -> list[Example]:
    if not examples:
        raise UserError("no row is left to train on: " + "; ".join(ledger.lines()))
    return examples


def require_columns(row: Row, wanted: Iterable[str]) -> None:
    for column in wanted:
        if row.columns.get(column) is None:
            raise UserError(
                f"{row.where}: wanted a column {column!r}; got {sorted(row.columns)}. "
                "Add it or remove the row"
            )


def require_number(row: Row, column: str) -> None:
    """A finite number; a probability, for a preference."""
    value = row.columns.get(column)
    try:
        good = value is not None and not isinstance(value, bool) and np.isfinite(float(value))
    except (TypeError, ValueError):
        good = False
    if good and column == "preference":
        good = 0 <= float(value or 0) <= 1
    if not good:
        wanted = "a probability" if column == "preference" else "a number"
        raise UserError(
            f"{row.where}: {column!r}: wanted {wanted}, which --loss_type reads; got {value!r}"
        )


def truth(value: Any) -> Any:
    """A label that a CSV file holds as text; any other value as it is."""
    told = {"true": True, "1": True, "false": False, "0": False}
    return told.get(value.lower(), value) if isinstance(value, str) else value


def kind_of(row: Row, column: str) -> str:
    """Whether a column holds text or a conversation; nothing else can be tokenized."""
    value = row.columns[column]
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value):
        return "messages"
    raise UserError(
        f"{row.where}: {column!r}: wanted text or a list of {{'role', 'content'}} messages; got "
        f"{str(value)[:60]!r}"
    )


def _completion_kind(row: Row, column: str) -> str:
    kind, value = kind_of(row, column), row.columns[column]
    if kind == "messages" and value:
        value = value[-1].get("content") or value[-1].get("tool_calls")
    if not value:
        raise UserError(f"{row.where}: {column!r} is an empty completion; fill or remove the row")
    return kind


def _require(row: Row, column: str, kind: str, wanted: str, why: str) -> None:
    if kind != wanted:
        raise UserError(f"{row.where}: {column!r}: wanted {wanted}, {why}; got {kind}")
