"""Preference functions and the policy's own signals as feedback of online runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import longer, responses
from online_runs import FULL, LEARN, PROMPTS, REWARDS
from tiny import (
    alone_and_on_two,
    in_float64,
    scorer_of,
    tiny_model,
    tiny_tokenizer,
    write_rows,
)
from torch.testing import assert_close

from prefuse.trainer.cli import main
from prefuse.trainer.config import updated
from prefuse.trainer.dist import Ranks
from prefuse.trainer.errors import UserError
from prefuse.trainer.experience import Window
from prefuse.trainer.feedback.preferences import bradley_terry, load_preference
from prefuse.trainer.judging import Judge, functions
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.pairs import pairs
from prefuse.trainer.learners.policy import policy
from prefuse.trainer.online_config import GRPOConfig, NashMDConfig, OnlineDPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.report import Meter
from prefuse.trainer.rewards import Feedback
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
    config = updated(config, output_dir=str(tmp_path))
    meter, report = Meter(ALONE), Lines()
    scorer = scorer_of(model if model is not None else tiny_model())
    given = functions(config), ALONE, report, meter, scorer
    judge = Judge(config, tiny_tokenizer(), *given)  # pyright: ignore[reportArgumentType]
    judge.judge(window, 1)
    return window, meter.read(), report


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


def test_wins_stay_with_their_prompts(tmp_path):
    """As prompts are left out, and others sampled in their place."""
    config = config_of(GRPOConfig, preference_func=RPS, advantage="spo", num_generations=2,
                       per_device_train_batch_size=4)  # fmt: skip
    groups = [[ROCK], [ROCK]], [[PAPER], [ROCK]], [[PAPER], [SCISSORS]]
    first, *_ = judged(config, window_of(*groups[:2]), tmp_path)
    second, *_ = judged(config, window_of(*groups[2:]), tmp_path)
    both = first.joined(second)
    assert both.informative().tolist() == [False, True, True]
    assert_close(advantages(both.taken([1, 2]), config), [0.5, -0.5, -0.5, 0.5])


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


def test_a_saved_reward_model_prefers_by_its_rewards(online_judge):
    pair = ["w1 :"], ["w2 w3"], ["w4"]
    asked = Feedback([load_preference(online_judge)])
    found = asked(pair[0], pair[1], [[1]], {"opponents": pair[2]}, ["row 0"]).rewards
    model = Feedback([online_judge])
    rewards = model(pair[0] * 2, pair[1] + pair[2], [[1]] * 2, {}, ["row 0"] * 2).rewards[:, 0]
    assert 0.01 < abs(rewards[0] - rewards[1])
    assert_close(float(found[0, 0]), 1 / (1 + math.exp(rewards[1] - rewards[0])))


@pytest.mark.parametrize("ask", ["", '&ask=constitution&principles=["Be long."]'])
def test_a_judge_compares_both_orders_of_what_is_asked(serve, tmp_path, ask):
    """It calls the longer better, but the first of a pair with w6 in it."""

    def reply(question, nth):
        return "Verdict: A" if "w6" in question else longer(question, nth)

    server = serve(reply)
    spec = f"judge?base_url={server.url}&model=m&cache={tmp_path / 'answers'}{ask}"
    config = config_of(GRPOConfig, preference_func=spec, num_generations=3,
                       per_device_train_batch_size=3)  # fmt: skip
    window, told, _ = judged(config, window_of([[ROCK, ROCK], [PAPER], [SCISSORS]]), tmp_path)
    wanted = torch.tensor([[[0.5, 1, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0.5]]], dtype=torch.float64)
    assert_close(window.wins, wanted)
    assert len(server.seen) == 6 and told["judge/order_matters"] == pytest.approx(2 / 3)
    assert {tuple(responses(body["messages"][0]["content"])) for body, *_ in server.seen} == {
        (a, b) for a in ("w4 w4", "w5", "w6") for b in ("w4 w4", "w5", "w6") if a != b
    }


def certainty_by_hand(model, prompt: list[int], completion: list[int]) -> float:
    tokens = torch.tensor([*prompt, *completion])
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        logits = model(input_ids=tokens[None], cu_seq_lens_q=bounds, use_cache=False).logits[0]
    p = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float((-math.log(p.shape[1]) - p).mean())  # sum over V of (1/V) (log 1/V - log p)


def test_self_certainty_is_the_kl_from_uniform_to_the_policy(tmp_path):
    """Beside a reward, with weights, in the order of the flags; an empty completion has none."""
    model = in_float64(tiny_model(seed=4))
    funcs = ["length?target=0&scale=1", "self_certainty", "length?target=1&scale=1"]
    config = config_of(GRPOConfig, reward_funcs=funcs, reward_weights=[0.5, 2.0, 0.25],
                       num_generations=2, per_device_train_batch_size=4)  # fmt: skip
    groups = [[ROCK, 20, 30], [PAPER]], [[SCISSORS, 9], []]
    window, told, _ = judged(config, window_of(*groups), tmp_path, model)
    certainty = [
        certainty_by_hand(model, window.prompt_of(i).tokens.tolist(), c.tokens.tolist())
        for i, c in enumerate(window.completions[:3])
    ]
    assert min(certainty) > 0.01
    assert_close(window.parts[:3, 1].tolist(), certainty, rtol=1e-9, atol=0)
    assert window.parts[3, 1].isnan()
    lengths = [3, 1, 2, 0]
    assert window.parts[:, 0].tolist() == [-n for n in lengths]
    assert window.parts[:, 2].tolist() == [-abs(n - 1) for n in lengths]
    wanted = -0.5 * 3 + 2 * certainty[0] - 0.25 * 2
    assert_close(float(window.rewards[0]), wanted, rtol=1e-9, atol=0)
    assert_close(told["rewards/self_certainty/mean"], sum(certainty) / 3, rtol=1e-9, atol=0)


TEMPLATE = "w30 {question} w31 {answer} w32"


@pytest.mark.parametrize("chat", [False, True])
def test_own_verdicts_are_odds_of_yes(tmp_path, chat):
    model, tokenizer = in_float64(tiny_model(seed=4)), tiny_tokenizer()
    spec = f"own_verdict?template={TEMPLATE}&yes=w1 w3&no=w1 w2"  # they differ in the second
    config = config_of(GRPOConfig, reward_funcs=[spec], num_generations=2,
                       per_device_train_batch_size=4)  # fmt: skip
    window = window_of([[ROCK, 20], [PAPER]], [[SCISSORS], [ROCK] * 128])
    said = ["w4 w14", "w5", "w6"]
    for i, prompt in enumerate(window.prompts):
        given = [{"role": "user", "content": f"w{i}"}] if chat else f"w{i}"
        window.prompts[i] = prompt._replace(prompt=given)
    window, told, _ = judged(config, window, tmp_path, model)
    for i, (answer, number) in enumerate(zip(said, (0, 0, 1), strict=True)):
        question = f"user: w{number}" if chat else f"w{number}"
        asked = f"w30 {question} w31 {answer} w32"
        asked = f"user : {asked} assistant : w1" if chat else f"{asked} w1"
        tokens = torch.tensor([tokenizer(asked)["input_ids"]])
        bounds = torch.tensor([0, tokens.shape[1]], dtype=torch.int32)
        with torch.no_grad():
            p = model(input_ids=tokens, cu_seq_lens_q=bounds).logits[0, -1].softmax(-1)
        assert_close(float(window.rewards[i]), float(p[9] / (p[9] + p[8])), rtol=1e-9, atol=0)
    assert window.rewards[3].isnan() and told["own_verdict/too_long"] == 0.25
    assert window.kept.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--preference_func", "gsm8k"], "gsm8k: wanted f(prompts, completions, opponents"),
        (["--preference_func", f"{PREFERENCES}:nobody"], "there is no 'nobody' in it"),
        (["--preference_func", "juge"], "no such reward; did you mean judge?"),
        (["--preference_func", RPS, "--num_generations", "1"], "--num_generations: wanted 2"),
        (["--preference_func", RPS, "--eval_fraction", "0.2", "--eval_strategy", "steps"],
         "--eval_strategy: wanted no, or a --reward_funcs"),
        (["--preference_func", RPS, "--replay_success", "1"], "--replay_success: wanted rewards"),
        (["--preference_func", RPS, "--reward_funcs", "gsm8k"], "nothing reads it beside rewards"),
        (["--preference_func", RPS, "--advantage", "remax"], "--advantage: remax takes off"),
        ([], "--reward_funcs: wanted a reward"),
        (["--reward_funcs", "self_certainty?temperature=2"], "self_certainty: wanted no options"),
        (["--reward_funcs", "own_verdict?yes=1"], "own_verdict: wanted options template, yes, no"),
        (["--reward_funcs", "own_verdict?template={x}&yes=w1"], "own_verdict: wanted a template"),
        (["--reward_funcs", "own_verdict"], "words that the tokenizer tells apart; got 'yes'"),
        (["--cost_funcs", "own_verdict", "--reward_funcs", "length"], "no such reward"),
    ],
)  # fmt: skip
def test_mistakes_are_told(online_run, more, wanted, capsys):
    options = ["--max_steps", "1", "--per_device_train_batch_size", "16", *more]
    with pytest.raises(SystemExit) as exit:
        online_run("grpo", "out", *options, reward=None)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err


def test_a_second_run_asks_nothing(online_run, tmp_path, monkeypatch):
    """Rewards, costs and preferences; a folder is as good as a file. A changed option is asked."""
    counts = tmp_path / "asked"
    monkeypatch.setenv("ASKED", str(counts))
    options = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--win_rates"]
    options += ["--preference_func", f"{PREFERENCES}:counted_preference"]
    options += ["--cost_funcs", f"{PREFERENCES}:counted_cost", "--num_generations", "4"]
    options += ["--reward_cache", str(tmp_path / "cache")]
    spec = f"{PREFERENCES}:counted"

    def run(name: str, reward: str) -> list[tuple]:
        counts.write_text("")
        lines = online_run("grpo", name, *options, "--reward_funcs", reward, reward=None)
        return [(x["loss"], x["reward"], x["cost"]) for x in lines]

    first = run("first", spec)
    assert {*counts.read_text().split()} == {"reward", "cost", "preference"}
    assert run("second", spec) == first and counts.read_text() == ""
    assert (tmp_path / "cache" / "rewards.sqlite").is_file()
    run("third", f"{spec}?scale=2")
    assert {*counts.read_text().split()} == {"reward"}


def test_a_run_by_preferences_alone_is_reported(online_run, tmp_path):
    """Its reward is 1/2 by construction, which is no lack of progress; failures are counted."""
    options = ["--preference_func", f"{PREFERENCES}:not_finite", "--reward_failure", "skip"]
    options += ["--per_device_train_batch_size", "16", "--max_steps", "2"]
    lines = online_run("grpo", "out", *options, reward=None)
    assert all(x["reward"] == 0.5 and x["preferences/failed"] == 0 for x in lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Preferences failed in 0 of 2 logged steps." in page and "Reward went from" not in page


def test_intuitors_recipe_runs(online_model, tmp_path):
    argv = ["train", str(Path(__file__).parents[1] / "recipes" / "intuitor.yaml")]
    argv += ["--model_name_or_path", online_model, "--output_dir", str(tmp_path / "out")]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--max_steps", "2"]
    argv += ["--per_device_train_batch_size", "14", "--gradient_accumulation_steps", "1"]
    argv += ["--max_completion_length", "6", "--logging_steps", "1", "--bf16", "false"]
    main([*argv, "--disable_tqdm", "--eval_fraction", "0.1", "--eval_on_start"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    start, first, *_ = (json.loads(line) for line in lines)
    assert start["eval_reward"] > 0 and first["grad_norm"] > 0
    assert first["reward"] == first["rewards/self_certainty/mean"]


@FULL
def test_two_ranks_read_the_policy_together(online_model, tmp_path):
    """Also where one of them has no held-out prompt, and nothing to read."""
    argv = ["grpo", "--model_name_or_path", online_model, "--max_completion_length", "6"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--disable_tqdm"]
    argv += ["--reward_funcs", "self_certainty", "own_verdict?yes=w1&no=w2", "--max_steps", "2"]
    argv += ["--logging_steps", "1", "--bf16", "false", "--per_device_train_batch_size", "8"]
    argv += ["--eval_fraction", "0.03", "--eval_on_start", "--output_dir"]
    found = alone_and_on_two(argv, tmp_path)
    assert found[0][0]["eval_reward"] > 0
    for one, two in zip(*found, strict=True):
        for key in one.keys() & {"loss", "grad_norm", "eval_reward", "rewards/own_verdict/mean"}:
            assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, msg=key)


WINS = ["--preference_func", f"{PREFERENCES}:w7_wins", *LEARN]
LEARNERS = [
    ("rloo", "30", ["--beta", "0", "--num_generations", "8"]),
    ("nash-md", "60", ["--beta", "0.001", "--num_generations", "4"]),
    ("online-dpo", "40", ["--loss_type", "sppo", "--reanchor", "--beta", "1",
                          "--num_generations", "8"]),
    ("online-dpo", "40", ["--loss_type", "mmpo", "--reanchor", "--beta", "1",
                          "--num_generations", "8"]),
    ("online-dpo", "60", ["--loss_type", "egpo", "--num_generations", "4", "--beta", "0.02",
                          "--extragradient"]),
    ("online-dpo", "40", ["--loss_type", "xpo", "--num_generations", "2", "--beta", "0.1"]),
    ("raft", "30", []),
]  # fmt: skip


@FULL
@pytest.mark.parametrize("seed", ["1", "2", "3"])
@pytest.mark.parametrize("command, steps, more", LEARNERS)
def test_what_wins_is_learnt(online_run, tmp_path, command, steps, more, seed):
    online_run(command, "out", *WINS, steps, "--seed", seed, *more, reward=None)
    rows = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    every = 2 if "xpo" in more else 1  # of a pair the second is the reference's
    shares = [row["completion"].split().count("w7") / 6 for row in rows[::every]]
    assert np.mean(shares[:8]) < 0.25 and np.mean(shares[-8:]) >= 0.95


@FULL
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_nash_md_mixes_what_goes_in_a_circle(online_run, tmp_path, seed):
    """Rock, paper and scissors beat all other words: what is learnt plays each of the three."""
    options = ["--preference_func", f"{PREFERENCES}:circle", *LEARN, "120", "--seed", seed]
    options += ["--beta", "0.1", "--learning_rate", "3e-3", "--num_generations", "4"]
    options += ["--max_completion_length", "1", "--log_completions", "64"]
    online_run("nash-md", "out", *options, reward=None)
    rows = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    words = [row["completion"].strip() for row in rows if row["step"] > 60]
    shares = [words.count(word) / len(words) for word in ("w4", "w5", "w6")]
    assert sum(shares) > 0.85 and min(shares) > 0.15 and max(shares) < 0.55
