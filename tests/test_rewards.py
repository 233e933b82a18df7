"""Feedback: how reward functions are found and called, and what comes of those that fail."""

import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest

from prefuse.trainer.errors import UserError
from prefuse.trainer.rewards import Feedback, combine

PROMPTS = ["1+1", "1+1", "2+2", "2+2"]
COMPLETIONS = ["2", "x", "4", "5"]
IDS = [[1], [2, 2], [3, 3, 3], [4, 4, 4, 4]]
COLUMNS = {"answer": ["2", "2", "4", "4"]}
INDICES = ["rows.jsonl:1", "rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:2"]


def score(*functions, **options):
    feedback = Feedback(functions, **options)
    return feedback(PROMPTS, COMPLETIONS, IDS, COLUMNS, INDICES)


def equal(prompts, completions, completion_ids, answer, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def slow_equal(completions, answer):
    await asyncio.sleep(0.3)
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def none_for_words(completions):
    return [None if c == "x" else 1 for c in completions]


class Lengths:
    def __call__(self, completion_ids, **kwargs):
        return np.array([len(ids) for ids in completion_ids], dtype=np.float32)


def test_several_functions_see_what_they_name_and_async_ones_run_together():
    functions = [equal, slow_equal, slow_equal, slow_equal, none_for_words, Lengths(), "gsm8k"]
    started = time.monotonic()
    scores = score(*functions)
    assert time.monotonic() - started < 0.8  # one after the other they take 0.9
    right = [1, 0, 1, 0]
    wanted = np.array([right, right, right, right, [1, math.nan, 1, 1], [1, 2, 3, 4], right]).T
    np.testing.assert_array_equal(scores.rewards, wanted)
    assert scores.failures == {} and scores.notes == ()
    names = Feedback(functions).names
    assert names[1:6] == ("slow_equal", "slow_equal_2", "slow_equal_3", "none_for_words", "Lengths")


def test_log_metric_and_log_extra_are_handed_on():
    def logs(completions, log_metric, log_extra):
        log_metric("words", 3)
        log_extra("seen", [c * 2 for c in completions])
        return [0.0] * len(completions)

    scores = score(logs)
    assert scores.metrics == {"words": 3.0} and scores.extra == {"seen": ["22", "xx", "44", "55"]}


def test_functions_are_found_in_files_and_modules(tmp_path, monkeypatch):
    source = "def double(completions, scale=2):\n    return [scale * len(c) for c in completions]\n"
    (tmp_path / "mine_42.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    scores = score("mine_42.double", f"{tmp_path}/mine_42.py:double?scale=3", "length?scale=1")
    np.testing.assert_array_equal(scores.rewards, [[2, 3, -n] for n in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    "spec, words",
    [
        ("gsm8", "did you mean gsm8k?"),
        ("no_such_package.reward", "does not import"),
        ("math.sqroot", "did you mean sqrt?"),
        ("nowhere.py:reward", "no file nowhere.py"),
        ("length?targt=3", "did you mean target?"),
        ("length?target", "option=value"),
        ("format?pattern=(", "regular expression"),
        ("math.pi", "got float"),
        ("math.sqrt", "by name"),
        (lambda: [1.0], "parameters"),
        (lambda completions, answr: [1.0], "did you mean answer?"),
        (Lengths, "got a class"),
        (3, "got int"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_message(spec, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        score(spec)


def test_what_rows_lack_is_known_before_they_are_sampled():
    Feedback(["gsm8k", "length"]).check(["answer"])
    with pytest.raises(UserError, match="wanted a column 'answer'"):
        Feedback(["gsm8k"]).check(["label"])


def on_two(value):
    """A function that fails where the prompt is 2+2: it returns or raises `value`."""

    def reward(prompts, completions):
        if isinstance(value, BaseException) and "2+2" in prompts:
            raise value
        return [value if p == "2+2" else 1.0 for p in prompts]

    return reward


def blocked(completions):
    threading.Event().wait()


def spinning(completions):
    while True:
        pass


async def asleep(completions):
    await asyncio.sleep(1e6)


async def blocking_the_loop(completions):
    threading.Event().wait(3)


async def deaf(completions):
    while True:
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            pass


ALL, TWO = [0, 1, 2, 3], [2, 3]


@pytest.mark.parametrize(
    "function, kind, rows",
    [
        (on_two(ValueError("no")), "raised", TWO),
        (on_two(SystemExit(3)), "raised", TWO),
        (on_two(math.nan), "not finite", TWO),
        (on_two(-math.inf), "not finite", TWO),
        (on_two("1.0"), "wrong type", TWO),
        (on_two([1.0]), "wrong count", TWO),
        (lambda prompts: [1.0] * (4 if len(prompts) == 4 else len(prompts) - 1), None, []),
        (lambda completions: [1.0], "wrong count", ALL),
        (lambda completions: [], "wrong count", ALL),
        (lambda completions: None, "wrong type", ALL),
        (lambda completions: dict.fromkeys(completions, 1.0), "wrong type", ALL),
        (lambda completions: "1111", "wrong type", ALL),
        (blocked, "timed out", ALL),
        (asleep, "timed out", ALL),
        (blocking_the_loop, "timed out", ALL),
        (deaf, "timed out", ALL),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip", "zero"])
def test_failures_are_reported_with_their_row_and_follow_the_policy(function, kind, rows, policy):
    started = time.monotonic()
    if policy == "stop" and rows:
        with pytest.raises(UserError, match=rf"rows.jsonl:{rows[0] // 2 + 1}\b.*--reward_failure"):
            score(function, on_failure=policy, timeout=0.3)
    else:
        scores = score(function, "length", on_failure=policy, timeout=0.3)
        instead = math.nan if policy == "skip" else 0.0
        wanted = [instead if i in rows else 1.0 for i in range(4)]
        np.testing.assert_array_equal(scores.rewards[:, 0], wanted)
        assert np.isfinite(scores.rewards[:, 1]).all()
        assert scores.failures == ({kind: len(rows)} if rows else {})
        assert len(scores.notes) == len({INDICES[i] for i in rows})
        assert all(INDICES[i] in " ".join(scores.notes) for i in rows)
    assert time.monotonic() - started < 3


def test_hung_calls_do_not_pile_up_and_a_blocked_loop_is_left_behind():
    feedback = Feedback([blocked], on_failure="skip", timeout=0.1, max_concurrency=2)
    before = threading.active_count()
    for _ in range(4):
        assert feedback(PROMPTS, COMPLETIONS, IDS, {}, INDICES).failures == {"timed out": 4}
    assert threading.active_count() - before <= 2
    calls = []

    async def blocks_once(completions):
        calls.append(1)
        if len(calls) == 1:
            threading.Event().wait(5)
        return [1.0] * len(completions)

    feedback = Feedback([blocks_once], on_failure="zero", timeout=0.2)
    first, second = (feedback(PROMPTS, COMPLETIONS, IDS, {}, INDICES) for _ in range(2))
    assert first.failures == {"timed out": 4} and second.failures == {}


def test_a_cache_spares_calls_and_forgets_with_the_source(tmp_path):
    calls = []

    def counted(completions, answer, bonus=0.0, **_):
        calls.append(list(completions))
        return [None if c == "x" else bonus + (c == a) for c, a in zip(completions, answer)]  # noqa: B905

    def run(function, answer):
        feedback = Feedback([function], cache=tmp_path / "cache.sqlite")
        columns = {"answer": answer, "unread": [object()] * 4}
        return feedback(PROMPTS, COMPLETIONS, IDS, columns, INDICES).rewards[:, 0]

    wanted = [1, math.nan, 1, 0]
    for _ in range(2):
        np.testing.assert_array_equal(run(counted, ["2", "2", "4", "4"]), wanted)
    assert calls == [COMPLETIONS]
    np.testing.assert_array_equal(run(counted, ["2", "2", "4", "5"]), [1, math.nan, 1, 1])
    assert calls[1:] == [["5"]]
    other = functools.partial(counted, bonus=1.0)
    np.testing.assert_array_equal(run(other, ["2", "2", "4", "4"]), [2, math.nan, 2, 1])
    assert calls[2:] == [COMPLETIONS]
    (tmp_path / "not.sqlite").write_text("hello" * 1000)
    for path in (tmp_path / "not.sqlite", tmp_path, tmp_path / "not.sqlite" / "below"):
        with pytest.raises(UserError, match="cache of rewards"):
            Feedback([equal], cache=path)


def test_functions_of_one_source_do_not_share_what_is_remembered(tmp_path):
    class Scale:
        def __init__(self, by):
            self.by = by

        def score(self, completions):
            return [self.by] * len(completions)

    def made(by):
        return lambda completions: [by] * len(completions)

    def defaulted(by):
        def score(completions, *, to=by):
            return [to] * len(completions)

        return score

    for make in (made, defaulted, lambda by: Scale(by).score):
        for by in (1.0, 2.0, 1.0):
            feedback = Feedback([make(by)], cache=tmp_path / "cache.sqlite")
            assert (
                feedback(PROMPTS, COMPLETIONS, IDS, {}, INDICES).rewards[:, 0].tolist() == [by] * 4
            )


def test_failures_are_not_cached(tmp_path):
    options = {"on_failure": "zero", "cache": tmp_path / "cache.sqlite"}
    for _ in range(2):
        assert score(on_two(math.nan), **options).failures == {"not finite": 2}


def test_combine_is_a_weighted_sum_of_what_applies():
    rewards = np.array([[1.0, 2.0], [math.nan, 4.0], [math.nan, math.nan]])
    np.testing.assert_array_equal(combine(rewards, [2.0, 0.5]), [3.0, 2.0, math.nan])
    np.testing.assert_array_equal(combine(rewards, [2.0, 0.5], how="min"), [1.0, 2.0, math.nan])
    rewards = np.array([[1.0, 100.0], [3.0, 300.0], [5.0, math.nan], [5.0, 7.0]])
    wanted = [-(2**0.5), 2**0.5, 0.0, 0.0]  # groups of 2: (-1, 1) / sqrt 2 in both columns
    close = functools.partial(np.testing.assert_allclose, atol=1e-3)
    close(combine(rewards, [1.0, 1.0], "per_function", group_size=2), wanted)
    close(combine(rewards[:2], [1.0, 0.0], "per_function"), [-(0.5**0.5), 0.5**0.5])


def test_options_are_checked():
    for options in (
        {"on_failure": "ignore"},
        {"timeout": 0},
        {"weights": [1.0, 2.0]},
        {"weights": [math.nan]},
        {"max_concurrency": 0},
    ):
        with pytest.raises(UserError, match="wanted"):
            Feedback(["length"], **options)
    with pytest.raises(UserError, match="got none"):
        Feedback([])
