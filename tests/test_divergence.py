"""Divergences of two heads against float64 formulas: values, gradients, modes, implementations."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from prefuse.kernels import divergence
from prefuse.kernels.divergence import (
    DIVERGENCES,
    linear_divergence,
    reference,
    self_certainty,
    token_divergence,
    topk_divergence,
)
from prefuse.kernels.launch import HAS_TRITON, INTERPRETED
from prefuse.kernels.linear_logp import linear_logp

# inf - inf, which the kernels select away, is worth a word to Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
ON_GPU = torch.cuda.is_available()
IMPLS = ["torch"]
IMPLS += [] if ON_GPU else ["cpu"]
IMPLS += ["triton"] if HAS_TRITON and (ON_GPU or INTERPRETED) else []
MODES = ("stash", "recompute")

KINDS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": dict(beta=0.3),
    "jsd near its end": dict(kind="jsd", beta=1e-3),
    "alpha": dict(alpha=0.3),
    "alpha near its end": dict(kind="alpha", alpha=0.999),
    "tvd": {},
}
OPTIONS = {
    "plain": {},
    "temperature, bias, scale": dict(temperature="random", bias=True, logit_scale=0.3),
    "softcap": dict(softcap=5.0, teacher_softcap=4.0, teacher_logit_scale=1.7, bias=True),
}


def kind_of(name):
    return {"kind": name, **KINDS[name]}


def make(n, v, h, options=(), dtype=torch.float32, device="cpu"):
    """Hidden states, weights and biases of both heads (the teacher's of another width)."""
    options = dict(options)
    with_bias = options.pop("bias", False)
    if options.get("temperature") == "random":
        options["temperature"] = torch.rand(n, device=device) + 0.5
    heads = []
    for width in (h, h + 3):
        hidden = torch.randn(n, width, device=device).to(dtype)
        weight = torch.randn(v, width, device=device).to(dtype)
        heads.append((hidden, weight, torch.randn(v, device=device).to(dtype)))
    (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = heads
    biases = (bias, teacher_bias) if with_bias else (None, None)
    return (hidden, weight, teacher_hidden, teacher_weight, *biases), options


def run(inputs, options, upstream, **more):
    """The divergence and the gradients of hidden, weight (and bias)."""
    inputs = [x if x is None else x.detach().clone() for x in inputs]
    leaves = [x for i, x in enumerate(inputs) if i in (0, 1, 4) and x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    value = linear_divergence(*inputs, **options, **more)
    (value * upstream.to(value.dtype)).sum().backward()
    return value.detach(), [x.grad for x in leaves]


def double(inputs):
    return tuple(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)


def relative_error(actual, expected) -> float:
    scale = expected.norm().clamp(min=1e-30)
    return float((actual.double() - expected).norm() / scale)


def through_logits(op, logits, teacher, upstream=None, **options):
    leaf = logits.detach().clone().requires_grad_()
    value = op(leaf, teacher, **options)
    (grad,) = torch.autograd.grad((value if upstream is None else value * upstream).sum(), leaf)
    return value.detach(), grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradients(name, options, impl, mode, device):
    inputs, options = make(5, 77, 8, OPTIONS[options], device=device)
    upstream = torch.randn(5, device=device)
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    expected, expected_grads = run(double(inputs), wide, upstream, **kind_of(name))
    actual, grads = run(inputs, options, upstream, impl=impl, mode=mode, **kind_of(name))
    assert actual.dtype == torch.float32 and expected.dtype == torch.float64
    assert_close(actual.double(), expected, rtol=5e-6, atol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, wanted) < 1e-5


# one token, one entry, odd sizes, around a chunk of the pass, more than one tile of the backward
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 5, 3), (3, 2, 4), (2, 1023, 5), (3, 1025, 5)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_odd_shapes(impl, mode, shape, device):
    inputs, options = make(*shape, device=device)
    upstream = torch.randn(shape[0], device=device)
    for kind in DIVERGENCES:
        expected, expected_grads = run(double(inputs), options, upstream, kind=kind)
        actual, grads = run(inputs, options, upstream, kind=kind, impl=impl, mode=mode)
        assert_close(actual.double(), expected, rtol=5e-6, atol=1e-6)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert relative_error(grad, wanted) < 1e-5 or float(wanted.norm()) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_many_runs_and_tiles(impl, device, monkeypatch):
    """Short runs of rows, narrow tiles of columns, a budget for a part of the tokens."""
    monkeypatch.setattr(divergence, "ROW_TILE", dict.fromkeys(("cpu", "cuda"), 2 * 700 * 8))
    monkeypatch.setattr(divergence, "BACKWARD_TILE", dict.fromkeys(("cpu", "cuda"), 1))
    inputs, options = make(7, 700, 6, dict(bias=True), device=device)
    upstream = torch.randn(7, device=device)
    expected, expected_grads = run(double(inputs), options, upstream, kind="jsd")
    for more in (dict(mode="stash"), dict(mode="recompute"), dict(budget_bytes=3 * 700 * 4)):
        actual, grads = run(inputs, options, upstream, kind="jsd", impl=impl, **more)
        assert_close(actual.double(), expected, rtol=5e-6, atol=1e-6)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert relative_error(grad, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_sixteen_bit_inputs(impl, mode, dtype, device):
    """Values stay float32; gradients are as exact as their own dtype allows."""
    inputs, options = make(6, 900, 16, dict(bias=True), dtype=dtype, device=device)
    upstream = torch.randn(6, device=device)
    for kind in ("reverse_kl", "jsd"):
        expected, expected_grads = run(double(inputs), options, upstream, kind=kind)
        actual, grads = run(inputs, options, upstream, kind=kind, impl=impl, mode=mode)
        assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert grad.dtype == dtype
            assert relative_error(grad, wanted) < 6e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_biases(impl, device):
    inputs, options = make(5, 77, 8, dict(bias=True), device=device)
    upstream = torch.randn(5, device=device)
    expected, expected_grads = run(inputs, options, upstream, impl=impl)
    biases = [torch.stack([b, b.roll(1)], 1)[:, 0] for b in inputs[4:]]
    leaf = inputs[0].clone().requires_grad_()
    actual = linear_divergence(leaf, *inputs[1:4], *biases, impl=impl)
    (actual * upstream).sum().backward()
    assert_close(actual.detach(), expected)
    assert_close(leaf.grad, expected_grads[0])


def test_wide_weight_under_narrow_hidden(device):
    """Float32 masters: the weight's gradient comes back in float32."""
    inputs, options = make(6, 700, 16, dtype=torch.bfloat16, device=device)
    inputs = (inputs[0], inputs[1].float(), *inputs[2:])
    upstream = torch.randn(6, device=device)
    _, expected = run(double(inputs), options, upstream)
    _, grads = run(inputs, options, upstream)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for grad, wanted in zip(grads, expected, strict=True):
        assert relative_error(grad, wanted) < 6e-3


@pytest.mark.parametrize("name", KINDS)
def test_the_pass_in_float64_is_the_formula(name):
    """Values and gradients of the hand-made pass against autograd through the formulas, from tiny
    log-ratios to ones beyond every branch's bounds."""
    size = torch.tensor([1e-3, 0.3, 1.0, 20.0, 80.0], dtype=torch.float64)[:, None]
    teacher = torch.randn(5, 50, dtype=torch.float64)
    logits = teacher + size * torch.randn(5, 50, dtype=torch.float64)
    options = dict(softcap=200.0, temperature=0.7, **kind_of(name))
    expected, wanted = through_logits(token_divergence, logits, teacher, **options)
    actual, grad = through_logits(token_divergence, logits, teacher, impl="torch", **options)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert_close(grad, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", KINDS)
def test_reference_gradcheck(name):
    teacher, *leaves = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    leaf = leaves[0].requires_grad_()
    options = dict(temperature=0.8, softcap=3.0, **kind_of(name))
    assert torch.autograd.gradcheck(lambda x: reference(x, teacher, **options), leaf)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "tvd"])  # not squared near 0
@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_small_divergences_keep_their_digits(scale, name, impl, device):
    """Values of 1e-8 to 1e-13: in float32 the formulas as they stand lose them to rounding."""
    teacher = torch.randn(4, 3001, device=device) * 2
    logits = teacher + scale * torch.randn(4, 3001, device=device) + 3 * scale
    wide = (logits.double(), teacher.double())
    expected, wanted = through_logits(reference, *wide, **kind_of(name))
    # float64 rounds the formulas too, by up to 1e-16 / 1e-3 near an end of alpha; the pass less
    precise, _ = through_logits(token_divergence, *wide, impl="torch", **kind_of(name))
    assert_close(precise, expected, rtol=1e-5, atol=1e-12)
    assert 1e-14 < float(precise.min()) and float(precise.max()) < 1e-7
    actual, grad = through_logits(token_divergence, logits, teacher, impl=impl, **kind_of(name))
    # an error of 1e-7 in the normalisers comes in squared
    assert_close(actual.double(), precise, rtol=2e-5, atol=1e-14)
    assert relative_error(grad, wanted) < 2e-7 / scale


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("name", KINDS)
def test_extremes(name, impl, device):
    """Logits of +-80, one-hot and swapped distributions, in float32."""
    v = 600
    logits, teacher = torch.zeros(4, v, device=device), torch.zeros(4, v, device=device)
    logits[0, 1], teacher[0, 2] = 80, 80
    logits[1, ::2], teacher[1, ::2] = 80, -80
    logits[2], teacher[2, 0] = 30 * torch.randn(v, device=device), 200
    logits[3, 0], teacher[3] = 200, 30 * torch.randn(v, device=device)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], device=device)
    wide = (logits.double(), teacher.double(), upstream.double())
    expected, wanted = through_logits(reference, *wide, **kind_of(name))
    value, grad = through_logits(
        token_divergence, logits, teacher, upstream, impl=impl, **kind_of(name)
    )
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    # log-ratios of 250 are exact to 1.5e-5, and reverse_kl's gradient has two, times 3 here
    assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("name", KINDS)
