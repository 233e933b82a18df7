"""`prompt` rows -> tokens to sample from, with the columns that rewards read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .data import kind_of, require_columns, tokenize
from .errors import UserError
from .rows import Row

NAMES = ("prompt", "question", "problem")


class Prompt(NamedTuple):
    """A row: its tokens, what a reward is given as its prompt, and its other columns."""

    index: int
    tokens: np.ndarray  # [L] int64
    prompt: Any  # text, or a list of messages
    columns: dict[str, Any]
    where: str


@dataclass
class PromptLedger:
    """What became of the rows."""

    rows: int = 0
    kept: int = 0
    too_long: int = 0
    tokens: int = 0

    def lines(self) -> Iterator[str]:
        yield f"{self.kept} of {self.rows} prompts kept, {self.tokens} tokens"
        yield f"{self.too_long} skipped: longer than max_prompt_length"


def load_prompts(
    rows: list[Row], tokenizer, max_length: int | None, columns: Iterable[str] = ()
) -> tuple[list[Prompt], PromptLedger]:
    """`prompt` rows, text or conversations; a conversation ends with the generation prompt.

    Where no row has a `prompt`, `question` (GSM8K) or `problem` (MATH) is taken for it. What a row
    lacks of the `columns`, and of those that other rows have, is None there.
    """
    column = next((n for n in NAMES if any(n in row.columns for row in rows)), "prompt")
    names = dict.fromkeys([*columns, *(name for row in rows for name in row.columns)])
    names.pop(column, None)
    ledger = PromptLedger(rows=len(rows))
    prompts: list[Prompt] = []
    for row in rows:
        require_columns(row, (column,))
        if not row.columns[column]:
            raise UserError(f"{row.where}: {column!r} is empty; fill or remove the row")
        kind_of(row, column)
        prompt = row.columns[column]
        tokens = np.asarray(
            tokenize(tokenizer, [prompt], [row], add_generation_prompt=True)[0], dtype=np.int64
        )
        if max_length is not None and len(tokens) > max_length:
            ledger.too_long += 1
            continue
        others = {name: row.columns.get(name) for name in names}
        prompts.append(Prompt(len(prompts), tokens, prompt, others, row.where))
        ledger.kept += 1
        ledger.tokens += len(tokens)
    if not prompts:
        raise UserError("no prompt is left to sample from: " + "; ".join(ledger.lines()))
    return prompts, ledger
