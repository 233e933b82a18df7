"""First-fit-decreasing packing against the textbook loop over bins."""

import random

import pytest
import torch

from prefuse.kernels.launch import choose_impl
from prefuse.kernels.packing import pack


def _runs(impl):
    try:
        return bool(choose_impl(impl, torch.device("cpu"), ("cpu",)))
    except ValueError:
        return False


IMPLS = [impl for impl in ("cpu", "reference") if _runs(impl)]


def by_loop(lengths, capacity):
    bins, room = [], []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (b for b in range(len(bins)) if room[b] >= lengths[item])
        chosen = next(fits, len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(capacity)
        bins[chosen].append(item)
        room[chosen] -= lengths[item]
    return [sorted(items) for items in bins]


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_worked(impl):
    # 6 opens a bin, 5 the next, 4 tops up the first, 3 and 2 the second.
    assert pack([2, 6, 3, 4, 5], 10, impl=impl) == [[1, 3], [0, 2, 4]]
    assert pack([4, 4, 4], 8, impl=impl) == [[0, 1], [2]]  # ties: the lower index first
    assert pack([], 8, impl=impl) == []
    assert pack([0, 0], 0, impl=impl) == [[0, 1]]
    assert pack([8], 8, impl=impl) == [[0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_loop_over_bins(impl):
    generator = random.Random(0)
    for _ in range(200):
        capacity = generator.choice([1, 7, 100, 4096])
        lengths = [generator.randint(0, capacity) for _ in range(generator.randint(0, 70))]
        bins = pack(lengths, capacity, impl=impl)
        assert bins == by_loop(lengths, capacity)
        assert sorted(sum(bins, [])) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in items) <= capacity for items in bins)


def test_tensors_of_lengths():
    assert pack(torch.tensor([3, 1, 2], dtype=torch.int32), 3) == [[0], [1, 2]]


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_the_item(impl):
    message = r"lengths\[1\]: wanted at most the capacity, 8; got 9. Truncate or drop"
    with pytest.raises(ValueError, match=message):
        pack([3, 9], 8, impl=impl)
    with pytest.raises(ValueError, match=r"lengths\[0\]: wanted a length of 0 or more; got -1"):
        pack([-1], 8, impl=impl)
