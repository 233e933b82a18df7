"""The pass over policy tokens: every implementation against the float64 reference."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels import launch
from prefuse.kernels.surrogate import (
    COUNTERS,
    KERNEL_RULES,
    Settings,
    Tokens,
    clip,
    detached_clip,
    soft,
    surrogate,
)

BOUNDS = {clip: (0.8, 1.2, 3.0), detached_clip: (0.5, 2.0, 0.0), soft: (1.0, 1.05, 0.0)}
CPU = pytest.param(
    "cpu", "cpu", marks=pytest.mark.skipif(launch._C is None, reason="no C++ extension")
)
TRITON = pytest.param(
    "triton",
    "cuda" if torch.cuda.is_available() else "cpu",
    marks=pytest.mark.skipif(
        not launch.HAS_TRITON or not (launch.INTERPRETED or torch.cuda.is_available()),
        reason="Triton needs a GPU or TRITON_INTERPRET=1",
    ),
)
IMPLS = [CPU, TRITON]
KINDS = (None, "k1", "k2", "k3", "ratio_k3")


def draw(m: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    given = {name: torch.randn(m, dtype=torch.float64) for name in Tokens._fields}
    for name in ("old_logp", "log_ratio", "ref_logp"):
        given[name] *= scale
    return given | dict(mask=torch.rand(m) < 0.8, weight=torch.rand(m, dtype=torch.float64))


def run(given, s: Settings, impl: str, dtype, device="cpu"):
    x = {
        k: None if v is None else v.to(device, v.dtype if v.dtype == torch.bool else dtype)
        for k, v in given.items()
    }
    wanted = [x[k].requires_grad_() for k in ("logp", "log_ratio") if x[k] is not None]
    loss, total, counters = surrogate(Tokens(**x), s, impl)
    upstream = torch.linspace(-1, 2, len(loss), dtype=dtype, device=device)
    grads = []
    for value in ((loss * upstream).sum(), total, loss.sum() + total):
        found = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=True)
        grads += [torch.zeros_like(loss) if g is None else g for g in found]
    return [t.detach().double().cpu() for t in (loss, total, *grads, counters)]


@pytest.mark.parametrize("impl, device", IMPLS)
@pytest.mark.parametrize("rule", KERNEL_RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("kl", KINDS)
def test_against_float64(rule, kl, impl, device):
    """Over optional inputs, and sizes around the block of 1024."""
    for m, ratio, mask in ((1, False, True), (1500, True, False), (1023, False, False)):
        given = draw(m)
        given |= {"old_logp" if ratio else "log_ratio": None}
        if not mask:
            given |= dict(mask=None, weight=None)
        settings = Settings(rule, *BOUNDS[rule], kl, 0.3)
        wanted = run(given, settings, "reference", torch.float64)
        got = run(given, settings, impl, torch.float32, device)
        for w, g in zip(wanted, got, strict=True):
            assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl, device", IMPLS)
@pytest.mark.parametrize("rule", KERNEL_RULES, ids=lambda r: r.__name__)
def test_extremes(rule, impl, device):
    """Log-ratios of +-80 and beyond, which count as 80, of both signs of A: as the reference has
    them in float32, to float32's own precision."""
    grid = itertools.product((-200.0, -80, 0, 80, 200), (-80.0, 80), (-1.0, 0, 1))
    u, k, a = torch.tensor(list(grid)).unbind(1)
    given = dict.fromkeys(Tokens._fields) | dict(logp=torch.zeros_like(u), advantages=a)
    given |= dict(old_logp=-u, ref_logp=-k)
    settings = Settings(rule, *BOUNDS[rule], "ratio_k3", 0.1)
    wanted = run(given, settings, "reference", torch.float32)
    got = run(given, settings, impl, torch.float32, device)
    for w, g in zip(wanted, got, strict=True):
        assert g.isfinite().all()
        assert_close(g, w, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("impl, device", IMPLS)
def test_small_log_ratios_keep_their_digits(impl, device):
    """k3 is about k^2 / 2: exp(-k) - 1 + k in float32 would have none left at k = 1e-4."""
    k = torch.tensor([1e-4, -1e-4, 1e-3, 0.3, -0.49, 0.51])
    given = dict.fromkeys(Tokens._fields) | dict(logp=k, advantages=torch.zeros(6))
    given |= dict(old_logp=torch.zeros(6), ref_logp=torch.zeros(6))
    s = Settings(clip, 0.8, 1.2, 3.0, "k3", 1.0)
    loss, _, grad, *_ = run(given, s, impl, torch.float32, device)
    exact = torch.expm1(-k.double()) + k.double()
    assert_close(loss, exact, rtol=2e-3, atol=0)  # eps / k, of the sum exp(-k) - 1 and k
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    assert_close(grad, -torch.expm1(-k.double()) * upstream, rtol=2e-6, atol=0)


@pytest.mark.parametrize("impl, device", IMPLS)
def test_no_tokens_and_no_gradient(impl, device):
    empty = torch.zeros(0, device=device)
    s = Settings(clip, 0.8, 1.2, 3.0, None, 0.0)
    none = dict.fromkeys(Tokens._fields)
    tokens = Tokens(**none | dict(logp=empty, advantages=empty, old_logp=empty))
    loss, total, counters = surrogate(tokens, s, impl)
    assert loss.shape == (0,) and total == 0
    assert (counters == 0).all() and len(counters) == len(COUNTERS)
    ones = torch.ones(3, device=device)
    tokens = Tokens(**none | dict(logp=ones, advantages=ones, old_logp=ones))
    loss, total, _ = surrogate(tokens, s, impl)
    assert not loss.requires_grad and not total.requires_grad
    assert_close(loss, -ones)


def test_counters_are_the_same_bits_whatever_the_threads():
    if launch._C is None:
        pytest.skip("no C++ extension")
    given = draw(50_000)
    given |= dict(log_ratio=None)
    s = Settings(clip, 0.8, 1.2, 3.0, "k3", 0.1)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(run(given, s, "cpu", torch.float32))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
