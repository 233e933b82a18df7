"""Attention of groups of completions that share their prompt: time and error, beside other ways.

A pack holds the prompts, then 8 completions of each, of GSM8K's lengths; heads are Qwen2.5-1.5B's.
Ours reads every prompt once. Beside it: the same kernel with the prompt packed anew for each
completion (as packed training without sharing does), torch's own varlen attention on the same, and
PyTorch's attention on padded rows, one a group, under a dense mask.

Forward and backward. FLOPs counted are those of the (query, key) pairs that sharing needs, 4 D a
pair and head forward and 10 D backward, for all methods: TFLOP/s is of useful work. Gradients of a
prompt that was copied are summed before they are compared, which is not timed. On a GPU "ms" is the
time on the device, of replayed CUDA graphs; "call ms" that of single calls.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import device
from exact import off
from measure import Case, Method, main
from torch import Tensor

from prefuse.kernels.attention import packed_attention, prefix_table, reference

HEADS, KV_HEADS, SIZE = 12, 2, 128
GROUP = 8
# of GSM8K's questions and answers, in tokens of Qwen2's tokenizer: minimum, deciles, maximum
QUESTIONS = (12, 36, 42, 46, 51, 56, 61, 67, 75, 89, 212)
ANSWERS = (29, 63, 77, 87, 98, 111, 125, 141, 161, 195, 453)
PROMPTS = {"tiny": 3, "cpu": 4, "cuda": 64}
SHORTER = {"tiny": 16}  # lengths over this
CHECKED = 2  # groups
LIMITS = {
    torch.float32: {"out off": 1e-5, "d q off": 1e-4, "d k off": 1e-4, "d v off": 1e-4},
    torch.bfloat16: {"out off": 1e-2, "d q off": 2e-2, "d k off": 2e-2, "d v off": 2e-2},
}


class Pack(NamedTuple):
    """Prompts first, then the completions of each."""

    bounds: list[int]
    parent: list[int]
    prompts: int

    @property
    def groups(self) -> list[list[int]]:
        """The packed tokens of each group: its prompt's, then its completions'."""
        found = [list(range(*pair)) for pair in list(pairwise(self.bounds))[: self.prompts]]
        for (start, stop), parent in zip(pairwise(self.bounds), self.parent, strict=True):
            if parent >= 0:
                found[parent] += range(start, stop)
        return found

    def copies(self) -> tuple[list[int], list[int], list[int]]:
        """Every completion behind a prompt of its own: the packed token of each token, the bounds,
        and where each packed token is found first."""
        index: list[int] = []
        bounds = [0]
        for (start, stop), parent in zip(pairwise(self.bounds), self.parent, strict=True):
            if parent >= 0:
                index += [*range(self.bounds[parent], self.bounds[parent + 1]), *range(start, stop)]
                bounds.append(len(index))
        first = {token: i for i, token in reversed(list(enumerate(index)))}
        return index, bounds, [first[token] for token in range(self.bounds[-1])]


class Inputs(NamedTuple):
    pack: Pack
    q: Tensor  # [T, HEADS, SIZE]
    k: Tensor
    v: Tensor
    upstream: Tensor
    exact: tuple[Tensor, ...]  # out, dq, dk, dv of `checked`
    checked: Tensor  # tokens of the first groups


def drawn(deciles: tuple[int, ...], count: int) -> list[int]:
    """Lengths with these deciles."""
    at = torch.rand(count) * (len(deciles) - 1)
    low, rest = at.floor().long(), at - at.floor()
    table = torch.tensor(deciles, dtype=torch.float32)
    return torch.lerp(table[low], table[low + 1], rest).round().long().tolist()


def make_pack(size: str) -> Pack:
    torch.manual_seed(0)
    prompts, shorter = PROMPTS[size], SHORTER.get(size, 1)
    lengths = drawn(QUESTIONS, prompts) + drawn(ANSWERS, prompts * GROUP)
    lengths = [-(-n // shorter) for n in lengths]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    parent = [-1] * prompts + [p for p in range(prompts) for _ in range(GROUP)]
    return Pack(bounds, parent, prompts)


def pairs(pack: Pack) -> int:
    """(query, key) pairs that must be looked at."""
    lengths = [stop - start for start, stop in pairwise(pack.bounds)]
    own = sum(n * (n + 1) // 2 for n in lengths)
    shared = zip(lengths, pack.parent, strict=True)
    return own + sum(n * lengths[p] for n, p in shared if p >= 0)


def inputs(pack: Pack, dtype: torch.dtype) -> Inputs:
    total, dev = pack.bounds[-1], device()
    q, upstream = (torch.randn(total, HEADS, SIZE, device=dev).to(dtype) for _ in range(2))
    k, v = (torch.randn(total, KV_HEADS, SIZE, device=dev).to(dtype) for _ in range(2))
    groups = pack.groups[:CHECKED]
    checked = torch.tensor([token for group in groups for token in group], device=dev)
    lengths = [stop - start for start, stop in pairwise(pack.bounds)]
    # the first groups alone, each its prompt and then its completions
    bounds, parent = [0], []
    for p in range(len(groups)):
        prompt = len(parent)
        for s in [p, *(s for s, of in enumerate(pack.parent) if of == p)]:
            bounds.append(bounds[-1] + lengths[s])
            parent.append(-1 if s == p else prompt)
    exact = _exact_groups(bounds, parent, [x[checked] for x in (q, k, v)], upstream[checked])
    for x in (q, k, v):
        x.requires_grad_()
    return Inputs(pack, q, k, v, upstream, exact, checked)


def _exact_groups(bounds, parent, packed: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Out and gradients in float64, a group at a time."""
    starts = [s for s, p in enumerate(parent) if p < 0] + [len(parent)]
    found = []
    for first, last in pairwise(starts):
        rows = slice(bounds[first], bounds[last])
        inner = torch.tensor([b - rows.start for b in bounds[first : last + 1]], dtype=torch.int32)
        table = prefix_table(inner, [-1] + [0] * (last - first - 1))
        q, k, v = leaves = [x[rows].detach().double().requires_grad_() for x in packed]
        out = reference(q, k, v, inner, table)
        grads = torch.autograd.grad(out, leaves, upstream[rows].double())
        found.append((out.detach(), *grads))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def errors(x: Inputs, whole: Callable[[tuple], tuple], out: tuple) -> dict[str, float]:
    names = ("out off", "d q off", "d k off", "d v off")
    found = zip(names, whole(out), x.exact, strict=True)
    return {name: off(got[x.checked], exact) for name, got, exact in found}


