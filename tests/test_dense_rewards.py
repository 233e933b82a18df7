"""Rewards of tokens and stretches of text: read, kept, placed at tokens, learnt from."""

import json
import math
import random

import numpy as np
import pytest
import torch
import transformers
from online_runs import FULL, LEARN, REWARDS, online_config
from test_rewards import COMPLETIONS, IDS, INDICES, PROMPTS
from tiny import PLAIN, byte_tokenizer
from torch.testing import assert_close

from prefuse.trainer.dist import Ranks
from prefuse.trainer.errors import UserError
from prefuse.trainer.experience import Window
from prefuse.trainer.feedback.dense import on_tokens, places
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.ppo import ppo, ppo_method
from prefuse.trainer.online_config import PPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.replay import Replay
from prefuse.trainer.rewards import Feedback, Spans
from prefuse.trainer.rollout import Completion, Episode

NAN = float("nan")
ALONE = Ranks(0, 1, torch.device("cpu"))
WORDS = [*PLAIN, "naïve", "日本語", "😀", "é"]


def score(*functions, **options):
    return Feedback(functions, **options)(PROMPTS, COMPLETIONS, IDS, {}, INDICES)


def prefixes(tokens, tokenizer) -> list[str]:
    counts = range(len(tokens) + 1)
    return [tokenizer.decode(tokens[:k], skip_special_tokens=True) for k in counts]


