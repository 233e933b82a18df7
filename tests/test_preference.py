"""Every preference loss: hand-worked values, gradients, signs, and what it refuses."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.preference import (
    LOSSES,
    hyperparameters,
    preference_loss,
    uses_reference,
)

# chosen -2 of 2 tokens (ref -3), rejected -6 of 3 tokens (ref -5): rho = 1 and -1, delta = 2
PAIR = dict(chosen=-2.0, rejected=-6.0, ref_chosen=-3.0, ref_rejected=-5.0)
LENGTHS = dict(chosen_len=2.0, rejected_len=3.0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


CASES = [
    ("sigmoid", dict(beta=0.5), softplus(-1)),
    ("sigmoid", dict(beta=0.5, label_smoothing=0.1), 0.9 * softplus(-1) + 0.1 * softplus(1)),
    ("hinge", dict(beta=0.2), 0.6),
    ("hinge", dict(beta=1.0), 0.0),
    ("hinge", dict(beta=0.2, label_smoothing=0.25), 0.75 * 0.6 + 0.25 * 1.4),
    ("ipo", dict(beta=1.0), (1 / 2 + 1 / 3 - 1 / 2) ** 2),
    ("ipo", dict(beta=1.0, label_smoothing=0.5), 0.5 * (1 / 3) ** 2 + 0.5 * (4 / 3) ** 2),
    ("simpo", dict(beta=2.0, gamma=1.0), softplus(-1)),
    (
        "simpo",
        dict(beta=1.0, gamma=0.0, label_smoothing=0.2),
        0.8 * softplus(-1) + 0.2 * softplus(1),
    ),
]


def tensors(values: dict[str, float], dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {k: torch.tensor([v], dtype=dtype) for k, v in values.items()}


@pytest.mark.parametrize("name, given, value", CASES)
def test_worked_by_hand(name, given, value):
    objective = preference_loss(**tensors(PAIR | LENGTHS), loss_type=name, **given)
    assert objective.unit == "pair"
    assert_close(objective.loss, torch.tensor([value], dtype=torch.float64))


def test_every_loss_has_a_case():
    assert {name for name, _, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_sign(name):
    """Raising the chosen log-prob must not raise the loss; the reference gets no say in it."""
    p = 6
    values = {k: torch.randn(p, dtype=torch.float64) * 2 - 8 for k in PAIR}
    lengths = {k: torch.randint(2, 9, (p,)).double() for k in LENGTHS}
    chosen, rejected = (values.pop(k).requires_grad_() for k in ("chosen", "rejected"))

    def loss(chosen, rejected):
        return preference_loss(chosen, rejected, **values, **lengths, loss_type=name).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    grads = torch.autograd.grad(loss(chosen, rejected).sum(), (chosen, rejected))
    if name != "ipo":  # a square has a minimum: past its target margin the signs turn
        assert (grads[0] <= 0).all() and (grads[1] >= 0).all()
    else:
        near = preference_loss(
            *(torch.full((1,), -3.0).requires_grad_() for _ in range(2)),
            torch.full((1,), -3.0), torch.full((1,), -3.0),
            chosen_len=torch.ones(1), rejected_len=torch.ones(1), loss_type="ipo",
        )  # fmt: skip
        assert_close(near.loss, torch.tensor([25.0]))


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_detached_and_ties_count_half(name):
    pair = tensors(dict.fromkeys(PAIR, -4.0) | dict.fromkeys(LENGTHS, 2.0))
    pair["chosen"].requires_grad_()
    objective = preference_loss(**pair, loss_type=name)
    assert objective.loss.requires_grad
    assert not any(m.requires_grad for m in objective.metrics.values())
    assert objective.metrics["rewards/accuracies"].item() == 0.5
    assert objective.metrics["rewards/margins"].item() == 0


def test_which_losses_use_a_reference():
    assert {name for name, loss in LOSSES.items() if not uses_reference(loss)} == {"simpo"}


def test_hyperparameters_come_from_the_signature():
    assert hyperparameters(LOSSES["simpo"]) == dict(beta=2.0, gamma=1.0, label_smoothing=0.0)


BAD = {
    "loss_type: wanted one of sigmoid": dict(loss_type="dpo"),
    "gamma: wanted a hyperparameter of sigmoid: beta, label_smoothing": dict(gamma=1.0),
    "label_smoothing: wanted a probability; got 1.5": dict(label_smoothing=1.5),
    "ref_chosen: wanted a tensor": dict(ref_chosen=None),
    r"rejected: wanted \(1,\); got \(2,\)": dict(rejected=torch.zeros(2)),
    "chosen_len: wanted a tensor": dict(loss_type="ipo"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**tensors(PAIR) | BAD[message])
