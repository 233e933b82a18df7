"""Every preference loss: hand-worked values, gradients, signs, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prefuse.kernels.informed_pair_losses import matched_by_rank
from prefuse.kernels.preference import LOSSES, hyperparameters, inputs, preference_loss

# chosen -2 of 2 tokens (ref -3), rejected -6 of 3 tokens (ref -5): rho = 1 and -1, delta = 2
PAIR = dict(chosen=-2.0, rejected=-6.0, ref_chosen=-3.0, ref_rejected=-5.0)
LENGTHS = dict(chosen_len=2.0, rejected_len=3.0)
JUDGED = dict(margin=math.log(3), preference=0.75)
SCORED = dict(prev_chosen=-2.5, prev_rejected=-5.5, chosen_kl=0.5, rejected_kl=1.5)
SCORED |= dict(chosen_weight=-math.log(2), rejected_weight=-math.log(3), explored=-4.0)
SCORED |= dict(gold=-8.0, gold_len=4.0)
SCORED |= dict(batch_margin=1.5, running_margin=0.5)
EXTRA = LENGTHS | JUDGED | SCORED


def h(z: float) -> float:
    return math.log1p(math.exp(-z))


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def log_odds(m: float) -> float:
    return m - math.log(1 - math.exp(m))


E = math.e
CASES = [
    ("sigmoid", dict(beta=0.5), h(1)),
    ("sigmoid", dict(beta=0.5, label_smoothing=0.1), 0.9 * h(1) + 0.1 * h(-1)),
    ("sigmoid_norm", dict(beta=6.0), h(5)),
    ("robust", dict(beta=0.5, label_smoothing=0.25), (0.75 * h(1) - 0.25 * h(-1)) / 0.5),
    ("hinge", dict(beta=0.2), 0.6),
    ("hinge", dict(beta=1.0), 0.0),
    ("hinge", dict(beta=0.2, label_smoothing=0.25), 0.75 * 0.6 + 0.25 * 1.4),
    ("slic", dict(delta=5.0, nll_coef=0.5), 2.0),
    ("ipo", dict(beta=0.5), (1 / 2 + 1 / 3 - 1) ** 2),
    ("ipo", dict(beta=1.0, label_smoothing=0.5), 0.5 * (1 / 3) ** 2 + 0.5 * (4 / 3) ** 2),
    ("ipo_sum", dict(beta=0.1), 9.0),
    ("fdpo_forward_kl", dict(beta=0.5), h(0.5 * (E - 1 / E))),
    ("fdpo_jsd", dict(beta=2.0), h(2 * (math.log(s(1)) - math.log(s(-1))))),
    ("fdpo_alpha", dict(beta=0.5, alpha=1.0), h(0.5 * (E - 1 / E))),
    ("fdpo_alpha", dict(beta=0.5, alpha=0.5), h(E**0.5 - E**-0.5)),
    (
        "exo_pair",
        dict(beta=0.5, label_smoothing=0.2),
        s(1) * (-h(1) - math.log(0.8)) + s(-1) * (-h(-1) - math.log(0.2)),
    ),
    ("nca_pair", dict(beta=2.0), h(2) + h(-2) / 2 + h(2) / 2),
    ("bco_pair", dict(beta=2.0), 2 * h(2)),
    ("bco_pair", dict(beta=2.0, shift=1.0), h(1) + h(3)),
    ("sppo_hard", dict(beta=0.25), 2.0),
    ("sppo", dict(beta=0.125), 2.0),
    ("apo_zero", dict(beta=2.0), 2 * s(-2)),
    ("apo_down", dict(beta=2.0), s(2) + s(-4)),
    ("discopop", dict(beta=0.5, tau=1.0), s(-1) * h(1) + s(1) / E),
    ("simpo", dict(beta=2.0, gamma=1.0), h(1)),
    ("simpo", dict(beta=1.0, gamma=0.0, label_smoothing=0.2), 0.8 * h(1) + 0.2 * h(-1)),
    ("alphapo", dict(beta=2.0, gamma=1.0, alpha=0.0), h(1)),
    ("alphapo", dict(beta=1.0, gamma=0.0, alpha=1.0), h(E**2 - E)),
    ("cpo", dict(beta=0.25, nll_coef=2.0), h(1) + 2.0),
    ("orpo", dict(beta=0.5), 1 + 0.5 * h(log_odds(-1) - log_odds(-2))),
    ("rdpo", dict(beta=0.25, alpha=0.75), h(0.5 - 0.75)),
    ("dpop", dict(beta=0.5, penalty=3.0), h(1)),
    ("dpo_nll", dict(beta=0.5, nll_coef=3.0), h(1) + 3),
    ("cpl", dict(alpha=0.5, bias=0.5), h(0.5)),
    ("mmpo", dict(beta=0.5, gamma=1.0), 0.75 * h(1) + 0.25 * h(-1)),
    ("osp", dict(beta=0.5), 0.75 * h(1) + 0.25 * h(-1)),
    (
        "rpo",
        dict(beta=0.5, eta=1.0),
        0.75 * (h(1) - math.log(4 / 3)) + 0.25 * (h(-1) - math.log(4)),
    ),
    ("wpo", dict(beta=0.5), h(1) / 6),
    ("tdpo1", dict(beta=0.5), h(0.5)),
    ("tdpo2", dict(beta=0.5, alpha=0.5), h(0.75)),
    ("tpo", dict(beta=0.25, nll_coef=3.0), h(1) + 6),
    ("tpo", dict(beta=0.25, nll_coef=0.0, label_smoothing=0.2), 0.8 * h(1) + 0.2 * h(-1)),
    ("tpo_l", dict(beta=2.0, gamma=0.5, nll_coef=1.0), h(1.5) + 2),
    ("xpo", dict(beta=0.5, alpha=0.5), 0.75 * h(1) + 0.25 * h(-1) - 2),
    ("inpo", dict(eta=0.25, tau=0.125), 0.25),
    ("egpo", dict(beta=1.0), (2 - math.log(3)) ** 2),
    ("cal_dpo", dict(beta=0.125), h(2) + 18),
    ("beta_dpo", dict(beta=0.25, alpha=1.0), h(1)),
    ("aot", dict(beta=0.5), h(1)),
    ("aot", dict(beta=0.5, label_smoothing=0.1), 0.9 * h(1) + 0.1 * h(-1)),
    ("aot_unpaired", dict(beta=0.5), h(1)),
]
# Losses that a rise of the chosen log-prob can raise: squares and soft targets have a minimum, NCA
# pulls the chosen reward to log 2, robust DPO and EXO turn past a margin, APO-down lowers both, and
# DiscoPOP as published rises around z = 0.
NOT_MONOTONE = {"ipo", "ipo_sum", "sppo_hard", "sppo", "mmpo", "osp", "rpo", "inpo", "egpo"}
NOT_MONOTONE |= {"nca_pair", "xpo", "robust", "exo_pair", "apo_down", "discopop", "cal_dpo"}


def tensors(values: dict[str, float], dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {k: torch.tensor([v], dtype=dtype) for k, v in values.items()}


@pytest.mark.parametrize("name, given, value", CASES)
def test_worked_by_hand(name, given, value):
    objective = preference_loss(**tensors(PAIR | EXTRA), loss_type=name, **given)
    assert objective.unit == "pair"
    assert_close(objective.loss, torch.tensor([value], dtype=torch.float64))


REWARDS = [
    ("sigmoid", dict(beta=0.5), 0.5, -0.5),
    ("ipo", dict(beta=0.5), 0.25, -1 / 6),
    ("fdpo_forward_kl", dict(beta=0.5), -0.5 / E, -0.5 * E),
    ("slic", {}, -2.0, -6.0),
    ("cpo", dict(beta=0.5), -1.0, -3.0),
    ("orpo", dict(beta=0.5), -0.5, -1.0),
    ("inpo", dict(eta=0.25, tau=0.125), 3 / 16, -3 / 16),  # anchors -2.75 and -5.25
    ("beta_dpo", dict(beta=0.25, alpha=1.0), 0.5, -0.5),
]


@pytest.mark.parametrize("name, given, chosen, rejected", REWARDS)
def test_implicit_rewards_by_hand(name, given, chosen, rejected):
    metrics = preference_loss(**tensors(PAIR | EXTRA), loss_type=name, **given).metrics
    wanted = dict(chosen=chosen, rejected=rejected, margins=chosen - rejected, accuracies=1.0)
    found = {name.removeprefix("rewards/"): x.item() for name, x in metrics.items()}
    assert found == pytest.approx(wanted)


def test_every_loss_has_a_case():
    assert {name for name, _, _ in CASES} == set(LOSSES)


def draw(p: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random pairs in float64, of lengths 2 to 8 and log-probs around -2 a token."""
    lengths = {k: torch.randint(2, 9, (p,)).double() for k in LENGTHS}
    logps = {}
    for name in PAIR:
        n = lengths["chosen_len" if "chosen" in name else "rejected_len"]
        logps[name] = -n * (1 + torch.rand(p, dtype=torch.float64) * 2 * scale)
    others = {name: torch.randn(p).double() for name in JUDGED | SCORED}
    others |= dict(preference=torch.rand(p), gold_len=torch.randint(2, 9, (p,)))
    return {k: v.double() for k, v in (logps | lengths | others).items()}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_sign(name):
    """Raising the chosen log-prob, or lowering the rejected one, must not raise the loss."""
    given = draw(6)
    chosen, rejected = (given.pop(k).requires_grad_() for k in ("chosen", "rejected"))

    def loss(chosen, rejected):
        return preference_loss(chosen, rejected, **given, loss_type=name).loss

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    grads = torch.autograd.grad(loss(chosen, rejected).sum(), (chosen, rejected))
    if name not in NOT_MONOTONE:
        assert (grads[0] <= 0).all() and (grads[1] >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_sign_where_policy_and_reference_agree(name):
    """The first step raises the chosen log-prob and lowers the rejected one, but for APO-down's
    chosen, which is meant to fall, and for DiscoPOP, whose slope at 0 is -3/4 + (1 - log 2) / 4 tau
    times beta."""
    given = tensors(PAIR | EXTRA)
    given |= dict(ref_chosen=given["chosen"].clone(), ref_rejected=given["rejected"].clone())
    given["chosen"].requires_grad_()
    given["rejected"].requires_grad_()
    preference_loss(**given, loss_type=name).loss.sum().backward()
    if name == "discopop":
        slope = 0.1 * (-3 / 4 + (1 - math.log(2)) / (4 * 0.05))
        assert_close(given["chosen"].grad, torch.tensor([slope], dtype=torch.float64))
        return
    assert (given["chosen"].grad < 0) == (name != "apo_down")
    assert given["rejected"].grad >= 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [80.0, 2000.0])
