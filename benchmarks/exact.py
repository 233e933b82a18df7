"""What is right, in float64: values and gradients of a head, in chunks of tokens that fit.

All values, the gradient of some hidden states and of some rows of the weight: those of the tokens'
own targets are among them, where cancellation is worst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of float64 logits
CHECKED = 128  # hidden states, and rows of the weight


class Exact(NamedTuple):
    value: Tensor  # [N]
    d_hidden: dict[str, Tensor]  # by upstream gradient, [rows, H]
    d_weight: dict[str, Tensor]  # [entries, H]
    rows: Tensor
    entries: Tensor


def exact_head(
    value: Callable[[Tensor, slice], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstreams: dict[str, Tensor],
) -> Exact:
    """`value` makes values [n] of float64 logits [n, V] of a slice of the tokens; `upstreams` are
    gradients of all values, for each of which the gradients are computed."""
    n, vocab = len(hidden), len(weight)
    rows = torch.linspace(0, n - 1, min(CHECKED, n), device=hidden.device).long()
    some = torch.linspace(0, vocab - 1, min(CHECKED // 2, vocab), device=hidden.device).long()
    entries = torch.cat([some, targets[rows[: CHECKED // 2]]]).unique()
    wide = weight.detach().double()
    step = max(1, CHUNK_BYTES[hidden.device.type] // (8 * vocab))
    values: list[Tensor] = []
    d_hidden: dict[str, list[Tensor]] = {name: [] for name in upstreams}
    d_weight = {name: wide.new_zeros(len(entries), hidden.shape[1]) for name in upstreams}
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        x = hidden[part].detach().double()
        logits = (x @ wide.t()).requires_grad_()
        found = value(logits, part)
        values.append(found.detach())
        here = rows[(rows >= part.start) & (rows < part.stop)] - part.start
        for name, upstream in upstreams.items():
            g = upstream[part].double()
            (grad,) = torch.autograd.grad(found, logits, g, retain_graph=True)
            d_hidden[name].append(grad[here] @ wide)
            d_weight[name] += grad[:, entries].t() @ x
    whole = {name: torch.cat(parts) for name, parts in d_hidden.items()}
    return Exact(torch.cat(values), whole, d_weight, rows, entries)


def exact_logp(hidden: Tensor, weight: Tensor, targets: Tensor, upstreams: dict[str, Tensor]):
    def logp(logits: Tensor, part: slice) -> Tensor:
        at_target = logits.gather(1, targets[part, None]).squeeze(1)
        return at_target - logits.logsumexp(-1)

    return exact_head(logp, hidden, weight, targets, upstreams)


def off(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||."""
    difference = (found.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp(min=1e-300))


def most_off(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN if there is one."""
    return float((found.double() - exact.double()).abs().max())


def head_errors(
    exact: Exact,
    upstream: str,
    value: Tensor | None,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    relative: bool = False,
) -> dict[str, float]:
    """Columns: the largest error of a value (nats, or relative), and of gradients by norm. A value
    that is a sum is compared with the sum, relatively."""
    found = {}
    if value is not None and value.dim():
        wanted = exact.value
        error = most_off(value / wanted, wanted / wanted) if relative else most_off(value, wanted)
        found["relative error" if relative else "max error"] = error
    elif value is not None:
        found["error of the sum"] = off(value, exact.value.sum())
    if d_hidden is not None:
        found["d hidden off"] = off(d_hidden[exact.rows], exact.d_hidden[upstream])
    if d_weight is not None:
        found["d weight off"] = off(d_weight[exact.entries], exact.d_weight[upstream])
    return found
