"""token_logp: from logits to statistics and back, in every implementation."""

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.launch import HAS_CUDA_EXTENSION, HAS_TRITON, INTERPRETED
from prefuse.kernels.logp import reference, token_logp
from prefuse.kernels.token_stats import OUTPUTS

ON_GPU = torch.cuda.is_available()
IMPLS = ["torch"]
IMPLS += ["cuda"] if ON_GPU and HAS_CUDA_EXTENSION else []
IMPLS += [] if ON_GPU else ["cpu"]
IMPLS += ["triton"] if HAS_TRITON and (ON_GPU or INTERPRETED) else []

# one token, one entry, odd sizes, around a chunk of 1024 and a block of 4096 columns
SHAPES = [(5, 37), (1, 1), (0, 5), (3, 1), (2, 1023), (2, 1025), (3, 4097), (2, 20001)]


def run(op, logits, targets, upstream, **options):
    leaf = logits.detach().clone().requires_grad_()
    stats = op(leaf * 1, targets, **options)  # not the leaf itself: it may be overwritten
    terms = [(getattr(stats, k) * g.to(stats.logp.dtype)).sum() for k, g in upstream.items()]
    (grad,) = torch.autograd.grad(sum(terms), leaf)
    return stats, grad


def make(n, v, dtype=torch.float32, device="cpu", hopeless=False):
    logits = torch.randn(n, v, device=device) * 3
    if hopeless:
        logits[::2] *= 100
    upstream = {k: torch.randn(n, device=device) for k in ("logp", "entropy", "lse")}
    return logits.to(dtype), torch.randint(v, (n,), device=device), upstream


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_and_gradient(shape, impl, softcap, inplace, device):
    logits, targets, upstream = make(*shape, device=device)
    options = dict(
        outputs=OUTPUTS, softcap=softcap, temperature=torch.rand(shape[0], device=device) + 0.5
    )
    expected, wanted = run(reference, logits.double(), targets, upstream, **options)
    actual, grad = run(
        token_logp, logits, targets, upstream, impl=impl, inplace_backward=inplace, **options
    )
    for field in OUTPUTS[:5]:
        assert_close(
            getattr(actual, field).double(), getattr(expected, field), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(actual.top1, expected.top1)
    assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_hopeless_targets(impl, device):
    logits, targets, upstream = make(6, 3000, device=device, hopeless=True)
    del upstream["entropy"]
    options = dict(outputs=("logp", "lse", "log_sum_sq"))
    expected, wanted = run(reference, logits.double(), targets, upstream, **options)
    actual, grad = run(token_logp, logits, targets, upstream, impl=impl, **options)
    assert float(expected.logp.detach().min()) < -300
    assert_close(actual.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    assert_close(actual.log_sum_sq.double(), expected.log_sum_sq, rtol=1e-5, atol=1e-5)
    assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_sixteen_bit_logits(impl, dtype, device):
    logits, targets, upstream = make(5, 2000, dtype, device)
    options = dict(outputs=("logp", "entropy", "lse"))
    expected, wanted = run(reference, logits.double(), targets, upstream, **options)
    actual, grad = run(token_logp, logits, targets, upstream, impl=impl, **options)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    assert_close(actual.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
    assert grad.dtype == dtype
    assert float((grad.double() - wanted).norm() / wanted.norm()) < 6e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_vocabulary_entries(impl, device):
    """-inf logits (a padded vocabulary, banned tokens) have probability 0 and gradient 0."""
    logits, targets, _ = make(4, 100, device=device)
    targets = targets.clamp(max=79)
    logits[:, 80:] = float("-inf")
    upstream = {"logp": torch.randn(4, device=device), "entropy": torch.randn(4, device=device)}
    options = dict(outputs=("logp", "entropy"))
    expected, wanted = run(token_logp, logits[:, :80], targets, upstream, impl=impl, **options)
    actual, grad = run(token_logp, logits, targets, upstream, impl=impl, **options)
    assert_close(actual.logp, expected.logp)
    assert_close(actual.entropy, expected.entropy)
    assert_close(grad[:, :80], wanted)
    assert float(grad[:, 80:].abs().max()) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_backward_takes_the_memory_once(impl, device):
    logits, targets, _ = make(4, 60, device=device)
    leaf = logits.clone().requires_grad_()
    taken = leaf * 1
    loss = token_logp(taken, targets, impl=impl, inplace_backward=True).logp.sum()
    loss.backward(retain_graph=True)
    assert_close(taken.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


VIEWS = {
    "padded columns": lambda x: x[:, :33],
    "every second row": lambda x: x[::2],
    "one row for all": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_logits_are_left_alone(impl, view, device):
    wide = torch.randn(8, 40, device=device)
    logits = VIEWS[view](wide)
    targets = torch.randint(33, logits.shape[:1], device=device)
    leaf, before = wide.clone().requires_grad_(), wide.clone()
    loss = token_logp(VIEWS[view](leaf), targets, impl=impl).logp.sum()
    first, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(leaf.detach(), before)
    exact = wide.double().requires_grad_()
    reference(VIEWS[view](exact), targets).logp.sum().backward()
    assert_close(first.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, again)
    taken = token_logp(VIEWS[view](leaf * 1), targets, impl=impl, inplace_backward=True)
    (in_place,) = torch.autograd.grad(taken.logp.sum(), leaf)
    assert_close(in_place, first)


def test_reference_gradcheck():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3])

    def op(x):
        options = dict(temperature=0.7, softcap=2.0, outputs=("logp", "entropy", "lse"))
        return reference(x, targets, **options)[:3]

    assert torch.autograd.gradcheck(op, logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_columns_first_logits(impl, device):
    logits, targets, _ = make(5, 40, device=device)
    transposed = logits.t().contiguous().t()
    assert_close(
        token_logp(transposed, targets, impl=impl).logp, token_logp(logits, targets, impl=impl).logp
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_of_a_table(impl, device):
    """A column of targets does not lie in one piece."""
    logits, targets, upstream = make(6, 40, device=device)
    column = torch.stack([targets.flip(0), targets], 1)[:, 1]
    expected, wanted = run(token_logp, logits, targets, upstream, impl=impl, outputs=OUTPUTS)
    actual, grad = run(token_logp, logits, column, upstream, impl=impl, outputs=OUTPUTS)
    assert_close(actual.logp, expected.logp)
    assert_close(grad, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_part_of_wider_logits_is_left_as_it_is(impl, device):
    """Those of a padded vocabulary, without its padding."""
    wide, targets, upstream = make(6, 40, device=device)
    before, leaf = wide.clone(), wide.requires_grad_()
    logp = token_logp(leaf[:, :37], targets % 37, impl=impl).logp
    (grad,) = torch.autograd.grad(logp, leaf, upstream["logp"])
    assert torch.equal(wide, before)
    one = {"logp": upstream["logp"]}
    _, wanted = run(reference, before[:, :37].double(), targets % 37, one)
    assert_close(grad[:, :37].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_millions_of_entries(impl, device):
    logits, targets, _ = make(1, 1 << 21, device=device)
    upstream = {"logp": torch.ones(1, device=device)}
    expected, wanted = run(reference, logits.double(), targets, upstream)
    actual, grad = run(token_logp, logits, targets, upstream, impl=impl)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-5, atol=1e-5)
    assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_bad_logits():
    with pytest.raises(ValueError, match=r"logits: wanted shape \[N, V\]"):
        token_logp(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="softcap: wanted a positive number, or None.*got 0"):
        token_logp(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), softcap=0.0)
    for impl in IMPLS:
        with pytest.raises(ValueError, match="logits: wanted at most float32 for this impl"):
            token_logp(torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64), impl=impl)
    with pytest.raises(ValueError, match="floating-point"):
        token_logp(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
