"""Completions judged one at a time -> Examples of one sequence; completions of other prompts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np

from .data import Example, Ledger, Sequence, require_columns, require_number, sft_examples, truth
from .data import split_prompt as split
from .errors import UserError
from .rows import Row

TEMPLATE = ("tools", "chat_template_kwargs")  # what the chat template of a row reads besides


@dataclass
class KTOLedger(Ledger):
    """Of completions; a pair is two of them."""

    desirable: int = 0
    undesirable: int = 0

    def lines(self) -> Iterator[str]:
        yield from super().lines()
        if self.desirable + self.undesirable:
            yield f"{self.desirable} desirable, {self.undesirable} undesirable"


def kto_examples(
    rows: list[Row], tokenizer, max_length: int | None, judged: tuple[str, ...]
) -> tuple[list[Example], KTOLedger]:
    """`prompt`, `completion` and the `judged` columns -> Examples; EOS and length as for SFT.

    A row with `chosen` and `rejected` is split in two, as in TRL: chosen is desirable, rejected is
    not.
    """
    rows = [single for row in rows for single in _unpaired(row)]
    numbers = {row.where: tuple(_judgement(row, name) for name in judged) for row in rows}
    for row in rows:
        require_columns(row, ("prompt", "completion"))
    names = ("prompt", "completion", *TEMPLATE)
    texts = [Row({k: row.columns[k] for k in names if k in row.columns}, row.where) for row in rows]
    found, ledger = sft_examples(texts, tokenizer, max_length)
    examples = [replace(example, judged=numbers[example.where]) for example in found]
    counts = KTOLedger(**asdict(ledger))
    if "label" in judged:
        counts.desirable = sum(e.judged[judged.index("label")] > 0 for e in examples)
        counts.undesirable = len(examples) - counts.desirable
    return examples, counts


def _unpaired(row: Row) -> Iterator[Row]:
    columns = row.columns
    if "completion" in columns or not {"chosen", "rejected"} <= columns.keys():
        yield row
        return
    require_columns(row, ("chosen", "rejected"))
    prompt, *both = split(row)
    for name, completion in zip(("chosen", "rejected"), both, strict=True):
        single = {"prompt": prompt, "completion": completion, "label": name == "chosen"}
        yield Row({**columns, **single}, f"{row.where} ({name})")


def _judgement(row: Row, name: str) -> float:
    value = row.columns.get(name)
    if name != "label":
        require_number(row, name)
        return float(value or 0)
    value = truth(value)
    if value not in (True, False):  # 1 and 0 too
        raise UserError(
            f"{row.where}: 'label': wanted true for a desirable completion, or false; got {value!r}"
        )
    return float(value)


def prompt_of(example: Example) -> np.ndarray:
    return np.split(example.sequences[0].tokens, [_start(example)])[0]


def up_to_prompt(example: Example) -> Example:
    """The prompt, and one token more, which is predicted where the prompt ends."""
    end = _start(example)
    tokens = example.sequences[0].tokens[: end + 1]
    return replace(example, sequences=(Sequence(tokens, np.arange(len(tokens)) == end),))


def mismatched(example: Example, other: Example, max_length: int | None) -> Example:
    """The prompt of one example with the completion of another."""
    prompt = prompt_of(example)
    completion = other.sequences[0].tokens[_start(other) :]
    tokens = np.concatenate([prompt, completion])[:max_length]
    return replace(example, sequences=(Sequence(tokens, np.arange(len(tokens)) >= len(prompt)),))


def partners(prompts: list[Hashable]) -> list[int | None]:
    """For each row another one, of another prompt: every row is the partner of one.

    Rows are turned by as many places as the commonest prompt has rows: by one, as in TRL, where
    all prompts differ. None where a prompt has more than half of the rows, for those left over.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    order = [row for rows in rows_of.values() for row in rows]
    turn = max((len(rows) for rows in rows_of.values()), default=0)
    found: list[int | None] = [None] * len(prompts)
    for place, row in enumerate(order):
        other = order[(place - turn) % len(order)]
        found[row] = other if prompts[other] != prompts[row] else None
    return found


def _start(example: Example) -> int:
    """Where the completion begins."""
    return int(np.flatnonzero(example.sequences[0].scored)[0])
