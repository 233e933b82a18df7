"""The completions sampled together: what is known of each token, and the micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .data import Example, Sequence
from .prompts import Prompt
from .rollout import Completion


@dataclass
class Window:
    """Completions [S] of this rank, `each` of them for every prompt, micro_rows a micro-batch.

    number: of the window in the run.
    columns: numbers of every token of every completion, end to end [M].
    kept: bool [S], the completions that are trained on; all but empty ones at first.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    each: int
    micro_rows: int
    number: int = 0
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self):
        self.kept = np.array([len(c.tokens) > 0 for c in self.completions], dtype=bool)

    @property
    def cu_groups(self) -> Tensor:
        """[G + 1] int32: which completions are of one prompt."""
        return torch.arange(len(self.prompts) + 1, dtype=torch.int32) * self.each

    @property
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int32: which tokens are of one completion."""
        lengths = torch.tensor([0, *(len(c.tokens) for c in self.completions)])
        return lengths.cumsum(0).int()

    def prompt_of(self, completion: int) -> Prompt:
        return self.prompts[completion // self.each]

    def micro_batches(self) -> list[list[Example]]:
        """An Example is what a micro-batch has of a prompt's group, and shares the prompt. Their
        number does not depend on what is kept, so it is the same on every rank."""
        batches = []
        for start in range(0, len(self.completions), self.micro_rows):
            stop = min(start + self.micro_rows, len(self.completions))
            rows = [i for i in range(start, stop) if self.kept[i]]
            groups = groupby(rows, lambda i: i // self.each)
            batches.append([self._example(list(members)) for _, members in groups])
        return batches

    def picked(self, choose: Callable[[range], list[int]]) -> list[list[Example]]:
        """Whole groups to a micro-batch, of each the completions that `choose` names, in order."""
        groups = [range(i, i + self.each) for i in range(0, len(self.completions), self.each)]
        chosen = [choose(group) for group in groups]
        size = max(1, self.micro_rows // self.each)
        batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return [[self._example(members) for members in batch if members] for batch in batches]

    def set(self, name: str, values: Tensor) -> None:
        """A column, from numbers of every token [M]."""
        self.columns[name] = values.detach().cpu().numpy()

    def spread(self, name: str, values: Tensor) -> None:
        """A column from a number of every completion [S]; 0 for NaN."""
        lengths = self.cu_seqlens.diff().long()
        self.set(name, values.float().nan_to_num(nan=0.0).repeat_interleave(lengths))

    def _example(self, members: list[int]) -> Example:
        prompt, bounds = self.prompt_of(members[0]), self.cu_seqlens.tolist()
        columns = {
            name: np.concatenate([values[bounds[i] : bounds[i + 1]] for i in members])
            for name, values in self.columns.items()
        }
        sequences = tuple(self._sequence(prompt.tokens, i) for i in members)
        return Example(members[0], sequences, prompt.where, columns=columns)

    def _sequence(self, prompt: np.ndarray, i: int) -> Sequence:
        tokens = np.concatenate([prompt, self.completions[i].tokens])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))
