"""Advantages of completions: hand-worked values, identities, TRL's own code, whitening of parts."""

import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels import group_advantage as ga
from prefuse.kernels.advantage import discounted_returns
from prefuse.kernels.advantage_parts import shaped_rewards
from prefuse.kernels.whitening import mean_and_variance, moving_mean, whiten, whitening_statistics

NAN = float("nan")


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# Groups of three and two, and their means 2 and 3; deviations -1, 1, 0, -2, 2; std 1 and sqrt(8).
REWARDS, GROUPS = exact([1.0, 3.0, 2.0, 1.0, 5.0]), bounds([3, 2])
WINS = exact([[9, 1.0, 0.5], [0.0, 9, 1.0], [0.5, 0.0, 9], [9, 0.25, 7], [0.75, 9, 7]])
# The mean of REWARDS is 2.4, their unbiased variance 2.8; of the deviations: 0 and 10 / 4.
HALF_PASS = exact([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])

BY_HAND = {
    "rloo": (lambda: ga.rloo(REWARDS, GROUPS), [-1.5, 1.5, 0, -4, 4]),
    "grpo": (
        lambda: ga.grpo(REWARDS, GROUPS, epsilon=0.0),
        [-1, 1, 0, -1 / math.sqrt(2), 1 / math.sqrt(2)],
    ),
    "grpo batch": (
        lambda: ga.grpo(REWARDS, GROUPS, scale="batch", epsilon=0.5),
        [x / (math.sqrt(2.8) + 0.5) for x in (-1, 1, 0, -2, 2)],
    ),
    "dr_grpo": (lambda: ga.dr_grpo(REWARDS, GROUPS), [-1, 1, 0, -2, 2]),
    "reinforce": (lambda: ga.reinforce(REWARDS), [-1.4, 0.6, -0.4, -1.4, 2.6]),
    "reinforce unscored": (lambda: ga.reinforce(exact([1.0, NAN, 3.0])), [-1, 0, 1]),
    "reinforce raw": (lambda: ga.reinforce(REWARDS, 0.0), [1, 3, 2, 1, 5]),
    "remax": (lambda: ga.remax(REWARDS, exact([2.0, 4.0]), GROUPS), [-1, 1, 0, -3, 1]),
    "remax of no greedy reward": (
        lambda: ga.remax(REWARDS, exact([2.0, NAN]), GROUPS),
        [-1, 1, 0, 0, 0],
    ),
    "remax each": (lambda: ga.remax(REWARDS, exact([1, 1, 1, 0, 0])), [0, 2, 1, 1, 5]),
    # baselines (1 + 3 + 8) / 6 and (3 + 5) / 4
    "opo": (lambda: ga.opo(REWARDS, exact([1, 1, 4, 3, 1]), GROUPS), [-1, 1, 0, -1, 3]),
    "gpg": (
        lambda: ga.gpg(exact([1.0, 0, 1, 1]), bounds([2, 2]), f_norm=2.0),
        [1 / 3, -1 / 3, 0, 0],
    ),
    "gpg informative": (
        lambda: ga.gpg(exact([1.0, 0, 1, 1]), bounds([2, 2]), informative=True),
        [1, -1, 0, 0],
    ),
    "grpo_passk": (lambda: ga.passk(REWARDS, GROUPS), [0, 1, 0, 0, 4]),
    "grpo_passk scaled": (
        lambda: ga.passk(REWARDS, GROUPS, scale="group", epsilon=0.0),
        [0, 1, 0, 0, math.sqrt(2)],
    ),
    # n = 3, c = 1, k = 2: rho = 2/3, sigma = sqrt(2)/3; a correct one passes, a wrong one half the
    # time. n = 3, c = 2: all pairs pass.
    "pass_at_k": (
        lambda: ga.pass_at_k(HALF_PASS, bounds([3, 3]), k=2),
        [1 / math.sqrt(2), -1 / 8**0.5, -1 / 8**0.5, 0, 0, 0],
    ),
    "spo": (lambda: ga.spo(WINS, GROUPS), [0.25, 0, -0.25, -0.25, 0.25]),
    # Columns normalised: -1, 1, 0, -s, s and 1, -1, 0, 0, 0 (s = 1 / sqrt 2); 2 a + b has mean 0
    # and sum of squares 1 + 1 + 2 + 2 over 4.
    "gdpo": (
        lambda: ga.gdpo(
            torch.stack([REWARDS, exact([3.0, 1, 2, 7, 7])], 1),
            exact([2.0, 1]),
            GROUPS,
            epsilon=0.0,
        ),
        [x / math.sqrt(1.5) for x in (-1, 1, 0, -math.sqrt(2), math.sqrt(2))],
    ),
    # returns 3, 2, 0, 4: mean 3 and variance 1 over the three actions
    "reinforce_plus_plus": (
        lambda: ga.reinforce_plus_plus(
            exact([1.0, 2, 0, 4]), bounds([3, 1]), mask=torch.tensor([1, 1, 0, 1]).bool()
        ),
        [0, -1, 0, 1],
    ),
    "reinforce_plus_plus_baseline": (
        lambda: ga.reinforce_plus_plus_baseline(REWARDS, GROUPS),
        [x / math.sqrt(2.5) for x in (-1, 1, 0, -2, 2)],
    ),
    # By tokens: -1, 1, 1, 0, -2, 2; their mean 1/6, squared deviations 10 + 1 - 1/6 over 5.
    "reinforce_plus_plus_baseline tokens": (
        lambda: ga.reinforce_plus_plus_baseline(REWARDS, GROUPS, exact([1.0, 2, 1, 1, 1])),
        [(x - 1 / 6) / math.sqrt((11 - 1 / 6) / 5) for x in (-1, 1, 0, -2, 2)],
    ),
    # Process: sequence means 2, 1; all token rewards less 1.5, doubled: -1, 3; -1. Outcomes +1, -1.
    # To go: 2 + 1, 3 + 1, -1 - 1; mean 5/3, variance ((16 + 49 + 121) / 9) / 2.
    "prime": (
        lambda: ga.prime(exact([1.0, 3, 1]), exact([1.0, 0]), bounds([2, 1]), bounds([2])),
        [(x - 5 / 3) / math.sqrt(186 / 18) for x in (3, 4, -2)],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    call, wanted = BY_HAND[name]
    got = call()
    assert got.dtype == torch.float64
    assert_close(got, exact(wanted), rtol=1e-7, atol=1e-7)


def test_every_estimator_has_a_hand_worked_value_and_a_title():
    elsewhere = {"gae", "shaped_gae", "vapo_gae", "vtrace", "reward_to_go"}  # test_advantage.py
    assert {name.split()[0] for name in BY_HAND} | elsewhere == set(ga.ESTIMATORS)
    assert len(ga.ESTIMATORS) >= 15
    for name, estimator in ga.ESTIMATORS.items():
        title = (estimator.__doc__ or "").split("\n")[0]
        assert ("arXiv:" in title or name == "reinforce") and ": " in title, name
        assert title.endswith((".", ";")) or "[T]" in title, title


def random_groups(sizes=(4, 2, 7, 0, 3)):
    return torch.randn(sum(sizes), dtype=torch.float64), bounds(sizes)


def test_rloo_leaves_one_out():
    rewards, cu_groups = random_groups()
    wanted = torch.zeros_like(rewards)
    for begin, end in zip(cu_groups, cu_groups[1:], strict=False):
        for i in range(begin, end):
            others = [float(rewards[j]) for j in range(begin, end) if j != i]
            wanted[i] = rewards[i] - sum(others) / len(others)
    assert_close(ga.rloo(rewards, cu_groups), wanted)


def test_prime_by_loops():
    """Three and two completions, with coefficients: a token's reward less the mean of the group's
    means, scaled, to go; beside the outcome less that of the others."""
    lengths, sizes = [3, 1, 2, 4, 2], [3, 2]
    outcomes = torch.randn(5, dtype=torch.float64)
    rewards = list(torch.randn(12, dtype=torch.float64).split(lengths))
    wanted, first = [], 0
    for k in sizes:
        group, scores = rewards[first : first + k], outcomes[first : first + k]
        baseline = sum(r.mean() for r in group) / k
        for r, score in zip(group, scores, strict=True):
            tokens = 0.5 * k / (k - 1) * (r - baseline)
            outcome = 3 * (score - (scores.sum() - score) / (k - 1))
            wanted += [tokens[t:].sum() + outcome for t in range(len(r))]
        first += k
    wanted = torch.stack(wanted)
    got = ga.prime(
        *(torch.cat(rewards), outcomes, bounds(lengths), bounds(sizes)),
        process_coef=0.5,
        outcome_coef=3.0,
    )
    assert_close(got, (wanted - wanted.mean()) / wanted.std(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("correct", [0, 1, 3, 5, 6])
def test_pass_at_k_by_enumeration(k, correct):
    """The mean over all groups of k with i in them, normalised by all groups of k."""
    rewards = exact([1.0] * correct + [0.0] * (6 - correct))
    groups = [(set(chosen), max(rewards[list(chosen)])) for chosen in combinations(range(6), k)]
    passes = torch.stack([best for _, best in groups])
    std = passes.std(correction=0)
    wanted = torch.zeros(6, dtype=torch.float64)
    if std > 0:
        for i in range(6):
            mine = torch.stack([best for chosen, best in groups if i in chosen])
            wanted[i] = (mine.mean() - passes.mean()) / std
    got = ga.pass_at_k(rewards, bounds([6]), k=k)
    assert_close(got, wanted)
    assert abs(got.sum()) < 1e-12


def test_win_rates_of_a_symmetric_game_cancel():
    strength = torch.randn(5, dtype=torch.float64)
    wins = (strength[:, None] - strength).sigmoid()
    advantages = ga.spo(wins, bounds([5]))
    assert abs(advantages.sum()) < 1e-12 and advantages.argmax() == strength.argmax()


GROUPED = {
    "rloo": ga.rloo,
    "grpo": ga.grpo,
    "grpo none": ga.dr_grpo,
    "opo": lambda r, cu: ga.opo(r, torch.arange(1.0, len(r) + 1), cu),
    "gpg": ga.gpg,
    "grpo_passk": ga.passk,
}


@pytest.mark.parametrize("name", [n for n in GROUPED if n != "gpg"])
def test_other_groups_change_nothing(name):
    rewards, cu_groups = random_groups((3, 5))
    alone = GROUPED[name](rewards[:3], cu_groups[:2])
    assert_close(GROUPED[name](rewards, cu_groups)[:3], alone)
    assert torch.equal(GROUPED[name](rewards, bounds([3, 0, 5])), GROUPED[name](rewards, cu_groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_say_nothing(name, dtype):
    """Exactly 0, though sums of 0.1 round; beside a group that does say something."""
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0], dtype=dtype, requires_grad=True)
    got = GROUPED[name](rewards, bounds([7, 2]))
    assert not got[:7].any() and got[7:].any()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad


@pytest.mark.parametrize("big", [1e30, 1e-30])
@pytest.mark.parametrize("name", GROUPED)
def test_extreme_rewards_are_finite(name, big):
    got = GROUPED[name](torch.tensor([big, -big, 0.0, big]), bounds([2, 2]))
    assert got.isfinite().all()


def test_groups_of_one_beside_others_get_nothing():
    rewards, cu_groups = exact([7.0, 1, 3]), bounds([1, 2])
    for name in ("grpo", "grpo none", "opo", "gpg"):
        got = GROUPED[name](rewards, cu_groups)
        assert got[0] == 0 and got[2] > 0, name


TRL = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")


TRL_ROUNDING = 1e-7  # its std has n / (n - 1) in float32, whatever the rewards are


def between(path, first, last):
    """The lines of TRL's method from one line to another, as a program."""
    lines = Path(path).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(begin, len(lines)) if last in lines[i])
    chosen = lines[begin : end + 1]
    indent = len(chosen[0]) - len(chosen[0].lstrip())
    return "\n".join(line[indent:] for line in chosen)


def trl_advantages(module, rewards, generations, **options):
    """TRL's own lines on rewards [S, F], with a stand-in for its trainer."""
    scope = dict(vars(module))
    trainer = SimpleNamespace(
        reward_weights=torch.ones(rewards.shape[1], dtype=torch.float64),
        reward_funcs=[None] * rewards.shape[1],
        **options,
    )
    scope |= dict(self=trainer, rewards_per_func=rewards, num_generations=generations)
    scope |= dict(device="cpu", mode="train")
    first = "unscorable_mask = torch.isnan(rewards_per_func)"
    exec(between(module.__file__, first, "advantages = torch.nan_to_num(advantages"), scope)
    return scope["advantages"]


def trl_rewards(columns=1):
    """Groups of four: one plain, one with equal rewards, one with unscorable completions."""
    rewards = torch.randn(16, columns, dtype=torch.float64)
    rewards[4:8] = 0.25
    rewards[9] = NAN
    rewards[12:15] = NAN
    if columns > 1:
        rewards[2, 0] = NAN
    return rewards


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_trl(scale):
    rewards = trl_rewards()
    options = dict(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale)
    wanted = trl_advantages(TRL, rewards, 4, **options)
    got = ga.grpo(rewards[:, 0], bounds([4] * 4), scale=scale)
    assert_close(got, wanted, rtol=TRL_ROUNDING, atol=TRL_ROUNDING)


def test_gdpo_is_trl():
    rewards = trl_rewards(3)
    options = dict(multi_objective_aggregation="normalize_then_sum", scale_rewards="group")
    wanted = trl_advantages(TRL, rewards, 4, **options)
    got = ga.gdpo(rewards, torch.ones(3), bounds([4] * 4))
    assert_close(got, wanted, rtol=TRL_ROUNDING, atol=TRL_ROUNDING)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_trl(beta):
    module = pytest.importorskip("trl.trainer.rloo_trainer")
    rewards, pair = trl_rewards(), [torch.randn(16, 5, dtype=torch.float64) for _ in range(2)]
    mask = torch.rand(16, 5) > 0.3
    module.old_per_token_logps, module.ref_per_token_logps = pair
    module.completion_mask, gather = mask, module.gather
    module.gather = lambda x: x
    try:
        options = dict(reward_clip_range=None, beta=beta, normalize_advantages=False)
        wanted = trl_advantages(module, rewards, 4, **options)
    finally:
        module.gather = gather
        del module.old_per_token_logps, module.ref_per_token_logps, module.completion_mask
    flat = [x.flatten() for x in pair]
    mine = ga.penalized_rewards(
        rewards[:, 0], *flat, bounds([5] * 16), mask.flatten(), kl_coef=beta
    )
    assert_close(ga.rloo(mine, bounds([4] * 4)), wanted, rtol=1e-12, atol=1e-12)


def test_kl_in_the_reward():
    logp, ref_logp = exact([-1.0, -2, -3]), exact([-2.0, -2, -1])
    mask = torch.tensor([True, True, False])
    got = ga.penalized_rewards(exact([5.0, 7]), logp, ref_logp, bounds([2, 1]), kl_coef=0.5)
    assert got.tolist() == [4.5, 8.0]
    tokens = shaped_rewards(exact([0.0, 5, 7]), logp, ref_logp, mask, kl_coef=0.5)
    assert tokens.tolist() == [-0.5, 5.0, 7.0]
    quadratic = shaped_rewards(exact([0.0, 0, 0]), logp, ref_logp, kl_coef=1.0, kind="k2")
    assert quadratic.tolist() == [-0.5, 0.0, -2.0]
    # paid to go, tokens get what the sequence pays in all
    togo = discounted_returns(tokens, bounds([3]), impl="reference")
    assert togo[0] == 12 - 0.5


def test_whitening_by_hand():
    x = exact([1.0, 3.0, NAN, 5.0])
    mask = torch.tensor([True, True, False, True])
    assert whitening_statistics(x, mask).tolist() == [3.0, 9.0, 35.0]
    assert_close(whiten(x, mask=mask, epsilon=0.0), exact([-1.0, 0, 0, 1]))
    assert_close(whiten(x, mask=mask, epsilon=0.0, shift_mean=False), exact([2.0, 3, 0, 4]))
    biased = whiten(x, mask=mask, epsilon=0.0, ddof=0)
    assert_close(biased, exact([-math.sqrt(1.5), 0, 0, math.sqrt(1.5)]))
    weighted = whitening_statistics(exact([1.0, 3.0]), torch.tensor([2, 0]))
    assert weighted.tolist() == [2.0, 2.0, 2.0]


def test_whitening_parts_is_whitening_the_whole():
    """Of micro-batches and ranks of unequal size: statistics add up."""
    x, mask = torch.randn(100, dtype=torch.float64) * 3 + 5, torch.rand(100) > 0.3
    cuts = [0, 7, 7, 60, 100]
    parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    summed = torch.stack([whitening_statistics(x[part], mask[part]) for part in parts]).sum(0)
    whole = whiten(x, mask=mask)
    mean, std = x[mask].mean(), x[mask].std()
    assert_close(whole[mask], (x[mask] - mean) / (std**2 + 1e-8).sqrt())
    for part in parts:
        assert_close(whiten(x[part], summed, mask[part]), whole[part])
        reduced = whiten(x[part], mask=mask[part], reduce=lambda own: summed)
        assert torch.equal(reduced, whiten(x[part], summed, mask[part]))


REDUCED = {
    "reinforce": lambda r, cu, reduce: ga.reinforce(r, reduce=reduce),
    "grpo batch": lambda r, cu, reduce: ga.grpo(r, cu, scale="batch", reduce=reduce),
    "gpg": lambda r, cu, reduce: ga.gpg((r - 0.5).relu(), cu, reduce=reduce),
    "reinforce_plus_plus": lambda r, cu, reduce: ga.reinforce_plus_plus(r, cu, reduce=reduce),
    "reinforce_plus_plus_baseline": lambda r, cu, reduce: ga.reinforce_plus_plus_baseline(
        r, cu, reduce=reduce
    ),
    "gdpo": lambda r, cu, reduce: ga.gdpo(
        torch.stack([r, r**2], 1), torch.ones(2), cu, reduce=reduce
    ),
    "prime": lambda r, cu, reduce: ga.prime(
        r, r, torch.arange(len(r) + 1, dtype=torch.int32), cu, reduce=reduce
    ),
}


@pytest.mark.parametrize("name", REDUCED)
def test_ranks_together_are_one_batch(name):
    rewards, sizes = torch.randn(10, dtype=torch.float64), [3, 2, 5]
    whole = REDUCED[name](rewards, bounds(sizes), None)
    ranks = [(rewards[:5], bounds(sizes[:2])), (rewards[5:], bounds(sizes[2:]))]
    own = []
    for mine in ranks:
        REDUCED[name](*mine, lambda statistics: own.append(statistics) or statistics)
    got = torch.cat([REDUCED[name](*mine, lambda statistics: sum(own)) for mine in ranks])
    assert_close(got, whole, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(torch.cat([REDUCED[name](*mine, None) for mine in ranks]), whole)


@pytest.mark.parametrize("value", [0.1, -1e4, 1e30])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_whitening_what_does_not_vary(value, count):
    x = torch.full((count,), value)
    assert not whiten(x).any()
    assert_close(whiten(x, shift_mean=False), x)
    assert not whiten(x, mask=torch.zeros(count, dtype=torch.bool)).any()


def test_a_moving_mean():
    first = moving_mean(2.0, exact([2.0, 10.0, 60.0]), decay=0.75)
    assert first == 1.5 + 0.25 * 5
    assert moving_mean(first, exact([0.0, 0.0, 0.0])) == first
    assert mean_and_variance(exact([4.0, 8.0, 28.0]), ddof=0)[1] == 3


PURE = {
    **GROUPED,
    "grpo batch": lambda r, cu: ga.grpo(r, cu, scale="batch"),
    "reinforce": lambda r, cu: ga.reinforce(r),
    "remax": lambda r, cu: ga.remax(r, r[: len(cu) - 1], cu),
    "pass_at_k": lambda r, cu: ga.pass_at_k((r > 0).float(), cu, k=2),
    "spo": lambda r, cu: ga.spo(r[:, None].sigmoid().expand(-1, 4), cu),
    **{name: lambda r, cu, call=call: call(r, cu, None) for name, call in REDUCED.items()},
}


@pytest.mark.parametrize("name", PURE)
def test_no_value_is_asked_for(name):
    with FakeTensorMode() as mode:
        rewards, cu_groups = mode.from_tensor(torch.randn(6)), mode.from_tensor(bounds([4, 2]))
        assert PURE[name](rewards, cu_groups).shape == (6,)


@pytest.mark.parametrize("name", PURE)
def test_compiles_whole(name):
    rewards, cu_groups = torch.randn(6), bounds([4, 2])
    torch.compiler.reset()
    compiled = torch.compile(PURE[name], backend="eager", fullgraph=True)
    assert_close(compiled(rewards, cu_groups), PURE[name](rewards, cu_groups))


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ga.rloo(FOUR, bounds([3, 1])), "cu_groups: wanted groups of at least 2 .* got 1"),
        (
            lambda: ga.grpo(FOUR, bounds([1] * 4)),
            "cu_groups: wanted a group of at least 2 .* got 1",
        ),
        (lambda: ga.passk(FOUR, bounds([3, 1])), "cu_groups: wanted groups of at least 2"),
        (lambda: ga.spo(torch.zeros(4, 3), bounds([3, 1])), "cu_groups: wanted groups of at least"),
        (
            lambda: ga.pass_at_k(FOUR, bounds([2, 2]), k=3),
            "groups of at least 3 .* got 2 per prompt",
        ),
        (lambda: ga.pass_at_k(FOUR, bounds([2, 2]), k=0), "k: wanted at least 1; got 0"),
        (
            lambda: ga.pass_at_k(FOUR + torch.tensor([0, 1, 0.5, torch.nan]), bounds([4]), k=2),
            r"rewards: wanted 0 or 1; got \[0.5\]. Reward correctness alone",
        ),
        (
            lambda: ga.grpo(FOUR, bounds([4]), scale="rank"),
            "scale: wanted one of group, batch, none",
        ),
        (lambda: ga.grpo(FOUR.long(), bounds([4])), "rewards: wanted a 1-D floating-point tensor"),
        (lambda: ga.grpo(FOUR, torch.tensor([0, 4])), "cu_groups: wanted a 1-D int32 tensor"),
        (lambda: ga.grpo(FOUR, bounds([3])), "cu_groups: wanted boundaries that rise from 0 .* 4"),
        (lambda: ga.opo(FOUR, FOUR[1:], bounds([4])), r"lengths: wanted shape \(4,\); got \(3,\)"),
        (lambda: ga.remax(FOUR, FOUR, bounds([4])), r"greedy_rewards: wanted shape \(1,\); got"),
        (lambda: ga.gdpo(FOUR, FOUR, bounds([4])), r"rewards: wanted shape \[S, F\]"),
        (lambda: ga.spo(FOUR, bounds([4])), r"wins: wanted floats of shape \[S, K\]"),
        (lambda: whiten(FOUR, torch.zeros(2)), r"statistics: wanted shape \(3,\); got \(2,\)"),
        (lambda: whiten(FOUR, mask=torch.ones(3)), r"mask: wanted shape \(4,\); got \(3,\)"),
        (
            lambda: moving_mean(0.0, torch.zeros(3), decay=1.0),
            r"decay: wanted a number in \[0, 1\)",
        ),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
