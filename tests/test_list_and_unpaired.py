"""Losses of single completions and of lists: by hand, gradients, signs, padding, extremes."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.preference import (
    LIST_LOSSES,
    UNPAIRED_LOSSES,
    inputs,
    list_loss,
    preference_loss,
    unpaired_loss,
)
from prefuse.kernels.preference_parts import Labelled, Listed
from prefuse.kernels.unpaired_losses import optimal_value


def h(z: float) -> float:
    return math.log1p(math.exp(-z))


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# logp -2, reference -3: rho = 1; the second completion is undesirable, with rho = -1
SINGLE = dict(logp=[-2.0, -6.0], ref_logp=[-3.0, -5.0], label=[True, False])
SINGLE |= dict(shift=[0.5, 0.5], reward=[2.0, -1.0], value=[0.5, 0.5])
UNPAIRED = [
    ("kto", dict(beta=2.0), (s(-1), s(-3))),
    ("kto", dict(beta=2.0, desirable_weight=3.0, undesirable_weight=0.5), (3 * s(-1), s(-3) / 2)),
    ("bco", dict(beta=2.0), (h(1.5), h(2.5))),
    ("apo_zero_unpaired", dict(beta=2.0), (s(-2), s(-2))),
    (
        "apo_zero_unpaired",
        dict(beta=2.0, desirable_weight=3.0, undesirable_weight=0.5),
        (3 * s(-2), s(-2) / 2),
    ),
    ("dro_v", dict(tau=0.5), (0.5, 0.5)),
    ("a2po", dict(beta=0.5), (1.0, 1.0)),
]


def singles(dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {
        k: torch.tensor(v, dtype=torch.bool if k == "label" else dtype) for k, v in SINGLE.items()
    }


@pytest.mark.parametrize("name, options, values", UNPAIRED)
def test_unpaired_by_hand(name, options, values):
    found = unpaired_loss(**singles(), loss_type=name, **options)
    assert found.unit == "sequence" and not found.metrics["rewards"].requires_grad
    assert_close(found.loss, torch.tensor(values, dtype=torch.float64))


def test_every_loss_has_a_case():
    assert {name for name, *_ in UNPAIRED} == set(UNPAIRED_LOSSES)
    assert {name for name, *_ in LISTS} == set(LIST_LOSSES)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_gradients(name):
    given = singles()
    logp = given.pop("logp").requires_grad_()

    def loss(logp):
        return unpaired_loss(logp, **given, loss_type=name).loss

    assert torch.autograd.gradcheck(loss, (logp,))
    (grad,) = torch.autograd.grad(loss(logp).sum(), logp)
    assert grad[0] < 0 < grad[1]  # raise the desirable one, lower the other


@pytest.mark.parametrize("name, values", [("kto", [s(-2), s(-2)]), ("bco", [h(5), h(-1)])])
def test_the_shift_is_detached_and_kto_keeps_it_positive(name, values):
    given = singles() | dict(shift=torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    given["logp"].requires_grad_()
    loss = unpaired_loss(**given, loss_type=name, beta=2.0).loss
    assert_close(loss, torch.tensor(values, dtype=torch.float64))
    loss.sum().backward()
    assert given["shift"].grad is None


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_implicit_rewards_by_hand(name):
    options = {"tau" if name == "dro_v" else "beta": 0.25}
    given = singles() | dict(logp=torch.tensor([-1.0, -6.0], dtype=torch.float64))
    rewards = unpaired_loss(**given, loss_type=name, **options).metrics["rewards"]
    assert rewards.tolist() == [0.5, -0.25]


def test_the_optimal_value_is_a_soft_maximum():
    """beta log of the mean of 1 and 3, and of 4 and 4, where exp(r / beta) is; a shift goes along;
    near 0 it is the best of the rewards, far from it their mean."""
    odds = torch.tensor([[1.0, 3.0], [4.0, 4.0]], dtype=torch.float64, requires_grad=True)
    rewards = 0.25 * odds.log()
    found = optimal_value(rewards, beta=0.25)
    wanted = torch.tensor([0.25 * math.log(2), 0.25 * math.log(4)], dtype=torch.float64)
    assert_close(found, wanted)
    assert not found.requires_grad
    assert_close(optimal_value(rewards + 7, beta=0.25), wanted + 7)
    for beta, limit in ((1e-4, rewards.amax(1)), (1e4, rewards.mean(1))):
        assert_close(optimal_value(rewards, beta=beta), limit, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"rewards: wanted \[G, K\]"):
        optimal_value(torch.zeros(3))


def test_dro_v_trains_the_critic_too():
    given = {k: v.requires_grad_() for k, v in singles().items() if k != "label"}
    unpaired_loss(**given, loss_type="dro_v", tau=0.5).loss.sum().backward()
    residual = given["reward"] - given["value"] - 0.5 * (given["logp"] - given["ref_logp"])
    assert_close(given["value"].grad, -residual.detach())
    assert_close(given["logp"].grad, -0.5 * residual.detach())


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_unpaired_extremes_stay_finite(name):
    logp = torch.full((4,), -100.0, requires_grad=True)
    given = dict(ref_logp=torch.tensor([-180.0, -20, -180, -20]), reward=torch.ones(4))
    given |= dict(label=torch.tensor([True, True, False, False]), value=torch.zeros(4))
    loss = unpaired_loss(logp, **given, shift=torch.tensor(0.3), loss_type=name).loss
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()


# rho = 1, -1, 0 with rewards 2, 0, 1; an absent fourth
LOGP = [[-2.0, -6.0, -4.0, -1.0]]
REF = [[-3.0, -5.0, -4.0, -9.0]]
REWARD = [[2.0, 0.0, 1.0, 9.0]]
MASK = [[True, True, True, False]]
Z = math.e + 1 / math.e + 1
Q = [math.e / Z, 1 / (math.e * Z), 1 / Z]
R = sum(math.exp(r) for r in (2, 0, 1))
PS = [math.exp(r) / R for r in (2, 0, 1)]
HALVED = [math.exp(r / 2) / sum(math.exp(r / 2) for r in (2, 0, 1)) for r in (2, 0, 1)]
D = [1 / math.log(2), 1 / math.log(4), 1 / math.log(3)]  # ranks 1, 3, 2
LISTS = [
    ("infonca", dict(beta=1.0), -sum(p * math.log(q) for p, q in zip(PS, Q, strict=True))),
    (
        "nca",
        dict(beta=1.0),
        sum(p * h(z) + h(-z) / 3 for p, z in zip(PS, (1, -1, 0), strict=True)),
    ),
    ("exo", dict(beta=1.0), sum(q * math.log(q / p) for p, q in zip(PS, Q, strict=True))),
    (
        "infonca",
        dict(beta=1.0, alpha=2.0),
        -sum(p * math.log(q) for p, q in zip(HALVED, Q, strict=True)),
    ),
    (
        "nca",
        dict(beta=2.0, alpha=2.0),
        sum(p * h(z) + h(-z) / 3 for p, z in zip(HALVED, (2, -2, 0), strict=True)),
    ),
    (
        "exo",
        dict(beta=1.0, alpha=2.0),
        sum(q * math.log(q / p) for p, q in zip(HALVED, Q, strict=True)),
    ),
    ("plackett_luce", dict(beta=1.0), -math.log(Q[0]) + math.log(1 + 1 / math.e)),
    (
        "lipo",
        dict(beta=1.0),
        3 * (D[0] - D[1]) * h(2) + 2 * (D[0] - D[2]) * h(1) + (D[2] - D[1]) * h(1),
    ),
]


def lists(dtype=torch.float64, columns: int = 4) -> dict[str, torch.Tensor]:
    given = dict(logp=LOGP, ref_logp=REF, reward=REWARD)
    found = {k: torch.tensor(v, dtype=dtype)[:, :columns] for k, v in given.items()}
    return found | dict(mask=torch.tensor(MASK)[:, :columns])


@pytest.mark.parametrize("name, options, value", LISTS)
def test_lists_by_hand(name, options, value):
    found = list_loss(**lists(), loss_type=name, **options)
    assert found.unit == "group" and found.metrics["rewards/accuracies"].tolist() == [1.0]
    assert_close(found.loss, torch.tensor([value], dtype=torch.float64))
    worst = list_loss(**lists() | dict(reward=-lists()["reward"]), loss_type=name, **options)
    assert worst.metrics["rewards/accuracies"].tolist() == [0.0]


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_list_gradients_and_padding(name):
    """gradcheck; absent completions have gradient 0 and change nothing; the best one rises."""
    given = lists()
    logp = given.pop("logp").requires_grad_()

    def loss(logp, **others):
        return list_loss(logp, **others, loss_type=name).loss

    assert torch.autograd.gradcheck(lambda x: loss(x, **given), (logp,))
    (grad,) = torch.autograd.grad(loss(logp, **given).sum(), logp)
    assert grad[0, 3] == 0 and grad[0, 0] < 0
    short = lists(columns=3)
    del short["mask"]
    assert_close(loss(**short), loss(logp, **given).detach())


@pytest.mark.parametrize("absent", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LIST_LOSSES)
def test_what_stands_at_an_absent_completion_is_not_read(name, absent):
    given = lists()
    wanted = list_loss(**given, loss_type=name)
    for key in ("logp", "ref_logp", "reward"):
        given[key] = given[key].masked_fill(~given["mask"], absent)
    given["logp"].requires_grad_()
    found = list_loss(**given, loss_type=name)
    assert_close(found.loss, wanted.loss)
    assert_close(found.metrics, wanted.metrics)
    (grad,) = torch.autograd.grad(found.loss.sum(), given["logp"])
    assert grad.isfinite().all() and grad[0, 3] == 0


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_list_corner_cases(name):
    """Groups of one, of none, of equal rewards; log-ratios of +-80: finite, in float32."""
    logp = torch.full((5, 2), -100.0, requires_grad=True)
    ratio = torch.tensor([[80.0, -80], [-80, 80], [80, 80], [-80, -80], [0, 0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [False, False], [True, True]])
    reward = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 1]])
    given = dict(ref_logp=-100 - ratio, reward=reward, mask=mask)
    found = list_loss(logp, **given, loss_type=name)
    found.loss.sum().backward()
    assert found.loss.isfinite().all() and logp.grad.isfinite().all()
    assert found.loss[3] == 0 and (logp.grad[~mask] == 0).all()


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_the_order_of_completions_does_not_matter(name):
    given = {k: torch.randn(8, 5).double() for k in ("logp", "ref_logp", "reward")}
    shuffled = {k: v[:, [3, 0, 4, 1, 2]] for k, v in given.items()}
    assert_close(
        list_loss(**given, loss_type=name).loss, list_loss(**shuffled, loss_type=name).loss
    )


def test_two_completions_are_a_pair():
    """Plackett-Luce of two is DPO; LiPO weighs it; EXO meets its pair form; where one is sure to be
    the better, NCA does, and InfoNCA is DPO."""
    logp, ref = torch.randn(9, 2).double() * 3, torch.randn(9, 2).double() * 3
    reward = torch.tensor([[1.0, 0.0]]).double().expand(9, 2)
    given = dict(ref_logp=ref, reward=reward)
    dpo = preference_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1]).loss
    assert_close(list_loss(logp, **given, loss_type="plackett_luce").loss, dpo)
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert_close(list_loss(logp, **given, loss_type="lipo").loss, weight * dpo)
    epsilon = 1 / (1 + math.e)
    pair = preference_loss(
        logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], loss_type="exo_pair", label_smoothing=epsilon
    )
    assert_close(list_loss(logp, **given, loss_type="exo").loss, pair.loss)
    sides = logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1]
    given["reward"] = 1000 * reward
    for name, of_two in (("nca", "nca_pair"), ("infonca", "sigmoid")):
        wanted = preference_loss(*sides, loss_type=of_two).loss
        assert_close(list_loss(logp, **given, loss_type=name).loss, wanted)


@pytest.mark.parametrize("name", [*UNPAIRED_LOSSES, *LIST_LOSSES])
def test_a_loss_reads_what_it_says(name):
    listed = name in LIST_LOSSES
    given, call = (lists(), list_loss) if listed else (singles(), unpaired_loss)
    needed = inputs(
        (LIST_LOSSES if listed else UNPAIRED_LOSSES)[name], Listed if listed else Labelled
    )
    assert call(**{k: given[k] for k in needed}, loss_type=name).loss.isfinite().all()
    for absent in set(needed) - {"logp", "mask"}:
        with pytest.raises(ValueError, match=f"{absent}: wanted a tensor"):
            call(**{k: given[k] for k in needed if k != absent}, loss_type=name)


def test_bad_input():
    with pytest.raises(ValueError, match=r"logp: wanted \[G, K\]"):
        list_loss(torch.zeros(3), loss_type="lipo")
    with pytest.raises(ValueError, match="label: wanted a bool tensor; got torch.float32"):
        unpaired_loss(**singles() | dict(label=torch.ones(2)), loss_type="kto")
    with pytest.raises(ValueError, match="mask: wanted a bool tensor"):
        list_loss(**lists() | dict(mask=torch.ones(1, 4)), loss_type="lipo")
    with pytest.raises(ValueError, match="loss_type: wanted one of infonca"):
        list_loss(torch.zeros(3, 2), loss_type="listnet")
    with pytest.raises(ValueError, match=r"reward: wanted \(1, 4\); got \(1, 3\)"):
        list_loss(**lists() | dict(reward=torch.zeros(1, 3)), loss_type="lipo")
    with pytest.raises(ValueError, match="gamma: wanted a hyperparameter of kto: beta"):
        unpaired_loss(**singles(), loss_type="kto", gamma=1.0)
