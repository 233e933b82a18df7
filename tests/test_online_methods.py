"""Online methods beyond plain policy gradients: who samples, who is the reference, what is held."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from online_runs import FULL, LEARN, REWARDS, online_config
from safetensors.torch import load_file
from tiny import scorer_of, tiny_model
from torch.testing import assert_close

from prefuse.trainer import loop
from prefuse.trainer.batch import pack
from prefuse.trainer.dist import Ranks
from prefuse.trainer.experience import Window
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.extragradient import Extragradient
from prefuse.trainer.learners.pairs import pairs
from prefuse.trainer.learners.policy import policy
from prefuse.trainer.learners.ppo import ppo, ppo_method
from prefuse.trainer.online_config import GRPOConfig, NashMDConfig, OnlineDPOConfig, PPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.replay import Replay
from prefuse.trainer.report import Meter
from prefuse.trainer.rollout import Completion

NAN = float("nan")
ALONE = Ranks(0, 1, torch.device("cpu"))

DNO = ["--loss_type", "mmpo", "--win_rates", "--preference", "larger", "--num_generations", "8"]
METHODS = [
    pytest.param("nash-md", "60", ["--beta", "0.001", "--num_generations", "4"], marks=FULL),
    pytest.param("online-dpo", "40", ["--loss_type", "xpo", "--num_generations", "2", "--beta",
                 "0.1"], marks=FULL),
    pytest.param("online-dpo", "40", ["--loss_type", "inpo", "--eta", "0.1", "--tau", "0.01",
                 "--num_generations", "8"], marks=FULL),
    pytest.param("online-dpo", "60", ["--loss_type", "egpo", "--num_generations", "4", "--beta",
                 "0.02", "--extragradient"], marks=FULL),
    pytest.param("online-dpo", "40", [*DNO, "--reanchor", "--beta", "1"], marks=FULL),
    pytest.param("reinforce", "40", ["--advantage", "remax", "--loss_type", "reinforce", "--beta",
                 "0", "--num_generations", "4"], marks=FULL),
    pytest.param("rloo", "40", ["--win_rates", "--beta", "0", "--num_generations", "8"],
                 marks=FULL),
]  # fmt: skip


@pytest.mark.parametrize("seed", ["1", "2", "3"])
@pytest.mark.parametrize("command, steps, more", METHODS)
def test_the_best_answer_is_found(online_run, command, steps, more, seed):
    lines = online_run(command, "out", *LEARN, steps, "--seed", seed, *more)
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert rewards[0] < 0.2
    assert sum(rewards[-2:]) / 2 >= 0.95


def window_of(rewards: list[list[float]], others: list[list[float]] | None = None) -> Window:
    """Groups of completions with these rewards, three tokens long but the first."""
    each, rng = len(rewards[0]), np.random.default_rng(0)
    prompts = [Prompt(i, np.arange(3, 5 + i), "", {}, f"row {i}") for i in range(len(rewards))]

    def completions(count: int) -> list[Completion]:
        lengths = [1, *[3] * (count - 1)]
        return [Completion(rng.integers(3, 40, n), np.zeros(n, np.float32), True) for n in lengths]

    window = Window(prompts, completions(each * len(rewards)), each, micro_rows=each)
    window.rewards = torch.tensor(rewards, dtype=torch.float64).flatten()
    window.parts = window.rewards[:, None]
    if others is not None:
        count = len(others[0])
        window.others = Window(prompts, completions(count * len(others)), count, count)
        window.others.rewards = torch.tensor(others, dtype=torch.float64).flatten()
    return window


def at_starts(window: Window, name: str) -> list[float]:
    return window.column(name)[window.cu_seqlens[:-1].long()].tolist()


def test_nash_compares_with_the_mixture_and_takes_the_kl_still_to_come():
    window = window_of([[1.0, 0.0], [0.5, 0.5]], others=[[0.0, 0.5], [0.5, 1.0]])
    config = online_config(NashMDConfig, num_generations=2, per_device_train_batch_size=4, beta=0.5)
    logp, ref = torch.linspace(-3, 0, 10), torch.linspace(-1, -2, 10)
    window.set("old_logp", logp)
    window.set("ref_logp", ref)
    policy(config, Controls(0.5), lambda x: x).batches(window, 0)
    wins = [(1 + 1) / 2, (0.5 + 0) / 2, (0.5 + 0) / 2, (0.5 + 0) / 2]
    bounds, kl = window.cu_seqlens.tolist(), (logp - ref).tolist()
    for i, win in enumerate(wins):
        for t in range(bounds[i], bounds[i + 1]):
            wanted = win - 0.5 - 0.5 * sum(kl[t : bounds[i + 1]])
            assert_close(float(window.column("advantages")[t]), wanted, rtol=1e-5, atol=1e-6)


def test_remax_takes_off_the_greedy_reward():
    window = window_of([[1.0, 0.0], [0.5, 0.25]], others=[[0.25], [1.0]])
    config = online_config(GRPOConfig, advantage="remax", num_generations=2, loss_type="reinforce")
    policy(config, Controls(), lambda x: x).batches(window, 0)
    assert_close(at_starts(window, "advantages"), [0.75, -0.25, -0.5, -0.75])


@pytest.mark.parametrize("name", ["remax", "spo"])
def test_what_nothing_was_compared_with_teaches_nothing(name):
    """A greedy completion without a reward; a completion alone with its reward."""
    window = window_of(
        [[1.0, NAN], [0.5, 0.25]], others=[[NAN], [1.0]] if name == "remax" else None
    )
    config = online_config(GRPOConfig, advantage=name, num_generations=2, loss_type="reinforce")
    policy(config, Controls(), lambda x: x).batches(window, 0)
    second = [-0.5, -0.75] if name == "remax" else [0.5, -0.5]
    assert_close(at_starts(window, "advantages"), [0.0, 0.0, *second])


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "ppo"])
def test_what_was_not_judged_does_not_whiten_the_others(name):
    window, without = window_of([[1.0, 2.0], [3.0, NAN]]), window_of([[1.0], [2.0], [3.0]])
    without.completions = window.completions[:3]
    for given in (window, without):
        given.set("values", torch.zeros(int(given.cu_seqlens[-1])))
        given.set("old_logp", torch.zeros(int(given.cu_seqlens[-1])))
        if name == "ppo":
            config = online_config(PPOConfig, beta=0.0)
            learner = ppo(config, ppo_method(config, Controls()), Controls(), lambda x: x)
        else:
            config = online_config(GRPOConfig, advantage=name, per_device_train_batch_size=8)
            learner = policy(config, Controls(), lambda x: x)
        learner.batches(given, 0)
    wanted = without.column("advantages")
    assert wanted.abs().max() > 0.5
    assert_close(window.column("advantages"), torch.cat([wanted, torch.zeros(3)]))


def test_costs_weigh_against_rewards():
    window = window_of([[1.0, 0.0], [0.0, 1.0]])
    window.costs = torch.tensor([2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    config = online_config(GRPOConfig, advantage="dr_grpo", num_generations=2, cost_funcs=["c"])
    policy(config, Controls(0.0, float(np.log(3.0))), lambda x: x).batches(window, 0)
    wanted = [(0.5 - 3 * 1) / 4, (-0.5 + 3 * 1) / 4, -0.5 / 4, 0.5 / 4]
    assert_close(at_starts(window, "advantages"), wanted)


def judged_pair(loss_type: str, rewards, others=None, **changes):
    config = online_config(
        OnlineDPOConfig, loss_type=loss_type, per_device_train_batch_size=len(rewards[0]),
        num_generations=len(rewards[0]), **changes,
    )  # fmt: skip
    window = window_of(rewards, others)
    window.foreign = len(rewards[0]) // 2 if loss_type == "xpo" else 0
    window.set("old_logp", torch.linspace(-3, 0, int(window.cu_seqlens[-1])))
    return pairs(config, None).batches(window, 0)


def test_a_success_is_replayed_where_none_is_found():
    """For its own prompt, with its tokens and rewards, also from a checkpoint's JSON."""
    window, later = window_of([[0.0, 1.0], [0.25, 0.5]]), window_of([[0.0, 0.0], [0.0, 0.25]])
    replay = Replay(1.0, ALONE)
    assert float(replay(window)["sampling/replayed"].total) == 0
    replay.stored = json.loads(json.dumps(replay.stored))
    assert float(replay(later)["sampling/replayed"].total) == 1
    assert later.rewards.tolist() == [0.0, 1.0, 0.0, 0.25] == later.parts[:, 0].tolist()
    assert np.array_equal(later.completions[1].tokens, window.completions[1].tokens)
    assert np.isnan(later.completions[1].logp).all()
    assert later.informative().tolist() == [True, True]


