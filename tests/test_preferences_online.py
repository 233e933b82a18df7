"""Preference functions and the policy's own signals as feedback of online runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from online_runs import REWARDS
from tiny import scorer_of, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from prefuse.trainer.dist import Ranks
from prefuse.trainer.errors import UserError
from prefuse.trainer.experience import Window
from prefuse.trainer.feedback.preferences import bradley_terry
from prefuse.trainer.judging import Judge, functions
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.pairs import pairs
from prefuse.trainer.learners.policy import policy
from prefuse.trainer.online_config import GRPOConfig, NashMDConfig, OnlineDPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.report import Meter
from prefuse.trainer.rollout import Completion

NAN, ALONE = float("nan"), Ranks(0, 1, torch.device("cpu"))
ROCK, PAPER, SCISSORS = 10, 11, 12  # w4, w5, w6
PREFERENCES = f"{REWARDS.with_name('online_preferences.py')}"
RPS = f"{PREFERENCES}:rock_paper_scissors"


class Lines:
    """A report that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def window_of(*groups: list[list[int]], others: Window | None = None) -> Window:
    """Groups of completions, given as their tokens."""
    prompts = [Prompt(i, np.arange(3, 5 + i), f"p{i}", {}, f"row {i}") for i in range(len(groups))]
    rows = [Completion(np.array(t), np.zeros(len(t), np.float32), True) for g in groups for t in g]
    each = len(groups[0])
    return Window(prompts, rows, each, micro_rows=each, others=others)


def judged(config, window: Window, tmp_path: Path, model=None) -> tuple[Window, dict, Lines]:
    config = type(config)(**{**vars_of(config), "output_dir": str(tmp_path)})
    meter, report = Meter(ALONE), Lines()
    scorer = scorer_of(model if model is not None else tiny_model())
    given = functions(config), ALONE, report, meter, scorer
    judge = Judge(config, tiny_tokenizer(), *given)  # pyright: ignore[reportArgumentType]
    judge.judge(window, 1)
    return window, meter.read(), report


def vars_of(config) -> dict:
    return {k: v for k, v in vars(config).items() if k not in ("hyperparameters",)}


def config_of(kind, **changes):
    return kind("m", "d", "o", bf16=False, **changes)


def advantages(window: Window, config) -> list[float]:
    policy(config, Controls(), lambda x: x).batches(window, 0)
    return window.column("advantages")[window.cu_seqlens[:-1].long()].tolist()


def test_no_reward_says_what_a_circle_of_preferences_says(tmp_path):
    """Each beats one and loses to one: SPO's advantages are 0; two rocks and a paper's are not."""
    config = config_of(GRPOConfig, preference_func=RPS, advantage="spo", num_generations=3,
                       per_device_train_batch_size=6)  # fmt: skip
    groups = [[ROCK], [PAPER], [SCISSORS]], [[ROCK], [ROCK], [PAPER]]
    window, told, _ = judged(config, window_of(*groups), tmp_path)
    circle = torch.tensor([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]], dtype=torch.float64)
    assert window.wins is not None
    assert_close(window.wins[0], circle)
    assert_close(window.rewards.tolist(), [0.5, 0.5, 0.5, 0.25, 0.25, 1.0])
    assert_close(advantages(window, config), [0.0, 0.0, 0.0, -0.25, -0.25, 0.5])
    assert told["preferences/asked"] == 2.5  # the two rocks are not compared
    assert told["rewards/rock_paper_scissors/mean"] == told["reward"] == 0.5
    rows = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows[0]["rewards"] == {"rock_paper_scissors": 0.5} and rows[0]["reward"] == 0.5