def by_every_prefix(prefix: list[str]) -> list[int]:
    """Of every character of the whole, the first token that completes it."""
    whole, counts = prefix[-1], range(len(prefix))
    ends = range(1, len(whole) + 1)
    return [next(k for k in counts if prefix[k][:e] == whole[:e]) - 1 for e in ends]


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_characters_of_tokenizers_in_use(data_dir, name):
    """Tokens at random, so most bytes are of no character."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir / "tokenizers" / name)
    tokens = np.random.default_rng(0).integers(0, len(tokenizer), 80)
    prefix = prefixes(tokens, tokenizer)
    wanted = by_every_prefix(prefix)
    assert places(range(1, len(prefix[-1]) + 1), tokens, tokenizer) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_a_character_lies_in_the_token_that_ends_it(seed):
    """Against every prefix; characters of several tokens, special tokens, bytes of none."""
    tokenizer, rng = byte_tokenizer(), random.Random(seed)
    text = " ".join(rng.choices(WORDS, k=25))
    ids = tokenizer(text)["input_ids"]
    if seed == 2:  # as a policy may sample
        ids += [tokenizer.get_vocab()[piece] for piece in ("ð", "Ł", "a")]
    tokens = np.array([*ids[:5], tokenizer.pad_token_id, *ids[5:], tokenizer.eos_token_id])
    prefix = prefixes(tokens, tokenizer)
    whole, wanted = prefix[-1], by_every_prefix(prefix)
    assert sum("�" in p for p in prefix[:-3]) > 5 and len(set(whole)) > 10
    assert places(range(1, len(whole) + 1), tokens, tokenizer) == wanted
    some = rng.sample(range(1, len(whole) + 1), 6)
    assert places(some, tokens, tokenizer) == [wanted[end - 1] for end in some]
    spans = Spans([(end, 1.0 + end) for end in some * 2])
    paid = on_tokens(spans, tokens, tokenizer)
    for place in range(len(tokens)):
        mine = sum(2.0 * (1 + end) for end in some if wanted[end - 1] == place)
        assert paid[place] == mine


def test_what_parts_are_worth_adds_up():
    """A list, a tensor, Spans and numbers from one function."""
    found = [[2.5], np.array([1.0, -2.0]), Spans([(1, 0.5), (1, 0.25)]), 3]
    scores = score(lambda completions: found, "length?scale=1")
    np.testing.assert_array_equal(scores.rewards, [[2.5, -1], [-1, -2], [0.75, -3], [3, -4]])
    assert scores.dense.keys() == {(0, 0), (1, 0), (2, 0)}
    np.testing.assert_array_equal(scores.dense[1, 0], [1.0, -2.0])  # type: ignore
    assert scores.dense[2, 0] == Spans(((1, 0.5), (1, 0.25)))


WRONG = [
    ([1.0], "wrong count"),
    ([], "wrong count"),
    ([1.0, NAN, 0.0, 0.0], "not finite"),
    ([1.0, None, 0.0, 0.0], "wrong type"),
    (Spans([(0, 1.0)]), "out of text"),
    (Spans([(2, 1.0)]), "out of text"),
    (Spans([(1, math.inf)]), "not finite"),
    (Spans([(1.0, 1.0)]), "wrong type"),  # type: ignore
    (Spans([1.0]), "wrong type"),  # type: ignore
]


@pytest.mark.parametrize("policy", ["stop", "skip", "zero"])
@pytest.mark.parametrize("value, kind", WRONG)
def test_what_does_not_fit_a_completion_is_a_failure(value, kind, policy):
    """Of the last of four, "5" of four tokens."""
    given = [0.5, [1.0, 0.0], [1.0] * 3, value]
    if policy == "stop":
        with pytest.raises(UserError, match=r"on rows.jsonl:2\b"):
            score(lambda completions: given)
        return
    scores = score(lambda completions: given, on_failure=policy)
    instead = NAN if policy == "skip" else 0.0
    np.testing.assert_array_equal(scores.rewards[:, 0], [0.5, 1, 3, instead])
    assert scores.failures == {kind: 1} and (3, 0) not in scores.dense


def test_a_cache_keeps_parts(tmp_path):
    calls, found = [], [[2.5], [1.0, -2.0], Spans([(1, 0.5)]), None]

    def counted(completions):
        calls.append(len(completions))
        return [found[COMPLETIONS.index(c)] for c in completions]

    first, again = (score(counted, cache=tmp_path / "c.sqlite") for _ in range(2))
    assert calls == [4] and first.dense.keys() == again.dense.keys()
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert again.dense[2, 0] == Spans(((1, 0.5),))
    np.testing.assert_array_equal(again.dense[1, 0], [1.0, -2.0])  # type: ignore
    feedback = Feedback([counted], cache=tmp_path / "c.sqlite", on_failure="skip")
    others = [*IDS[:1], [7, 7, 7], *IDS[2:]]  # the same text of other tokens
    assert feedback(PROMPTS, COMPLETIONS, others, {}, INDICES).failures == {"wrong count": 1}
    assert calls[1:] == [1]


def window_of(lengths: list[int], paid: bool = True, seed: int = 0) -> Window:
    rng = np.random.default_rng(seed)
    prompts = [Prompt(i, np.arange(3, 6), "", {}, "") for i in range(len(lengths) // 2)]
    completions = [Completion(rng.integers(3, 40, n), np.zeros(n), True) for n in lengths]
    window = Window(prompts, completions, each=2, micro_rows=2)
    window.rewards = torch.from_numpy(rng.normal(size=len(lengths)))
    window.parts = window.rewards[:, None]
    if paid:
        window.token_rewards = [rng.normal(size=n) for n in lengths]
    return window


def test_parts_stay_with_their_completions():
    """Taken, joined with a window without any, and replayed from a checkpoint's JSON."""
    window, plain = window_of([3, 2, 4, 1]), window_of([2, 5], paid=False)
    assert window.token_rewards is not None
    taken = window.taken([1])
    assert taken.token_rewards is not None and taken.paid() == window.paid()[2:]
    assert [len(x) for x in taken.joined(plain).paid()] == [4, 1, 2, 5]
    joined = plain.joined(taken)
    assert joined.token_rewards is not None
    assert not any(x.any() for x in joined.token_rewards[:2])
    assert joined.token_rewards[2] is taken.token_rewards[0]
    assert plain.joined(plain).token_rewards is None

    window.rewards = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    replay, later = Replay(1.0, ALONE), window_of([3, 3], paid=False)
    replay(window)
    replay.stored = json.loads(json.dumps(replay.stored))
    later.rewards = torch.zeros(2).double()
    replay(later)
    assert later.token_rewards is not None and not later.token_rewards[0].any()
    np.testing.assert_array_equal(later.token_rewards[1], window.token_rewards[1])


def learnt(window: Window, **changes) -> dict[str, torch.Tensor]:
    """Returns, by PPO with a KL in the reward."""
    config = online_config(PPOConfig, per_device_train_batch_size=2, **changes)
    total, rng = int(window.cu_seqlens[-1]), np.random.default_rng(9)
    for name in ("old_logp", "ref_logp", "values"):
        window.set(name, torch.from_numpy(rng.normal(size=total)))
    controls = Controls(config.beta)
    ppo(config, ppo_method(config, controls), controls, lambda x: x).batches(window, 0)
    names = ("returns", "advantages", "old_logp", "ref_logp", "values")
    return {name: window.column(name) for name in names}


