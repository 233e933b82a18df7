"""The fused head against its float64 reference: every output, gradient, mode and implementation."""

import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels import divergence, tiled_head
from prefuse.kernels.attention import packed_attention
from prefuse.kernels.divergence import linear_divergence, token_divergence
from prefuse.kernels.head_plan import plan
from prefuse.kernels.launch import HAS_TRITON, INTERPRETED
from prefuse.kernels.linear_logp import linear_logp, linear_token_loss, reference
from prefuse.kernels.logp import token_logp
from prefuse.kernels.policy import policy_loss
from prefuse.kernels.token_stats import OUTPUTS

ON_GPU = torch.cuda.is_available()
IMPLS = ["torch"]
IMPLS += [] if ON_GPU else ["cpu"]
IMPLS += ["triton"] if HAS_TRITON and (ON_GPU or INTERPRETED) else []
MODES = ("stash", "recompute")

# N, V, H: one token, one entry, odd everything, more columns than a fold block, many tiles
SHAPES = [(5, 37, 8), (1, 1, 1), (0, 5, 3), (3, 1, 4), (9, 1030, 17), (2, 9001, 5)]

# what happens to a hidden state on its way to x, and how many times its rounding it moves
OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "per-token temperature": dict(temperature="random"),
    "bias and scale": dict(bias=True, logit_scale=0.3),
    "softcap": dict(softcap=5.0, logit_scale=1.7, temperature=1.3),
}


def make(n, v, h, options, dtype=torch.float32, device="cpu"):
    """Inputs of a head in `dtype`, and the float64 copies the reference reads."""
    options = dict(options)
    hidden = torch.randn(n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * 1.5).to(dtype)
    targets = torch.randint(v, (n,), device=device)
    bias = torch.randn(v, device=device).to(dtype) if options.pop("bias", False) else None
    if options.get("temperature") == "random":
        options["temperature"] = torch.rand(n, device=device) + 0.5
    return (hidden, weight, targets, bias), options


def run(op, inputs, options, upstream, **more):
    """Stats and the gradients of hidden, weight (and bias) under `upstream` per output."""
    hidden, weight, targets, bias = inputs
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs[:2]]
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    stats = op(*leaves, targets, bias, **options, **more)
    terms = [(getattr(stats, k) * g.to(stats.logp.dtype)).sum() for k, g in upstream.items()]
    sum(terms).backward()
    return stats, [x.grad for x in (*leaves, bias) if x is not None]


