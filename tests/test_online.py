"""Online runs of tiny models: they learn a task whose optimum is known, repeat, and resume."""

import json

import pytest
import torch
from online_runs import FULL, LEARN, PROMPTS, REWARDS
from safetensors.torch import load_file
from tiny import WORDS, alone_and_on_two, needs, tiny_model, write_model, write_rows
from torch.testing import assert_close

COMMANDS = [
    ("grpo", "25", []),
    ("rloo", "30", ["--beta", "0"]),
    pytest.param("ppo", "80", ["--beta", "0"], marks=FULL),
    pytest.param("reinforce", "40", ["--beta", "0"], marks=FULL),
    pytest.param("online-dpo", "40", ["--beta", "0.1", "--num_generations", "8"], marks=FULL),
    pytest.param("raft", "30", [], marks=FULL),
]


@pytest.mark.parametrize("seed", ["1", *(pytest.param(s, marks=FULL) for s in ("2", "3"))])
@pytest.mark.parametrize("command, steps, more", COMMANDS)
def test_the_best_answer_is_found(online_run, command, steps, more, seed):
    """The reward is the share of w7 among six tokens; 1 is the best there is."""
    lines = online_run(command, "out", *LEARN, steps, "--seed", seed, *more)
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert rewards[0] < 0.2
    assert sum(rewards[-2:]) / 2 >= 0.95


@pytest.mark.parametrize("more", [(), ("--num_mini_batches", "2", "--num_iterations", "2")])
def test_without_learning_nothing_moves(online_run, more):
    options = ["--per_device_train_batch_size", "16", "--learning_rate", "0", "--beta", "0.5"]
    lines = online_run("grpo", "out", *options, "--max_steps", "4", "--loss_type", "grpo", *more)
    for line in lines:
        assert_close(line["kl"], 0.0, atol=1e-9, rtol=0)
        assert_close(line["policy/approx_kl"], 0.0, atol=1e-6, rtol=0)
        assert line["sampling/logp_difference"] < 1e-5
        # -mean(A) over sequences: the advantages of a group add up to 0
        assert_close(line["loss"], 0.0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("command", ["grpo", "ppo", "online-dpo", "raft"])
def test_resume_is_straight_through(online_run, tmp_path, command):
    """Prompts, samples, losses and weights, exactly."""
    options = ["--per_device_train_batch_size", "16", "--learning_rate", "1e-2"]
    options += ["--max_steps", "8", "--num_mini_batches", "2", "--num_iterations", "1"]
    straight = online_run(command, "straight", *options)
    online_run(command, "broken", *options, "--save_steps", "3")  # a window ends after step 4
    resumed = online_run(
        command,
        "broken",
        *options,
        "--resume_from_checkpoint",
        str(tmp_path / "broken/checkpoint-3"),
    )
    for name in ("loss", "reward", "grad_norm", "completions/mean_length"):
        assert [x.get(name) for x in resumed] == [x.get(name) for x in straight]
    wanted, got = (load_file(tmp_path / n / "model.safetensors") for n in ("straight", "broken"))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@needs("psutil", "dev")
@pytest.mark.parametrize("command", ["grpo", pytest.param("online-dpo", marks=FULL)])
def test_the_engines_sample_alike(online_run, tmp_path, command):
    """Continuous batching, by name, and the engine that a run has on a CPU; XPO's has two."""
    options = ["--per_device_train_batch_size", "16", "--learning_rate", "1e-2", "--max_steps", "3"]
    options += ["--loss_type", "xpo"] if command == "online-dpo" else []
    lines = [
        online_run(command, name, *options, *more)
        for name, more in (("auto", ()), ("continuous", ("--engine", "transformers")))
    ]
    written = [(tmp_path / n / "samples.jsonl").read_text() for n in ("auto", "continuous")]
    assert written[0] == written[1]
    for one, other in zip(*lines, strict=True):
        assert_close(other["loss"], one["loss"], rtol=1e-4, atol=1e-6)
        assert other.get("sampling/logp_difference", 0.0) < 1e-5  # where both are known


def test_epochs_are_passes_over_the_prompts(online_run):
    """A step has 20 of 32 prompts, so 5 epochs are 8 steps; the first ends in the second."""
    options = ["--per_device_train_batch_size", "40", "--num_generations", "2"]
    options += ["--eval_strategy", "epoch", "--eval_fraction", "0.1"]
    rows = ["--num_train_epochs", "5", "--save_steps", "0"]
    lines = online_run("grpo", "out", *options, *rows)
    epochs = [x["epoch"] for x in lines if "epoch" in x]
    assert_close(epochs, [(i + 1) * 20 / 32 for i in range(8)])
    assert [x["step"] for x in lines if "eval_reward" in x] == [2, 3, 5, 6, 8]


def test_samples_are_written(online_run, tmp_path):
    online_run("grpo", "out", "--max_steps", "2", "--per_device_train_batch_size", "8")
    rows = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    for row in rows:
        share = row["completion"].split().count("w7") / 6
        assert_close(row["reward"], share)
        assert row["rewards"] == {"share_of_w7": row["reward"]}


def test_what_the_models_settings_call_an_end_ends_a_completion(online_run, tmp_path):
    """Chat models end their turns with another token than the tokenizer's EOS."""
    model = tiny_model(seed=3)
    ends = [f"w{i}" for i in range(20)]
    model.generation_config.eos_token_id = [WORDS.index(word) for word in ends]
    more = ["--model_name_or_path", write_model(tmp_path / "model", model), "--max_steps", "2"]
    lines = online_run("grpo", "out", *more, "--per_device_train_batch_size", "16")
    assert lines[0]["completions/clipped_ratio"] < 0.5
    rows = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert not set(row["completion"].split()[:-1]) & {*ends, "</s>"}


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--num_generations", "1"], "--num_generations: wanted 2 or more, for advantage grpo"),
        (["--advantage", "grpoo"], "--advantage: wanted one of grpo"),
        (["--per_device_train_batch_size", "9"], "--per_device_train_batch_size: wanted with"),
        (["--loss_type", "kl_cov"], "--loss_type kl_cov: it reads selected of every token"),
        (["--reward_weights", "1", "2"], "--reward_weights: wanted a number for each of the 1"),
        (["--ref_model_mixup_alpha", "0"], "--ref_model_mixup_alpha: wanted a number in (0, 1]"),
        (["--max_prompt_length", "2"], "no prompt is left to sample from"),
        (["--max_completion_length", "200"], "128"),
    ],
)
def test_mistakes_are_told(online_run, more, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        online_run("grpo", "out", "--max_steps", "1", *more)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("parts", ["1", "2"])
@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=FULL)])
def test_two_ranks_are_one(online_model, tmp_path, name, parts):
    """The same prompts, samples, rewards and losses, whether one process has them or two; also of
    each of a pass's steps."""
    argv = [
        name,
        "--model_name_or_path",
        online_model,
        "--max_completion_length",
        "6",
        "--max_steps",
        str(2 * int(parts)),
    ]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--disable_tqdm"]
    argv += ["--reward_funcs", f"{REWARDS}:share_of_w7", "--logging_steps", "1", "--bf16", "false"]
    argv += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--beta", "0.01"]
    argv += ["--num_iterations", "2", "--num_mini_batches", parts, "--output_dir"]
    found = alone_and_on_two(argv, tmp_path)
    for one, two in zip(*found, strict=True):
        for key in one.keys() & {"loss", "reward", "kl", "grad_norm", "entropy", "value_loss"}:
            assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, msg=key)