def test_nash_meets_the_mixture_alone(tmp_path):
    config = config_of(NashMDConfig, preference_func=RPS, num_generations=2,
                       per_device_train_batch_size=2, beta=0.5)  # fmt: skip
    others = window_of([[ROCK], [SCISSORS]])
    window = window_of([[ROCK], [PAPER]], others=others)
    window, told, _ = judged(config, window, tmp_path)
    wanted = torch.tensor([[[0.5, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    assert_close(window.wins, wanted)
    assert_close(window.rewards.tolist(), [0.75, 0.5])
    assert_close(others.rewards.tolist(), [0.25, 0.5])  # how they fare against the policy
    assert told["preferences/asked"] == 3 and told["reward_others"] == 0.375
    for name in ("old_logp", "ref_logp"):
        window.set(name, torch.zeros(2))
    assert_close(advantages(window, config), [0.25, 0.0])


@pytest.mark.parametrize(
    "loss_type, wanted",
    [("sppo", (0.9,)), ("mmpo", (0.9 - 0.2,)), ("xpo", (0.9, 0.0))],
)
def test_pairs_read_what_the_function_told(loss_type, wanted):
    """Of rewards one reads nothing: the wins contradict them."""
    each = 2 if loss_type == "xpo" else 3
    config = config_of(OnlineDPOConfig, preference_func=RPS, loss_type=loss_type,
                       num_generations=each, per_device_train_batch_size=each)  # fmt: skip
    window = window_of([[ROCK], [PAPER], [SCISSORS]][:each])
    wins = torch.tensor([[[0.5, 0.9, 0.9], [0.1, 0.5, 0.3], [0.1, 0.7, 0.5]]], dtype=torch.float64)
    window.wins = wins[:, :each, :each]
    window.rewards = torch.tensor([0.9, 0.2, 0.4][:each], dtype=torch.float64)
    window.foreign = each // 2 if loss_type == "xpo" else 0
    learner = pairs(config, lambda batch: torch.zeros(batch.n_scored))
    (batch,) = learner.batches(window, 0)
    assert [e.judged for e in batch] == [pytest.approx(wanted)]
    first = batch[0].sequences[0].tokens[-1]
    assert first == ROCK
    window.wins[0, 0, 1] = NAN
    assert bool(learner.batches(window, 0)[0]) == (loss_type == "mmpo")


def test_egpo_reads_how_both_fare_against_opponents(tmp_path):
    config = config_of(OnlineDPOConfig, preference_func=RPS, loss_type="egpo", num_generations=4,
                       per_device_train_batch_size=4)  # fmt: skip
    others = window_of([[SCISSORS], [SCISSORS]])
    window, *_ = judged(config, window_of([[ROCK], [PAPER]], others=others), tmp_path)
    (batch,) = pairs(config, lambda batch: torch.zeros(batch.n_scored)).batches(window, 0)
    assert batch[0].judged == (1.0,)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("raises", "raised RuntimeError: no word on it on row 1"),
        ("no_probability", "returned 1.5, no probability, on row 1"),
        ("not_finite", "returned nan on row 1"),
        ("too_few", "returned 2 probabilities for 3 pairs on row 1"),
        ("hangs", "timed out after 0.5 s on row"),
        ("nested", "returned [0.5] for a pair, not a probability, on row 1"),
    ],
)
@pytest.mark.parametrize("failure", ["stop", "skip", "zero"])
def test_failures_are_told_with_their_row(tmp_path, name, kind, failure):
    """Each fails on all pairs of the second prompt. skip: not known; zero: a tie."""
    config = config_of(GRPOConfig, preference_func=f"{PREFERENCES}:{name}", num_generations=3,
                       reward_failure=failure, reward_timeout=0.5,
                       per_device_train_batch_size=6)  # fmt: skip
    group = [[ROCK], [PAPER], [SCISSORS]]
    if failure == "stop":
        with pytest.raises(UserError) as error:
            judged(config, window_of(group, group), tmp_path)
        assert kind in str(error.value) and f"preference {name}" in str(error.value)
        return
    window, told, report = judged(config, window_of(group, group), tmp_path)
    lost = 2 if name == "hangs" else 1  # prompts of two
    assert told["preferences/failed"] == lost / 2
    assert any(kind in line for line in report.said)
    rewards = window.rewards[-3:].tolist()
    assert all(math.isnan(r) for r in rewards) if failure == "skip" else rewards == [0.5] * 3
    assert window.kept.sum() == (6 - 3 * lost if failure == "skip" else 6)


def test_what_a_function_does_not_know_is_left_out(tmp_path):
    """None: no failure. The others' win rates are of the comparisons that are known."""
    config = config_of(GRPOConfig, preference_func=f"{PREFERENCES}:no_word_on_paper",
                       num_generations=3, per_device_train_batch_size=3)  # fmt: skip
    window, told, _ = judged(config, window_of([[ROCK], [PAPER], [SCISSORS]]), tmp_path)
    assert told["preferences/failed"] == 0
    assert_close(window.rewards.tolist(), [1.0, NAN, 0.0], equal_nan=True)
    assert window.kept.tolist() == [True, False, True]


def test_a_reward_model_sees_each_completion_once():
    seen = []

    def model(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c)) for c in completions]

    found = bradley_terry(model)(["p"] * 3, ["a", "a", "bbb"], ["bbb", "cc", "cc"])
    assert_close(found, torch.tensor([-2.0, -1.0, 1.0], dtype=torch.float64).sigmoid().tolist())
    assert sorted(seen) == [("p", "a"), ("p", "bbb"), ("p", "cc")]
