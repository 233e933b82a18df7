"""The fused head with 16-bit matrix products, as on a GPU: every implementation, mode and output.

Where there is no GPU, stand-ins compute the products that PyTorch has for GPUs alone (16-bit
operands, float32 result), so that the code around them runs all the same. Triton's interpreter
cannot multiply bfloat16 (it takes its bits for integers) and truncates what it writes in 16 bits.
"""

import pytest
import torch
from test_linear_logp import MODES, OPTIONS, double, make, relative_error, run
from torch.testing import assert_close

from prefuse.kernels import head_plan, tiled_head
from prefuse.kernels.launch import HAS_TRITON, INTERPRETED
from prefuse.kernels.linear_logp import linear_logp, linear_token_loss, reference
from prefuse.kernels.token_stats import OUTPUTS

ON_GPU = torch.cuda.is_available()
IMPLS = ["torch"] + (["triton", "fused"] if HAS_TRITON and (ON_GPU or INTERPRETED) else [])
if ON_GPU and torch.cuda.get_device_capability()[0] != 9:
    IMPLS.remove("fused")

# N, V, H: less than a tile of everything, and more, none a multiple of it
SMALL, ODD, WIDE = (5, 40, 8), (130, 300, 72), (3, 1000, 64)
CASES = [(name, SMALL) for name in OPTIONS] + [("plain", ODD), ("softcap", ODD), ("plain", WIDE)]

ROUNDINGS = 2 * 2**-8  # of bfloat16: of the logits' gradient, and of what the products write


def width(impl: str) -> torch.dtype:
    return torch.float16 if impl == "fused" and not ON_GPU else torch.bfloat16


@pytest.fixture(autouse=True)
def sixteen_bit_products(monkeypatch):
    if ON_GPU:
        yield
        return
    library = torch.library.Library("aten", "IMPL")

    def product(a, b, dtype):
        return (a.float() @ b.float()).to(dtype)

    def added(total, a, b, dtype, *, beta=1, alpha=1, out):
        assert (beta, alpha, total.dtype) == (1, 1, dtype)
        return out.copy_(total + product(a, b, dtype))

    library.impl("mm.dtype", product, "CPU")
    library.impl("mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(product(a, b, dtype)), "CPU")
    library.impl("addmm.dtype_out", added, "CPU")
    settle = head_plan.head_options

    def as_on_a_gpu(hidden, *args):
        return settle(hidden, *args)._replace(dtype=hidden.dtype)

    monkeypatch.setattr("prefuse.kernels.linear_logp.head_options", as_on_a_gpu)
    yield
    library._destroy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_logp_and_gradients(name, shape, impl, mode, device):
    n, v, h = shape
    inputs, options = make(n, v, h, OPTIONS[name], dtype=width(impl), device=device)
    upstream = {"logp": torch.randn(n, device=device)}
    expected, wanted = run(reference, double(inputs), options, upstream)
    actual, grads = run(linear_logp, inputs, options, upstream, impl=impl, mode=mode)
    assert_close(actual.logp.double(), expected.logp, rtol=3e-6, atol=2e-5)
    for grad, exact in zip(grads, wanted, strict=True):
        assert grad is not None and grad.dtype == width(impl)
        assert relative_error(grad, exact) < ROUNDINGS


@pytest.mark.parametrize("mode", ["auto", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_output(name, impl, mode, device):
    inputs, options = make(9, 700, 24, OPTIONS[name], dtype=width(impl), device=device)
    inputs = (inputs[0] * 0.3, *inputs[1:])
    options |= dict(outputs=OUTPUTS)
    upstream = {k: torch.randn(9, device=device) for k in ("logp", "entropy", "lse")}
    expected, wanted = run(reference, double(inputs), options, upstream)
    actual, grads = run(linear_logp, inputs, options, upstream, impl=impl, mode=mode)
    for field in OUTPUTS[:5]:
        assert_close(
            getattr(actual, field).double(), getattr(expected, field), rtol=1e-5, atol=2e-5
        )
    assert torch.equal(actual.top1, expected.top1)
    for grad, exact in zip(grads, wanted, strict=True):
        assert relative_error(grad, exact) < 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_hopeless_targets(impl, mode, device):
    """Logits hundreds of nats above the target's raise the anchor, in some tiles and not others."""
    inputs, _ = make(40, 600, 16, {}, dtype=width(impl), device=device)
    inputs = (inputs[0] * 20, *inputs[1:])
    upstream = {"logp": torch.randn(40, device=device)}
    expected, wanted = run(reference, double(inputs), {}, upstream)
    assert expected.logp.min() < -100
    actual, grads = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode)
    assert_close(actual.logp.double(), expected.logp, rtol=2e-6, atol=2e-5)
    for grad, exact in zip(grads, wanted, strict=True):
        assert relative_error(grad, exact) < ROUNDINGS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_wide_weight_and_many_runs(impl, mode, monkeypatch, device):
    """A float32 weight is converted a part at a time; runs add up in float32."""
    monkeypatch.setattr(tiled_head, "CONVERTED_ENTRIES", 256)
    monkeypatch.setattr(tiled_head, "MAX_ROWS", 7)
    (hidden, weight, targets, _), _ = make(20, 600, 16, {}, device=device)
    inputs = (hidden.to(width(impl)), weight.to(width(impl)).float(), targets, None)
    upstream = {"logp": torch.randn(20, device=device)}
    expected, wanted = run(reference, double(inputs), {}, upstream)
    actual, grads = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode)
    assert_close(actual.logp.double(), expected.logp, rtol=3e-6, atol=2e-5)
    for grad, exact, dtype in zip(grads, wanted, (width(impl), torch.float32), strict=True):
        assert grad is not None and grad.dtype == dtype
        assert relative_error(grad, exact) < ROUNDINGS


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [None, 2 * 300 * 2], ids=["one run", "runs of two"])
def test_token_loss(budget, impl, device):
    (hidden, weight, targets, _), _ = make(6, 300, 16, {}, dtype=width(impl), device=device)
    advantages = torch.randn(6, device=device)

    def gradients(op, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        op(*leaves).backward()
        return [x.grad for x in leaves]

    def ours(h, w):
        loss = linear_token_loss(
            h, w, targets, lambda stats, a: -stats.logp * a, advantages,
            impl=impl, budget_bytes=budget,
        )[0]  # fmt: skip
        return loss.sum()

    def exact(h, w):
        return -(reference(h, w, targets).logp * advantages).sum()

    wanted = gradients(exact, hidden.double(), weight.double())
    for grad, right in zip(gradients(ours, hidden, weight), wanted, strict=True):
        assert relative_error(grad, right) < ROUNDINGS


@pytest.mark.parametrize("message", ["multiple of 8", "16 bits", "contiguous"])
@pytest.mark.skipif("fused" not in IMPLS, reason="no Triton")
def test_the_fused_product_says_what_it_cannot_read(message, device):
    n, h = (4, 9) if message == "multiple of 8" else (4, 16)
    dtype = torch.float32 if message == "16 bits" else torch.bfloat16
    weight = torch.randn(20, 2 * h, device=device).to(dtype)
    weight = weight[:, :h] if message == "contiguous" else weight[:, :h].contiguous()
    targets = torch.zeros(n, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=message):
        linear_logp(torch.randn(n, h, device=device).to(dtype), weight, targets, impl="fused")
