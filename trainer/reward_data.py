"""Judged rows -> Examples whose scored tokens are those at which a reward is read.

Numbers of the row travel with them as columns, one entry a scored token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .data import Example, Sequence, common_prefix, pair_examples, require_columns, tokenize, truth
from .errors import UserError
from .rows import Row

# what a loss learns from
FORMATS = {
    "bradley_terry": "pairs",
    "bradley_terry_returns": "pairs",
    "odin": "pairs",
    "cost": "costs",
    "k_wise": "lists",
    "all_pairs": "lists",
    "prm": "steps",
    "binary": "labels",
    "regression": "ratings",
}
OPTIONAL = {"bradley_terry": ("margin", "preference"), "bradley_terry_returns": ("preference",)}
PER_TOKEN = ("bradley_terry_returns",)  # the others read a sequence's last token, or step ends


@dataclass
class RewardLedger:
    """What became of the rows; an answer cut short is another answer, so none is cut."""

    rows: int = 0
    kept: int = 0
    too_long: int = 0
    identical: int = 0
    tokens: int = 0

    def lines(self) -> Iterator[str]:
        yield f"{self.kept} of {self.rows} rows kept, {self.tokens} tokens"
        yield f"{self.too_long} skipped: longer than max_length"
        yield f"{self.identical} skipped: identical pair"


def reward_examples(
    rows: list[Row], tokenizer, max_length: int | None, loss_type: str, step_separator: str = "\n"
) -> tuple[list[Example], RewardLedger]:
    """The rows of the format that `loss_type` learns from."""
    ledger = RewardLedger(rows=len(rows))
    kind = FORMATS[loss_type]
    if kind in ("pairs", "costs"):
        found = _pairs(rows, tokenizer, loss_type, ledger)
    else:
        make: Callable = {"lists": _list, "steps": _steps, "labels": _label, "ratings": _rating}[
            kind
        ]
        extra = (step_separator,) if kind == "steps" else ()
        found = [make(row, tokenizer, *extra) for row in rows]
    limit = float("inf") if max_length is None else max_length
    examples = []
    for example in found:
        if max(len(s.tokens) for s in example.sequences) > limit:
            ledger.too_long += 1
            continue
        examples.append(replace(example, index=len(examples)))
        ledger.kept += 1
        ledger.tokens += example.n_tokens
    if not examples:
        raise UserError("no row is left to train on: " + "; ".join(ledger.lines()))
    return examples, ledger


def read_at_end(tokens: np.ndarray, start: int, pad: int | None) -> Sequence:
    """Read at the last token that is no padding token, where transformers reads a saved model."""
    real = np.flatnonzero(tokens != pad)
    scored = np.zeros(len(tokens), dtype=bool)
    scored[real[-1] if len(real) else len(tokens) - 1] = True
    return Sequence(tokens, scored)


def answer(tokenizer, prompt: Any, completion: Any, row: Row) -> tuple[np.ndarray, int]:
    """Tokens of prompt and completion, and where the completion begins; text ends with EOS."""
    if type(prompt) is not type(completion):
        raise UserError(
            f"{row.where}: 'prompt' and its completion: wanted both as text or both as messages; "
            f"got {type(prompt).__name__} and {type(completion).__name__}"
        )
    tokens = np.asarray(tokenize(tokenizer, [prompt + completion], [row])[0], dtype=np.int64)
    alone = tokenize(tokenizer, [prompt], [row], add_generation_prompt=True)[0]
    start = common_prefix(np.asarray(alone, dtype=np.int64), tokens)
    if isinstance(completion, str) and (not len(tokens) or tokens[-1] != tokenizer.eos_token_id):
        tokens = np.append(tokens, tokenizer.eos_token_id)
    return tokens, min(start, len(tokens) - 1)


def _pairs(rows: list[Row], tokenizer, loss_type: str, ledger: RewardLedger) -> list[Example]:
    """Chosen, rejected; for costs the safer and the more harmful answer."""
    if FORMATS[loss_type] == "costs":
        rows = [_safe_rlhf(row) for row in rows]
    given = {c for row in rows for c in row.columns if row.columns[c] is not None}
    judged = [c for c in OPTIONAL.get(loss_type, ()) if c in given]
    pairs, skipped = pair_examples(rows, tokenizer, None, judged)
    ledger.identical = skipped.identical
    by_place = {row.where: row for row in rows}
    found = []
    for example in pairs:
        lengths = [int(s.scored.sum()) for s in example.sequences]
        sequences = example.sequences
        if loss_type not in PER_TOKEN:
            sequences = tuple(read_at_end(s.tokens, 0, tokenizer.pad_token_id) for s in sequences)
        each = {name: [number] * 2 for name, number in zip(judged, example.judged, strict=True)}
        each["length"] = lengths
        if FORMATS[loss_type] == "costs":
            each["unsafe"] = _unsafe(by_place[example.where])
        counts = [int(s.scored.sum()) for s in sequences]
        columns = {k: np.repeat(_float32(v), counts) for k, v in each.items()}
        found.append(Example(example.index, sequences, example.where, columns=columns))
    return found


def _safe_rlhf(row: Row) -> Row:
    """PKU-SafeRLHF's own columns as ours."""
    c = row.columns
    if "safer_response_id" not in c:
        return row
    safer = int(c["safer_response_id"])
    texts = (c.get("response_0"), c.get("response_1"))
    flags = (c.get("is_response_0_safe"), c.get("is_response_1_safe"))
    changed = dict(chosen=texts[safer], rejected=texts[1 - safer])
    changed |= dict(is_chosen_safe=flags[safer], is_rejected_safe=flags[1 - safer])
    return Row({**c, **changed}, row.where)