def double(inputs):
    return tuple(x.double() if x is not None and x.is_floating_point() else x for x in inputs)


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in float64."""
    scale = expected.norm().clamp(min=1e-30)
    return float((actual.double() - expected).norm() / scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_logp_and_gradients(name, shape, impl, mode, device):
    inputs, options = make(*shape, OPTIONS[name], device=device)
    upstream = {"logp": torch.randn(shape[0], device=device)}
    expected, expected_grads = run(reference, double(inputs), options, upstream)
    actual, grads = run(linear_logp, inputs, options, upstream, impl=impl, mode=mode)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, wanted) < 2e-5 or float(wanted.norm()) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_targets_and_bias_of_tables(impl, mode, device):
    """Columns of targets and biases do not lie in one piece."""
    (hidden, weight, targets, bias), _ = make(6, 40, 8, dict(bias=True), device=device)
    columns = [torch.stack([x.flip(0), x], 1)[:, 1] for x in (targets, bias)]
    upstream = {"logp": torch.randn(6, device=device)}
    given = hidden, weight, targets, bias
    expected, wanted = run(linear_logp, given, {}, upstream, impl=impl, mode=mode)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logp = linear_logp(*leaves, *columns, impl=impl, mode=mode).logp
    assert_close(logp, expected.logp)
    for grad, exact in zip(
        torch.autograd.grad(logp, leaves, upstream["logp"]), wanted[:2], strict=True
    ):
        assert_close(grad, exact)
    loss, _ = linear_token_loss(*leaves, columns[0], lambda x: x.logp, bias=columns[1], impl=impl)
    assert_close(loss, expected.logp)


@pytest.mark.parametrize("module", [tiled_head, divergence])
def test_a_tile_of_gradients_is_gone_before_the_next(module, monkeypatch):
    monkeypatch.setitem(tiled_head.BACKWARD_TILE, "cpu", 1)  # the narrowest tiles
    make_tile, made = module._gradient_tile, []

    def tile(*given):
        assert all(tile() is None for tile in made)
        found = make_tile(*given)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "_gradient_tile", tile)
    (hidden, weight, targets, _), _ = make(6, 1000, 8, {})
    hidden.requires_grad_()
    if module is tiled_head:
        value = linear_logp(hidden, weight, targets, mode="recompute").logp
    else:
        value = linear_divergence(hidden, weight, hidden + 1, weight, mode="recompute")
    value.sum().backward()
    assert len(made) > 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_output(name, impl, mode, device):
    if "softcap" in OPTIONS[name] and mode == "stash":
        pytest.skip("refused: test_stash_refuses_entropy_under_a_softcap")
    inputs, options = make(7, 1500, 16, OPTIONS[name], device=device)
    upstream = {k: torch.randn(7, device=device) for k in ("logp", "entropy", "lse")}
    more = dict(outputs=OUTPUTS)
    expected, expected_grads = run(reference, double(inputs), options, upstream, **more)
    actual, grads = run(linear_logp, inputs, options, upstream, impl=impl, mode=mode, **more)
    for field in OUTPUTS[:5]:
        assert_close(
            getattr(actual, field).double(), getattr(expected, field), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(actual.top1, expected.top1)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, wanted) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_sixteen_bit_inputs(impl, mode, dtype, device):
    """Statistics stay float32; gradients are as exact as their own dtype allows."""
    inputs, _ = make(12, 3000, 32, {}, dtype=dtype, device=device)
    inputs = (inputs[0] * 0.3, *inputs[1:])
    upstream = {"logp": torch.randn(12, device=device)}
    expected, expected_grads = run(reference, double(inputs), {}, upstream)
    actual, grads = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, wanted) < 6e-3


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_confident_tokens_keep_their_relative_error(impl, device):
    """|logp| near 1e-9: a float32 log-sum-exp would round every one of them to 0."""
    n, v = 6, 400
    hidden = torch.eye(n, device=device) * torch.linspace(26, 28, n, device=device)[:, None]
    weight = torch.randn(v, n, device=device) * 1e-3
    weight[:n] += torch.eye(n, device=device)
    inputs = (hidden, weight, torch.arange(n, device=device), None)
    upstream = {"logp": torch.ones(n, device=device)}
    expected, expected_grads = run(reference, double(inputs), {}, upstream)
    assert 1e-10 < float(expected.logp.detach().abs().max()) < 1e-8
    if impl == "reference":
        assert float(reference(*inputs).logp.abs().max()) == 0
        return
    actual, grads = run(linear_logp, inputs, {}, upstream, impl=impl)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-3, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, wanted) < 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_hopeless_targets_do_not_overflow(impl, mode, device):
    """Logits hundreds of nats above the target: the anchor is raised, nothing is infinite."""
    inputs, _ = make(8, 5000, 8, {}, device=device)
    hidden = inputs[0].clone()
    hidden[::2] *= 200
    inputs = (hidden, *inputs[1:])
    upstream = {k: torch.randn(8, device=device) for k in ("logp", "lse")}
    more = dict(outputs=("logp", "lse", "log_sum_sq"))
    expected, expected_grads = run(reference, double(inputs), {}, upstream, **more)
    assert float(expected.logp.detach().min()) < -300
    actual, grads = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode, **more)
    assert_close(actual.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    assert_close(actual.log_sum_sq.double(), expected.log_sum_sq, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        # |z| of 1e3 in float32 is exact to 6e-5, which is the relative error of its exponential
        assert relative_error(grad, wanted) < 3e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_without_gradient_skip_the_backward_gemms(impl, device, monkeypatch):
    inputs, _ = make(10, 300, 8, {}, device=device)
    grads_in = torch.randn(10, device=device)
    grads_in[[0, 3, 4, 9]] = 0
    multiplied = []
    original = tiled_head.head_backward

    def spy(head, runs, *args, **kwargs):
        multiplied.append(sum(len(rows.targets) for rows, _ in runs))
        return original(head, runs, *args, **kwargs)

    monkeypatch.setattr("prefuse.kernels.linear_logp.head_backward", spy)
    for mode in MODES:
        expected, expected_grads = run(reference, double(inputs), {}, {"logp": grads_in})
        _, grads = run(linear_logp, inputs, {}, {"logp": grads_in}, impl=impl, mode=mode)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert relative_error(grad, wanted) < 1e-5
        assert torch.equal(grads[0][3], torch.zeros_like(grads[0][3]))
    run(linear_logp, inputs, {}, {"logp": torch.zeros_like(grads_in)}, impl=impl)
    assert multiplied == [6, 6, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_skip_their_gemm(impl, frozen, device, monkeypatch):
    inputs, _ = make(6, 200, 8, {}, device=device)
    hidden, weight = (x.clone() for x in inputs[:2])
    (weight if frozen == "hidden" else hidden).requires_grad_()
    asked = []
    original = tiled_head.head_backward

    def spy(head, runs, plain, d_hidden, d_weight, d_bias, **kwargs):
        asked.append((d_hidden is not None, d_weight is not None))
        return original(head, runs, plain, d_hidden, d_weight, d_bias, **kwargs)

    monkeypatch.setattr("prefuse.kernels.linear_logp.head_backward", spy)
    linear_logp(hidden, weight, inputs[2], impl=impl).logp.sum().backward()
    assert asked == [(frozen == "weight", frozen == "hidden")]
    assert (hidden if frozen == "hidden" else weight).grad is None
    with torch.no_grad():
        linear_logp(hidden, weight, inputs[2], impl=impl)


def test_a_budget_below_nothing_keeps_nothing(device):
    """As of what is left of a memory that is full."""
    inputs, _ = make(4, 50, 4, {}, device=device)
    upstream = {"logp": torch.randn(4, device=device)}
    wanted, wanted_grads = run(linear_logp, inputs, {}, upstream, mode="recompute")
    found, grads = run(linear_logp, inputs, {}, upstream, budget_bytes=-1000)
    assert_close(found.logp, wanted.logp)
    assert_close(grads, wanted_grads)
    assert plan(4, 50, torch.float32, budget_bytes=-1000)[:2] == (0, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_plan_equals_either_mode(impl, device):
    """A budget for part of the tokens: some kept, some recomputed, the same numbers."""
    inputs, _ = make(11, 500, 8, {}, device=device)
    upstream = {"logp": torch.randn(11, device=device)}
    budget = 4 * 500 * 4
    assert plan(11, 500, torch.float32, budget_bytes=budget).stash_rows == 4
    _, kept = run(linear_logp, inputs, {}, upstream, impl=impl, mode="stash")
    _, mixed = run(linear_logp, inputs, {}, upstream, impl=impl, budget_bytes=budget)
    for a, b in zip(kept, mixed, strict=True):
        assert relative_error(a, b.double()) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic_and_repeatable_backward(impl, mode, device):
    inputs, _ = make(33, 2100, 16, {}, device=device)
    upstream = {"logp": torch.randn(33, device=device)}
    first = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode)
    second = run(linear_logp, inputs, {}, upstream, impl=impl, mode=mode)
    assert torch.equal(first[0].logp, second[0].logp)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    hidden = inputs[0].clone().requires_grad_()
    logp = linear_logp(hidden, inputs[1], inputs[2], impl=impl, mode=mode).logp.sum()
    (once,) = torch.autograd.grad(logp, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(logp, hidden)
    assert torch.equal(once, again)


@pytest.mark.parametrize("impl", IMPLS)
def test_wide_weight_under_narrow_hidden(impl, device):
    """Float32 masters: the weight's gradient comes back in float32."""
    inputs, _ = make(6, 700, 16, {}, dtype=torch.bfloat16, device=device)
    inputs = (inputs[0], inputs[1].float(), *inputs[2:])
    upstream = {"logp": torch.randn(6, device=device)}
    _, expected = run(reference, double(inputs), {}, upstream)
    _, grads = run(linear_logp, inputs, {}, upstream, impl=impl)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for grad, wanted in zip(grads, expected, strict=True):
        assert relative_error(grad, wanted) < 6e-3