def by_hand(window: Window, found, beta, gamma, lam, bounds=None):
    """GAE's recursion in float64, its actions the tokens or the stretches between bounds."""
    returns, advantages, begin = [], [], 0
    rewards, paid = window.rewards.tolist(), window.paid()
    for reward, tokens in zip(rewards, paid, strict=True):
        total, own = len(tokens), slice(begin, begin + len(tokens))
        r = tokens - beta * (found["old_logp"][own] - found["ref_logp"][own]).numpy()
        r[-1] += reward - tokens.sum()
        values, carried = found["values"][own].numpy(), 0.0
        marks = bounds(total) if bounds else list(range(total + 1))
        actions = list(zip(marks, marks[1:], strict=False))
        v = [values[a:b].mean() for a, b in actions]
        back = []
        for k in reversed(range(len(actions))):
            a, b = actions[k]
            after = v[k + 1] if k + 1 < len(v) else 0.0
            carried = r[a:b].sum() + gamma * after - v[k] + gamma * lam * carried
            back.insert(0, (carried, carried + v[k], b - a))
        advantages += [x for x, _, n in back for _ in range(n)]
        returns += [x for _, x, n in back for _ in range(n)]
        begin += total
    white = torch.tensor(advantages, dtype=torch.float64)
    return torch.tensor(returns, dtype=torch.float64), (white - white.mean()) / white.std()


@pytest.mark.parametrize("paid", [True, False])
def test_ppo_pays_tokens_and_the_rest_at_the_end(paid):
    window = window_of([3, 1, 5, 2], paid)
    given = dict(beta=0.3, gamma=0.9, lam=0.8)
    found = learnt(window, **given)
    returns, advantages = by_hand(window, found, **given)
    assert_close(found["returns"], returns, rtol=1e-12, atol=1e-12)
    assert_close(found["advantages"], advantages, rtol=1e-6, atol=1e-6)


def test_the_sum_is_the_reward():
    """At gamma 1, lambda 1 and no KL the first token's return is the completion's reward."""
    window = window_of([3, 1, 5, 2])
    found = learnt(window, beta=0.0, lam=1.0)
    starts = window.cu_seqlens[:-1].long()
    assert_close(found["returns"][starts], window.rewards, rtol=1e-12, atol=1e-12)


def test_macro_actions_are_n_grams():
    """Rewards and KL summed, values averaged, one advantage for all of its tokens."""
    window, given = window_of([7, 1, 5, 2]), dict(beta=0.3, gamma=0.9, lam=0.8)
    found = learnt(window, **given, macro_actions="ngram", macro_size=3)
    bounds = lambda n: [*range(0, n, 3), n]  # noqa: E731
    returns, advantages = by_hand(window, found, **given, bounds=bounds)
    assert_close(found["returns"], returns, rtol=1e-12, atol=1e-12)
    assert_close(found["advantages"], advantages, rtol=1e-6, atol=1e-6)
    alone = learnt(window, **given, macro_actions="ngram", macro_size=1)
    assert_close(alone["returns"], learnt(window, **given)["returns"], rtol=1e-12, atol=1e-12)


def test_macro_actions_end_with_the_turn():
    """Turns of 4 and 3 tokens, others' in between: three, one, three."""
    own = np.array([False] * 3 + [True] * 4 + [False] * 2 + [True] * 3)
    given = np.zeros(2), np.array([7, 12]), "done", []
    episode = Episode(np.arange(3, 15), own, np.zeros(12, dtype=np.float32), *given)
    window, options = window_of([7, 7]), dict(beta=0.0, gamma=0.9, lam=0.8)
    window.completions = [episode.completion()] * 2
    found = learnt(window, **options, macro_actions="ngram", macro_size=3)
    returns, _ = by_hand(window, found, **options, bounds=lambda n: [0, 3, 4, 7])
    assert_close(found["returns"], returns, rtol=1e-12, atol=1e-12)


def test_lambda_by_length_counts_actions():
    """VAPO's 1 - 1 / (alpha n), n the macro actions: of one or two it is 0 at alpha 0.5."""
    window, given = window_of([6, 4, 3, 5]), dict(macro_actions="ngram", macro_size=3)
    by_length = learnt(window, lam_alpha=0.5, **given)["returns"]
    assert_close(by_length, learnt(window, lam=0.0, **given)["returns"], rtol=1e-12, atol=1e-12)


def test_macro_actions_by_perplexity_end_where_it_rises():
    window = window_of([7, 1, 5, 2])
    found = learnt(window, beta=0.1, macro_actions="perplexity")
    begin = 0
    for n in (7, 1, 5, 2):
        own = slice(begin, begin + n)
        logp, returns = found["ref_logp"][own].tolist(), found["returns"][own].tolist()
        for t in range(1, n):
            assert (returns[t] == returns[t - 1]) == (logp[t] >= logp[t - 1])
        begin += n


SHORT = ["--per_device_train_batch_size", "16", "--learning_rate", "1e-2", "--max_steps", "2"]


@pytest.fixture
def windows(monkeypatch):
    """Those of the runs of a test."""
    seen: dict[int, Window] = {}
    paid = Window.paid
    monkeypatch.setattr(Window, "paid", lambda self: paid(seen.setdefault(id(self), self)))
    yield seen.values()
    assert seen


