"""Online runs of a tiny model in this process, on a task whose best answer is known."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_model, write_rows
from transformers import LlamaForSequenceClassification

from prefuse.trainer.cli import main

FULL = pytest.mark.full
REWARDS = Path(__file__).with_name("online_rewards.py")
PROMPTS = [{"prompt": f"w{i} w{j} :"} for i in range(6) for j in range(6)]
LEARN = ["--per_device_train_batch_size", "64", "--learning_rate", "1e-2", "--save_steps", "0"]
LEARN += ["--lr_scheduler_type", "constant", "--max_steps"]


@pytest.fixture(scope="session")
def online_model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), tiny_model(seed=3))


@pytest.fixture(scope="session")
def online_judge(tmp_path_factory) -> str:
    """A saved reward model, or a process model."""
    shape = tiny_model(pad_token_id=0).config
    shape.num_labels = 1
    torch.manual_seed(5)
    judge = LlamaForSequenceClassification(shape)
    for p in judge.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return write_model(tmp_path_factory.mktemp("judge"), judge)


@pytest.fixture
def online_run(online_model, tmp_path):
    """Runs a command in this process; returns the lines of its metrics.jsonl."""

    def run(command: str, name: str, *more: str, reward: str | None = "share_of_w7"):
        argv = ["--model_name_or_path", online_model, "--output_dir", str(tmp_path / name)]
        argv += ["--dataset_name", write_rows(tmp_path / f"{name}.jsonl", PROMPTS)]
        argv += ["--reward_funcs", f"{REWARDS}:{reward}"] if reward else []
        argv += ["--max_completion_length", "6"]
        argv += ["--logging_steps", "1", "--bf16", "false", "--disable_tqdm", *more]
        main([command, *argv])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


@pytest.fixture
def online_train(online_model, tmp_path):
    """Runs a recipe on the tiny model; returns the lines of its metrics.jsonl."""

    def run(recipe: Path, *more: str) -> list[dict]:
        rows = write_rows(tmp_path / "rows.jsonl", PROMPTS)
        argv = [str(recipe), "--model_name_or_path", online_model, "--dataset_name", rows]
        argv += ["--output_dir", str(tmp_path / "out"), "--max_completion_length", "6"]
        argv += ["--reward_funcs", f"{REWARDS}:even", "--gradient_accumulation_steps", "1"]
        argv += ["--per_device_train_batch_size", "16"]
        argv += ["--max_steps", "4", "--logging_steps", "1", "--bf16", "false", "--disable_tqdm"]
        main(["train", *argv, "--learning_rate", "1e-3", *more])
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def online_config(kind, **changes):
    """A configuration that names files nobody reads."""
    return kind("m", "d", "o", reward_funcs=["x"], bf16=False, **changes)
