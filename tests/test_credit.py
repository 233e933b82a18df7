"""Rewards of sequences and segments as rewards of tokens: hand-worked values, sums, packing."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels import credit
from prefuse.kernels.advantage import gae


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# Sequences of 4, 0 and 2 tokens; lines of 1, 3 and 2.
CU, LINES = bounds([4, 0, 2]), bounds([1, 3, 2])
REWARDS = exact([10.0, 99.0, -4.0])
TOKENS = torch.tensor([False, True, True, True, True, False])
VALUES = exact([1.0, 2, 4, 8, 16, 32])
STEPS = bounds([3, 1, 2])

BY_HAND = {
    "at_ends": (lambda: credit.at_ends(REWARDS, CU, 6), [0, 0, 0, 10, 0, -4]),
    "over_spans": (
        lambda: credit.over_spans(exact([1.0, -1, 0.5]), LINES, 6),
        [1, -1, -1, -1, 0.5, 0.5],
    ),
    "fine_grained": (
        lambda: credit.fine_grained([exact([1.0, 2, 3]), REWARDS], [LINES, CU], [2.0, 0.5], 6),
        [2, 0, 0, 4 + 5, 0, 6 - 2],
    ),
    # shares 1/4, 1/2, 1/4 and, with one token left of the second, all to it
    "attention_credit": (
        lambda: credit.attention_credit(
            REWARDS, exact([0.5, 0.1, 0.2, 0.1, 0.3, 0.6]), CU, TOKENS, beta=0.5
        ),
        [0, 1.25, 2.5, 1.25 + 5, -2, -2],
    ),
    "attention_credit zero": (
        lambda: credit.attention_credit(REWARDS, exact([7.0, 0, 0, 0, 3, 1]), CU, TOKENS),
        [0, 0, 0, 10, -4, 0],
    ),
    "min": (lambda: credit.aggregate_steps(VALUES, CU, how="min"), [1, 0, 16]),
    "product": (lambda: credit.aggregate_steps(-VALUES, CU, how="product"), [64, 0, 512]),
    "mean": (lambda: credit.aggregate_steps(VALUES, CU, how="mean"), [3.75, 0, 24]),
    "max": (lambda: credit.aggregate_steps(-VALUES, CU, how="max"), [-1, 0, -16]),
    "last": (lambda: credit.aggregate_steps(VALUES, CU, how="last"), [8, 0, 32]),
    # two lines in the first sequence, one in the last: weights 1/2 and 1
    "line_rewards": (
        lambda: credit.line_rewards(exact([1.0, 3, 5]), LINES, REWARDS, CU, 6, coef=2.0),
        [1, 0, 0, 3 + 10, 0, 10 - 4],
    ),
    "line_rewards uncapped": (
        lambda: credit.line_rewards(exact([1.0, 3, 5]), LINES, REWARDS, CU, 6, max_lines=math.inf),
        [1, 0, 0, 3 + 10, 0, 5 - 4],
    ),
    "step_contributions": (
        lambda: credit.step_contributions(
            exact([1.0, 3, 5]), LINES, 6, exact([0.0, 1, 1]), alpha=2.0, beta=0.5
        ),
        [2, 0, 0, 6.5, 0, 10.5],
    ),
    # 10 - 4 missing, 3 a step; -4 - 5
    "step_contributions exact": (
        lambda: credit.step_contributions(exact([1.0, 3, 5]), LINES, 6, None, REWARDS, CU),
        [4, 0, 0, 6, 0, -4],
    ),
    "ngram_steps": (
        lambda: credit.ngram_steps(bounds([5, 0, 2, 1]), 8, size=2).double(),
        [0, 2, 4, 5, 7, 8],
    ),
    "ngram_steps of three": (
        lambda: credit.ngram_steps(bounds([5, 0, 2, 4]), 11, size=3).double(),
        [0, 3, 5, 7, 10, 11],
    ),
    "ngram_steps of nothing": (lambda: credit.ngram_steps(bounds([0]), 0, size=2).double(), [0]),
    # falling in the first two; the third is likelier than what another sequence ended with
    "perplexity_steps": (
        lambda: credit.perplexity_steps(
            exact([-3.0, -2, -2, -4, -1, 0, -9, -8]), bounds([2, 3, 0, 3])
        ).double(),
        [0, 2, 3, 5, 6, 8],
    ),
    "step_values first": (
        lambda: credit.step_values(VALUES, STEPS, how="first"),
        [1, 1, 1, 8, 16, 16],
    ),
    "step_values mean": (lambda: credit.step_values(VALUES, STEPS), [7 / 3] * 3 + [8, 24, 24]),
    "step_values last": (
        lambda: credit.step_values(VALUES, STEPS, how="last"),
        [4, 4, 4, 8, 32, 32],
    ),
    # sigma = (6, 3, 2) / 11 and (2, 1) / 3
    "step_values position": (
        lambda: credit.step_values(VALUES, STEPS, how="position"),
        [20 / 11] * 3 + [8, 64 / 3, 64 / 3],
    ),
    "step_values of actions": (
        lambda: credit.step_values(VALUES, bounds([2, 2, 2]), TOKENS, how="last"),
        [2, 2, 8, 8, 16, 16],
    ),
    "soft_overlong": (
        lambda: credit.soft_overlong(exact([0.0, 80, 81, 90, 100, 500]), max_length=100, cache=20),
        [0, 0, -0.05, -0.5, -1, -1],
    ),
    "missing_eos": (
        lambda: credit.missing_eos(REWARDS, torch.tensor([True, False, False])),
        [10, -1, -1],
    ),
    "missing_eos added": (
        lambda: credit.missing_eos(
            REWARDS, torch.tensor([True, False, False]), penalty=-2.0, replace=False
        ),
        [10, 97, -6],
    ),
    "lagrangian": (
        lambda: credit.lagrangian(exact([1.0, 4]), exact([5.0, 0]), math.log(3.0)),
        [(1 - 15) / 4, 1],
    ),
    "update_log_multiplier": (
        lambda: credit.update_log_multiplier(
            exact([math.log(2.0)] * 3), exact([1.0, -1, 1e3]), rate=0.1
        ),
        [math.log(2) + 0.2, math.log(2) - 0.2, math.log(5)],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    call, wanted = BY_HAND[name]
    got = call()
    assert got.dtype == torch.float64
    assert_close(got, exact(wanted), rtol=1e-12, atol=1e-12)


def test_every_function_has_a_hand_worked_value_and_a_title():
    listed = {name.split()[0] for name in BY_HAND} | {"aggregate_steps"}
    functions = [
        f for f in vars(credit).values() if getattr(f, "__module__", "") == credit.__name__
    ]
    public = [f for f in functions if not f.__name__.startswith(("_", "<"))]
    assert {f.__name__ for f in public} == listed - set(credit.AGGREGATIONS)
    for f in public:
        title = (f.__doc__ or "").split("\n")[0]
        assert "arXiv:" in title and ": " in title, title


def random_pack(lengths):
    total = sum(lengths)
    steps = bounds([n for length in lengths for n in (length // 2, length - length // 2)])
    return dict(
        rewards=torch.randn(len(lengths), dtype=torch.float64),
        attention=torch.rand(total, dtype=torch.float64),
        mask=torch.rand(total) > 0.3,
        scores=torch.randn(2 * len(lengths), dtype=torch.float64),
        steps=steps,
        cu=bounds(lengths),
        total=total,
    )


TOKEN_REWARDS = {
    "at_ends": lambda p: credit.at_ends(p["rewards"], p["cu"], p["total"]),
    "attention_credit": lambda p: credit.attention_credit(
        p["rewards"], p["attention"], p["cu"], p["mask"], beta=0.7
    ),
    "step_contributions": lambda p: credit.step_contributions(
        p["scores"], p["steps"], p["total"], None, p["rewards"], p["cu"]
    ),
}
OTHERS = {
    "over_spans": lambda p: credit.over_spans(p["scores"], p["steps"], p["total"]),
    "fine_grained": lambda p: credit.fine_grained(
        [p["scores"], p["rewards"]], [p["steps"], p["cu"]], [1.0, 0.5], p["total"]
    ),
    "line_rewards": lambda p: credit.line_rewards(
        p["scores"], p["steps"], p["rewards"], p["cu"], p["total"]
    ),
    "step_values": lambda p: credit.step_values(
        p["attention"], p["steps"], p["mask"], how="position"
    ),
}


@pytest.mark.parametrize("name", TOKEN_REWARDS)
def test_redistributed_rewards_sum_to_the_reward(name):
    pack = random_pack([5, 1, 30, 2])
    got = TOKEN_REWARDS[name](pack)
    sums = torch.stack([part.sum() for part in got.split(pack["cu"].diff().tolist())])
    assert_close(sums, pack["rewards"])


@pytest.mark.parametrize("name", TOKEN_REWARDS | OTHERS)
def test_a_sequence_alone_is_the_sequence_in_a_pack(name):
    call, lengths = (TOKEN_REWARDS | OTHERS)[name], [5, 1, 30, 2]
    pack = random_pack(lengths)
    together = call(pack).split(lengths)
    begin = 0
    for s, length in enumerate(lengths):
        tokens = slice(begin, begin + length)
        alone = {k: pack[k][tokens] for k in ("attention", "mask")}
        alone |= dict(rewards=pack["rewards"][s : s + 1], scores=pack["scores"][2 * s : 2 * s + 2])
        alone |= dict(total=length, cu=bounds([length]))
        alone["steps"] = pack["steps"][2 * s : 2 * s + 3] - begin
        assert_close(call(alone), together[s], rtol=1e-12, atol=1e-12)
        begin += length


def test_masked_attention_is_not_read():
    attention = exact([math.nan, 1, 2, 1, 3, math.inf])
    got = credit.attention_credit(REWARDS, attention, CU, TOKENS)
    assert_close(got, exact([0, 2.5, 5, 2.5, -4, 0]))


def test_macro_actions_with_mean_values():
    """The repository's SMDP of arXiv:2410.02743, with rewards summed: per step, then spread."""
    rewards, values = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    got = gae(
        rewards,
        credit.step_values(values, STEPS),
        bounds([6]),
        gamma=0.9,
        lam=0.8,
        steps=STEPS,
        impl="reference",
    )
    parts = STEPS.diff().tolist()
    r, v = (
        torch.stack([f(x) for x in t.split(parts)])
        for f, t in ((torch.sum, rewards), (torch.mean, values))
    )
    wanted = gae(r, v, bounds([3]), gamma=0.9, lam=0.8, impl="reference")
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close(mine, theirs.repeat_interleave(torch.tensor(parts)))


