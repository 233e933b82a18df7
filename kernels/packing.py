"""First-fit-decreasing packing of sequences into micro-batches of a token budget.

Items are placed longest first (ties: lower index first), each into the first bin with room. It
never needs more than 11/9 of the fewest bins possible, plus 6/9 (Dosa, 2007). O(n log n): a tree
of maxima over the room left in each bin finds the first that fits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from .launch import _C, choose_impl, expect, next_power_of_2


def reference(lengths: Sequence[int], capacity: int) -> list[int]:
    """The bin of each item. Every length is at most `capacity`."""
    leaves = next_power_of_2(len(lengths))
    room = [capacity] * (2 * leaves)  # room[1] is the root; unopened bins are the rightmost leaves
    bin_of = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < lengths[item])
        bin_of[item] = node - leaves
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bin_of


def _bins_cpu(lengths: Sequence[int], capacity: int) -> array[int]:
    items, bin_of = array("q", lengths), array("q", bytes(8 * len(lengths)))
    _C.pack_cpu(items.buffer_info()[0], len(items), capacity, bin_of.buffer_info()[0])
    return bin_of


def pack(lengths: Sequence[int], capacity: int, *, impl: str = "auto") -> list[list[int]]:
    """Bins of item indices whose lengths sum to at most `capacity`; ascending inside a bin.

    Deterministic. impl: "cpu" (C++) or "reference" (Python); both give the same bins.

    Raises:
        ValueError: an item is longer than `capacity`, or a length is negative.
    """
    lengths = [int(length) for length in lengths]
    for item, length in enumerate(lengths):
        expect(length >= 0, f"lengths[{item}]", "a length of 0 or more", length)
        expect(
            length <= capacity,
            f"lengths[{item}]",
            f"at most the capacity, {capacity}",
            length,
            "Truncate or drop the item, or raise the capacity",
        )
    bins_of = {"cpu": _bins_cpu, "reference": reference}
    bin_of = bins_of[choose_impl(impl, torch.device("cpu"), ("cpu",))](lengths, capacity)
    bins: list[list[int]] = [[] for _ in range(max(bin_of, default=-1) + 1)]
    for item, bin_index in enumerate(bin_of):
        bins[bin_index].append(item)
    return bins
