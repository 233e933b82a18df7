"""What may go wrong in a run: signals, full disks, other data, kills, numbers not finite."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from online_runs import PROMPTS, REWARDS
from safetensors.torch import load_file
from tiny import HERE, ragged_pairs, sft_rows, tiny_model, write_model, write_rows

from prefuse.trainer import checkpoint, loop
from prefuse.trainer.cli import main
from prefuse.trainer.dist import Ranks
from prefuse.trainer.guards import naming_lost_ranks, not_finite

FULL = pytest.mark.full
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def argv(model, tmp_path) -> list[str]:
    """`prefuse sft` for 6 steps, saving each."""
    rows = write_rows(tmp_path / "rows.jsonl", sft_rows(16))
    argv = ["sft", "--model_name_or_path", model, "--dataset_name", rows, "--max_steps", "6"]
    argv += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "4"]
    return [*argv, "--save_steps", "1", "--bf16", "false", "--disable_tqdm"]


RESUME = ("--resume_from_checkpoint", "true")


def steps_of(folder: Path) -> list[int]:
    return [int(p.name.split("-")[1]) for p in checkpoint.complete(folder)]


def at_step(monkeypatch, number: int, act) -> None:
    """`act` once, while the gradient of that step is computed."""
    backward, steps = loop.backward, 0

    def acting(*args):
        nonlocal steps
        steps += 1
        if steps == number:
            act()
        return backward(*args)

    monkeypatch.setattr(loop, "backward", acting)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(argv, tmp_path, monkeypatch, capsys, number, code):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        main([*argv, "--save_steps", "0"])
    assert exit.value.code == code
    assert steps_of(tmp_path / "out") == [3]
    assert f"checkpoint-3 ({number.name})" in capsys.readouterr().out
    main([*argv, *RESUME])
    assert steps_of(tmp_path / "out") == [3, 4, 5, 6]


def full_disk(monkeypatch, from_step: int) -> None:
    """No file may grow beyond some bytes while checkpoints of these steps are written."""
    write = checkpoint._write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(partial: Path, *args):
        if int(partial.name.split("-")[1].split(".")[0]) < from_step:
            return write(partial, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            return write(partial, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "_write", limited)


def test_a_full_disk_keeps_the_last_good_checkpoint(argv, tmp_path, monkeypatch, capsys):
    """The run goes on, and says so."""
    full_disk(monkeypatch, 4)
    main([*argv, "--save_total_limit", "2"])
    out = tmp_path / "out"
    assert steps_of(out) == [2, 3] and not list(out.glob(".checkpoint-*"))
    said = capsys.readouterr().out
    assert said.count("could not be written") == 3 and "File too large" in said
    assert f"the newest one is {out / 'checkpoint-3'}" in said and (out / "config.json").exists()


def test_a_full_disk_at_the_end_is_an_error(argv, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, 3)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and "could not be written" in capsys.readouterr().err
    assert steps_of(tmp_path / "out") == [1, 2]


@pytest.mark.parametrize("online", [False, True])
def test_other_data_under_a_resumed_run_are_refused(argv, tmp_path, capsys, online):
    rows = PROMPTS[:8] if online else sft_rows(16)
    rows = [{**row, "answer": "w7"} for row in rows] if online else rows
    if online:
        argv = ["grpo", *argv[1:], "--reward_funcs", f"{REWARDS}:share_of_w7"]
        argv += ["--max_completion_length", "4", "--num_generations", "2"]
    file = Path(write_rows(tmp_path / "rows.jsonl", rows))
    main([*argv, "--max_steps", "2"])
    changed = [{**rows[0], **({"answer": "w8"} if online else {"prompt": "w1"})}, *rows[1:]]
    for other in (changed, rows[:-1], rows[::-1]):
        write_rows(file, other)
        with pytest.raises(SystemExit):
            main([*argv, *RESUME])
        said = capsys.readouterr().err
        assert "wanted the rows that the run began with (rows " in said and file.name in said
    write_rows(file, rows)  # a new time of writing alone is nothing
    main([*argv, *RESUME])
    assert steps_of(tmp_path / "out")[-1] == 6


@pytest.mark.parametrize(
    "more, wanted",
    [
        (("--seed", "7"), "seed 42"),
        (("--per_device_train_batch_size", "8"), "wanted 4, as "),
        (("--gradient_accumulation_steps", "2"), "wanted 4, as "),
    ],
)
def test_another_order_of_rows_is_refused(argv, capsys, more, wanted):
    main([*argv, "--max_steps", "1"])
    with pytest.raises(SystemExit):
        main([*argv, *RESUME, *more])
    assert wanted in capsys.readouterr().err


def test_other_labels_under_a_resumed_run_are_refused(argv, tmp_path, capsys):
    rows = [{**row, "label": True} for row in sft_rows(16)]
    argv = ["reward", *argv[1:], "--loss_type", "binary"]
    write_rows(tmp_path / "rows.jsonl", rows)
    main([*argv, "--max_steps", "1"])
    write_rows(tmp_path / "rows.jsonl", [{**rows[0], "label": False}, *rows[1:]])
    with pytest.raises(SystemExit):
        main([*argv, *RESUME])
    assert "wanted the rows that the run began with" in capsys.readouterr().err


def test_settings_of_the_optimizer_are_those_of_the_resumed_run(argv, tmp_path):
    """At the schedule's place: as config.yaml and metrics.jsonl say."""
    argv += ["--lr_scheduler_type", "linear", "--logging_steps", "1"]
    main([*argv, "--max_steps", "2", "--learning_rate", "1e-3"])
    main([*argv, *RESUME, "--learning_rate", "6e-4", "--weight_decay", "0.1", "--adam_beta1", "0"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4])
    last = tmp_path / "out" / "checkpoint-6"
    group = {f"optimizer.param_groups.0.{name}": None for name in ("weight_decay", "betas")}
    checkpoint.read_alone(group, last)
    assert list(group.values()) == [0.1, (0.0, 0.999)]