def test_extreme_log_ratios_stay_finite(name, size):
    """Log-ratios of either sign, in float32, in all four combinations; long completions have them
    beyond what an exponential holds."""
    ratios = size * torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])
    logps = torch.full((2, 4), -20 - size, requires_grad=True)
    ref = logps.detach() - ratios
    extra = {name: torch.full((4,), 5.0 if name in LENGTHS else 0.75) for name in EXTRA}
    loss = preference_loss(*logps, *ref, loss_type=name, **extra).loss
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_certain_completions_stay_finite(name):
    """log pi = 0, a probability of 1, on one token."""
    logps = torch.zeros(2, 3, requires_grad=True)
    extra = {k: torch.full((3,), 0.5 if k == "preference" else 1.0) for k in EXTRA}
    loss = preference_loss(*logps, *torch.zeros(2, 3), loss_type=name, **extra).loss
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_detached_and_ties_count_half(name):
    same = dict.fromkeys([*PAIR, "prev_chosen", "prev_rejected"], -4.0)
    pair = tensors(EXTRA | dict.fromkeys(LENGTHS, 2.0) | same)
    pair["chosen"].requires_grad_()
    objective = preference_loss(**pair, loss_type=name)
    assert objective.loss.requires_grad
    assert not any(m.requires_grad for m in objective.metrics.values())
    assert objective.metrics["rewards/accuracies"].item() == 0.5
    assert objective.metrics["rewards/margins"].item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_it_says(name):
    """`inputs` is exact: without any of them the loss refuses, with no other it runs."""
    given = tensors(PAIR | EXTRA)
    needed = inputs(LOSSES[name])
    assert preference_loss(**{k: given[k] for k in needed}, loss_type=name).loss.isfinite().all()
    for absent in set(needed) - {"chosen", "rejected"}:
        with pytest.raises(ValueError, match=f"{absent}: wanted a tensor"):
            preference_loss(**{k: given[k] for k in needed if k != absent}, loss_type=name)


