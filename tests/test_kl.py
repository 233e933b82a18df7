"""KL estimators: what each has as its mean and as its gradient, by enumerating every sample."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.kl import ESTIMATORS, adaptive_coefficient, kl_estimate
from prefuse.kernels.objective import Mean
from prefuse.kernels.policy import policy_loss

V = 5


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of pi, differentiable, and of pi_ref, over V tokens."""
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(V, dtype=torch.float64)


def forward_and_reverse(logits, ref):
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    return (ref.exp() * (ref - logp)).sum(), (logp.exp() * (logp - ref)).sum()


def expected_gradient(per_sample, logits) -> torch.Tensor:
    """The mean over samples of pi of the gradient of a loss per sample: pi itself is detached."""
    weights = logits.detach().softmax(0)
    return torch.autograd.grad((weights * per_sample).sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["k1", "k3", "ratio_k3"])
def test_the_mean_is_the_kl(kind):
    logits, ref = policies()
    logp = logits.log_softmax(0)
    mean = (logp.exp() * kl_estimate(logp, ref.log_softmax(0), kind)).sum()
    assert_close(mean, forward_and_reverse(logits, ref)[1])


def test_the_gradients_as_losses():
    """k1: none. k2 and R k3: that of KL(pi || pi_ref). k3: that of KL(pi_ref || pi)."""
    logits, ref = policies()
    forward, reverse = forward_and_reverse(logits, ref)
    (forward,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(reverse, logits)
    assert not torch.allclose(forward, reverse, atol=0.01)
    logp = logits.log_softmax(0)
    found = {
        kind: expected_gradient(kl_estimate(logp, ref.log_softmax(0), kind), logits)
        for kind in ESTIMATORS
    }
    wanted = dict(k1=torch.zeros(V).double(), k2=reverse, k3=forward, ratio_k3=reverse)
    assert_close(found, wanted)


def test_k1_as_a_reward_and_sg_ratio_k3():
    """-sg(k1) as the reward of log pi: KL(pi || pi_ref). sg(R) k3: the other direction still."""
    logits, ref = policies()
    forward, reverse = forward_and_reverse(logits, ref)
    logp, ref_logp = logits.log_softmax(0), ref.log_softmax(0)
    reward = expected_gradient((logp - ref_logp).detach() * logp, logits)
    assert_close(reward, torch.autograd.grad(reverse, logits, retain_graph=True)[0])
    off = (logp - torch.randn(V).double().log_softmax(0)).exp().detach()
    k3 = kl_estimate(logp, ref_logp, "k3")
    # samples of pi_old reweighed by a detached ratio are samples of pi
    old = logp.detach() - off.log()
    found = torch.autograd.grad((old.exp() * off * k3).sum(), logits)[0]
    assert_close(found, torch.autograd.grad(forward, logits)[0])


def test_a_sequence_needs_the_reward_to_go():
    """Over two tokens, sum_t log pi_t sum_{s >= t} k1_s has the gradient of the sequence KL;
    sum_t sg(k1_t) log pi_t, each token paid for itself alone, has not."""
    first = torch.randn(V, dtype=torch.float64)
    second = torch.randn(V, V, dtype=torch.float64)
    refs = torch.randn(V).double().log_softmax(0), torch.randn(V, V).double().log_softmax(1)
    logits = torch.cat([first[None], second]).requires_grad_()
    logp = logits.log_softmax(1)
    total = own = to_go = torch.zeros(()).double()
    for i, j in itertools.product(range(V), range(V)):
        tokens = torch.stack([logp[0, i], logp[1 + i, j]])
        k = tokens - torch.stack([refs[0][i], refs[1][i, j]])
        weight = tokens.sum().exp()
        total = total + weight * k.sum()
        held = k.detach()
        own = own + weight.detach() * (held * tokens).sum()
        to_go = to_go + weight.detach() * (held.flip(0).cumsum(0).flip(0) * tokens).sum()
    wanted, own, to_go = (
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (total, own, to_go)
    )
    assert_close(to_go, wanted)
    assert (own - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("kind, forward", [("k2", False), ("k3", True), ("ratio_k3", False)])
def test_the_penalty_of_a_policy_loss(kind, forward):
    """All samples of pi with their probabilities as weights of an otherwise empty loss."""
    logits, ref = policies()
    kls = forward_and_reverse(logits, ref)
    logp = logits.log_softmax(0)
    found = policy_loss(
        logp, advantages=torch.zeros(V).double(), ref_logp=ref.log_softmax(0), beta=1.0, kl=kind
    )
    (grad,) = torch.autograd.grad(
        (found.loss * logp.exp().detach()).sum(), logits, retain_graph=True
    )
    assert_close(grad, torch.autograd.grad(kls[0 if forward else 1], logits)[0])
    assert isinstance(found.metrics["kl"], Mean)


def test_adaptive_controller():
    """Twice the target: the error counts as 0.2; half of it: as -0.2; near it: as it is."""
    settings = dict(target=6.0, horizon=100.0, steps=10.0)
    for kl, factor in ((12.0, 1.02), (3.0, 0.98), (6.6, 1.01)):
        assert adaptive_coefficient(0.5, kl, **settings) == pytest.approx(0.5 * factor)
        found = adaptive_coefficient(torch.tensor(0.5), torch.tensor(kl), **settings)
        assert_close(found, torch.tensor(0.5 * factor))
    with pytest.raises(ValueError, match="target: wanted a positive"):
        adaptive_coefficient(0.5, 1.0, target=0.0, horizon=1.0, steps=1.0)


def test_bad_input():
    with pytest.raises(ValueError, match="kind: wanted one of k1, k2, k3, ratio_k3; got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match=r"ref_logp: wanted \(2,\); got \(3,\)"):
        kl_estimate(torch.zeros(2), torch.zeros(3))
