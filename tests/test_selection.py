"""Which completions are trained on, which make a pair, and how likely one beats another."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from prefuse.trainer import selection
from prefuse.trainer.win_rates import beats, win_rates

NAN = float("nan")
REWARDS = np.array([0.5, NAN, 3.0, 1.0, 3.0, -1.0])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    "name, keep, wanted",
    [
        ("best", 2, [2, 4]),
        ("best", 9, [0, 2, 3, 4, 5]),
        ("best_worst", 2, [2, 5]),
        ("best_worst", 3, [2, 4, 5]),
        ("best_worst", 4, [0, 2, 4, 5]),
        ("best_worst", 9, [0, 2, 3, 4, 5]),
    ],
)
def test_subsets(name, keep, wanted):
    assert selection.SUBSETS[name](REWARDS, keep, rng()) == wanted
    assert selection.SUBSETS[name](np.full(3, NAN), keep, rng()) == []


def test_the_best_and_others_by_chance():
    drawn = {tuple(selection.best_and_random(REWARDS, 2, np.random.default_rng(k)))
             for k in range(64)}  # fmt: skip
    assert drawn == {(0, 2), (2, 3), (2, 4), (2, 5)}
    assert selection.best_and_random(np.full(3, NAN), 2, rng()) == []


def test_pairs_have_the_better_one_first_and_no_ties():
    assert selection.extremes(REWARDS, rng()) == [2, 5]
    for name, choose in selection.PAIRS.items():
        for k in range(50):
            found = choose(REWARDS, np.random.default_rng(k))
            assert found == [] or REWARDS[found[0]] > REWARDS[found[1]], name
        assert choose(np.array([1.0, 1.0]), rng()) == []
        assert choose(np.array([NAN, 1.0]), rng()) == []
    both = {tuple(selection.two_at_random(REWARDS, np.random.default_rng(k))) for k in range(300)}
    assert both == {(2, 0), (2, 3), (2, 5), (4, 0), (4, 3), (4, 5), (3, 0), (3, 5), (0, 5), ()}


def test_rejection_sampling_turns_samples_into_those_of_the_optimum():
    """Of pi(y) = (0.5, 0.3, 0.2) with rewards r, what is accepted is as pi(y) exp(r(y) / eta)."""
    generator, chance = rng(), np.array([0.5, 0.3, 0.2])
    rewards, eta, counts = np.array([0.0, 0.4, 0.7]), 0.5, np.zeros(3)
    for _ in range(3000):
        drawn = generator.choice(3, 16, p=chance)
        drawn[0] = 2  # so that the best there is, is among them
        kept = selection.accepted(rewards[drawn], eta, generator)
        counts += np.bincount(drawn[[i for i in kept if i]], minlength=3)
    wanted = chance * np.exp(rewards / eta)
    assert_close(counts / counts.sum(), wanted / wanted.sum(), rtol=0, atol=0.01)


def test_win_rates_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    found = win_rates(beats(rewards, rewards, "larger"), among_themselves=True)
    assert_close(found, torch.tensor([2, 0.5, 0.5, 3], dtype=torch.float64) / 3)
    for how in ("larger", "bradley_terry", "difference"):
        wins = beats(rewards / 4, rewards / 4, how)
        assert_close(wins + wins.mT, torch.ones_like(wins))
    assert_close(float(beats(rewards, rewards, "bradley_terry")[0, 0, 1]), 0.7310585786300049)
    assert_close(float(beats(rewards / 4, rewards / 4, "difference")[0, 3, 0]), 0.75)


def test_win_rates_are_of_the_known_comparisons():
    rewards = torch.tensor([[1.0, NAN, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    wins = beats(rewards, rewards, "larger")
    wins[1, 0, 1], wins[1, 1, 0] = NAN, NAN
    found = win_rates(wins, among_themselves=True)
    wanted = torch.tensor([1.0, NAN, 0.0, 0.0, 0.5, 0.75], dtype=torch.float64)
    assert_close(found, wanted, equal_nan=True)