def _unsafe(row: Row) -> list[float]:
    names = ("is_chosen_safe", "is_rejected_safe")
    return [1.0 - _flag(row, name, row.columns.get(name)) for name in names]


def _list(row: Row, tokenizer) -> Example:
    """`prompt`, `completions`, and `ranks` (1 is best) or `scores` (higher is better)."""
    require_columns(row, ("prompt", "completions"))
    completions = _many(row, "completions")
    if len(completions) < 2:
        raise UserError(f"{row.where}: 'completions': wanted two or more; got {len(completions)}")
    column, sign = ("ranks", -1.0) if row.columns.get("ranks") is not None else ("scores", 1.0)
    require_columns(row, (column,))
    quality = [sign * _number(row, column, x) for x in _as_many(row, column, len(completions))]
    sequences = []
    for completion in completions:
        tokens, start = answer(tokenizer, row.columns["prompt"], completion, row)
        sequences.append(read_at_end(tokens, start, tokenizer.pad_token_id))
    place = np.arange(len(sequences), dtype=np.float32)
    columns = {"quality": _float32(quality), "answer": place}
    return Example(0, tuple(sequences), row.where, columns=columns)


def _steps(row: Row, tokenizer, separator: str) -> Example:
    """TRL's stepwise rows: `prompt`, `completions` (steps), `labels`; read at separators."""
    require_columns(row, ("prompt", "completions", "labels"))
    steps = _many(row, "completions")
    labels = [_probability(row, "labels", x) for x in _as_many(row, "labels", len(steps))]
    tokens, ends = step_tokens(tokenizer, row.columns["prompt"], steps, separator)
    scored = np.zeros(len(tokens), dtype=bool)
    scored[ends] = True
    columns = {"label": _float32(labels)}
    return Example(0, (Sequence(tokens, scored),), row.where, columns=columns)


def step_tokens(tokenizer, prompt: str, steps: list[str], separator: str):
    """Tokens of prompt and steps, each with its separator, tokenized apart as TRL did; and where
    the steps end."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens, ends = bos + encode(prompt), []
    for step in steps:
        own = encode(step) + encode(separator)
        if not own:
            raise UserError(f"a step has no tokens: {step!r}, separator {separator!r}")
        tokens += own
        ends.append(len(tokens) - 1)
    return np.asarray(tokens, dtype=np.int64), ends


def _label(row: Row, tokenizer) -> Example:
    """`prompt`, `completion`, `label`: bool or a probability."""
    label = _probability(row, "label", row.columns.get("label"))
    return _single(row, tokenizer, {"label": _float32([label])})


def _rating(row: Row, tokenizer) -> Example:
    """`prompt`, `completion`, `target`: a number, or several with null where there is none."""
    target = row.columns.get("target")
    many = target if isinstance(target, list) else [target]
    if not any(x is not None for x in many):
        raise UserError(f"{row.where}: 'target': wanted a number, or a list with one; got {target}")
    numbers = [np.nan if x is None else _number(row, "target", x) for x in many]
    return _single(row, tokenizer, {"target": _float32([numbers])})


def _single(row: Row, tokenizer, columns: dict[str, np.ndarray]) -> Example:
    require_columns(row, ("prompt", "completion"))
    tokens, start = answer(tokenizer, row.columns["prompt"], row.columns["completion"], row)
    sequence = read_at_end(tokens, start, tokenizer.pad_token_id)
    return Example(0, (sequence,), row.where, columns=columns)


def _float32(numbers: list) -> np.ndarray:
    return np.asarray(numbers, dtype=np.float32)


def _many(row: Row, column: str) -> list:
    value = row.columns.get(column)
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: {column!r}: wanted a list; got {str(value)[:60]!r}")
    return value


def _as_many(row: Row, column: str, count: int) -> list:
    value = _many(row, column)
    if len(value) != count:
        raise UserError(
            f"{row.where}: {column!r}: wanted {count}, one for each of 'completions'; got "
            f"{len(value)}"
        )
    return value


def _number(row: Row, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not np.isfinite(number):
        raise UserError(f"{row.where}: {column!r}: wanted a finite number; got {value!r}")
    return number


def _probability(row: Row, column: str, value: Any) -> float:
    value = truth(value)
    number = float(value) if isinstance(value, bool) else _number(row, column, value)
    if not 0 <= number <= 1:
        raise UserError(
            f"{row.where}: {column!r}: wanted true, false or a probability; got {value}"
        )
    return number


def _flag(row: Row, column: str, value: Any) -> float:
    value = truth(value)
    if not isinstance(value, bool):
        raise UserError(f"{row.where}: {column!r}: wanted true or false; got {value!r}")
    return float(value)
