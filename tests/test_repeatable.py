"""Every op gives the same bits in every run: outputs, metrics and gradients.

A flash kernel's backward on a GPU is the exception: it adds up dq by atomics, unless torch is told
to be deterministic (kernels/attention.py).
"""

import pytest
import torch
from device_ops import MAKE, ON_GPU, bounds, run

from prefuse.kernels.attention import packed_attention, prefix_table
from prefuse.kernels.group_advantage import ESTIMATORS

RUNS = 20 if ON_GPU else 3


def litter(device):
    """Leaves NaN in the memory that is handed out next: an entry nobody writes stands out."""
    for size in (1, 1 << 7, 1 << 10, 1 << 13, 1 << 17, 1 << 21) if device == "cuda" else (1 << 10,):
        blocks = [torch.full((size,), float("nan"), device=device) for _ in range(8)]
        del blocks


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(call, device):
    """The sums of differing bytes stay on the device until the end: runs follow without a gap."""
    first = [bits(x) for x in call()]
    differing = torch.zeros(len(first), dtype=torch.long, device=device)
    for _ in range(RUNS - 1):
        litter(device)
        again = [bits(x) for x in call()]
        differing += torch.stack([(a != b).sum() for a, b in zip(first, again, strict=True)])
    assert differing.tolist() == [0] * len(first)


@pytest.mark.parametrize("name", MAKE)
def test_the_same_bits_in_every_run(name, device):
    op = MAKE[name]()
    assert_same_bits(lambda: run(op, device), device)


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_heads_in_bfloat16(mode, device):
    for name in (f"linear_logp, {mode}", f"linear_divergence, {mode}"):
        op = MAKE[name]()
        assert_same_bits(lambda op=op: run(op, device, torch.bfloat16), device)


def test_every_estimator_is_here():
    names = {name.removeprefix("estimate ").split(",")[0] for name in MAKE}
    assert set(ESTIMATORS) <= names


@pytest.mark.parametrize("shared", [False, True])
def test_attention(shared, device):
    lengths, parent = [200, 30, *[70] * 8, 1, 300], [-1, -1, *[0] * 4, *[1] * 4, -1, -1]
    cu = bounds(lengths)
    table = prefix_table(cu, parent if shared else [-1] * len(lengths)).to(device)
    dtype, heads = (torch.bfloat16, 8) if ON_GPU else (torch.float32, 2)
    draw = lambda h: torch.randn(sum(lengths), h, 64, dtype=dtype, device=device)  # noqa: E731
    leaves = [draw(h).requires_grad_() for h in (2 * heads, heads, heads)]
    upstream = draw(2 * heads)

    def call():
        out = packed_attention(*leaves, table.cu_seqlens, table)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(call, device)
    finally:
        torch.use_deterministic_algorithms(False)
