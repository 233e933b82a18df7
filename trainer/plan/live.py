"""Bytes of the tensors that are alive, by class, at every operation.

Storages are counted, not what the allocator or the system holds: the same on every machine, with
what autograd keeps, without Python and its libraries. Of fake tensors as of real ones.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOVED = "moved"  # bytes read and written so far by everything but matrix products
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")


class LiveBytes(TorchDispatchMode):
    """now: the class of what is made next. recording: keeps every operation's totals. resizing:
    looks at every storage again, as FSDP empties those of gathered weights."""

    def __init__(self, recording: bool = False, resizing: bool = False):
        super().__init__()
        self.now, self.recording, self.resizing = "activations", recording, resizing
        self.totals: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = {}
        self.timeline: list[dict[str, int]] = []
        self.known: dict[int, tuple[weakref.ref, str, int]] = {}
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self.note(x)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        kind = "cast weights" if _casts(func, given) and self._is(given[0], "weights") else None
        new = [x for x in made if self.note(x, kind)]
        writes = new or func._schema.is_mutable
        if writes and not func.overloadpacket.__name__.startswith(PRODUCTS):
            self.moved += sum(x.nbytes for x in given) + sum(x.nbytes for x in new)
        self.mark()
        return out

    def note(self, x: Tensor, kind: str | None = None) -> bool:
        """Counts the tensor's storage, if it is new."""
        storage = getattr(x, "_local_tensor", x).untyped_storage()
        key = storage._cdata
        held = self.known.get(key)
        if held is not None and held[0]() is storage:
            return False
        kind = kind or self.now
        ref = weakref.ref(storage, partial(self._forget, key))
        self.known[key] = ref, kind, storage.nbytes()
        self.totals[kind] += storage.nbytes()
        return True

    def reclass(self, x: Tensor, kind: str) -> None:
        self.note(x, kind)
        key = getattr(x, "_local_tensor", x).untyped_storage()._cdata
        ref, old, size = self.known[key]
        self.known[key] = ref, kind, size
        self.totals[old] -= size
        self.totals[kind] += size

    def _is(self, x: Tensor, kind: str) -> bool:
        return self.known[getattr(x, "_local_tensor", x).untyped_storage()._cdata][1] == kind

    def _forget(self, key: int, ref: weakref.ref) -> None:
        held = self.known.get(key)
        if held is not None and held[0] is ref:
            self.totals[held[1]] -= held[2]
            del self.known[key]

    def mark(self) -> None:
        """One more moment."""
        if self.resizing:
            self._look_again()
        if self.recording:
            self.timeline.append({**self.totals, MOVED: self.moved})
        if sum(self.totals.values()) > sum(self.peak.values()):
            self.peak = dict(self.totals)

    def _look_again(self) -> None:
        for key, (ref, kind, size) in list(self.known.items()):
            storage = ref()
            if storage is not None and storage.nbytes() != size:
                self.totals[kind] += storage.nbytes() - size
                self.known[key] = ref, kind, storage.nbytes()

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        old, self.now = self.now, kind
        try:
            yield
        finally:
            self.now = old


def _casts(func, given: list[Tensor]) -> bool:
    return func is torch.ops.aten._to_copy.default and bool(given)
