"""Examples -> a PackedBatch: one row of tokens in which common prefixes stand once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels.objective import Unit
from prefuse.kernels.prefix import PrefixTable, prefix_table
from prefuse.kernels.segments import segment_ids

from .data import Example, common_prefix


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, T tokens in S segments; M of them are scored, of Q sequences.

    A token attends to its own segment causally and to the whole parent segment. Prefix segments
    come first, then all children grouped by parent. `score_rows[i]` is the token whose hidden
    state predicts `targets[i]`: the last token of a shared prefix predicts the first token of
    every child, so a row may appear several times. `token_rows[i]` is where `targets[i]` itself is.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    parent: Tensor  # [S] int64 on the CPU: the segment continued, or -1
    score_rows: Tensor  # [M] int64
    token_rows: Tensor  # [M] int64
    targets: Tensor  # [M] int64
    score_cu_seqlens: Tensor  # [Q + 1] int32
    examples: Tensor  # [E] int64: the rows these sequences come from
    indices: tuple[int, ...]  # the same, on the host
    judged: Tensor  # [E, columns]: numbers of those rows, for losses that read them
    columns: dict[str, Tensor]  # [M] each: numbers of the scored tokens; {} without examples
    prefix: PrefixTable
    n_tokens: int  # as the rows have them, before prefixes are shared

    @property
    def n_scored(self) -> int:
        return len(self.targets)

    @property
    def n_sequences(self) -> int:
        return len(self.score_cu_seqlens) - 1

    def count(self, unit: Unit) -> int:
        """How many of `unit` the batch has; pairs stand as chosen, rejected, chosen, ..."""
        counts = {
            "token": self.n_scored,
            "sequence": self.n_sequences,
            "pair": self.n_sequences // 2,
            "group": len(self.examples),
        }
        return counts[unit]

    def to(self, device: torch.device) -> PackedBatch:
        """On a GPU without waiting for it: from memory that it reads by itself."""
        own = self if device.type == "cpu" else self._pinned()
        moved = {k: v.to(device, non_blocking=True) for k, v in own._tensors().items()}
        columns = {k: v.to(device, non_blocking=True) for k, v in own.columns.items()}
        return replace(self, **moved, columns=columns, prefix=own.prefix.to(device))

    def _pinned(self) -> PackedBatch:
        table = self.prefix._asdict().items()
        prefix = {k: v.pin_memory() for k, v in table if isinstance(v, Tensor)}
        return replace(
            self,
            **{k: v.pin_memory() for k, v in self._tensors().items()},
            columns={k: v.pin_memory() for k, v in self.columns.items()},
            prefix=self.prefix._replace(**prefix),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Those that travel, but for columns and the prefix table."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in every.items() if isinstance(v, Tensor) and k != "parent"}


def pack(examples: list[Example], share: bool = True) -> PackedBatch:
    """Packs examples; with `share`, the sequences of an example keep their common prefix once.

    No examples give a batch of one unscored token, so that a rank with nothing to do can still
    take part in collective operations.
    """
    prefixes: list[np.ndarray] = []
    children: list[tuple[np.ndarray, int, int]] = []  # tokens, first position, parent
    scored: list[tuple[int, np.ndarray, np.ndarray]] = []  # child, scored positions, their tokens
    for example in examples:
        shared = _shared_length(example) if share else 0
        if shared:
            prefixes.append(example.sequences[0].tokens[:shared])
        for sequence in example.sequences:
            positions = np.flatnonzero(sequence.scored)
            scored.append((len(children), positions, sequence.tokens[positions]))
            parent = len(prefixes) - 1 if shared else -1
            children.append((sequence.tokens[shared:], shared, parent))
    if not examples:
        children.append((np.zeros(1, dtype=np.int64), 0, -1))

    segments = prefixes + [tokens for tokens, _, _ in children]
    cu = np.cumsum([0, *(len(s) for s in segments)])
    first = [0] * len(prefixes) + [position for _, position, _ in children]
    parent = [-1] * len(prefixes) + [p for _, _, p in children]
    before, at = (
        [
            _rows(positions - back, children[child], cu, len(prefixes) + child)
            for child, positions, _ in scored
        ]
        for back in (1, 0)
    )
    cu_seqlens = torch.from_numpy(cu.astype(np.int32))
    parent = torch.tensor(parent)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(segments)),
        positions=torch.from_numpy(
            np.concatenate([np.arange(len(s)) + p for s, p in zip(segments, first, strict=True)])
        ),
        cu_seqlens=cu_seqlens,
        parent=parent,
        score_rows=torch.from_numpy(_concatenate(before)),
        token_rows=torch.from_numpy(_concatenate(at)),
        targets=torch.from_numpy(_concatenate([tokens for _, _, tokens in scored])),
        score_cu_seqlens=torch.from_numpy(
            np.cumsum([0, *(len(positions) for _, positions, _ in scored)]).astype(np.int32)
        ),
        examples=torch.tensor([e.index for e in examples], dtype=torch.int64),
        indices=tuple(e.index for e in examples),
        judged=torch.tensor([e.judged for e in examples], dtype=torch.float32),
        columns={
            name: torch.from_numpy(np.concatenate([e.columns[name] for e in examples]))
            for name in (examples[0].columns if examples else ())
        },
        prefix=prefix_table(cu_seqlens, parent),
        n_tokens=sum(e.n_tokens for e in examples),
    )


def _shared_length(example: Example) -> int:
    """The common prefix of all sequences, leaving each at least one token of its own."""
    first, *others = (s.tokens for s in example.sequences)
    if not others:
        return 0
    common = min(common_prefix(first, tokens) for tokens in others)
    return min(common, *(len(s.tokens) - 1 for s in example.sequences))


def _rows(positions: np.ndarray, child, cu: np.ndarray, segment: int) -> np.ndarray:
    """Where in the pack a sequence's tokens at `positions` stand: in the child, or its parent."""
    _, shared, parent = child
    in_child = cu[segment] + positions - shared
    return (
        in_child if parent < 0 else np.where(positions < shared, cu[parent] + positions, in_child)
    )


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Padded:
    """An unshared PackedBatch as a rectangle, for models that only take one."""

    input_ids: Tensor  # [S, L]
    attention_mask: Tensor  # [S, L]
    rows: Tensor  # [T] int64: where in the flattened rectangle each packed token stands


def pad(batch: PackedBatch, pad_token_id: int) -> Padded:
    """Right-pads the segments of a batch packed with `share=False`."""
    if bool((batch.parent >= 0).any()):
        raise ValueError("batch: wanted one packed with share=False; got shared prefixes")
    bounds, longest, device = batch.cu_seqlens, batch.prefix.max_segment, batch.tokens.device
    place = torch.arange(len(batch.tokens), device=device)
    segment = segment_ids(bounds, len(batch.tokens))
    rows = place + segment * longest - bounds[:-1].long()[segment]
    shape = len(bounds) - 1, longest
    mask = torch.arange(longest, device=device) < bounds.diff()[:, None]
    input_ids = torch.full(shape, pad_token_id, device=device)
    input_ids.view(-1)[rows] = batch.tokens
    return Padded(input_ids, mask.long(), rows)