def test_xpo_meets_what_the_reference_sampled():
    """Of 4 completions the last two are the reference's; who sampled the better is told."""
    (batch,) = judged_pair("xpo", [[1.0, 0.0, 0.5, 0.25]])
    assert [(e.judged, len(e.sequences)) for e in batch] == [((1.0, 0.0), 2), ((1.0, 1.0), 2)]
    (batch,) = judged_pair("xpo", [[1.0, 0.5, 1.0, NAN]])
    assert [e.judged for e in batch] == [(0.5, 0.0)]


def test_rewards_are_told_of_what_the_policy_sampled(online_run):
    """Half of XPO's completions are the reference's, which does not learn."""
    lines = online_run("online-dpo", "out", *LEARN, "16", "--loss_type", "xpo", "--beta", "0.1")
    assert lines[-1]["reward"] > 0.5 > 0.3 > lines[-1]["reward_others"]


def test_egpo_reads_how_both_fare_against_opponents():
    batch = judged_pair("egpo", [[1.0, 0.5]], [[0.75, 0.5, 0.25]])[0]
    assert_close(batch[0].judged, (1 - (0 + 0.5 + 1) / 3,))


def test_margins_and_preferences_of_pairs():
    given = dict(preference="bradley_terry")
    assert_close(judged_pair("mmpo", [[1.0, 0.0, 3.0]])[0][0].judged, (3.0,))
    (found,) = judged_pair("sppo", [[1.0, 0.0, 3.0]], **given)[0][0].judged
    assert_close(found, float(torch.tensor(3.0).sigmoid()))
    assert judged_pair("sigmoid", [[1.0, 0.0, 3.0]], min_margin=3.5) == [[]]