@pytest.mark.parametrize("reward", ["w7_of_tokens", "w7_of_text"])
def test_the_same_tokens_are_paid(online_run, windows, reward):
    """A run of PPO: where w7 stands, and half of it by the weight."""
    more = ["--reward_weights", "0.5", "--missing_eos_penalty", "1"]
    online_run("ppo", "out", *SHORT, *more, reward=reward)
    for window in windows:
        assert window.token_rewards is not None
        for completion, paid in zip(window.completions, window.paid(), strict=True):
            np.testing.assert_allclose(paid, (completion.tokens == 13) / 12)
        sums = torch.tensor([p.sum() for p in window.paid()])
        assert_close(window.rewards, sums - 1.0 * ~window.finished)


def test_turns_are_paid_at_their_ends(online_run, windows):
    """Beside a function that pays tokens, weighted."""
    talk = ["--environment", f"{REWARDS}:Echo", "--max_completion_length", "3"]
    online_run("ppo", "out", *SHORT, *talk, "--reward_weights", "2", reward="w7_of_tokens")
    for window in windows:
        for completion, paid in zip(window.completions, window.paid(), strict=True):
            episode = completion.episode
            assert episode is not None
            wanted = (completion.tokens == 13) / 3
            ends = episode.own.cumsum()[episode.ends - 1] - 1
            wanted[ends] += episode.rewards
            np.testing.assert_allclose(paid, wanted)
        assert_close(window.rewards, torch.tensor([p.sum() for p in window.paid()]))


@pytest.mark.parametrize("command", ["grpo", "raft"])
def test_others_learn_from_the_sum(online_run, command):
    dense = online_run(command, "dense", *SHORT, reward="w7_of_text")
    whole = online_run(command, "whole", *SHORT, reward="share_of_w7")
    for one, other in zip(dense, whole, strict=True):
        assert_close(one.get("loss"), other.get("loss"))
        assert_close(one.get("reward"), other.get("reward"))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--reward_combination", "normalized_sum"], "--reward_combination: wanted sum"),
        (
            ["--win_rates", "--num_generations", "2"],
            "--reward_combination: wanted sum, and no --win",
        ),
        (["--macro_actions", "ngram", "--macro_size", "0"], "--macro_size: wanted 1 or more"),
        (
            ["--macro_actions", "ngram", "--turn_values", "--environment", f"{REWARDS}:Echo"],
            "--macro_actions: wanted none with turn_values",
        ),
    ],
)
def test_mistakes_are_told(online_run, more, words, capsys):
    with pytest.raises(SystemExit) as exit:
        online_run("ppo", "out", *SHORT, *more, reward="w7_of_text")
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


@FULL
@pytest.mark.parametrize(
    "reward, more",
    [
        ("w7_of_tokens", ["--gamma", "0"]),
        ("w7_of_text", ["--gamma", "0"]),
        ("share_of_w7", ["--macro_actions", "ngram", "--macro_size", "3"]),
        ("w7_of_tokens", ["--macro_actions", "perplexity"]),
    ],
)
def test_what_tokens_are_worth_is_learnt(online_run, reward, more):
    """At gamma 0 a token learns from its own reward alone, so each must have had it."""
    lines = online_run("ppo", "out", *LEARN, "80", "--beta", "0", *more, reward=reward)
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert rewards[0] < 0.2 and sum(rewards[-2:]) / 2 >= 0.95


@FULL
def test_a_reward_at_the_end_teaches_little_without_a_future(online_run):
    options = [*LEARN, "80", "--beta", "0", "--gamma", "0"]
    lines = online_run("ppo", "out", *options, reward="share_of_w7")
    assert [x["reward"] for x in lines if "reward" in x][-1] < 0.5


def test_resume_is_straight_through(online_run, tmp_path):
    """With successes that are replayed, what their tokens were paid included."""
    more = [*SHORT[:-1], "6", "--num_iterations", "1", "--num_generations", "2"]
    more += ["--replay_success", "0.3", "--macro_actions", "ngram", "--macro_size", "2"]
    straight = online_run("ppo", "straight", *more, reward="w7_of_tokens")
    online_run("ppo", "broken", *more, "--save_steps", "4", reward="w7_of_tokens")
    place = str(tmp_path / "broken/checkpoint-4")
    options = [*more, "--resume_from_checkpoint", place]
    resumed = online_run("ppo", "broken", *options, reward="w7_of_tokens")
    assert max(x["sampling/replayed"] for x in straight[4:]) > 0
    for key in ("loss", "reward", "value_loss", "grad_norm", "sampling/replayed"):
        assert [x.get(key) for x in resumed] == [x.get(key) for x in straight]
