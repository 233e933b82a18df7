"""Every command on a GPU that is only pretended: nothing is made on the wrong device or mixed, and
an optimizer step waits for the device once, to see whether its numbers are finite."""

import json
from collections import Counter

import pretend_gpu
import pytest
import torch
from online_runs import PROMPTS, REWARDS
from pretend_gpu import WAITS, Gpu
from tiny import needs, pair_rows, sft_rows, tiny_model, write_model, write_rows

from prefuse.trainer import loop
from prefuse.trainer.cli import main

FULL = pytest.mark.full
LATER = 2  # the step at which a run is as it goes on
# the head's fallback without Triton, which a GPU does not run; and where it looks for tokens that
# have a gradient, which is known
KNOWN = ("nonzero at fold.reanchor", "nonzero at linear_logp._compact")
ONCE = "cpu at dist.total"

LABELLED = [
    {**row, "label": i % 2 == 0, "reward": i % 3 - 1.0} for i, row in enumerate(sft_rows(24))
]
OFFLINE = [
    ("sft", sft_rows(24), []),
    ("dpo", pair_rows(24), ["--gradient_accumulation_steps", "2"]),
    ("kto", LABELLED, []),
    ("reward", pair_rows(24), []),
    pytest.param(
        "dpo",
        pair_rows(24),
        ["--use_peft", "--precompute_ref_log_probs"],
        marks=(FULL, needs("peft", "peft")),
    ),
    *(
        pytest.param(name, rows, more, marks=FULL)
        for name, rows, more in (
            ("sft", sft_rows(24), ["--gradient_checkpointing"]),
            ("dpo", pair_rows(24), ["--sync_ref_model", "--ref_model_sync_steps", "1"]),
            ("kto", LABELLED, ["--loss_type", "bco"]),
            ("kto", LABELLED, ["--loss_type", "dro_v"]),
            ("reward", pair_rows(24), ["--loss_type", "odin"]),
        )
    ),
]
ONLINE = [
    ("grpo", ["--beta", "0.1"]),
    ("ppo", []),
    pytest.param("online-dpo", [], marks=FULL),
    *(pytest.param(name, [], marks=FULL) for name in ("rloo", "nash-md", "raft")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), tiny_model(tie=True))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Runs a command here, or where there seems to be a GPU: the waits of each step, from one look
    at its numbers to the next, and the lines of its metrics."""

    def run(command: str, rows: list[dict], *more: str, gpu: bool = True):
        folder = tmp_path / f"out-{gpu}"
        argv = [command, "--model_name_or_path", model, "--output_dir", str(folder)]
        argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", rows), "--max_steps", "4"]
        argv += ["--per_device_train_batch_size", "4", "--save_steps", "0", "--disable_tqdm"]
        argv += ["--logging_steps", "10", "--bf16", "true", *more]
        seen: list[Counter] = []
        finite = loop.finite

        def looked(*given):
            found = finite(*given)
            seen.append(WAITS.at.copy())
            return found

        with monkeypatch.context() as patch:
            patch.setattr(loop, "finite", looked)
            if not gpu:
                main(argv)
            else:
                pretend_gpu.install(patch)
                with Gpu():
                    main(argv)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        steps = [b - a for a, b in zip(seen, seen[1:], strict=False)]
        return steps, [json.loads(line) for line in lines]

    return run


def unknown(waits: Counter) -> dict[str, int]:
    return {place: n for place, n in waits.items() if not place.startswith(KNOWN)}


def check(waits: Counter) -> None:
    (place, times), *others = unknown(waits).items()
    assert place.startswith(ONCE) and times == 1 and not others, waits


@pytest.mark.parametrize("command, rows, more", OFFLINE)
def test_a_step_waits_once_and_says_what_a_cpu_says(command, rows, more, run):
    steps, lines = run(command, rows, *more)
    check(steps[LATER])
    _, wanted = run(command, rows, *more, gpu=False)
    for line, other in zip(lines, wanted, strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=0.05), name
        assert line["num_tokens"] == other["num_tokens"]


@pytest.mark.parametrize("command, more", ONLINE)
def test_a_step_of_a_window_waits_once(command, more, run):
    asked = ["--reward_funcs", f"{REWARDS}:share_of_w7", "--engine", "generate"]
    asked += ["--num_mini_batches", "4", "--max_completion_length", "4", "--learning_rate", "1e-3"]
    if command != "ppo":
        asked += ["--num_generations", "2"]
    steps, lines = run(command, PROMPTS, *asked, *more)
    check(steps[LATER])
    assert lines[-1]["step"] == 4


def test_what_a_gpu_refuses_is_refused(monkeypatch):
    """Else the tests above could not fail."""
    pretend_gpu.install(monkeypatch)
    with Gpu():
        there = torch.zeros(3).to(pretend_gpu.HERE)
        with pytest.raises(RuntimeError, match="beside those of cuda:0"):
            there + torch.ones(3)
        with pytest.raises(TypeError):
            there.numpy()
        with pytest.raises(RuntimeError, match="16-bit"):
            torch.ops.aten._flash_attention_forward(
                *[torch.zeros(2, 1, 8, device=pretend_gpu.HERE)] * 3,
                *[torch.tensor([0, 2], dtype=torch.int32, device=pretend_gpu.HERE)] * 2,
                2, 2, 0.0, True, False,
            )  # fmt: skip
        before = WAITS.total()
        assert (there + 1).sum() == 3
        _ = there[there > 0]
        there.nonzero()
        there.cpu()
        torch.zeros(2).to(pretend_gpu.HERE, non_blocking=True)
        assert WAITS.total() - before == 5
        torch.zeros(2).pin_memory().to(pretend_gpu.HERE, non_blocking=True)
        assert WAITS.total() - before == 5
