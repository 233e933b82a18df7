"""The tiled head: vocabulary GEMMs around the fold, one tile of columns at a time.

`head_forward` makes row sums of hidden states; `head_backward` makes gradients of per-token
coefficients. linear_logp.py says what for and at what cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .fold import FOLD_BLOCK, Logits, fold_backward, fold_forward, reanchor, row_dots
from .gemm_fold import Product, gemm_backward, gemm_forward
from .token_stats import Coefficients, merge, target_anchor
from .vocab_shard import VocabShard

FORWARD_TILE = {"cpu": 2 << 20, "cuda": 32 << 20}  # bytes of float32 logits: a share of the cache
BACKWARD_TILE = {"cpu": 16 << 20, "cuda": 256 << 20}  # larger: d hidden is summed over tiles
CONVERTED_ENTRIES = 1 << 15  # of a weight wider than its products: converted so many at a time
MAX_ROWS = 16384


class Options(NamedTuple):
    """What makes final logits of the projection, and how it is run."""

    logit_scale: float
    softcap: float | None
    impl: str
    dtype: torch.dtype  # of the GEMM operands
    shard: VocabShard | None = None  # of the vocabulary: which part weight and bias are


class Head(NamedTuple):
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    options: Options

    @property
    def vocab(self) -> int:
        """Entries of all ranks."""
        shard = self.options.shard
        return len(self.weight) if shard is None else shard.total


class Rows(NamedTuple):
    """The tokens at hand. `kept` is their stashed E, or None. Targets count from the shard's start,
    if there is one."""

    hidden: Tensor  # [n, H] in the GEMM dtype
    targets: Tensor
    anchor: Tensor
    inverse_temperature: Tensor
    kept: Tensor | None

    def select(self, rows) -> Rows:
        kept = None if self.kept is None else self.kept[rows]
        hidden, targets, anchor, inverse_temperature = (x[rows] for x in self[:4])
        return Rows(hidden, targets, anchor, inverse_temperature, kept)


def for_device(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cuda"])


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 accumulation and a float32 result, from operands of either width; or a
    result of the operands' width, rounded once, where `out` has it."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if out is not None and out.dtype == a.dtype:
        with _float32_sums():
            return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@contextmanager
def _float32_sums():
    """Keeps cuBLAS from adding up parts of a product in 16 bits, as PyTorch lets it by default."""
    flags, kinds = torch.backends.cuda.matmul, ("bf16", "fp16")
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in kinds]
    before = [(getattr(flags, x), getattr(flags, f"{x}_split_k", None)) for x in names]
    for name in names:
        setattr(flags, name, False)
    try:
        yield
    finally:
        for name, (allowed, split) in zip(names, before, strict=True):
            setattr(flags, name, allowed if split is None else (allowed, split))


def column_tiles(vocab: int, rows: int, tile_bytes: int) -> Iterator[slice]:
    """Column tiles whose float32 logits for `rows` tokens fit `tile_bytes`; a power of 2 wide, so
    that a stored tile splits evenly into the fold's blocks."""
    return slices(vocab, tile_width(rows, tile_bytes))


def slices(vocab: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, vocab)) for start in range(0, vocab, width))


