"""`prefuse estimate` and --dry_run against what runs take."""

import json
import re
import subprocess
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny import (
    HERE,
    each_rank,
    needs,
    python,
    ragged_pairs,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)
from transformers import LlamaConfig

from prefuse.trainer.batch import pack
from prefuse.trainer.cli import main
from prefuse.trainer.plan import measured
from prefuse.trainer.plan import trace as tracing
from prefuse.trainer.plan.trace import Step, totals, trace
from prefuse.trainer.plan.work import Work

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(1997))]
ON_CPU = ["--device", "cpu", "--device_tflops", "0.1", "--device_gbps", "10"]
DPO = ["dpo", "--dataset_name", "pairs.jsonl"]
GRPO = ["--dataset_name", "prompts.jsonl", "--reward_funcs", "length", "--beta", "0.1"]
RUNS = {
    "sft": ["sft", "--dataset_name", "sft.jsonl"],
    "dpo": DPO,
    "dpo, reference scored before": [*DPO, "--precompute_ref_log_probs"],
    "dpo, checkpointing": [*DPO, "--gradient_checkpointing"],
    "dpo, padded": [*DPO, "--layout", "padded"],
    "dpo, repacked": [*DPO, "--max_tokens_per_micro_batch", "900"],
    "grpo": ["grpo", *GRPO, "--max_completion_length", "40", "--num_generations", "4"],
    "dpo, 2 ranks": DPO,
    "dpo, 2 ranks, copies": [*DPO, "--fsdp", "none"],
    "dpo, 2 ranks, head gathered": [*DPO, "--shard_head", "false"],
    "dpo, 2 ranks, checkpointing": [*DPO, "--gradient_checkpointing"],
    "dpo, adapters": [*DPO, "--use_peft"],
}
BIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
BIG |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
BIG |= {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose weights, layers and head all matter, and rows of it."""
    folder, rng = tmp_path_factory.mktemp("estimate"), np.random.default_rng(0)
    shape: Any = dict(vocab_size=len(WORDS), hidden_size=128, intermediate_size=352)
    model = tiny_model(**shape, num_hidden_layers=5, max_position_embeddings=512)
    write_model(folder / "model", model, tiny_tokenizer(words=WORDS, chat_template=None))

    def text(low: int, high: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(3, len(WORDS), rng.integers(low, high)))

    pairs = [{"prompt": text(20, 60), "chosen": " " + text(20, 120)} for _ in range(16)]
    pairs = [{**row, "rejected": " " + text(20, 120)} for row in pairs]
    write_rows(folder / "pairs.jsonl", pairs)
    sft = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    write_rows(folder / "sft.jsonl", sft)
    write_rows(folder / "prompts.jsonl", [{"prompt": r["prompt"]} for r in pairs])
    return folder


def argv_of(argv: list[str], folder) -> list[str]:
    argv = [str(folder / a) if a.endswith(".jsonl") else a for a in argv]
    given = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out")]
    given += ["--max_steps", "2", "--bf16", "false", "--disable_tqdm", "--overwrite_output_dir"]
    return [*argv, *given]


def peak_mib(text: str) -> float:
    found = re.search(r"^peak: ([\d.]+) (MiB|GiB)", text, re.MULTILINE)
    assert found, text
    return float(found[1]) * (1024 if found[2] == "GiB" else 1)


def measured_mib(argv: list[str], ranks: int) -> float:
    """In processes of their own: the most bytes of tensors alive at once, on any rank."""
    envs = each_rank(ranks) if ranks > 1 else [{}]
    worker = [str(HERE / "peak_worker.py"), *argv]
    runs = [python(*worker, env=env, stdout=subprocess.PIPE) for env in envs]
    texts = [run.communicate(timeout=600)[0] for run in runs]
    assert not any(run.returncode for run in runs)
    peaks = [sum(json.loads(text.rsplit("PEAK ", 1)[1]).values()) for text in texts]
    return max(peaks) / 2**20


def both(name: str, folder, said) -> tuple[float, float]:
    """Estimated and measured; said: what was printed since it was last called."""
    argv = argv_of(RUNS[name], folder)
    ranks = 2 if "2 ranks" in name else 1
    main([*argv, "--dry_run", "--world_size", str(ranks), *ON_CPU])
    return peak_mib(said().out), measured_mib(argv, ranks)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=() if n == "dpo" else pytest.mark.full) for n in list(RUNS)[:-1]),
        pytest.param("dpo, adapters", marks=[pytest.mark.full, needs("peft", "peft")]),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name, folder, capsys):
    """`pytest -rP` shows the rows of docs/scaling.md."""
    estimate, truth = both(name, folder, capsys.readouterr)
    print(f"| {name} | {estimate:.2f} | {truth:.2f} |")
    assert abs(estimate - truth) <= 0.1 * truth


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": "full", "autocast": True},
        {"reference": True, "second": True},
        {"inline": True, "padded": True},
        {"heads": ("lm", "score"), "ranks": 4},
    ],
    ids=str,
)
def test_three_layers_tell_of_all(changes, monkeypatch):
    shape = dict(vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=7)
    config: Any = LlamaConfig(**cast(Any, shape), num_attention_heads=8, num_key_value_heads=2)
    work = Work(400, 300, 500, 400 * 200, 200, 200, 200, 3 if "padded" in changes else 2)
    plain = dict(dtype=torch.float32, autocast=False, checkpointing=None, padded=False)
    given: Any = {**plain, "budget": None, "device": torch.device("cpu"), **changes}
    step = Step(**given)
    found = trace(config, work, step)
    monkeypatch.setattr(tracing, "FEW", 99)
    every = trace(config, work, step)
    assert found.sizes == every.sizes and len(found.timeline) < len(every.timeline)
    peaks = [max(sum(totals(m).values()) for m in t.timeline) for t in (found, every)]
    assert peaks[0] == peaks[1]
    assert found.timeline[-1]["moved"] == every.timeline[-1]["moved"]


def test_work_counts_what_a_shared_prefix_saves():
    examples = ragged_pairs(4)
    shared, apart = (Work.of(pack(examples, share)) for share in (True, False))
    assert shared.real == apart.real == apart.tokens > shared.tokens
    assert shared.scored == apart.scored and apart.children == 0 < shared.children
    lengths = [len(s.tokens) for e in examples for s in e.sequences]
    assert apart.pairs == sum(n * (n + 1) // 2 for n in lengths)


@pytest.fixture
def big(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return str(tmp_path)


def test_a_large_model_from_its_config_alone(big, capsys):
    """70B: 70.6e9 numbers of 4 bytes, gradients and two moments over 64 ranks."""
    argv = ["sft", "--model_name_or_path", big, "--device", "h100", "--world_size", "64"]
    argv += ["--per_device_train_batch_size", "1", "--max_length", "2048"]
    main(["estimate", *argv, "--gradient_checkpointing"])
    text = capsys.readouterr().out
    step = text[text.index("optimizer step") :]
    weights = 70_553_706_496 * 4 / 64 / 2**30
    assert re.search(rf"weights +{weights:.2f} GiB", step)
    assert f"{4 * weights:.2f} GiB" in step.splitlines()[0]


def test_what_does_not_fit_is_told_with_its_remedy(big, capsys):
    argv = ["dpo", "--model_name_or_path", big, "--device", "h100", "--device_memory_gb", "600"]
    argv += ["--world_size", "16", "--per_device_train_batch_size", "8", "--max_length", "4096"]
    main(["estimate", *argv])
    text = capsys.readouterr().out
    assert "does not fit 600.00 GiB" in text
    assert re.search(r"--gradient_checkpointing +frees \d", text)
    assert re.search(r"fits with --\w+", text)


def test_a_dry_run_trains_nothing_and_finds_what_is_wrong(folder, capsys, tmp_path):
    argv = [*argv_of(DPO, folder), "--output_dir", str(tmp_path / "out")]
    main([*argv, "--dry_run", "--world_size", "4", *ON_CPU])
    text = capsys.readouterr().out
    assert "on rank 0 of 4" in text and "schedule: 2 steps" in text and "peak: " in text
    whole, mine = map(int, re.findall(r"(\d+) parameters, (\d+) of them", text)[0])
    assert whole / 4 <= mine <= whole / 4 + 1000
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([*argv, "--dry_run", "--world_size", "3", "--fsdp", "hsdp", "--fsdp_group_size", "2"])
    assert "--fsdp_group_size: wanted a divisor of the 3 ranks" in capsys.readouterr().err
    bad = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    with pytest.raises(SystemExit):
        main([*argv, "--dataset_name", bad, "--dry_run", *ON_CPU])
    assert "rows.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_tells_its_memory_beside_the_estimate(name, folder, capsys, monkeypatch):
    """A CPU does not tell; where a device does, a run says both and how far they are apart."""
    argv = argv_of(RUNS[name], folder)
    main(argv)
    assert "memory:" not in capsys.readouterr().out
    monkeypatch.setattr(measured, "measured_bytes", lambda device: 1 << 30)
    main(argv)
    told = " ".join(capsys.readouterr().out.split())
    got = re.search(r"memory: 1.00 GiB of tensors at most; estimated (\S+) GiB \((-\d+)%\)", told)
    assert got and 0.01 < float(got[1]) < 0.3
    assert float(got[1]) - 1 == pytest.approx(float(got[2]) / 100, abs=0.01)
    monkeypatch.setattr(measured, "estimate", lambda run: 1 / 0)
    main(argv)
    assert "no estimate: division by zero" in " ".join(capsys.readouterr().out.split())