def test_masked_vocabulary_entries(name, impl, device):
    """-inf on both sides (a padded vocabulary) counts as 0, value and gradient; on the side that
    leaves the value finite it is a probability of 0."""
    logits, teacher = (torch.randn(3, 40, device=device) for _ in range(2))
    logits[:, 30:] = teacher[:, 30:] = float("-inf")
    if kind_of(name)["kind"] == "forward_kl":
        teacher[0, 3:5] = float("-inf")
    else:
        logits[0, 3:5] = float("-inf")
    if impl == "reference":  # near an end of alpha the formula divides float32's rounding by 1e-3
        logits, teacher = logits.double(), teacher.double()
    value, grad = through_logits(token_divergence, logits, teacher, impl=impl, **kind_of(name))
    short = (logits[:, :30].double(), teacher[:, :30].double())
    expected, wanted = through_logits(reference, *short, **kind_of(name))
    assert value.isfinite().all()
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(grad[:, :30].double(), wanted, rtol=1e-4, atol=1e-6)
    assert float(grad[:, 30:].abs().max()) == 0


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_missing_entry_is_an_infinite_divergence(impl, device):
    logits, teacher = (torch.randn(1, 9, device=device) for _ in range(2))
    logits[0, 2] = float("-inf")
    value, grad = through_logits(token_divergence, logits, teacher, impl=impl)
    assert float(value) == math.inf
    assert impl == "reference" or grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", KINDS)