def test_the_reference_is_what_sampled():
    """reanchor: log-ratios are of the policy now and when it sampled, so 0 before a step."""
    config = online_config(
        OnlineDPOConfig, reanchor=True, num_generations=2, per_device_train_batch_size=4
    )
    config.hyperparameters.update(beta=0.1)
    model = tiny_model()
    scorer = scorer_of(model)
    window, learner = window_of([[1.0, 0.0], [0.0, 1.0]]), pairs(config, None)
    assert learner.scores == ("old_logp",)
    rows = [pack(examples) for examples in window.micro_batches(every=True)]
    with torch.no_grad():
        window.set("old_logp", torch.cat([scorer(batch).logp for batch in rows]))
    meter = Meter(ALONE)
    loop.backward(config, learner.method, scorer, learner.batches(window, 0), ALONE, meter)
    told = meter.read()
    assert_close(told["loss"], float(np.log(2)), rtol=1e-6, atol=0)
    assert_close(told["rewards/margins"], 0.0, rtol=0, atol=1e-6)


def test_an_extragradient_step_begins_where_the_look_ahead_did():
    """Two Adam steps with gradients g1, g2: the second as if the first had never been."""
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    ahead = Extragradient(model, ours)
    seen = []
    for turn in range(3):
        for number in (2 * turn, 2 * turn + 1):
            ahead(number)
            seen.append(model.weight.detach().clone())
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + number)
            ours.step()
        for p in twin.parameters():
            p.grad = torch.full_like(p, 2.0 + 2 * turn)
        theirs.step()
        assert torch.equal(seen[-1], seen[-2])
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


