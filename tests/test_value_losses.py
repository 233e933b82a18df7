"""Losses of a critic: by hand, gradients, masks, identities, extremes, bad input."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels.value_losses import LOSSES, value_hl_gauss, value_of_bins

NAN = float("nan")
# errors 0.25 and -2, then a masked token
GIVEN = dict(values=[0.75, -2.0, NAN], returns=[0.5, 0.0, NAN], mask=[True, True, False])
OLD = [0.0, -2.5, NAN]


def phi(z: float) -> float:
    return math.erf(z / math.sqrt(2)) / 2


# bins [-1, 0] and [0, 1], sigma 1/4, a return of 1/2: its mass in each, but for what lies beyond 1
INSIDE, BEFORE = 2 * phi(2), phi(6) - phi(2)
FIRST, SECOND = math.log(4), math.log(4 / 3)  # -log of the two bins' probabilities
CASES = [
    ("value_mse", {}, [1 / 32, 2, 0]),
    ("value_clipped", {}, [0.3**2 / 2, 2.3**2 / 2, 0]),
    ("value_clipped", dict(cliprange=1.0), [1 / 32, 2, 0]),
    ("value_huber", {}, [1 / 32, 1.5, 0]),
    ("value_huber", dict(delta=0.5), [1 / 32, 0.875, 0]),
    (
        "value_hl_gauss",
        dict(sigma_bins=0.25),
        [(BEFORE * FIRST + INSIDE * SECOND) / (BEFORE + INSIDE), (FIRST + SECOND) / 2, 0],
    ),
]


def tensors(name: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    found = {
        k: torch.tensor(v, dtype=torch.bool if k == "mask" else dtype) for k, v in GIVEN.items()
    }
    if name == "value_clipped":
        found["old_values"] = torch.tensor(OLD, dtype=dtype)
    if name == "value_hl_gauss":
        del found["values"]
        row = [0.0, math.log(3)]
        found["logits"] = torch.tensor([row, row, [NAN, NAN]], dtype=dtype)
    return found


# wide enough for both tokens to move; narrow enough for two bins to hold what is smoothed
OPTIONS = {"value_clipped": dict(cliprange=1.0), "value_hl_gauss": dict(sigma_bins=0.25)}


def learnt(given) -> str:
    return "logits" if "logits" in given else "values"


@pytest.mark.parametrize("name, options, wanted", CASES)
def test_worked_by_hand(name, options, wanted):
    found = LOSSES[name](**tensors(name), **options)
    assert_close(found.loss, torch.tensor(wanted, dtype=torch.float64))
    assert found.unit == "token" and found.count == 2


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_by_hand(name):
    """Values 0.75 and -2, or 1/4 twice: the mean of bins at -1/2 and 1/2 by 1/4 and 3/4."""
    found = {k: (x.total, x.count) for k, x in LOSSES[name](**tensors(name)).metrics.items()}
    sums = (0.5, 1 / 16 + 1 / 16) if name == "value_hl_gauss" else (-1.25, 1 / 16 + 4)
    wanted = {"values/mean": (sums[0], 2), "values/squared_error": (sums[1], 2)}
    if name == "value_clipped":
        wanted |= {"clip_ratio/value": (2, 2)}
    assert found == {k: pytest.approx(pair) for k, pair in wanted.items()}


def test_every_loss_has_a_case():
    assert {name for name, *_ in CASES} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_masks(name):
    """gradcheck; a gradient of exactly 0 at masked tokens, though they hold NaN."""
    given = tensors(name)
    key = learnt(given)
    x = given.pop(key).requires_grad_()
    given |= OPTIONS.get(name, {})
    LOSSES[name](x, **given).loss.sum().backward()
    assert (x.grad[2] == 0).all() and (x.grad[:2] != 0).any()
    safe = x.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, **given).loss, (safe,))


@pytest.mark.parametrize("name", LOSSES)
def test_the_sign_and_the_metrics(name):
    """A step down the gradient brings the values nearer to the returns."""
    given = tensors(name)
    key = learnt(given)
    given[key].requires_grad_()
    found = LOSSES[name](**given, **OPTIONS.get(name, {}))
    found.loss.sum().backward()
    assert not any(m.total.requires_grad for m in found.metrics.values())
    before, after = given[key].detach(), given[key].detach() - 0.1 * given[key].grad
    if name == "value_hl_gauss":
        before, after = value_of_bins(before), value_of_bins(after)
    target = given["returns"]
    assert ((after - target).abs() < (before - target).abs())[:2].all()


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up(name):
    given = tensors(name)
    whole = LOSSES[name](**given).loss
    parts = [LOSSES[name](**{k: v[i : i + 1] for k, v in given.items()}).loss for i in range(3)]
    assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_and_empty(name):
    given = tensors(name, torch.float32)
    key = learnt(given)
    given[key] = given[key].nan_to_num() + 80
    given[key].requires_grad_()
    loss = LOSSES[name](**given).loss
    loss.sum().backward()
    assert loss.isfinite().all() and given[key].grad.isfinite().all()
    empty = {k: v[:0] for k, v in tensors(name, torch.float32).items()}
    assert LOSSES[name](**empty).mean() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_traced(name):
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) for k, v in tensors(name).items()}
        assert LOSSES[name](**fake).loss.shape == (3,)
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], backend="eager", fullgraph=True)
    assert_close(compiled(**tensors(name)).loss, LOSSES[name](**tensors(name)).loss)


def test_hl_gauss_is_least_at_its_target():
    """There the mean of the bins is the return."""
    returns = torch.tensor([0.1, -0.35], dtype=torch.float64)
    logits = torch.zeros(2, 40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = value_hl_gauss(logits, returns, low=-2.0, high=2.0).loss.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(value_of_bins(logits, low=-2.0, high=2.0), returns, atol=1e-4, rtol=0)


BAD = {
    "returns: wanted (3,); got (2,)": ("value_mse", dict(returns=torch.zeros(2))),
    "mask: wanted a bool tensor": ("value_mse", dict(mask=torch.ones(3))),
    "mask: wanted (3,)": ("value_mse", dict(mask=torch.ones(2).bool())),
    "old_values: wanted (3,)": ("value_clipped", dict(old_values=torch.zeros(1))),
    "cliprange: wanted a positive": ("value_clipped", dict(cliprange=0.0)),
    "delta: wanted a positive": ("value_huber", dict(delta=0.0)),
    "low: wanted less than high": ("value_hl_gauss", dict(low=2.0)),
    "returns: wanted numbers from low to high": ("value_hl_gauss", dict(high=0.25)),
    "sigma_bins: wanted a positive": ("value_hl_gauss", dict(sigma_bins=0.0)),
    "logits: wanted [M, B]": ("value_hl_gauss", dict(logits=torch.zeros(3))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    name, wrong = BAD[message]
    with pytest.raises(ValueError) as caught:
        LOSSES[name](**tensors(name) | wrong)
    assert message in str(caught.value)