def run(attend: Callable[..., Tensor], leaves: tuple[Tensor, ...], upstream: Tensor) -> tuple:
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def shared_method(x: Inputs) -> tuple[Callable, tuple, Tensor, Callable]:
    cu = torch.tensor(x.pack.bounds, dtype=torch.int32, device=x.q.device)
    table = prefix_table(cu, x.pack.parent)
    return partial(_packed, cu, table), (x.q, x.k, x.v), x.upstream, lambda out: out


def _packed(cu: Tensor, table, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed_attention(q, k, v, cu, table)


def copied_method(x: Inputs, varlen: bool) -> tuple[Callable, tuple, Tensor, Callable]:
    index, bounds, first = x.pack.copies()
    where, firsts = (torch.tensor(i, device=x.q.device) for i in (index, first))
    cu = torch.tensor(bounds, dtype=torch.int32, device=x.q.device)
    longest = max(b - a for a, b in pairwise(bounds))
    leaves = tuple(t.detach()[where].requires_grad_() for t in (x.q, x.k, x.v))
    upstream = torch.zeros_like(leaves[0])
    upstream[firsts] = x.upstream  # of a copied prompt, once
    attend = partial(_varlen if varlen else _unshared, cu, longest)

    def whole(out: tuple) -> tuple:
        """As if nothing had been copied: in float32, as bfloat16 sums would round."""
        grads = [
            torch.zeros(leaf.shape, device=leaf.device).index_add_(0, where, got.float())
            for leaf, got in zip((x.q, x.k, x.v), out[1:], strict=True)
        ]
        return out[0][firsts], *grads

    return attend, leaves, upstream, whole


def _unshared(cu: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed_attention(q, k, v, cu, max_seqlen=longest)


def _varlen(cu: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = dict(window_size=(-1, 0))  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # else it is not asked
        options["enable_gqa"] = True
    found: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    return found


def dense_method(x: Inputs) -> tuple[Callable, tuple, Tensor, Callable]:
    """A row a group, padded to the longest; a completion sees its prompt and itself."""
    groups, dev = x.pack.groups, x.q.device
    longest = max(len(group) for group in groups)
    where = torch.zeros(len(groups), longest, dtype=torch.int64, device=dev)
    real = torch.zeros_like(where, dtype=torch.bool)
    mask = torch.eye(longest, dtype=torch.bool, device=dev).repeat(len(groups), 1, 1)
    lengths = [stop - start for start, stop in pairwise(x.pack.bounds)]
    for row, group in enumerate(groups):
        where[row, : len(group)] = torch.tensor(group, device=dev)
        real[row, : len(group)] = True
        prompt = at = lengths[row]
        mask[row, :prompt, :prompt] = _causal(prompt, dev)
        for s in (s for s, p in enumerate(x.pack.parent) if p == row):
            stop = at + lengths[s]
            mask[row, at:stop, :prompt] = True
            mask[row, at:stop, at:stop] = _causal(lengths[s], dev)
            at = stop
    leaves = tuple(
        t.detach()[where].transpose(1, 2).contiguous().requires_grad_() for t in (x.q, x.k, x.v)
    )
    upstream = (x.upstream[where] * real[:, :, None, None]).transpose(1, 2)

    def whole(out: tuple) -> tuple:
        flat = [got.transpose(1, 2)[real] for got in out]
        packed = [torch.zeros_like(got) for got in flat]
        for target, got in zip(packed, flat, strict=True):
            target[where[real]] = got
        return tuple(packed)

    return partial(_dense, mask[:, None]), leaves, upstream, whole


def _causal(n: int, dev: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=dev).tril()


def _dense(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Key heads repeated, as in transformers: with a mask, grouped ones have no fast kernel."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def methods(size: str) -> list[Method]:
    dtype = dtype_of()
    x = inputs(make_pack(size), dtype)
    found = [("prefuse, shared prompts", shared_method(x), True)]
    found.append(("prefuse, copied prompts", copied_method(x, False), True))
    if x.q.device.type == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen"):
        found.append(("torch varlen, copied prompts", copied_method(x, True), False))
    found.append(("PyTorch, dense mask", dense_method(x), False))
    out = []
    for name, (attend, leaves, upstream, whole), ours in found:
        once = partial(run, attend, leaves, upstream)
        rows = leaves[0].numel() // (HEADS * SIZE)
        columns = {"tokens computed": rows}
        checks = partial(errors, x, whole)
        out.append(
            Method(name, once, checks, LIMITS[dtype], ours, flops_of(x.pack), columns=columns)
        )
    return out


def flops_of(pack: Pack) -> float:
    return 14.0 * SIZE * HEADS * pairs(pack)


def dtype_of() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def cases(size: str) -> list[Case]:
    pack = make_pack(size)
    total = pack.bounds[-1]
    columns: dict[str, Any] = {"op": "attention", "prompts": pack.prompts, "completions": GROUP}
    columns |= {"tokens": total, "heads": f"{HEADS}/{KV_HEADS} of {SIZE}"}
    columns["dtype"] = str(dtype_of()).removeprefix("torch.")
    # q, out, dout, dq and k, v, dk, dv, once each
    element = torch.empty(0, dtype=dtype_of()).element_size()
    moved = 4.0 * element * SIZE * (HEADS + KV_HEADS) * total
    make = partial(methods, size)
    return [Case("groups", make, columns, flops_of(pack), moved, short=True)]


if __name__ == "__main__":
    main(__doc__, cases)