def test_a_checkpoint_of_another_model_or_optimizer(argv, tmp_path, capsys):
    narrow = write_model(tmp_path / "narrow", tiny_model(intermediate_size=40))
    main([*argv, "--max_steps", "1"])
    for more in (("--optim", "sgd"), ("--model_name_or_path", narrow)):
        with pytest.raises(SystemExit):
            main([*argv, *RESUME, *more])
        assert "wanted the parameters and the optimizer of this run; " in capsys.readouterr().err


def test_what_is_being_removed_is_no_checkpoint(argv, tmp_path, monkeypatch):
    """A kill inside a removal leaves files, but not under a checkpoint's name."""
    rmtree, out = shutil.rmtree, tmp_path / "out"

    def killed(path, **options):
        if Path(path).exists():
            Path(path, "progress.json").exists() and Path(path, ".metadata").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        main([*argv, "--save_total_limit", "2"])
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert steps_of(out) == [2, 3] and (out / ".checkpoint-1.removed").exists()
    main([*argv, *RESUME])
    assert steps_of(out) == [2, 3, 4, 5, 6] and not list(out.glob(".checkpoint-*"))


@pytest.mark.parametrize("phase", ["loss", "gradient"])
def test_the_micro_batch_that_is_not_finite_is_named(phase):
    """In the loss as it is; in the gradient by taking the micro-batches one by one."""
    batches = [ragged_pairs(6)[i : i + 2] for i in (0, 2, 4)]
    losses = [torch.tensor(1.0), torch.tensor(math.nan if phase == "loss" else 1.0)]

    def norm_of(micro_batches):
        return math.inf if any(e.index == 3 for rows in micro_batches for e in rows) else 1.0

    error = not_finite(4, losses, torch.tensor(math.inf), batches, norm_of, ALONE)
    assert str(error).startswith(f"step 5: {phase} is not finite")
    assert "Rows of rank 0: 2, 3. " in str(error)


def test_an_error_of_ones_own_is_not_a_lost_rank():
    two = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_ranks(two, lambda: "step 1"):
        raise RuntimeError("shapes do not match")


@FULL
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_kills_at_any_moment(model, tmp_path, monkeypatch, name):
    """25 SIGKILLs, many inside a save: every restart goes on, and the end is that of a run that
    was never killed."""
    rows = sft_rows(40) if name == "sft" else PROMPTS
    argv = [name, "--model_name_or_path", model, "--max_steps", "200", "--save_steps", "1"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", rows), "--bf16", "false"]
    argv += ["--disable_tqdm", "--per_device_train_batch_size", "4", "--save_total_limit", "2"]
    argv += ["--logging_steps", "1", "--learning_rate", "1e-3"]
    if name == "grpo":
        argv += ["--reward_funcs", f"{REWARDS}:share_of_w7", "--num_generations", "2"]
        argv += ["--num_iterations", "3", "--max_completion_length", "4"]
    main([*argv, "--output_dir", str(tmp_path / "straight")])
    out, rng, kills, inside = tmp_path / "killed", random.Random(0), 0, 0
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    server = multiprocessing.get_context("forkserver")  # each run begins with all imported
    server.set_forkserver_preload(["conftest", "prefuse.trainer.online"])
    while kills < 25:
        before = steps_of(out)[-1:]
        more = RESUME if before else ("--overwrite_output_dir",)
        run = server.Process(target=main, args=([*argv, "--output_dir", str(out), *more],))
        run.start()
        deadline = time.monotonic() + 120
        while run.is_alive() and steps_of(out)[-1:] == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        run.kill()
        run.join()
        if run.exitcode == 0:
            break
        assert run.exitcode == -signal.SIGKILL
        kills += 1
        inside += bool(list(out.glob(".checkpoint-*")))
    main([*argv, "--output_dir", str(out), *RESUME])
    assert kills == 25 and inside
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("straight", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [
        [json.loads(x) for x in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("straight", "killed")
    ]
    assert [[x["step"], x["loss"]] for x in lines[0]] == [[x["step"], x["loss"]] for x in lines[1]]