MORE = ["--per_device_train_batch_size", "16", "--learning_rate", "1e-2", "--max_steps", "6"]
RUNS = {
    "refill": ("grpo", ["--filter_zero_std", "--refill", "3", "--num_generations", "2"]),
    "egpo": ("online-dpo", ["--loss_type", "egpo", "--num_generations", "4", "--extragradient"]),
    "kl": ("rloo", ["--beta", "0.1", "--kl_target", "0.5", "--kl_horizon", "32"]),
    "replay": ("grpo", ["--replay_success", "0.3", "--num_generations", "2"]),
    "cost": ("rloo", ["--cost_funcs", "COSTS", "--cost_limit", "0.2", "--beta", "0"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_straight_through(online_run, tmp_path, name):
    command, more = RUNS[name]
    options = [*MORE, *[COST if x == "COSTS" else x for x in more]]
    straight = online_run(command, "straight", *options)
    online_run(command, "broken", *options, "--save_steps", "4")
    place = str(tmp_path / "broken/checkpoint-4")
    resumed = online_run(command, "broken", *options, "--resume_from_checkpoint", place)
    for key in ("loss", "reward", "grad_norm", "kl_coef", "cost_multiplier"):
        assert [x.get(key) for x in resumed] == [x.get(key) for x in straight]
    wanted, got = (load_file(tmp_path / n / "model.safetensors") for n in ("straight", "broken"))
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


COST = f"{Path(__file__).with_name('online_rewards.py')}:share_of_w7"


def test_the_gap_is_between_engine_and_trainer(online_run):
    """At later passes too, when the policy has moved away from what sampled; and a critic needs no
    group, so that none is called empty."""
    options = [*MORE, "--num_iterations", "3", "--num_mini_batches", "2"]
    lines = online_run("ppo", "out", *options)
    assert max(x["sampling/logp_difference"] for x in lines) < 1e-5
    assert max(x["policy/approx_kl"] for x in lines) > 1e-3
    assert not any("frac_reward_zero_std" in x for x in lines)


def test_refills_take_the_place_of_groups_without_a_signal(online_run):
    options = [*MORE, "--num_generations", "2", "--filter_zero_std", "--learning_rate", "0"]
    options += ["--max_steps", "3"]
    alone = online_run("grpo", "alone", *options)
    filled = online_run("grpo", "filled", *options, "--refill", "8")
    assert min(x["frac_reward_zero_std"] for x in alone) > 0
    for short, full in zip(alone, filled, strict=True):
        assert short["completions/trained_on"] < full["completions/trained_on"] == 1.0


def test_the_multiplier_follows_the_cost():
    """ln lambda + rate lambda (mean cost - limit), the mean a moving one, lambda at most 5."""
    window = window_of([[1.0, 0.0], [0.0, 1.0]])
    config = online_config(
        GRPOConfig, cost_funcs=["c"], cost_limit=0.5, cost_decay=0.75, multiplier_rate=0.1
    )
    controls, mean, log = Controls(0.0, float(np.log(2.0))), None, float(np.log(2.0))
    for cost in ([2.0, 0.0, 2.0, NAN], [0.0] * 4, [1e3] * 4):
        window.costs = torch.tensor(cost, dtype=torch.float64)
        known = [c for c in cost if c == c]
        now = sum(known) / len(known)
        mean = now if mean is None else 0.75 * mean + 0.25 * now
        log = min(log + 0.1 * np.exp(log) * (mean - 0.5), np.log(5.0))
        told = controls.adjust(config, window, ALONE)
        assert_close(controls.log_multiplier, float(log))
        assert_close(float(told["cost_multiplier"]), float(np.exp(log)))


@pytest.mark.full
@pytest.mark.parametrize("command", ["rloo", "ppo"])
def test_a_heavy_cost_wins(online_run, command):
    """Reward and cost are the same number: its weight says which of them is learnt."""
    options = [*LEARN, "40", "--multiplier_rate", "1e-6", "--beta", "0", "--cost_funcs", COST]
    costs = []
    for weight in ("0.2", "4"):
        lines = online_run(command, f"at {weight}", *options, "--multiplier_init", weight)
        costs.append([x["cost"] for x in lines if "cost" in x])
    assert costs[0][0] < 0.6 < costs[0][-1]
    assert sum(costs[1][-4:]) < 0.5 * sum(costs[1][:4])


@pytest.mark.full
def test_the_kl_is_held_at_its_target(online_run):
    steps = [*LEARN, "80", "--kl_target", "2", "--kl_horizon", "300", "--beta", "0.05"]
    lines = online_run("rloo", "out", *steps, "--num_generations", "8")
    last = [x["sequence_kl"] for x in lines[-20:]]
    assert 1 < sum(last) / len(last) < 3.5
    assert lines[-1]["kl_coef"] > 0.05


def test_thresholds_of_rests_passes(online_run):
    options = [*MORE, "--num_iterations", "2", "--min_reward", "0", "0.1", "--keep_best", "8"]
    lines = online_run("raft", "out", *options, "--learning_rate", "0")
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        assert first["num_tokens"] > second["num_tokens"] > 0


def test_the_reward_of_z_scores_is_told_as_their_sum(online_run):
    """A mean of z-scores is 0, and the z-score of a held-out prompt's one completion."""
    options = ["--per_device_train_batch_size", "16", "--max_steps", "1", "--eval_on_start"]
    options += ["--reward_combination", "normalized_sum", "--eval_fraction", "0.5"]
    options += ["--reward_funcs", f"{REWARDS}:even", f"{REWARDS}:share_of_w7"]
    before, line = online_run("grpo", "out", *options, "--reward_weights", "1", "3", reward=None)
    parts = line["rewards/even/mean"] + 3 * line["rewards/share_of_w7/mean"]
    assert_close(line["reward"], parts)
    assert line["reward_std"] > 0 and before["eval_reward"] > 0


def test_held_out_prompts_are_sampled(online_run, tmp_path):
    options = [*LEARN, "16", "--eval_fraction", "0.2", "--eval_strategy", "steps"]
    lines = online_run("grpo", "out", *options, "--eval_steps", "8", "--eval_on_start")
    rewards = [x["eval_reward"] for x in lines if "eval_reward" in x]
    assert len(rewards) == 3 and rewards[0] < 0.3 < 0.6 < rewards[-1]
    rows = (tmp_path / "out" / "eval_samples.jsonl").read_text().splitlines()
    trained = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    seen = {json.loads(r)["prompt"] for r in trained}
    assert not seen & {json.loads(r)["prompt"] for r in rows}


@pytest.mark.parametrize(
    "command, more, wanted",
    [
        ("nash-md", ["--engine", "transformers"], "--engine"),
        ("nash-md", ["--mixture_coef", "1"], "--mixture_coef: wanted a number between 0 and 1"),
        (
            "online-dpo",
            ["--loss_type", "xpo", "--num_generations", "4", "--reanchor"],
            "--reanchor",
        ),
        ("online-dpo", ["--loss_type", "egpo"], "--num_generations: wanted 3 or more"),
        ("online-dpo", ["--extragradient"], "--extragradient: wanted --loss_type egpo"),
        (
            "online-dpo",
            ["--loss_type", "cpo", "--sync_ref_model"],
            "--sync_ref_model: wanted a run",
        ),
        ("grpo", ["--refill", "2"], "--refill: wanted 0, or filter_zero_std"),
        (
            "grpo",
            ["--kl_target", "2"],
            "--kl_target: wanted a positive number, with a positive beta",
        ),
        (
            "ppo",
            ["--reward_combination", "normalized_sum"],
            "--reward_combination: wanted sum or min with one",
        ),
        (
            "nash-md",
            ["--reward_combination", "normalized_sum", "--num_generations", "2"],
            "--reward_combination: wanted sum or min, for rewards are compared",
        ),
        ("grpo", ["--cost_funcs", COST, "--advantage", "spo"], "--cost_funcs: wanted an advantage"),
        ("raft", ["--min_reward", "0", "1"], "--min_reward: wanted one number, or one for each"),
    ],
)
def test_mistakes_are_told(online_run, command, more, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        online_run(command, "out", "--max_steps", "1", "--per_device_train_batch_size", "16", *more)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err


ECHO = f"{Path(__file__).with_name('online_rewards.py')}:Echo"
TALK = ["--environment", f"{ECHO}?pay=0.5", "--max_completion_length", "3"]


@pytest.mark.parametrize("command, more", [("grpo", []), ("ppo", ["--turn_values"])])
def test_the_policy_talks_to_environments(online_run, tmp_path, command, more):
    """Two turns of three tokens; what the environment says is context, not trained on."""
    options = ["--per_device_train_batch_size", "16", "--max_steps", "2", *TALK, *more]
    lines = online_run(command, "out", *options, reward=None)
    assert lines[0]["completions/mean_length"] <= 6 and lines[0]["sampling/logp_difference"] < 1e-5
    rows = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        first, second = row["completion"].split(" w1 :")
        said = [turn.removesuffix(" w2 :").split().count("w7") for turn in (first, second)]
        assert_close(row["rewards"], {"environment": sum(said) / 6})


@pytest.mark.full
@pytest.mark.parametrize(
    "command, steps, more", [("grpo", "25", []), ("ppo", "80", ["--turn_values"])]
)
def test_turns_are_learnt(online_run, command, steps, more):
    lines = online_run(command, "out", *LEARN, steps, "--beta", "0", *TALK, *more, reward=None)
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert rewards[0] < 0.2 and sum(rewards[-2:]) / 2 >= 0.95


RECIPES = Path(__file__).parents[1] / "recipes"
ONLINE = sorted(p.stem for p in RECIPES.glob("*.yaml") if "REWARD" in p.read_text())
QUICK = ("dapo", "safe_rlhf", "egpo", "rest", "abc", "prm_code")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else FULL) for n in ONLINE]
)
def test_recipes_run(online_train, online_judge, name):
    """Two updates, of batches cut down to a group or two; rewards are more than `even`."""
    steps, dense = f"{online_judge}?credit=steps", f"{REWARDS}:w7_of_text"
    more = {
        "safe_rlhf": ["--cost_funcs", COST],
        "abc": ["--reward_funcs", f"{online_judge}?credit=attention&beta=0.8"],
        "fine_grained": ["--reward_funcs", dense, steps, "--reward_weights", "1", "0.5", "0.3"],
        "rso": ["--rso_eta", "2"],  # at 0.5 it takes more than two groups to see a pair
        "intuitor": ["--per_device_train_batch_size", "14"],  # its groups are of 7
        "prm_code": ["--reward_funcs", steps, "--critic_model_name_or_path", online_judge],
    }
    lines = online_train(RECIPES / f"{name}.yaml", *more.get(name, ()))
    assert max(x["grad_norm"] for x in lines) > 0
