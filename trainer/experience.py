"""The completions sampled together: what is known of each token, and the micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .data import Example, Sequence
from .prompts import Prompt
from .rollout import Completion, Episode


@dataclass
class Window:
    """Completions [S] of this rank, `each` of them for every prompt, micro_rows a micro-batch.

    number: of the window in the run.
    foreign: how many of a prompt's completions, its last, another model sampled (XPO).
    others: completions of the same prompts that are judged but never trained on.
    rewards: [S] float64, weighted; NaN where none was given. parts: [S, F], of each function.
    costs: [S], where there are any.
    wins: [G, K, L], where a preference function told P(y_i beats y'_j): y' of the others, or of the
    group itself where there are none. NaN where it did not know.
    token_rewards: what of a completion's reward was given to its tokens, [L] of each; weighted.
    columns: numbers of every token of every completion, end to end [M].
    kept: bool [S], the completions that are trained on; all but empty ones at first.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    each: int
    micro_rows: int
    number: int = 0
    foreign: int = 0
    others: Window | None = None
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0))
    parts: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    costs: Tensor | None = None
    wins: Tensor | None = None
    token_rewards: list[np.ndarray] | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self):
        if len(self.kept) != len(self.completions):
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

    @property
    def finished(self) -> Tensor:
        """bool [S]: ended by themselves."""
        return torch.tensor([c.finished for c in self.completions], dtype=torch.bool)

    @property
    def groups(self) -> Tensor:
        """Rewards [G, K]."""
        return self.rewards.view(-1, self.each)

    @property
    def own(self) -> Tensor:
        """bool [S]: sampled by the policy."""
        return torch.arange(len(self.completions)) % self.each < self.each - self.foreign

    @property
    def candidates(self) -> np.ndarray:
        """Rewards [G, K] of those that are kept, NaN for the others."""
        return np.where(self.kept, self.rewards.numpy(), np.nan).reshape(-1, self.each)

    @property
    def episodes(self) -> list[Episode] | None:
        """The completions as conversations, where the policy talked to environments."""
        found = [c.episode for c in self.completions if c.episode is not None]
        return found if found and len(found) == len(self.completions) else None

    def paid(self) -> list[np.ndarray]:
        """token_rewards; zeros where there are none."""
        if self.token_rewards is not None:
            return self.token_rewards
        return [np.zeros(len(c.tokens)) for c in self.completions]

    def prompt_of(self, completion: int) -> Prompt:
        return self.prompts[completion // self.each]

    def informative(self) -> np.ndarray:
        """bool [G]: a prompt whose completions do not all have the same reward."""
        groups = self.groups.numpy()
        differ = np.fmax.reduce(groups, axis=1) > np.fmin.reduce(groups, axis=1)
        return np.asarray(differ, dtype=bool)

    def copy(self) -> Window:
        """One that a learner's choices and columns do not reach."""
        return replace(self, columns=dict(self.columns), kept=self.kept.copy())

    def taken(self, groups: Iterable[int]) -> Window:
        """Of these prompts alone."""
        chosen = list(groups)
        rows = [g * self.each + k for g in chosen for k in range(self.each)]
        bounds = self.cu_seqlens.tolist()
        columns = {
            name: np.concatenate([values[:0], *(values[bounds[i] : bounds[i + 1]] for i in rows)])
            for name, values in self.columns.items()
        }
        return Window(
            [self.prompts[g] for g in chosen],
            [self.completions[i] for i in rows],
            self.each,
            self.micro_rows,
            self.number,
            self.foreign,
            None if self.others is None else self.others.taken(chosen),
            self.rewards[rows],
            self.parts[rows],
            None if self.costs is None else self.costs[rows],
            None if self.wins is None else self.wins[chosen],
            None if self.token_rewards is None else [self.token_rewards[i] for i in rows],
            columns,
            self.kept[rows],
        )

    def joined(self, more: Window) -> Window:
        """With the prompts of another after its own, and the same columns."""
        others = self.others
        if others is not None and more.others is not None:
            others = others.joined(more.others)
        costs = self.costs
        if costs is not None and more.costs is not None:
            costs = torch.cat([costs, more.costs])
        wins = self.wins
        if wins is not None and more.wins is not None:
            wins = torch.cat([wins, more.wins])
        dense = self.token_rewards is not None or more.token_rewards is not None
        return Window(
            self.prompts + more.prompts,
            self.completions + more.completions,
            self.each,
            self.micro_rows,
            self.number,
            self.foreign,
            others,
            torch.cat([self.rewards, more.rewards]),
            torch.cat([self.parts, more.parts]),
            costs,
            wins,
            None if not dense else self.paid() + more.paid(),
            {name: np.concatenate([x, more.columns[name]]) for name, x in self.columns.items()},
            np.concatenate([self.kept, more.kept]),
        )

    def micro_batches(self, every: bool = False) -> list[list[Example]]:
        """An Example is what a micro-batch has of a prompt's group, and shares the prompt. Their
        number does not depend on what is kept, so it is the same on every rank.

        every: those that are left out as well.
        """
        told = np.array([len(c.tokens) > 0 for c in self.completions], dtype=bool)
        taken = told if every else self.kept
        batches = []
        for start in range(0, len(self.completions), self.micro_rows):
            stop = min(start + self.micro_rows, len(self.completions))
            rows = [i for i in range(start, stop) if taken[i]]
            groups = groupby(rows, lambda i: i // self.each)
            batches.append([self.example(list(members)) for _, members in groups])
        return batches

    def picked(self, choose: Callable[[int], list[Example]]) -> list[list[Example]]:
        """What `choose` makes of each prompt's group, by its place; whole groups a micro-batch."""
        chosen = [choose(group) for group in range(len(self.prompts))]
        size = max(1, self.micro_rows // self.each)
        batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return [[example for made in batch for example in made] for batch in batches]

    def set(self, name: str, values: Tensor) -> None:
        """A column, from numbers of every token [M]."""
        self.columns[name] = values.detach().cpu().numpy()

    def column(self, name: str) -> Tensor:
        return torch.from_numpy(self.columns[name])

    def spread(self, name: str, values: Tensor) -> None:
        """A column from a number of every completion [S]; 0 for NaN."""
        lengths = self.cu_seqlens.diff().long()
        self.set(name, values.float().nan_to_num(nan=0.0).repeat_interleave(lengths))

    def example(self, members: list[int], judged: tuple[float, ...] = ()) -> Example:
        """Completions of one prompt, in this order; judged: numbers that the loss reads."""
        prompt, bounds = self.prompt_of(members[0]), self.cu_seqlens.tolist()
        columns = {
            name: np.concatenate([values[bounds[i] : bounds[i + 1]] for i in members])
            for name, values in self.columns.items()
        }
        sequences = tuple(self._sequence(prompt.tokens, i) for i in members)
        return Example(members[0], sequences, prompt.where, judged, columns)

    def _sequence(self, prompt: np.ndarray, i: int) -> Sequence:
        episode = self.completions[i].episode
        if episode is not None:
            return Sequence(episode.tokens, episode.own)
        tokens = np.concatenate([prompt, self.completions[i].tokens])
        return Sequence(tokens, np.arange(len(tokens)) >= len(prompt))
