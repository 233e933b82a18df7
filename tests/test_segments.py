"""Segment reductions: values and gradients against a slice-by-slice oracle, every impl."""

import pytest
import torch

from prefuse.kernels.launch import choose_impl
from prefuse.kernels.segments import (
    segment_ids,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_spread,
    segment_sum,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _runs(impl):
    try:
        return bool(choose_impl(impl, torch.device(DEVICE), ("cpu", "triton")))
    except ValueError:
        return False


IMPLS = ["reference", *(impl for impl in ("cpu", "triton") if _runs(impl))]
RAGGED = [3, 0, 1, 17, 1024, 0, 0, 1025, 2500, 8]


def boundaries(lengths, device=DEVICE):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def by_slices(reduce, x, lengths):
    parts = [reduce(part) if len(part) else part.sum() for part in x.split(lengths)]
    return torch.stack(parts)


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_worked(impl):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE, requires_grad=True)
    cu_seqlens = boundaries([3, 0, 1])
    sums = segment_sum(x, cu_seqlens, impl=impl)
    assert sums.tolist() == [6.0, 0.0, 4.0]
    sums.backward(torch.tensor([1.0, 5.0, 7.0], device=DEVICE))
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 7.0]
    assert segment_mean(x, cu_seqlens, impl=impl).tolist() == [2.0, 0.0, 4.0]
    assert segment_max(x, cu_seqlens).tolist() == [3.0, 0.0, 4.0]
    assert segment_ids(cu_seqlens, 4).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "segmented, reduce",
    [
        (segment_sum, torch.sum),
        (segment_mean, torch.mean),
        (segment_logsumexp, lambda part: part.logsumexp(0)),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, segmented, reduce, dtype):
    x = torch.randn(sum(RAGGED), device=DEVICE).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got = segmented(x, boundaries(RAGGED), impl=impl)
    wanted = by_slices(reduce, exact, RAGGED)
    upstream = torch.randn(len(RAGGED), dtype=torch.float64, device=DEVICE)
    got.backward(upstream.to(got.dtype))
    wanted.backward(upstream)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5  # sums of 2500 float32 numbers
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, exact.grad.to(dtype), atol=tolerance, rtol=1e-5)


def test_maximum_and_its_gradient():
    x = torch.randn(sum(RAGGED), dtype=torch.float64, device=DEVICE, requires_grad=True)
    got, wanted = segment_max(x, boundaries(RAGGED)), by_slices(torch.max, x, RAGGED)
    assert torch.equal(got, wanted)
    mine, exact = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted))
    assert torch.equal(mine, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_to_second_order(impl):
    x = torch.randn(9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cu_seqlens = boundaries([2, 0, 6, 1])
    for segmented in (segment_sum, segment_mean, segment_logsumexp):
        # exp makes the second derivative of the sums something else than 0
        assert torch.autograd.gradcheck(lambda x, f=segmented: f(x, cu_seqlens, impl=impl), x)
        assert torch.autograd.gradgradcheck(
            lambda x, f=segmented: f(x, cu_seqlens, impl=impl).exp(), x
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_segments_are_isolated(impl):
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 3.0], device=DEVICE)
    assert segment_sum(x, boundaries([1, 1, 1, 1, 1]), impl=impl)[[0, 2, 4]].tolist() == [1, 2, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_logsumexp_of_extremes(impl):
    infinite = float("inf")
    x = torch.tensor([-infinite, -infinite, 1000.0, 1000.0, -infinite, -1000.0], device=DEVICE)
    got = segment_logsumexp(x, boundaries([2, 2, 2]), impl=impl)
    torch.testing.assert_close(
        got, torch.tensor([-infinite, 1000.0 + torch.tensor(2.0).log(), -1000.0], device=DEVICE)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_sum(impl, lengths):
    x = torch.zeros(0, device=DEVICE, requires_grad=True)
    sums = segment_sum(x, boundaries(lengths), impl=impl)
    assert sums.tolist() == [0.0] * len(lengths)
    sums.sum().backward()
    assert x.grad.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl):
    x = torch.arange(8.0, device=DEVICE)[::2]
    assert segment_sum(x, boundaries([1, 3]), impl=impl).tolist() == [0.0, 12.0]


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs CPU tensors and the extension")
def test_threads_do_not_change_the_bits():
    x, threads = torch.randn(sum(RAGGED)), torch.get_num_threads()
    try:
        sums = []
        for count in (1, 3):
            torch.set_num_threads(count)
            sums.append(segment_sum(x, boundaries(RAGGED), impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*sums)


@pytest.mark.parametrize(
    "x, cu_seqlens, message",
    [
        (torch.zeros(2, 2), [0, 2], r"x: wanted a 1-D floating-point tensor; .* shape \(2, 2\)"),
        (torch.zeros(4), [0, 3], "cu_seqlens: wanted boundaries .* tokens, 4; got 0 to 3"),
        (torch.zeros(4), [0, 3, 2, 4], "cu_seqlens: .* falling in between"),
        (torch.zeros(4), [], "cu_seqlens: wanted a 1-D int32 tensor of segment boundaries"),
    ],
)
def test_errors_say_what_was_wanted(x, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):  # on a CPU, where the values are checked
        segment_sum(x, torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("impl", IMPLS)
def test_spread_repeats_and_its_gradient_is_a_sum(impl, dtype):
    x = torch.randn(len(RAGGED), device=DEVICE).to(dtype)
    lengths, total = torch.tensor(RAGGED, device=DEVICE), sum(RAGGED)
    got = segment_spread(x, boundaries(RAGGED), total, impl=impl)
    assert got.dtype == dtype and torch.equal(got, x.repeat_interleave(lengths))
    if dtype == torch.float64:
        few = x[:3].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: segment_spread(x, boundaries([2, 0, 3]), 5, impl=impl), few
        )
    with pytest.raises(ValueError, match="x: wanted shape"):
        segment_spread(x[1:], boundaries(RAGGED), total, impl=impl)
    if DEVICE == "cpu":  # on a GPU nobody waits to read them
        with pytest.raises(ValueError, match="cu_seqlens: wanted boundaries"):
            segment_spread(x, boundaries(RAGGED), total - 1, impl=impl)
