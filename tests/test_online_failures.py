"""Online runs in which something goes wrong: rewards that fail, a process that is killed."""

import json
import signal
import time
from pathlib import Path

import pytest
from online_runs import PROMPTS, REWARDS
from safetensors.torch import load_file
from tiny import command, each_rank, write_rows

STEP = ["--per_device_train_batch_size", "16", "--num_generations", "2", "--max_steps", "3"]


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_a_reward_that_fails_is_counted_and_the_run_goes_on(online_run, tmp_path, capsys, policy):
    """NaN for prompts of w2 is a failure; None for those of w3 says that it does not apply."""
    options = [*STEP, "--reward_failure", policy, "--log_completions", "16"]
    metrics = online_run("grpo", "out", *options, reward="fails_on_w2")
    rows = lines_of(tmp_path / "out" / "samples.jsonl")
    by_word = {w: [r["reward"] for r in rows if r["prompt"].startswith(w)] for w in ("w2", "w3")}
    assert by_word["w2"] and set(by_word["w2"]) == {None if policy == "skip" else 0.0}
    assert by_word["w3"] and set(by_word["w3"]) == {None}
    failed = sum(x["rewards/failed"] * 16 for x in metrics)
    assert round(failed) == len(by_word["w2"])
    shown = capsys.readouterr().out
    assert "out.jsonl:" in shown  # the row of a prompt that it failed on


@pytest.mark.parametrize("reward, told", [("fails_on_w2", "nan"), ("raises", "no reward today")])
def test_a_reward_that_fails_stops_the_run(online_run, capsys, reward, told):
    with pytest.raises(SystemExit) as exit:
        online_run("grpo", "out", *STEP, reward=reward)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert told in message and "out.jsonl:" in message


def test_rows_of_several_tasks_train_together(online_run, tmp_path):
    """A reward of one of them does not apply to rows of the others."""
    rows = [{**row, **({"answer": "7"} if i % 2 else {})} for i, row in enumerate(PROMPTS)]
    data = ["--dataset_name", write_rows(tmp_path / "mixed.jsonl", rows)]
    options = [*STEP, *data, "--log_completions", "16", "--eval_fraction", "0.05"]
    options += ["--reward_funcs", "gsm8k", f"{REWARDS}:even"]
    online_run("grpo", "out", *options, reward=None)
    told = {row["rewards"]["gsm8k"] for row in lines_of(tmp_path / "out" / "samples.jsonl")}
    assert told >= {None, 0.0}


def test_a_column_that_no_row_has_is_told_before_the_model_is_loaded(online_run, capsys):
    for more in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as exit:
            online_run("grpo", "out", *STEP, "--reward_funcs", "ifeval", *more, reward=None)
        assert exit.value.code == 2
        told = capsys.readouterr()
        assert "wanted a column 'instruction_id_list'" in told.err and not told.out


@pytest.mark.full
def test_a_killed_run_loses_and_repeats_no_prompt(online_model, tmp_path):
    """SIGKILL while the fourth window is judged; then as if nothing had happened."""
    argv = ["grpo", "--model_name_or_path", online_model, "--max_completion_length", "6"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--disable_tqdm"]
    argv += ["--reward_funcs", f"{REWARDS}:slow", "--logging_steps", "1", "--bf16", "false"]
    argv += ["--learning_rate", "1e-2", *STEP, "--max_steps", "6", "--save_steps", "1"]
    argv += ["--log_completions", "16", "--output_dir"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    other = command(*argv, str(straight))
    run = command(*argv, str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-3" / "progress.json").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (killed / "model.safetensors").exists()
    again = command(*argv, str(killed), "--resume_from_checkpoint", "true")
    assert [other.wait(timeout=240), again.wait(timeout=240)] == [0, 0]
    wanted, got = (lines_of(folder / "samples.jsonl") for folder in (straight, killed))
    assert got == wanted and len(got) == 6 * 16
    weights = [load_file(folder / "model.safetensors") for folder in (straight, killed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.full
def test_a_reward_that_hangs_on_one_rank_ends_all(online_model, tmp_path):
    """Within 30 seconds of giving it up, with the row, the rank and the step."""
    argv = ["grpo", "--model_name_or_path", online_model, "--max_completion_length", "6"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--disable_tqdm"]
    argv += ["--reward_funcs", f"{REWARDS}:hangs_on_rank_1", "--reward_timeout", "1", *STEP]
    argv += ["--bf16", "false", "--output_dir", str(tmp_path / "out")]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    runs = [
        command(*argv, env=env, stdout=log.open("w"), stderr=-2)
        for env, log in zip(each_rank(2), logs, strict=True)
    ]
    assert runs[1].wait(timeout=120) == 2
    assert runs[0].wait(timeout=30) == 2
    said = [log.read_text() for log in logs]
    assert "hangs_on_rank_1 timed out after 1 s" in said[1] and "rows.jsonl:" in said[1]
    assert "rank 0, step 1: rank 1 of 2 did not answer" in said[0]