def policy(stats, advantages, old):
    """A PPO clip with an entropy bonus: token-local, with tokens that get no gradient."""
    ratio = (stats.logp - old).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -clipped - 0.01 * stats.entropy


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("budget", [None, 2 * 900 * 4], ids=["one run", "runs of two"])
def test_token_loss_equals_its_reference(budget, softcap, impl, device):
    inputs, _ = make(9, 900, 12, {"bias": True}, device=device)
    hidden, weight, targets, bias = inputs
    extras = (torch.randn(9, device=device), torch.randn(9, device=device) - 6)
    options = dict(outputs=("logp", "entropy"), softcap=softcap, temperature=0.9)

    def one(cast, **more):
        leaves = [cast(x).clone().requires_grad_() for x in (hidden, weight, bias)]
        extra = [cast(x) for x in extras]
        loss, stats = linear_token_loss(
            *leaves[:2], targets, policy, *extra, bias=leaves[2], **options, **more
        )
        (loss.sum() * 0.25).backward()
        assert not stats.logp.requires_grad
        return loss, stats, [x.grad for x in leaves]

    wanted, wanted_stats, wanted_grads = one(torch.Tensor.double, impl="reference")
    loss, stats, grads = one(lambda x: x, impl=impl, budget_bytes=budget)
    assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_close(stats.entropy.double(), wanted_stats.entropy, rtol=1e-5, atol=1e-5)
    for grad, expected in zip(grads, wanted_grads, strict=True):
        assert relative_error(grad, expected) < 3e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_token_loss_of_no_tokens(impl, device):
    inputs, _ = make(0, 50, 4, {}, device=device)
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    loss, _ = linear_token_loss(hidden, weight, inputs[2], lambda s: -s.logp, impl=impl)
    loss.sum().backward()
    assert loss.shape == (0,) and float(weight.grad.abs().sum()) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_token_loss_wants_one_upstream_gradient(impl, device):
    inputs, _ = make(4, 50, 4, {}, device=device)
    weight = inputs[1].clone().requires_grad_()
    loss, _ = linear_token_loss(inputs[0], weight, inputs[2], lambda s: -s.logp, impl=impl)
    with pytest.raises(RuntimeError, match="inside `token_loss`"):
        (loss * torch.arange(4.0, device=device)).sum().backward()