def test_gradients_in_the_divergences():
    """TDPO1 has them on both sides, TDPO2 on the rejected one alone; WPO's weight and the margins
    of beta-DPO have none."""
    found = {}
    for name in ("tdpo1", "tdpo2", "wpo", "beta_dpo"):
        given = {k: v.requires_grad_() for k, v in tensors(PAIR | EXTRA).items()}
        preference_loss(**given, loss_type=name).loss.sum().backward()
        found[name] = [k for k in SCORED if given[k].grad is not None and given[k].grad != 0]
    both = ["chosen_kl", "rejected_kl"]
    assert found == {"tdpo1": both, "tdpo2": both[1:], "wpo": [], "beta_dpo": []}


def test_aot_sorts_the_batch():
    """Against the definition: sorted, then paired; in parts, with the whole batch's matches."""
    given = {k: v for k, v in draw(9).items() if k in PAIR}
    given["chosen"].requires_grad_()
    given["rejected"].requires_grad_()
    policy, ref = (given[p + "chosen"] - given[p + "rejected"] for p in ("", "ref_"))
    chosen, rejected = (given[k] - given["ref_" + k] for k in ("chosen", "rejected"))
    sides = [given["chosen"], given["rejected"]]
    for name, a, b in (("aot", policy, ref), ("aot_unpaired", chosen, rejected)):
        wanted = F.softplus(-0.5 * (a.sort().values - b.sort().values)).sum()
        found = preference_loss(**given, loss_type=name, beta=0.5).loss.sum()
        assert_close(found, wanted)
        grads = (torch.autograd.grad(x, sides, retain_graph=True) for x in (found, wanted))
        assert_close(*grads)
    whole = preference_loss(**given, loss_type="aot").loss
    for i, j in ((0, 4), (4, 9)):
        part = {k: v[i:j] for k, v in given.items()}
        matched = matched_by_rank(policy, ref, i, j)
        found = preference_loss(**part, loss_type="aot", matched=matched).loss
        assert_close(found, whole[i:j])


