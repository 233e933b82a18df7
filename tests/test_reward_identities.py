"""Reward losses: what must hold between them, beside other libraries' results, and at the edges."""

import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prefuse.kernels.objective import Mean
from prefuse.kernels.preference import preference_loss
from prefuse.kernels.reward import (
    all_pairs,
    binary,
    both_orders,
    bradley_terry,
    bradley_terry_returns,
    cost,
    goal_contrastive,
    implicit_prm,
    info_nce,
    k_wise,
    lore,
    odin,
    odin_moments,
    ordered_thresholds,
    ordinal,
    prm,
    regression,
    time_smoothness,
    token_nll,
    verdict_pair,
    vote_strength,
    vpl,
)

P, H = 7, 5


def draw(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def grads(loss: torch.Tensor, *learned: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss.sum(), learned, retain_graph=True)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_same(got: torch.Tensor, wanted: torch.Tensor, *learned: torch.Tensor) -> None:
    """Value and gradient."""
    assert_close(got, wanted)
    assert_close(grads(got, *learned), grads(wanted, *learned))


# Bradley-Terry


def test_only_differences_count_unless_centred():
    chosen, rejected = draw(P), draw(P)
    assert_close(bradley_terry(chosen + 3, rejected + 3).loss, bradley_terry(chosen, rejected).loss)
    centred = bradley_terry(chosen, rejected, centering=0.1).loss
    moved = bradley_terry(chosen + 3, rejected + 3, centering=0.1).loss
    assert_close(moved - centred, 0.1 * (12 * (chosen + rejected) + 36))


def test_dpo_is_bradley_terry_of_implicit_rewards():
    w, l, ref_w, ref_l = (draw(P) for _ in range(4))  # noqa: E741
    rewards = 0.3 * (w - ref_w), 0.3 * (l - ref_l)
    dpo = preference_loss(w, l, ref_w, ref_l, beta=0.3, label_smoothing=0.1)
    assert_same(bradley_terry(*rewards, label_smoothing=0.1).loss, dpo.loss, w, l)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_the_gradient_of_a_soft_label_vanishes_at_its_logit(p):
    """As do those of label smoothing 1 - p, of a soft verdict, step, answer, and outcome."""
    z = torch.full((1,), math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    soft, zero, one = torch.full_like(z, p).detach(), torch.zeros_like(z), torch.ones(1).bool()
    losses = [
        bradley_terry(z, zero, None, soft),
        bradley_terry(z, zero, label_smoothing=1 - p),
        verdict_pair(z, zero, soft),
        prm(z, soft, one),
        binary(z, soft),
        implicit_prm(z, zero, bounds(1), soft, beta=1.0),
        bradley_terry_returns(z, bounds(1), zero, bounds(1), soft, random_labels=0.0),
    ]
    for objective in losses:
        assert_close(grads(objective.loss, z)[0], zero, atol=1e-15, rtol=0)
        assert objective.loss > 0


def test_a_flipped_label_is_a_swapped_pair():
    chosen, rejected = draw(P), draw(P)
    flipped = bradley_terry(chosen, rejected, None, torch.zeros(P)).loss
    assert_same(flipped, bradley_terry(rejected, chosen).loss, chosen, rejected)


def test_secrets_two_needs_margin_and_preference_alone():
    """Flip below, smooth in the middle, adaptive margin above: as the docstring composes them."""
    chosen, rejected = draw(3, scale=1), draw(3, scale=1)
    ensemble = torch.tensor([[-1.0, 1.5, 4.0], [1.0, 1.5, 7.0]], requires_grad=True)
    strength, std = vote_strength(ensemble, torch.tensor([[1.0], [2.0]]).expand(2, 3))
    assert not strength.requires_grad and not std.requires_grad
    assert_close(strength, torch.tensor([-1.5, 0.0, 4.0]))
    assert_close(std, torch.tensor([0.5, 0.5, 1.0]))
    assert_close(vote_strength(ensemble[:1], ensemble[:1]).std, torch.zeros(3))
    low, high = -1.0, 1.0
    preference = torch.where(strength < low, 0.0, torch.where(strength < high, 0.9, 1.0))
    margin = strength.where(strength >= high, 0.0)
    z = chosen - rejected
    h = F.softplus
    wanted = torch.stack([h(z[0]), 0.9 * h(-z[1]) + 0.1 * h(z[1]), h(4 - z[2])])
    got = bradley_terry(chosen, rejected, margin, preference).loss
    assert_close(got, wanted, atol=1e-7, rtol=1e-7)  # preference and margin are float32


def test_christianos_tenth_is_inside_the_logarithm():
    """Label smoothing 0.05 is the expected loss of labels a tenth of which a coin has thrown; the
    paper's likelihood bounds the pull of one such label instead."""
    z = torch.linspace(-9, 9, 7, dtype=torch.float64).requires_grad_()
    zero, ones = torch.zeros_like(z), bounds(*[1] * 7)
    relabelled = 0.9 * F.softplus(-z) + 0.1 * (F.softplus(-z) + F.softplus(z)) / 2
    assert_same(bradley_terry(z, zero, label_smoothing=0.05).loss, relabelled, z)
    mixture = bradley_terry_returns(z, ones, zero, ones)
    assert_same(mixture.loss, -torch.log(0.9 * z.sigmoid() + 0.05), z)
    pull = grads(mixture.loss, z)[0]
    assert pull.argmin() not in (0, 6) and pull[0] > -0.01  # smoothing would pull with 0.95
    assert mixture.loss.max() < -math.log(0.05)


def test_returns_sum_over_tokens_and_skip_nothing():
    """A sum, not a mean; one token is a plain pair; an empty sequence returns 0."""
    chosen, rejected = draw(6), draw(3)
    lengths = (4, 1, 1), (1, 2, 0)
    got = bradley_terry_returns(
        chosen, bounds(*lengths[0]), rejected, bounds(*lengths[1]), random_labels=0.0
    )
    sums = (
        torch.stack([part.sum() for part in x.split(n)])
        for x, n in zip((chosen, rejected), lengths, strict=True)
    )
    assert_same(got.loss, bradley_terry(*sums).loss, chosen, rejected)


def test_smoothness_is_within_sequences():
    rewards = draw(9)
    wanted = [part.diff().square().sum() for part in rewards.split([4, 0, 1, 4])]
    got = time_smoothness(rewards, bounds(4, 0, 1, 4))
    assert_same(got.loss, torch.stack(wanted), rewards)
    assert_close(time_smoothness(rewards[:0], bounds(0)).loss, torch.zeros(1).double())


# Cost


def test_the_sign_of_a_cost():
    """The worse answer's cost rises over the other's, and each moves to its own side of 0."""
    worse, better = draw(P), draw(P)
    yes, no = torch.ones(P).bool(), torch.zeros(P).bool()
    ranked = bradley_terry(worse, better).loss
    for s_w, s_l in ((yes, yes), (yes, no), (no, no)):
        signed = binary(worse, s_w).loss + binary(better, s_l).loss
        found = cost(worse, better, s_w, s_l)
        assert_same(found.loss, ranked + signed, worse, better)
    moved = cost(worse + 1, better + 1, yes, no).loss
    assert not torch.allclose(moved, cost(worse, better, yes, no).loss)  # 0 has a meaning


# ODIN


def odin_batch(p: int = P) -> tuple[torch.Tensor, ...]:
    lengths = torch.randint(1, 2000, (2, p)).double()
    return *(draw(p) for _ in range(4)), *lengths, draw(H), draw(H)


def test_odin_is_numpys_correlation():
    """And its gradient is autograd's through the formula written out."""
    batch = odin_batch()
    q, v, n = (torch.cat(batch[i : i + 2]) for i in (0, 2, 4))
    found = odin(*batch, length_coef=0.7, orthogonality_coef=0.3)
    correlations = [np.corrcoef(x.detach(), n)[0, 1] for x in (q, v)]
    assert_close(found.metrics["correlations/quality"][0].item(), correlations[0])
    assert_close(found.metrics["correlations/length"][0].item(), correlations[1])

    def corr(x):
        return torch.corrcoef(torch.stack([x, n]))[0, 1]

    ranked = F.softplus((batch[1] + batch[3]) - (batch[0] + batch[2])).mean()
    cosine = F.cosine_similarity(batch[6], batch[7], dim=0)
    wanted = ranked + 0.7 * (corr(q).abs() - corr(v)) + 0.3 * cosine.abs()
    assert_same(found.loss.mean(), wanted, *batch[:4], *batch[6:])


def test_odin_splits_over_ranks_and_micro_batches():
    """Given the step's moments; without them each part would decorrelate by itself."""
    batch = odin_batch()
    learned = (*batch[:4], *batch[6:])
    whole = grads(odin(*batch).loss, *learned)
    parts = [[x[rows] for x in batch[:6]] for rows in (slice(0, 1), slice(1, 5), slice(5, P))]
    moments = sum(odin_moments(*part) for part in parts).requires_grad_()
    assert_close(moments, odin_moments(*batch[:6]))
    loss = odin(*parts[0], *batch[6:], moments).loss.sum()
    assert torch.autograd.grad(loss, moments, allow_unused=True) == (None,)

    def total(moments):
        return sum(odin(*part, *batch[6:], moments).loss.sum() for part in parts)

    assert_close(grads(total(moments), *learned), whole)
    assert not torch.allclose(grads(total(None), *learned)[0], whole[0])


def test_odin_pulls_the_heads_apart():
    """Descent makes quality forget the length and the other head learn it, whatever their signs."""
    for sign in (1, -1):
        batch = odin_batch(200)
        n = torch.stack(batch[4:6])
        with torch.no_grad():
            for i in (0, 1):
                batch[i].add_(sign * 0.002 * n[i])
        before = odin(*batch)
        step = grads(before.loss, *batch[:4])
        moved = [x - 20 * g for x, g in zip(batch[:4], step, strict=True)]
        after = odin(*moved, *batch[4:])
        quality, length = (f"correlations/{k}" for k in ("quality", "length"))
        assert after.metrics[quality][0].abs() < before.metrics[quality][0].abs()
        assert after.metrics[length][0] > before.metrics[length][0]


def test_odin_at_the_edges():
    """No gradient through lengths; constants and a single pair of equal lengths count as 0."""
    batch = list(odin_batch(1))
    batch[4] = batch[5] = torch.full((1,), 9.0, dtype=torch.float64, requires_grad=True)
    found = odin(*batch, orthogonality_coef=0.0)
    ranked = bradley_terry(batch[0] + batch[2], batch[1] + batch[3]).loss
    assert_same(found.loss, ranked, *batch[:4])
    assert torch.autograd.grad(found.loss.sum(), batch[4], allow_unused=True) == (None,)
    lengths = torch.randint(1, 1000, (2, 7))
    for value in (0.1, 0.3, 1.1):  # sums round them
        constant = torch.full((7,), value, dtype=torch.float64, requires_grad=True)
        loss = odin(*[constant] * 4, *lengths, *batch[6:]).loss
        assert_close(grads(loss, constant)[0], torch.zeros(7, dtype=torch.float64))


def test_odin_in_float32_at_long_lengths():
    """Moments are kept in float64: squares of lengths of 100,000 cancel in float32."""
    exact = odin_batch(64)
    exact = (*exact[:4], *(100_000 + x / 1000 for x in exact[4:6]), *exact[6:])
    single = [x.detach().float().requires_grad_() for x in exact]
    got, wanted = (
        odin(*x, orthogonality_coef=0.0).metrics["correlations/quality"] for x in (single, exact)
    )
    assert_close(got.double(), wanted, atol=1e-2, rtol=0)  # lengths themselves are rounded


# Ratings and rankings


def test_one_threshold_is_binary():
    rewards, threshold = draw(P), draw(1)
    label = torch.arange(P) % 2
    got = ordinal(rewards, label, threshold)
    assert_same(got.loss, binary(rewards - threshold, label).loss, rewards, threshold)


def test_ordinal_probabilities_sum_to_one():
    """Also where the difference of two sigmoids would cancel to 0."""
    thresholds = ordered_thresholds(torch.tensor([-1.0, 0.5, -3.0], dtype=torch.float64))
    assert (thresholds.diff() > 0).all() and thresholds[0] == -1
    rewards = torch.linspace(-4, 4, 9, dtype=torch.float64)
    losses = [ordinal(rewards, torch.full((9,), k), thresholds).loss for k in range(4)]
    assert_close(sum((-x).exp() for x in losses), torch.ones_like(rewards))
    far = ordinal(torch.tensor([80.0]), torch.tensor([1]), thresholds.float()).loss
    inside = (-torch.expm1(thresholds[0] - thresholds[1])).log()
    assert_close(far[0], (80 - thresholds[1] - inside).float())


def test_huber_meets_the_square():
    rewards, target = draw(P), torch.zeros(P, dtype=torch.float64)
    square = regression(rewards, target).loss
    assert_same(square, F.mse_loss(rewards, target, reduction="none"), rewards)
    assert_same(regression(rewards, target, huber=100.0).loss, square, rewards)
    straight = regression(torch.tensor([10.0, 11.0]), torch.zeros(2), huber=1.0).loss
    assert_close(straight, torch.tensor([19.0, 21.0]))


def test_two_ranked_answers_are_a_pair():
    rewards = draw(P, 2)
    quality = torch.tensor([[2.0, 1.0]]).expand(P, 2)
    pair = bradley_terry(rewards[:, 0], rewards[:, 1]).loss
    assert_same(k_wise(rewards, quality).loss, pair, rewards)
    assert_same(all_pairs(rewards, quality).loss, pair, rewards)
    smoothed = bradley_terry(rewards[:, 0], rewards[:, 1], label_smoothing=0.2).loss
    assert_same(all_pairs(rewards, quality, label_smoothing=0.2).loss, smoothed, rewards)


def test_k_wise_is_the_likelihood_of_the_order():
    """By the recursion, on strict orders; probabilities of all orders of three sum to 1."""
    rewards, quality = draw(P, 4), torch.rand(P, 4)
    ranked = rewards.gather(1, quality.argsort(1, descending=True))
    wanted = sum(ranked[:, k:].logsumexp(1) - ranked[:, k] for k in range(4))
    assert_same(k_wise(rewards, quality).loss, wanted, rewards)
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    losses = k_wise(draw(1, 3).expand(6, 3), orders).loss
    assert_close((-losses).exp().sum().item(), 1.0)


@pytest.mark.parametrize("loss", [k_wise, all_pairs])
def test_rankings(loss):
    """Order of columns and a common shift do not matter; the best rises, the worst falls; ties and
    groups of one compare nothing; padding is inert."""
    rewards, quality = draw(P, 4), torch.rand(P, 4)
    whole = loss(rewards, quality).loss
    order = [2, 0, 3, 1]
    assert_same(loss(rewards[:, order], quality[:, order]).loss, whole, rewards)
    assert_close(loss(rewards + 5, quality).loss, whole)
    (grad,) = grads(whole, rewards)
    assert (grad.gather(1, quality.argmax(1, True)) < 0).all()
    assert (grad.gather(1, quality.argmin(1, True)) > 0).all()
    assert_close(grad.sum(1), torch.zeros(P, dtype=torch.float64))
    for nothing in (loss(rewards, torch.ones(P, 4)), loss(rewards[:, :1], quality[:, :1])):
        assert (nothing.loss == 0).all() and (grads(nothing.loss, rewards)[0] == 0).all()
        assert nothing.metrics["rewards/accuracies"].count == 0
    padded = torch.cat([rewards, draw(P, 2) * math.inf], 1)
    mask = torch.arange(6).expand(P, 6) < 4
    got = loss(padded, torch.cat([quality, torch.full((P, 2), 9.0)], 1), mask).loss
    assert_same(got, whole, rewards)


def test_pairs_are_averaged_within_the_prompt():
    """A prompt of nine answers weighs as much as one of two."""
    rewards = torch.tensor([[1.0, 0.0, 0, 0], [1.0, 0.0, 0, 0]])
    quality = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    loss = all_pairs(rewards, quality, mask).loss
    assert_close(loss, torch.full((2,), math.log1p(math.exp(-1))))


# Tokens and words


def test_what_is_masked_is_no_unit():
    """Means are over separators, rated answers, and prompts with something to compare."""
    mask = torch.tensor([True, False, True, False])
    scores = torch.tensor([1.0, 9.0, -1.0, 9.0])
    steps = prm(scores, torch.tensor([1.0, 0.0, 1.0, 0.0]), mask)
    words = token_nll(scores - 10, mask)
    rated = regression(scores, torch.zeros(4), mask)
    assert steps.count == words.count == rated.count == 2
    accuracy = steps.metrics["rewards/accuracies"]
    assert accuracy.total / accuracy.count == 0.5
    assert words.mean() == 10 and words.metrics["logps"].total == -20
    assert rated.mean() == 1 and rated.metrics["rewards/absolute_error"].total == 2
    some = regression(
        torch.ones(3, 2), torch.zeros(3, 2), torch.tensor([[1, 1], [1, 0], [0, 0]]) > 0
    )
    assert some.count == 2 and some.mean() == 1
    ranked = all_pairs(torch.tensor([[2.0, 1.0], [1.0, 0.0]]), torch.tensor([[2, 1], [1, 1]]))
    accuracy = ranked.metrics["rewards/accuracies"]
    assert accuracy.total == accuracy.count == 1


def test_two_classes_are_one_score():
    """Of verdict tokens, too: the difference of the logits of "+" and "-" is the score."""
    logits, mask = draw(P, 2), torch.arange(P) % 3 > 0
    labels = torch.arange(P) % 2
    wanted = F.cross_entropy(logits, labels, reduction="none") * mask
    assert_same(prm(logits, labels, mask).loss, wanted, logits)
    assert_same(prm(logits[:, 1] - logits[:, 0], labels, mask).loss, wanted, logits)
    soft = torch.rand(P, dtype=torch.float64)
    both = prm(logits, torch.stack([1 - soft, soft], 1), mask)
    assert_same(prm(logits[:, 1] - logits[:, 0], soft, mask).loss, both.loss, logits)


def test_implicit_prm_is_binary_of_the_summed_log_ratio():
    logp, ref = draw(6), draw(6).detach()
    correct = torch.tensor([True, False, True])
    rewards = torch.stack([x.sum() for x in (0.05 * (logp - ref)).split([2, 4, 0])])
    got = implicit_prm(logp, ref, bounds(2, 4, 0), correct)
    assert_same(got.loss, binary(rewards, correct).loss, logp)
    assert_close(got.loss[2].item(), math.log(2))  # an empty answer


def test_verdicts_and_critiques():
    """The verdict's NLL among all tokens is that among the two plus that of saying one of them."""
    logits = draw(P, 9)
    logp = logits.log_softmax(1)
    says_a = torch.arange(P) % 2 == 0
    said = logp[:, 0].where(says_a, logp[:, 1])
    either = logp[:, :2].logsumexp(1)
    whole = token_nll(said, torch.ones(P).bool()).loss
    assert_same(whole, verdict_pair(logp[:, 0], logp[:, 1], says_a).loss - either, logits)


def test_both_orders_cancel_a_bias_for_a_place():
    """A judge that adds 2 to whatever comes first is undecided between equals."""
    zero = torch.zeros(3)
    assert_close(both_orders(zero + 2, zero, zero, zero + 2), torch.full((3,), 0.5))
    p = both_orders(zero + 3, zero, zero - 1, zero)
    assert_close(p, (torch.sigmoid(zero + 3) + torch.sigmoid(zero - 1)) / 2)


def test_metrics_by_hand():
    """A tie is half right, what is absent or not rated counts nowhere."""
    rewards = torch.tensor([[3.0, 1.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    quality = torch.tensor([[2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    present = torch.tensor([[True, True, True, False], [True, True, True, True]])
    for loss in (k_wise, all_pairs):
        found = loss(rewards, quality, present).metrics["rewards/accuracies"]
        assert_close(found, Mean(torch.tensor(2.5 / 3), torch.tensor(1)))
    off = regression(
        torch.tensor([[1.0, 2.0], [5.0, 0.0], [7.0, 7.0]]),
        torch.tensor([[0.0, 4.0], [5.5, 9.0], [0.0, 0.0]]),
        torch.tensor([[True, True], [True, False], [False, False]]),
    ).metrics["rewards/absolute_error"]
    assert_close(off, Mean(torch.tensor(1.5 + 0.5), torch.tensor(2)))
    costs = cost(
        *(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])),
        *(torch.tensor([True, False]), torch.tensor([False, True])),
    ).metrics
    assert costs["costs/accuracies"].tolist() == [1, 0]
    assert costs["costs/sign_accuracies"].tolist() == [0.5, 1]


# Users and embeddings


def test_vpl_kl_is_torchs():
    mean, log_var, chosen, rejected = draw(P, H), draw(P, H), draw(P), draw(P)
    prior = torch.distributions.Normal(0.0, 1.0)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1)
    found = vpl(chosen, rejected, mean, log_var, kl_coef=0.3)
    wanted = bradley_terry(chosen, rejected).loss + 0.3 * kl
    assert_same(found.loss, wanted, chosen, rejected, mean, log_var)
    assert_close(found.metrics["kl"], kl.detach())


def test_lore_of_one_basis_is_bradley_terry():
    """Whatever the user; and a common shift of a user's logits changes nothing."""
    chosen, rejected, users = draw(P, 1), draw(P, 1), draw(P, 1)
    plain = bradley_terry(chosen[:, 0] / 100, rejected[:, 0] / 100).loss
    assert_same(lore(users, chosen, rejected).loss, plain, chosen, rejected)
    many = draw(P, 3), draw(P, 3), draw(P, 3)
    assert_close(lore(many[0] + 4, *many[1:]).loss, lore(*many).loss)


def test_contrastive_losses_know_direction_alone():
    state, goal, other = draw(P, H), draw(P, H), draw(P, H)
    found = goal_contrastive(state, goal, other).loss
    assert_close(goal_contrastive(3 * state, goal / 7, other).loss, found)
    near, far = (F.cosine_similarity(state, x) for x in (goal, other))
    assert_same(found, F.softplus(-near) + F.softplus(far), state, goal, other)
    nce = info_nce(state, torch.cat([goal, other]))
    cosines = F.cosine_similarity(state[:, None], torch.cat([goal, other]), dim=2) / 0.05
    wanted = F.cross_entropy(cosines, torch.arange(P), reduction="none")
    assert_same(nce.loss, wanted, state, goal, other)
    step = [x - 0.1 * g for x, g in zip((state, goal), grads(found, state, goal), strict=True)]
    assert goal_contrastive(*step, other).loss.sum() < found.sum()


# TRL


@pytest.mark.parametrize("centering", [None, 0.05])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_is_trls(with_margin, centering):
    """TRL 1.16's loss sits in its trainer: it is called here on a stand-in for it."""
    trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}")
    assert "center_rewards_coefficient" in inspect.getsource(trl.RewardTrainer.compute_loss)
    rewards, margin = draw(2 * P, 1), torch.rand(P, dtype=torch.float64) * 3
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = dict(attention_mask=torch.ones(2 * P, 3)) | (dict(margin=margin) if with_margin else {})
    theirs = trl.RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=rewards), batch
    )
    chosen, rejected = rewards.squeeze(1).chunk(2)
    mine = bradley_terry(
        chosen, rejected, margin if with_margin else None, centering=centering or 0.0
    )
    assert_same(mine.loss.mean(), theirs, rewards)
    metrics = trainer._metrics["train"]
    assert_close(mine.metrics["rewards/accuracies"].mean().item(), metrics["accuracy"][0])
    assert_close(mine.metrics["rewards/margins"].mean().item(), metrics["margin"][0])
