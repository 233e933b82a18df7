"""Every op where the fast paths run: its values are the CPU's in float64, and no objective, scan or
estimate waits for the GPU."""

import pytest
import torch
from device_ops import HEADS, MAKE, ON_GPU, bounds, run
from torch._subclasses.fake_tensor import FakeTensorMode

from prefuse.kernels.attention import packed_attention, prefix_table
from prefuse.kernels.divergence import DIVERGENCES

# They skip the tokens without a gradient, and have to know how many those are.
WAIT = {*HEADS, *DIVERGENCES}
TOLERANCE = 2e-5  # of the largest entry


@pytest.mark.parametrize("name", MAKE)
def test_equals_float64_on_a_cpu(name, device):
    op = MAKE[name]()
    found, wanted = run(op, device), run(op, dtype=None)
    assert len(found) == len(wanted)
    for got, exact in zip(found, wanted, strict=True):
        assert got.device.type == device and got.shape == exact.shape
        got, exact = got.double().cpu(), exact.double()
        assert torch.equal(got.isfinite(), exact.isfinite())
        error = torch.where(exact.isfinite(), got - exact, 0.0).abs()
        scale = torch.where(exact.isfinite(), exact, 0.0).abs()
        assert not len(error.view(-1)) or error.max() <= TOLERANCE * scale.max()


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to wait for")
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in MAKE if name not in WAIT])
def test_nothing_waits_for_the_gpu(name, device):
    op = MAKE[name]()
    op = op._replace(given={k: x.to(device) for k, x in op.given.items()})
    run(op, device)  # compiles kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to wait for")
@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_attention_with_a_table_does_not_wait(shared):
    lengths = [30, 70, 80, 1]
    table = prefix_table(bounds(lengths), [-1, 0, 0, -1] if shared else [-1] * 4).to("cuda")
    draw = lambda h: torch.randn(181, h, 64, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    q, k, v = (draw(h).requires_grad_() for h in (4, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            packed_attention(q, k, v, table.cu_seqlens, table).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.version.cuda is None, reason="torch knows no device of that name")
@pytest.mark.parametrize("name", [name for name in MAKE if name not in WAIT])
def test_every_tensor_is_made_on_the_device(name):
    """Fake tensors of a GPU: operands on two devices raise, and so does asking for a value.
    Autograd wants a real GPU."""
    op = MAKE[name]()._replace(learnt=())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = {k: mode.from_tensor(x).to("cuda") for k, x in op.given.items()}
        for x in run(op._replace(given=given), "cuda"):
            assert x.device.type == "cuda"