def test_which_losses_use_a_reference():
    free = {name for name, loss in LOSSES.items() if "ref_chosen" not in inputs(loss)}
    assert free == {"slic", "simpo", "alphapo", "cpo", "orpo", "cpl", "tpo", "tpo_l"}


def test_limits_and_identities():
    """alpha -> 0 is DPO and SimPO; -1/u is alpha = 1; equal rewards make DPO's soft target 1/2."""
    given = draw(50)

    def loss(name, **options):
        needed = inputs(LOSSES[name])
        return preference_loss(**{k: given[k] for k in needed}, loss_type=name, **options).loss

    assert_close(loss("fdpo_alpha", alpha=1e-7), loss("sigmoid"), rtol=1e-5, atol=0)
    assert_close(loss("fdpo_alpha", alpha=1.0), loss("fdpo_forward_kl"))
    assert_close(loss("alphapo", alpha=1e-7), loss("simpo"), rtol=1e-5, atol=0)
    assert_close(loss("robust", label_smoothing=0.0), loss("sigmoid"))
    assert_close(loss("tpo", beta=0.1, nll_coef=0.0), loss("cpo", nll_coef=0.0))
    assert_close(loss("tpo_l", beta=2.0, gamma=1.0, nll_coef=0.0), loss("simpo", beta=2.0, gamma=1))
    given["preference"] = torch.ones(50).double()
    assert_close(loss("osp"), loss("sigmoid"))
    assert_close(loss("sppo", beta=0.3), loss("sppo_hard", beta=0.3))
    assert_close(loss("inpo", eta=0.2, tau=0.2), loss("ipo_sum", beta=0.2))
    given |= dict(chosen_kl=given["rejected_kl"])
    assert_close(loss("tdpo1"), loss("sigmoid"))
    given |= dict(margin=torch.full((50,), 0.5).double())
    assert_close(loss("egpo", beta=0.3), loss("ipo_sum", beta=0.3))


def test_hyperparameters_come_from_the_signature():
    assert hyperparameters(LOSSES["simpo"]) == dict(beta=2.0, gamma=1.0, label_smoothing=0.0)


BAD = {
    "loss_type: wanted one of sigmoid": dict(loss_type="dpo"),
    "gamma: wanted a hyperparameter of sigmoid: beta, label_smoothing": dict(gamma=1.0),
    "label_smoothing: wanted a probability; got 1.5": dict(label_smoothing=1.5),
    "beta: wanted a positive number; got 0": dict(beta=0.0),
    "tau: wanted a number from 0 to eta": dict(
        loss_type="inpo", tau=1.0, prev_chosen=torch.zeros(1), prev_rejected=torch.zeros(1)
    ),
    "alpha: wanted a number in": dict(loss_type="fdpo_alpha", alpha=2.0),
    "label_smoothing: wanted 0 to below 1/2": dict(loss_type="robust", label_smoothing=0.5),
    "margin: wanted a tensor": dict(loss_type="mmpo"),
    "ref_chosen: wanted a tensor": dict(ref_chosen=None),
    r"rejected: wanted \(1,\); got \(2,\)": dict(rejected=torch.zeros(2)),
    "chosen_len: wanted a tensor": dict(loss_type="ipo"),
    "preference: wanted probabilities in .0, 1.; got 1.5": dict(
        loss_type="osp", preference=torch.tensor([1.5])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**tensors(PAIR) | BAD[message])