def tile_width(rows: int, tile_bytes: int) -> int:
    return 1 << max(8, (tile_bytes // (4 * max(rows, 1))).bit_length() - 1)


def aligned_empty(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, width] whose rows begin at 16 bytes, as the fast matrix products want it."""
    step = 16 // dtype.itemsize
    return torch.empty((rows, -(-width // step) * step), dtype=dtype, device=device)[:, :width]


class Scratch:
    """One tile of float32 logits, used again for every tile: a heap that frees and allocates a
    tile at a time, with small tensors between, grows instead."""

    def __init__(self, rows: int, width: int, device: torch.device):
        self.flat = torch.empty(rows * width, dtype=torch.float32, device=device)

    def tile(self, rows: int, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        return self.flat[: rows * width].view(rows, width)


def _block(head: Head, rows: Rows, columns: slice, out: Tensor) -> Logits:
    """GEMM 1 for a tile of the vocabulary, into `out` [n, v]."""
    weight = head.weight[columns].to(head.options.dtype).t()
    return Logits(matmul(rows.hidden, weight, out), *_shaping(head, rows, columns))


def _product(head: Head, rows: Rows, columns: slice) -> Product:
    """The same tile as one product, whose logits are never written."""
    weight = head.weight[columns].to(head.options.dtype)
    return Product(rows.hidden, weight, *_shaping(head, rows, columns))


def _shaping(head: Head, rows: Rows, columns: slice) -> tuple:
    """What makes final logits of a tile's products, as Logits and Product name it."""
    bias = None if head.bias is None else head.bias[columns].float().contiguous()
    per_token = rows.targets, rows.anchor, rows.inverse_temperature
    return *per_token, columns.start, bias, head.options.logit_scale, head.options.softcap


def anchor_logits(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """The target's logit per token, by a gathered dot product in float32."""
    entries, inside = _held(head, targets)
    if len(head.weight) and len(targets):
        logit = row_dots(head.options.impl, hidden, head.weight, entries)
    else:
        logit = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    if head.bias is not None and len(head.bias):
        logit += head.bias[entries].float()
    if head.options.shard is not None:
        logit = head.options.shard.summed(torch.where(inside, logit, 0.0))
    return target_anchor(logit, head.options.logit_scale, head.options.softcap)


def _held(head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where the targets stand in this rank's weight, and which of them do."""
    if head.options.shard is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    entries = targets - head.options.shard.start
    inside = (entries >= 0) & (entries < len(head.weight))
    return entries.clamp(0, max(len(head.weight) - 1, 0)), inside


def head_forward(head: Head, rows: Rows, n_parts: int) -> Tensor:
    """Row sums [n_parts, n]; fills `rows.kept` with E, 0 at the target."""
    by_tile = _fused_parts if head.options.impl == "fused" else _folded_parts
    parts, width = by_tile(head, rows, n_parts)
    sums = merge(parts)
    if head.options.shard is not None:
        sums, others = head.options.shard.merged(sums)
        parts = torch.cat([parts, others])  # their columns are not here, but their shifts count
    if rows.kept is not None:
        impl = "triton" if head.options.impl == "fused" else head.options.impl
        reanchor(impl, rows.kept, parts, width)
    return sums


def _folded_parts(head: Head, rows: Rows, n_parts: int) -> tuple[Tensor, int]:
    """Sums of parts of the vocabulary [parts, n_parts, n], and the columns of a stored part: each
    tile of logits is written, in float32, and folded while it is in the cache."""
    n, vocab = len(rows.targets), len(head.weight)
    tile_bytes = for_device(FORWARD_TILE, rows.hidden.device)
    width = tile_width(n, tile_bytes)
    in_place = rows.kept is not None and rows.kept.dtype == torch.float32
    scratch = Scratch(0 if in_place else n, min(width, vocab), rows.hidden.device)
    parts = []
    for columns in column_tiles(vocab, n, tile_bytes):
        store = None if rows.kept is None else rows.kept[:, columns]
        out = store if store is not None and in_place else scratch.tile(n, columns)
        block = _block(head, rows, columns, out)
        parts.append(fold_forward(head.options.impl, block, n_parts, store))
        if store is None and len(parts) == 16:  # only E, once stored, needs the parts apart
            parts = [merge(torch.cat(parts))[None]]
    found = torch.cat(parts) if parts else _no_parts(rows, n_parts)
    return found, min(width, FOLD_BLOCK) if head.options.impl == "triton" else width


def _fused_parts(head: Head, rows: Rows, n_parts: int) -> tuple[Tensor, int]:
    """As `_folded_parts`, by products that fold what they compute."""
    vocab = len(head.weight)
    alike = head.weight.dtype == head.options.dtype
    found, width = [], 1
    for columns in slices(vocab, max(vocab, 1) if alike else CONVERTED_ENTRIES):
        store = None if rows.kept is None else rows.kept[:, columns]
        parts, width = gemm_forward(_product(head, rows, columns), n_parts, store)
        found.append(parts)
    return torch.cat(found) if found else _no_parts(rows, n_parts), width


def _no_parts(rows: Rows, n_parts: int) -> Tensor:
    """The sums of no entries, of a rank that holds none."""
    return rows.anchor.new_zeros((1, n_parts, len(rows.targets)))


def _gradient_tile(
    head: Head, rows: Rows, c: Coefficients, columns: slice, plain: bool, scratch: Scratch
) -> Tensor:
    """d loss / d raw logits [n, v] in the GEMM dtype, up to `_row_factor`."""
    n, dtype = len(rows.targets), head.options.dtype
    if rows.kept is None and head.options.impl == "fused":
        grad = aligned_empty(n, columns.stop - columns.start, dtype, rows.hidden.device)
        gemm_backward(_product(head, rows, columns), c, grad)
        return grad
    if rows.kept is None:
        block = _block(head, rows, columns, scratch.tile(n, columns))
        grad = block.raw if dtype == torch.float32 else torch.empty_like(block.raw, dtype=dtype)
        fold_backward(head.options.impl, block, c, grad)
        return grad
    e = rows.kept[:, columns]
    if plain:  # the target's -S is in E already
        return e.to(dtype)
    e = e.float()
    grad = e * c.alpha[:, None]
    if c.beta is not None:
        grad.addcmul_(torch.special.xlogy(e, e), c.beta[:, None])
    _at_target(grad, rows.targets - columns.start, c.gamma * _target_slope(head, rows))
    grad *= (rows.inverse_temperature * head.options.logit_scale)[:, None]
    return grad.to(dtype)


def _row_factor(head: Head, rows: Rows, c: Coefficients, plain: bool) -> Tensor | None:
    """What d loss / d logits [n, 1] still is to be multiplied by: all of it where E is kept."""
    if rows.kept is None or not plain:
        return None
    return (c.alpha * rows.inverse_temperature * head.options.logit_scale)[:, None]


def _target_slope(head: Head, rows: Rows) -> Tensor | float:
    """1 - tanh^2 of the softcap at the target."""
    return 1.0 if head.options.softcap is None else 1 - (rows.anchor / head.options.softcap) ** 2


def _at_target(tile: Tensor, columns: Tensor, values: Tensor) -> None:
    """tile[i, columns[i]] = values[i] where the column lies in the tile."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1)[:, None]
    values = torch.where(inside, values.to(tile.dtype), tile.gather(1, columns).squeeze(1))
    tile.scatter_(1, columns, values[:, None])


def head_backward(
    head: Head,
    runs: list[tuple[Rows, Coefficients]],
    plain: bool,
    d_hidden: list[Tensor] | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    accumulate: bool = False,
) -> None:
    """Fills d_hidden (zeros, a float32 [n, H] per run); writes, or adds to, d_weight [V, H] and
    d_bias [V].

    The vocabulary is the outer loop: a tile of d_weight is summed over the runs in float32 and
    written once. `plain`: only logp has an upstream gradient.
    """
    vocab, device, dtype = len(head.weight), head.weight.device, head.options.dtype
    written = len(runs) == 1 and not accumulate  # a tile of d_weight in one product
    width = _backward_width(head, runs, plain and d_bias is None, d_weight, written)
    again = max((len(rows.targets) for rows, _ in runs if rows.kept is None), default=0)
    scratch = Scratch(0 if head.options.impl == "fused" else again, width, device)
    factors = [_row_factor(head, rows, c, plain) for rows, c in runs]
    scaled = [
        rows.hidden if factor is None or d_weight is None else (rows.hidden * factor).to(dtype)
        for (rows, _), factor in zip(runs, factors, strict=True)
    ]
    for columns in slices(vocab, max(width, 1)):
        weight = head.weight[columns].to(dtype)
        weight_sum = None
        if d_weight is not None:
            weight_sum = RunningSum(d_weight[columns], accumulate, written, dtype)
        bias_sum = None if d_bias is None else RunningSum(d_bias[columns], accumulate)
        for index, (rows, c) in enumerate(runs):
            grad, factor = _gradient_tile(head, rows, c, columns, plain, scratch), factors[index]
            if d_hidden is not None:
                add_product(d_hidden[index], grad, weight)
            if weight_sum is not None:
                weight_sum.add_product(grad.t(), scaled[index])
            if bias_sum is not None:
                bias_sum.add((grad if factor is None else grad * factor).sum(0).float())
            del grad  # or two tiles are held while the next is made
        for total in (weight_sum, bias_sum):
            if total is not None:
                total.write()
    for total, factor in zip(d_hidden or (), factors, strict=d_hidden is not None):
        if factor is not None:
            total.mul_(factor)


def _backward_width(head: Head, runs, simple: bool, d_weight: Tensor | None, written: bool) -> int:
    """Columns of a tile. Where gradients are products of tensors that are there, tiles save nothing
    but what a weight's conversion takes."""
    vocab, dtype = len(head.weight), head.options.dtype
    longest = max((len(rows.targets) for rows, _ in runs), default=0)
    width = min(tile_width(longest, for_device(BACKWARD_TILE, head.weight.device)), vocab)
    kept = all(rows.kept is not None and rows.kept.dtype == dtype for rows, _ in runs)
    direct = d_weight is None or d_weight.dtype == torch.float32
    direct = direct or (written and d_weight is not None and d_weight.dtype == dtype)
    if not (simple and kept and direct):
        return width
    return vocab if head.weight.dtype == dtype else max(width, min(CONVERTED_ENTRIES, vocab))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class RunningSum:
    """A float32 running sum whose first term needs no zeros, written to `out` once. `single`: it
    has one term, a product of matrices of `dtype`, which goes into `out` of that dtype itself."""

    def __init__(
        self,
        out: Tensor,
        accumulate: bool,
        single: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.out, self.accumulate = out, accumulate
        in_place = out.dtype == torch.float32
        direct = in_place or (single and out.dtype == dtype)
        self.total = out if direct else torch.empty_like(out, dtype=torch.float32)
        self.empty = not (in_place and accumulate)

    def add(self, term: Tensor) -> None:
        self.total.copy_(term) if self.empty else self.total.add_(term)
        self.empty = False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        if self.empty:
            matmul(a, b, self.total)
        else:
            add_product(self.total, a, b)
        self.empty = False

    def write(self) -> None:
        if self.empty:
            self.total.zero_()
        if self.total is not self.out:
            self.out.add_(self.total) if self.accumulate else self.out.copy_(self.total)


def stash_targets(head: Head, rows: Rows, sums: Tensor) -> None:
    """Puts -S at the target of the kept E, which makes it d logp / d logits up to a row factor."""
    if rows.kept is None:
        return
    values = (-sums[0] * _target_slope(head, rows)).to(rows.kept.dtype)
    if head.options.shard is None:
        rows.kept.scatter_(1, rows.targets[:, None], values[:, None])
    elif len(head.weight):
        _at_target(rows.kept, rows.targets, values)


def run_slices(n: int, stash_rows: int, longest: int = 0) -> list[slice]:
    """Runs of at most `longest` and MAX_ROWS tokens, each wholly kept or wholly recomputed."""
    if n == 0:
        return [slice(0, 0)]
    step = min(longest or MAX_ROWS, MAX_ROWS)
    edges = sorted({*range(0, stash_rows, step), *range(stash_rows, n, step), n})
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
