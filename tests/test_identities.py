"""What the papers prove about their losses, by enumerating every sample."""

import itertools

import torch
from torch.testing import assert_close

from prefuse.kernels.policy import policy_loss
from prefuse.kernels.preference import preference_loss

V, BETA = 4, 0.3


def test_online_ipo_is_self_play_policy_gradient():
    """EGPO, arXiv:2503.08942: over y, y', y'' of pi, the gradient of the loss is -4 / beta times
    that of E P(y > y'') - beta KL(pi || pi_ref), y'' held."""
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(V).double().log_softmax(0)
    raw = torch.rand(V, V).double()
    prefers = raw / (raw + raw.T)  # P(i > j) + P(j > i) = 1
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    y, z, x = (torch.tensor(i) for i in zip(*itertools.product(range(V), repeat=3), strict=True))
    margin = prefers[y, x] - prefers[z, x]
    sample = dict(ref_chosen=ref[y], ref_rejected=ref[z], margin=margin)
    loss = preference_loss(logp[y], logp[z], **sample, loss_type="egpo", beta=BETA).loss
    found = torch.autograd.grad((p[y] * p[z] * p[x] * loss).sum(), logits, retain_graph=True)[0]
    value = (logp.exp() * (prefers @ p)).sum() - BETA * (logp.exp() * (logp - ref)).sum()
    assert_close(found, -4 / BETA * torch.autograd.grad(value, logits)[0])


def test_nft_on_policy_has_the_slopes_of_grpo():
    """arXiv:2505.18116: with sqrt((1 - q) / q) those of GRPO's advantages, with 1 - q those of Dr.
    GRPO's; a group that is all right or all wrong has none."""
    rewards = torch.tensor([[1.0, 0, 0, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    q = rewards.mean(1, keepdim=True).expand_as(rewards).double()
    centred = rewards.double() - q
    std = (q * (1 - q)).sqrt()
    grpo = torch.where(std > 0, centred / torch.where(std > 0, std, 1), 0)
    logp = -torch.rand(rewards.numel(), dtype=torch.float64)
    for scale, advantages in (("std", grpo), ("mean", centred)):
        x = logp.clone().requires_grad_()
        given = dict(reward=rewards.flatten().double(), pass_rate=q.flatten())
        cu_seqlens = torch.arange(len(x) + 1, dtype=torch.int32)
        options = dict(loss_type="nft", scale=scale, max_length=1.0, cu_seqlens=cu_seqlens)
        loss = policy_loss(x, **given, **options).loss
        assert (loss[10:] == 0).all()
        loss.sum().backward()
        assert_close(x.grad, -advantages.flatten())


def test_reinforce_with_a_baseline_is_the_policy_gradient():
    """A baseline moves no gradient; importance weights give it from another policy's samples."""
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(V).double()
    logp = logits.log_softmax(0)
    p, other = logp.exp().detach(), torch.randn(V).double().log_softmax(0)
    (wanted,) = torch.autograd.grad((logp.exp() * rewards).sum(), logits, retain_graph=True)
    for baseline in (0.0, 1.7):
        loss = policy_loss(logp, advantages=rewards - baseline, loss_type="reinforce").loss
        found = torch.autograd.grad((p * loss).sum(), logits, retain_graph=True)[0]
        assert_close(found, -wanted)
    for name in ("importance", "decoupled_ppo"):
        extra = {} if name == "importance" else dict(rollout_logp=other)
        old = other if name == "importance" else logp.detach()
        loss = policy_loss(logp, old, rewards, loss_type=name, **extra).loss
        found = torch.autograd.grad((other.exp() * loss).sum(), logits, retain_graph=True)[0]
        assert_close(found, -wanted)


def test_a_group_shares_what_gspo_gives_every_token():
    """GSPO and GSPO-token have the same gradients where a sequence has one advantage."""
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    old = -torch.rand(9, dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = []
    for name in ("gspo", "gspo_token"):
        logp = (old + 0.001 * torch.arange(9)).requires_grad_()
        wide = dict(epsilon=0.2, epsilon_high=0.2, cu_seqlens=cu_seqlens)
        policy_loss(logp, old, advantages, loss_type=name, **wide).loss.sum().backward()
        found.append(logp.grad)
    assert_close(*found)