TARGETS = torch.tensor([0, 8, 3])
KERNELS = {
    "linear_logp": lambda x, w, **how: linear_logp(x, w, TARGETS, **how).logp,
    "linear_token_loss": lambda x, w, **how: linear_token_loss(
        x, w, TARGETS, lambda stats: -stats.logp, **how
    )[0],
    "token_logp": lambda x, w, **how: token_logp(x @ w.t(), TARGETS, **how).logp,
    "linear_divergence": lambda x, w, **how: linear_divergence(x, w, x.detach() + 1, w, **how),
    "token_divergence": lambda x, w, **how: token_divergence(x @ w.t(), w.t()[:3] * 2, **how),
    "policy_loss": lambda x, w, **how: policy_loss(x @ w[0], x[:, 0], x[:, 1], **how).loss,
    "packed_attention": lambda x, w, **how: packed_attention(
        x[:, None], x[:, None] + 1, x[:, None] * 2, torch.tensor([0, 3]).int(), **how
    ),
}


@pytest.mark.parametrize("op", KERNELS)
def test_no_second_derivative_is_made_up(op):
    """Autograd would differentiate a kernel's gradient as a constant: all but its term is lost."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    with pytest.raises(RuntimeError, match=f"^{op}: wanted create_graph=False.*'reference'"):
        torch.autograd.grad(KERNELS[op](hidden, weight).sum(), hidden, create_graph=True)
    value = KERNELS[op](hidden, weight, impl="reference").sum()
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), hidden)
    assert float(second.abs().max()) > 0


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_reference_gradcheck(softcap):
    inputs, _ = make(4, 9, 3, {"bias": True})
    hidden, weight, targets, bias = double(inputs)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def op(hidden, weight, bias):
        options = dict(temperature=0.8, softcap=softcap, outputs=("logp", "entropy", "lse"))
        return reference(hidden, weight, targets, bias, **options)[:3]

    assert torch.autograd.gradcheck(op, leaves)


def test_worked_by_hand():
    """Two entries with logits ln 3 and 0: p = 3/4 and 1/4."""
    weight = torch.tensor([[math.log(3)], [0.0]])
    stats = linear_logp(torch.ones(2, 1), weight, torch.tensor([0, 1]), outputs=OUTPUTS)
    assert_close(stats.logp, torch.tensor([0.75, 0.25]).log())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert_close(stats.entropy, torch.full((2,), entropy))
    assert_close(stats.lse, torch.full((2,), math.log(4)))
    assert_close(stats.mean_logit, torch.full((2,), math.log(3) / 2))
    assert_close(stats.log_sum_sq, torch.full((2,), math.log(0.75**2 + 0.25**2)))
    assert stats.top1.tolist() == [True, False]


def test_stash_refuses_entropy_under_a_softcap():
    inputs, _ = make(4, 50, 4, {})
    with pytest.raises(ValueError, match="recompute"):
        linear_logp(
            *inputs[:3], softcap=5.0, outputs=("logp", "entropy"), mode="stash", impl="torch"
        )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_recompute_stays_far_below_the_logits():
    n, h, v = 2048, 64, 50257
    script = Path(__file__).parents[1] / "benchmarks" / "bench_linear_logp.py"
    case = ["--case", "prefuse recompute", "--shape", str(n), str(h), str(v)]
    extra = subprocess.run([sys.executable, script, *case], capture_output=True, check=True).stdout
    assert float(extra) < n * v * 4 / 1e6 / 8


BAD = {
    "hidden: wanted shape": dict(hidden=torch.zeros(2, 3, 4)),
    r"weight: wanted shape \[V, 4\]": dict(weight=torch.zeros(9, 5)),
    "weight: wanted a floating-point": dict(weight=torch.zeros(9, 4, dtype=torch.int64)),
    r"targets: wanted shape \[3\]": dict(targets=torch.zeros(2, dtype=torch.int64)),
    "targets: wanted int64": dict(targets=torch.zeros(3, dtype=torch.int32)),
    r"targets: wanted values in \[0, 9\); got -100.*no ignore index": dict(
        targets=torch.tensor([1, -100, 2])
    ),
    r"targets: wanted values in \[0, 9\); got 9": dict(targets=torch.tensor([1, 9, 2])),
    r"bias: wanted \[9\]": dict(bias=torch.zeros(8)),
    "bias: wanted device cpu; got meta": dict(bias=torch.zeros(9, device="meta")),
    "temperature: wanted a positive": dict(temperature=0.0),
    r"temperature: wanted a number or \[3\]": dict(temperature=torch.ones(2)),
    "temperature: wanted positive numbers; got 0": dict(temperature=torch.tensor([1.0, 0, 2])),
    "^softcap: wanted a positive number, or None": dict(softcap=0.0),
    "outputs: wanted any of": dict(outputs=("logp", "perplexity")),
    "mode: wanted 'auto'": dict(mode="fast", weight=torch.zeros(9, 4, requires_grad=True)),
    "hidden: wanted at most float32 for this impl": dict(
        hidden=torch.zeros(3, 4).double(), impl="torch"
    ),
    "impl: wanted one of": dict(impl="fastest"),
    "impl: wanted one of auto, reference": dict(impl="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_tensor(message):
    given = dict(
        hidden=torch.zeros(3, 4), weight=torch.zeros(9, 4), targets=torch.tensor([0, 1, 2])
    )
    given |= BAD[message]
    positional = [given.pop(k) for k in ("hidden", "weight", "targets")]
    with pytest.raises(ValueError, match=message):
        linear_logp(*positional, **given)