def test_lagrangian_extremes():
    advantages, costs = exact([1.0, -2]), exact([3.0, 4])
    assert torch.equal(credit.lagrangian(advantages, costs, -1e3), advantages)
    assert torch.equal(credit.lagrangian(advantages, costs, 1e3), -costs)


def test_results_are_detached_and_keep_the_dtype():
    pack = random_pack([4, 3])
    for dtype in (torch.float32, torch.float64):
        for call in (TOKEN_REWARDS | OTHERS).values():
            given = {
                k: x.to(dtype).requires_grad_()
                if isinstance(x, torch.Tensor) and x.is_floating_point()
                else x
                for k, x in pack.items()
            }
            got = call(given)
            assert got.dtype == dtype and not got.requires_grad


PURE = TOKEN_REWARDS | OTHERS
PURE |= {
    how: lambda p, how=how: credit.aggregate_steps(p["attention"], p["cu"], how=how)
    for how in credit.AGGREGATIONS
}
PURE["soft_overlong"] = lambda p: credit.soft_overlong(p["cu"].diff(), max_length=9, cache=3)
PURE["lagrangian"] = lambda p: credit.lagrangian(p["rewards"], p["rewards"], p["rewards"][0])
PURE["update_log_multiplier"] = lambda p: credit.update_log_multiplier(
    p["rewards"], p["rewards"], rate=0.1
)