def test_identities(name, impl, device):
    """Nothing below 0; exactly 0, value and gradient, at equality; one head on both sides."""
    logits, teacher = (4 * torch.randn(6, 500, device=device) for _ in range(2))
    value, grad = through_logits(token_divergence, logits, teacher, impl=impl, **kind_of(name))
    assert float(value.min()) > 0
    assert float(grad.sum(1).abs().max()) < 1e-5  # a shift of all logits changes nothing
    value, grad = through_logits(token_divergence, teacher, teacher, impl=impl, **kind_of(name))
    assert float(value.abs().max()) == 0 and float(grad.abs().max()) == 0
    if name == "tvd":  # rounding is a difference, and has a sign
        return
    shifted, grad = through_logits(
        token_divergence, teacher + 8, teacher, impl=impl, **kind_of(name)
    )
    assert float(shifted.max()) < 1e-11 and float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_relations_between_kinds(impl, device):
    logits, teacher = (3 * torch.randn(6, 300, device=device) for _ in range(2))

    def value(a, b, **options):
        return token_divergence(a, b, impl=impl, **options)

    pair = (logits, teacher)
    half = value(*pair, kind="jsd")
    assert_close(half, value(teacher, logits, kind="jsd"))
    assert_close(value(*pair, kind="jsd", beta=0.2), value(teacher, logits, kind="jsd", beta=0.8))
    assert float(half.max()) <= math.log(2)
    far = torch.zeros(2, 300, device=device)
    far[0, 0] = far[1, 1] = 300
    assert_close(value(far[:1], far[1:], kind="jsd"), torch.full((1,), math.log(2), device=device))
    assert_close(value(*pair, kind="reverse_kl"), value(teacher, logits, kind="forward_kl"))
    for kind, option in (("jsd", "beta"), ("alpha", "alpha")):
        ends = ("forward_kl", "reverse_kl") if kind == "jsd" else ("reverse_kl", "forward_kl")
        for end, same in enumerate(ends):
            assert torch.equal(value(*pair, kind=kind, **{option: end}), value(*pair, kind=same))
    if impl != "reference":  # float32 loses the formula's limit to cancellation
        for alpha, same in ((1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")):
            near = value(*pair, kind="alpha", alpha=alpha)
            assert_close(near, value(*pair, kind=same), rtol=1e-4, atol=0)
    hellinger = (logits.softmax(-1).sqrt() - teacher.softmax(-1).sqrt()).square().sum(-1)
    assert_close(value(*pair, kind="alpha"), 2 * hellinger, rtol=1e-5, atol=1e-5)
    tvd = value(*pair, kind="tvd")
    assert_close(tvd, value(teacher, logits, kind="tvd"))
    assert (tvd**2 <= value(*pair) / 2).all()  # Pinsker
    assert_close(value(far[:1], far[1:], kind="tvd"), torch.ones(1, device=device))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_by_enumeration(impl, device):
    """Each entry's probabilities written out by hand."""
    p_s, p_t = [0.5, 0.25, 0.25], [0.1, 0.3, 0.6]
    mixed = [0.25 * t + 0.75 * s for s, t in zip(p_s, p_t, strict=True)]

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    affinity = sum(s**0.8 * t**0.2 for s, t in zip(p_s, p_t, strict=True))
    expected = {
        "forward_kl": kl(p_t, p_s),
        "reverse_kl": kl(p_s, p_t),
        "jsd": 0.25 * kl(p_t, mixed) + 0.75 * kl(p_s, mixed),
        "alpha": (1 - affinity) / 0.16,
        "tvd": 0.4,
    }
    logits, teacher = (torch.tensor([p], device=device).log() for p in (p_s, p_t))
    for kind, value in expected.items():
        got = token_divergence(logits, teacher, kind=kind, beta=0.25, alpha=0.2, impl=impl)
        assert_close(got.cpu(), torch.tensor([value]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_without_gradient_are_skipped(impl, device, monkeypatch):
    inputs, options = make(10, 300, 8, device=device)
    upstream = torch.randn(10, device=device)
    upstream[[0, 3, 4, 9]] = 0
    taken = []
    original = divergence._backward

    def spy(heads, runs, *rest):
        taken.append(sum(len(rows.hidden) for _, rows in runs))
        return original(heads, runs, *rest)

    monkeypatch.setattr(divergence, "_backward", spy)
    expected, expected_grads = run(double(inputs), options, upstream)
    for mode in MODES:
        _, grads = run(inputs, options, upstream, impl=impl, mode=mode)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert relative_error(grad, wanted) < 1e-5
        assert float(grads[0][3].abs().max()) == 0
    _, grads = run(inputs, options, torch.zeros_like(upstream), impl=impl)
    assert taken == [6, 6, 0]
    assert all(float(grad.abs().max()) == 0 for grad in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_head_on_two_hidden_states(impl, mode, device):
    """A shared weight gets the student's gradient alone, a shared hidden state likewise."""
    (hidden, weight, _, _, _, _), options = make(5, 200, 8, device=device)
    teacher_hidden = torch.randn_like(hidden)
    upstream = torch.randn(5, device=device)
    apart = (hidden, weight, teacher_hidden, weight.clone())
    _, expected = run(apart, options, upstream, impl=impl, mode=mode, kind="jsd")
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, teacher_hidden)]
    value = linear_divergence(
        leaves[0], leaves[1], leaves[2], leaves[1], kind="jsd", impl=impl, mode=mode
    )
    (value * upstream).sum().backward()
    assert torch.equal(leaves[0].grad, expected[0]) and torch.equal(leaves[1].grad, expected[1])
    assert leaves[2].grad is None


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("mode", MODES)
def test_frozen_inputs_skip_their_gemm(mode, frozen, device, monkeypatch):
    inputs, _ = make(6, 200, 8, device=device)
    (inputs[1] if frozen == "hidden" else inputs[0]).requires_grad_()
    asked = []
    original = divergence._backward

    def spy(heads, runs, upstream, d_hidden, d_weight, d_bias):
        asked.append((d_hidden is not None, d_weight is not None))
        return original(heads, runs, upstream, d_hidden, d_weight, d_bias)

    monkeypatch.setattr(divergence, "_backward", spy)
    linear_divergence(*inputs, mode=mode).sum().backward()
    assert asked == [(frozen == "weight", frozen == "hidden")]
    assert (inputs[0] if frozen == "hidden" else inputs[1]).grad is None


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_and_repeatable_backward(mode, device):
    inputs, _ = make(9, 2100, 16, device=device)
    hidden = inputs[0].clone().requires_grad_()
    value = linear_divergence(hidden, *inputs[1:], kind="reverse_kl", mode=mode)
    again = linear_divergence(hidden, *inputs[1:], kind="reverse_kl", mode=mode)
    assert torch.equal(value, again)
    (once,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(value.sum(), hidden)
    assert torch.equal(once, twice)


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        sizes = [x.numel() for x in tensors if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_tensor_of_all_logits(kind, device, monkeypatch):
    """Recompute and no gradient: a run's logits at most. Stash: one [N, V], not two."""
    n, v = 64, 1000
    monkeypatch.setattr(divergence, "ROW_TILE", dict.fromkeys(("cpu", "cuda"), 8 * v * 8))
    monkeypatch.setattr(divergence, "BACKWARD_TILE", dict.fromkeys(("cpu", "cuda"), 1 << 14))
    inputs, _ = make(n, v, 4, device=device)
    hidden = inputs[0].requires_grad_()
    for more, bound in ((dict(mode="recompute"), n * v // 2), (dict(mode="stash"), n * v)):
        with Largest() as largest:
            linear_divergence(*inputs, kind=kind, **more).sum().backward()
        assert largest.elements <= bound
        assert (largest.elements == n * v) == (more["mode"] == "stash")
    with Largest() as largest, torch.no_grad():
        linear_divergence(hidden, *inputs[1:], kind=kind, mode="stash")
    assert largest.elements <= n * v // 4


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_topk_with_a_tail(kind):
    """The K entries and the rest as one: the divergence of those K + 1 outcomes, by hand."""
    p_s, p_t = (torch.randn(5, 12, dtype=torch.float64).softmax(-1) for _ in range(2))
    options = dict(kind=kind, beta=0.3, alpha=0.7)
    buckets = [torch.cat((p[:, :4], p[:, 4:].sum(1, keepdim=True)), 1).log() for p in (p_s, p_t)]
    leaf = p_s[:, :4].log().requires_grad_()
    value = topk_divergence(leaf, p_t[:, :4].log(), **options)
    assert_close(value, reference(*buckets, **options))
    assert (value <= reference(p_s.log(), p_t.log(), **options)).all()
    assert torch.autograd.gradcheck(lambda x: topk_divergence(x, p_t[:, :4].log(), **options), leaf)
    alone = topk_divergence(leaf, p_t[:, :4].log(), tail=False, **options)
    assert_close(alone, reference(p_s[:, :4].log(), p_t[:, :4].log(), **options))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_topk_of_everything_has_an_empty_tail(kind, wide):
    logits, teacher = (torch.randn(4, 6, dtype=wide).log_softmax(-1) for _ in range(2))
    value, grad = through_logits(topk_divergence, logits, teacher, kind=kind)
    assert_close(value, reference(logits, teacher, kind=kind), rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()
    one_hot = torch.tensor([[0.0, -90.0]], dtype=wide)
    value, grad = through_logits(topk_divergence, one_hot, one_hot, kind=kind)
    assert grad.isfinite().all() and abs(float(value)) < 1e-6


def test_self_certainty():
    """KL of the uniform distribution to p, entry by entry; a reward has no gradient."""
    hidden, weight = torch.randn(5, 6), torch.randn(40, 6, requires_grad=True)
    targets = torch.zeros(5, dtype=torch.int64)
    stats = linear_logp(hidden, weight, targets, outputs=("lse", "mean_logit"))
    value = self_certainty(stats, 40)
    logp = (hidden @ weight.t()).log_softmax(-1)
    assert_close(value, (-math.log(40) - logp).mean(-1).detach(), rtol=1e-5, atol=1e-5)
    assert not value.requires_grad
    with pytest.raises(ValueError, match="stats: wanted lse and mean_logit; got no mean_logit"):
        self_certainty(linear_logp(hidden, weight, targets, outputs=("lse",)), 40)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_parity_with_trl(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    pair = [2 * torch.randn(7, 90, dtype=torch.float64) for _ in range(2)]

    def theirs(student, teacher):
        return gkd.GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=temperature, reduction="none"
        )[0].sum(-1)

    upstream = torch.randn(7, dtype=torch.float64)
    expected, wanted = through_logits(theirs, *pair, upstream)
    options = dict(kind="jsd", beta=beta, temperature=temperature)
    value, grad = through_logits(token_divergence, *pair, upstream, **options)
    assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert_close(grad, wanted, rtol=1e-6, atol=1e-9)
    for impl in IMPLS[:2]:
        narrow = [x.float() for x in (*pair, upstream)]
        value, grad = through_logits(token_divergence, *narrow, impl=impl, **options)
        assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_parity_with_trl_heads(beta):
    """TRL's chunked divergence: the same values and gradients from hidden states, in float32."""
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    inputs, _ = make(6, 500, 8, dict(bias=True))
    upstream = torch.randn(6)
    value, grads = run(inputs, {}, upstream, kind="jsd", beta=beta, temperature=0.9)
    hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias = inputs
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    theirs, _ = trl.ChunkedDivergenceFunction.apply(
        *leaves, teacher_hidden, teacher_weight, teacher_bias, beta, 0.9
    )
    (theirs * upstream).sum().backward()
    assert_close(value, theirs.detach(), rtol=1e-5, atol=1e-5)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_parity_with_liger(beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    inputs, _ = make(6, 300, 8)
    loss = liger.LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=False)
    leaves = [x.double().requires_grad_() for x in inputs[:2]]
    targets = torch.zeros(6, dtype=torch.int64)
    theirs = loss(*leaves, *double(inputs[2:4]), targets)
    theirs.backward()
    upstream = torch.full((6,), 1 / 6)
    value, grads = run(inputs, {}, upstream, kind="jsd", beta=beta)
    assert_close(value.mean().double(), theirs.detach().double(), rtol=1e-5, atol=1e-6)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert relative_error(grad, leaf.grad) < 1e-5
    exact = linear_divergence(*double(inputs[:4]), kind="jsd", beta=beta)
    # its total is a float32 tensor even of float64 inputs
    assert_close(exact.mean(), theirs.detach().double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_top_k_is_trls_self_distillation(alpha, tail):
    """SDPO's support: the student's top k, and the rest as one entry."""
    sdpo = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    logits, teacher = (2 * torch.randn(6, 40, dtype=torch.float64) for _ in range(2))
    settings = dict(distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail)
    theirs = lambda s, t: sdpo.compute_topk_self_distillation_loss(s, t, **settings)  # noqa: E731

    def ours(student, teacher):
        top = student.topk(5).indices
        sides = (x.log_softmax(-1).gather(-1, top) for x in (student, teacher))
        return topk_divergence(*sides, kind="jsd", beta=alpha, tail=tail)

    for got, wanted in zip(
        through_logits(ours, logits, teacher), through_logits(theirs, logits, teacher), strict=True
    ):
        assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="Liger's kernel does not run in Triton's interpreter")
def test_tvd_is_ligers(device):
    """Its kernel takes probabilities; the softmax's gradient is torch's."""
    liger = pytest.importorskip("liger_kernel.transformers.tvd")
    logits, teacher = (torch.randn(4, 33, device=device) for _ in range(2))
    loss = liger.LigerTVDLoss(reduction="none")
    theirs = lambda s, t: loss(s.softmax(-1), t.softmax(-1)).sum(-1)  # noqa: E731
    expected, wanted = through_logits(theirs, logits, teacher)
    value, grad = through_logits(token_divergence, logits, teacher, kind="tvd")
    assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_runs_on_fake_tensors_and_under_compile():
    inputs, _ = make(4, 30, 6)

    def both(hidden, weight, teacher_hidden, teacher_weight):
        head = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, kind="jsd")
        logits, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
        top = topk_divergence(logits.log_softmax(-1)[:, :5], teacher.log_softmax(-1)[:, :5])
        return head + token_divergence(logits, teacher, kind="alpha") + top

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs[:4]), both(*inputs[:4]))


GOOD = dict(
    hidden=torch.zeros(3, 4),
    weight=torch.zeros(9, 4, requires_grad=True),
    teacher_hidden=torch.zeros(3, 5),
    teacher_weight=torch.zeros(9, 5),
)
BAD = {
    r"^hidden: wanted shape \[N, H\]": dict(hidden=torch.zeros(2, 3, 4)),
    r"^weight: wanted shape \[V, 4\]": dict(weight=torch.zeros(9, 5)),
    r"teacher_weight: wanted shape \[V, 5\]": dict(teacher_weight=torch.zeros(9, 4)),
    "teacher_hidden: wanted 3 at dimension 0": dict(teacher_hidden=torch.zeros(2, 5)),
    "teacher_weight: wanted 9 at dimension 0.*they share": dict(teacher_weight=torch.zeros(8, 5)),
    r"^bias: wanted \[9\]": dict(bias=torch.zeros(8)),
    r"teacher_bias: wanted \[9\]": dict(teacher_bias=torch.zeros(8)),
    "kind: wanted one of forward_kl, reverse_kl, jsd, alpha, tvd; got 'kl'": dict(kind="kl"),
    "beta: wanted a number in": dict(beta=1.5),
    "alpha: wanted a number in": dict(alpha=-0.1),
    "temperature: wanted a positive": dict(temperature=0.0),
    r"temperature: wanted a number or \[3\]": dict(temperature=torch.ones(2)),
    "temperature: wanted positive numbers; got -1": dict(temperature=torch.tensor([1.0, -1, 2])),
    "^softcap: wanted a positive number, or None": dict(softcap=0.0),
    "teacher_softcap: wanted a positive number": dict(teacher_softcap=-30.0),
    "mode: wanted 'auto'": dict(mode="fast"),
    "impl: wanted one of": dict(impl="cuda"),
    "hidden: wanted at most float32": dict(
        impl="torch", **{k: x.detach().double() for k, x in GOOD.items()}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_tensor(message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(GOOD | BAD[message]))


def test_bad_logits():
    x = torch.zeros(3, 4)
    for message, pair in {
        r"^logits: wanted shape \[N, V\]": (x[0], x),
        "teacher_logits: wanted 4 at dimension 1.*they share": (x, x[:, :3]),
        "^logits: wanted a floating-point": (x.long(), x),
    }.items():
        with pytest.raises(ValueError, match=message):
            token_divergence(*pair)
    with pytest.raises(ValueError, match="teacher_softcap: wanted a positive"):
        token_divergence(x, x, teacher_softcap=0.0)
    with pytest.raises(ValueError, match=r"teacher_logp: wanted \(3, 4\)"):
        topk_divergence(x, x[:, :2])


def test_every_kind_says_what_it_is():
    assert all("sum" in f.__doc__ or "KL" in f.__doc__ for f in DIVERGENCES.values())
    assert len({f.__doc__ for f in DIVERGENCES.values()}) == len(DIVERGENCES)
