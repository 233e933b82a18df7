"""The layout of a packed row whose segments share prefixes, as attention needs it.

`parent[s]` is the segment that segment s continues, or -1. Worked out once per batch on the host:
afterwards no layer looks at a length again, so a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import expect


class PrefixTable(NamedTuple):
    """Which segments continue which prefix; built once per batch, so that no layer syncs.

    The second flash call sees the rows `queries` of the pack as segments `cu_q` and the rows `keys`
    as segments `cu_k`: entry g is one prefix and all its children. A segment without a prefix that
    stands between them is an entry without keys, one that stands between prefixes an entry without
    queries.
    """

    tokens: int  # T
    cu_seqlens: Tensor  # [S+1] int32
    parent: tuple[int, ...]  # [S], -1 for none
    max_segment: int  # longest segment
    longest_row: int  # longest prefix + child, or segment
    queries: tuple[int, int]  # first and last+1 token of the children; (0, 0) if there are none
    keys: tuple[int, int]  # the same of their prefixes
    cu_q: Tensor  # [groups+1] int32
    cu_k: Tensor  # [groups+1] int32
    max_q: int
    max_k: int
    has_prefix: Tensor | None  # bool per token of `queries`; None if every one has a prefix

    def to(self, device: torch.device | str) -> PrefixTable:
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in zip(self._fields, self, strict=True)
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)


def prefix_table(cu_seqlens: Tensor | Sequence[int], parent: Tensor | Sequence[int]) -> PrefixTable:
    """The table of a pack in which segment s continues segment `parent[s]`, or none if that is -1.

    Args:
        cu_seqlens: [S+1] segment bounds. The table's tensors are placed on its device.
        parent: [S]. Prefixes precede all children, the children of one prefix are adjacent, and
            these groups come in the order of their prefixes; a prefix has no parent itself.
            Segments that are neither may stand anywhere.
    """
    bounds, parents = _host_list(cu_seqlens), _host_list(parent)
    check_layout(bounds, parents)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    rows = [n + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True)]
    groups = _groups(bounds, parents)
    query_counts = torch.tensor([queries for queries, _ in groups], dtype=torch.int32)
    key_counts = torch.tensor([keys for _, keys in groups], dtype=torch.int32)
    queries = keys = (0, 0)
    if bool(((query_counts > 0) & (key_counts > 0)).any()):
        children = [s for s, p in enumerate(parents) if p >= 0]
        first, last = children[0], children[-1]
        queries = (bounds[first], bounds[last + 1])
        keys = (bounds[parents[first]], bounds[parents[last] + 1])
    has_prefix = (key_counts > 0).repeat_interleave(query_counts)
    table = PrefixTable(
        tokens=bounds[-1],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        parent=tuple(parents),
        max_segment=max(lengths, default=0),
        longest_row=max(rows, default=0),
        queries=queries,
        keys=keys,
        cu_q=_cumulative(query_counts),
        cu_k=_cumulative(key_counts),
        max_q=max((q for q, _ in groups), default=0),
        max_k=max((k for _, k in groups), default=0),
        has_prefix=None if bool(has_prefix.all()) else has_prefix,
    )
    return table.to(cu_seqlens.device) if isinstance(cu_seqlens, Tensor) else table


def _cumulative(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])


def _host_list(x: Tensor | Sequence[int]) -> list[int]:
    return x.tolist() if isinstance(x, Tensor) else [int(value) for value in x]


def check_layout(bounds: list[int], parents: list[int]) -> None:
    expect(
        bool(bounds) and bounds[0] == 0 and all(a <= b for a, b in pairwise(bounds)),
        "cu_seqlens",
        "segment bounds that start at 0 and never decrease",
        f"{bounds[:12]}{'...' if len(bounds) > 12 else ''}",
    )
    expect(
        len(parents) == len(bounds) - 1,
        "parent",
        f"one entry per segment ({len(bounds) - 1})",
        len(parents),
    )
    for s, p in enumerate(parents):
        if p != -1:
            expect(
                0 <= p < s and parents[p] == -1,
                f"parent[{s}]",
                "-1 or the index of an earlier segment that has no parent itself",
                p,
                "One level of sharing is supported",
            )
    order = [p for p in parents if p >= 0]
    expect(
        all(a <= b for a, b in pairwise(order)),
        "parent",
        "the children of one prefix adjacent, groups in the order of their prefixes",
        order,
        "Sort the children by parent",
    )
    first_child = next((s for s, p in enumerate(parents) if p >= 0), len(parents))
    expect(
        not order or order[-1] < first_child,
        "parent",
        f"every prefix ahead of the first child (segment {first_child})",
        f"prefix {max(order, default=-1)}",
        "Put the prefixes first in the pack",
    )


def _groups(bounds: list[int], parents: list[int]) -> list[tuple[int, int]]:
    """(query tokens, key tokens) of each entry of the second call, in the order of the pack."""
    children = [s for s, p in enumerate(parents) if p >= 0]
    if not children:
        return []
    groups: list[tuple[int, int]] = []
    key_end = bounds[parents[children[0]]]
    region = range(children[0], children[-1] + 1)
    for p, run in groupby(region, key=parents.__getitem__):
        segments = list(run)
        query_count = bounds[segments[-1] + 1] - bounds[segments[0]]
        if p < 0:
            groups.append((query_count, 0))
            continue
        if bounds[p] > key_end:
            groups.append((0, bounds[p] - key_end))
        # An orphan may split a group: its prefix then comes back, which one pass of keys cannot.
        expect(
            bounds[p] >= key_end,
            "parent",
            f"the children of segment {p} adjacent",
            "a segment without a parent between them",
            "Move it to either end of the pack",
        )
        groups.append((query_count, bounds[p + 1] - bounds[p]))
        key_end = bounds[p + 1]
    return groups