@pytest.mark.parametrize("name", PURE)
def test_no_value_is_asked_for(name):
    pack = random_pack([5, 1, 7])
    with FakeTensorMode() as mode:
        fake = {
            k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in pack.items()
        }
        assert len(PURE[name](fake)) in (3, 13)


@pytest.mark.parametrize("name", PURE)
def test_compiles_whole(name):
    pack = random_pack([5, 1, 7])
    torch.compiler.reset()
    compiled = torch.compile(PURE[name], backend="eager", fullgraph=True)
    assert_close(compiled(pack), PURE[name](pack))


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: credit.at_ends(ONE, CU, 6), "scores: wanted 3 entries; got 1"),
        (lambda: credit.at_ends(REWARDS, CU, 7), "boundaries: wanted .* 7; got 0 to 6"),
        (lambda: credit.at_ends(REWARDS.long(), CU, 6), "scores: wanted a 1-D floating-point"),
        (lambda: credit.fine_grained([], [], [], 6), "scores: wanted at least one"),
        (lambda: credit.fine_grained([REWARDS], [CU], [], 6), "weights: wanted 1 entries; got 0"),
        (
            lambda: credit.attention_credit(REWARDS, VALUES, CU, beta=1.5),
            r"beta: wanted a number in \[0, 1\]; got 1.5",
        ),
        (lambda: credit.aggregate_steps(VALUES, CU, how="sum"), "how: wanted one of min, product"),
        (lambda: credit.step_values(VALUES, CU, how="unit"), "how: wanted one of first, mean"),
        (
            lambda: credit.line_rewards(VALUES[:3], LINES, REWARDS, CU, 6, max_lines=0),
            "max_lines: wanted a positive number",
        ),
        (
            lambda: credit.step_contributions(VALUES[:3], LINES, 6, None, REWARDS),
            "cu_seqlens: wanted boundaries",
        ),
        (
            lambda: credit.soft_overlong(ONE, max_length=5, cache=6),
            "cache: wanted more than 0 and at most 5; got 6",
        ),
        (lambda: credit.missing_eos(ONE, ONE), "finished: wanted bool"),
        (
            lambda: credit.update_log_multiplier(ONE, ONE, rate=0.1, largest=0.0),
            "largest: wanted a positive number",
        ),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
