"""The whole-step benchmarks: what they count, a setting that fails, and that they run."""

import importlib
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from tiny import needs
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
QUICK = ["--tiny", "--steps", "1", "--rounds", "1", "--warmup", "1"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    compare = importlib.import_module("train_compare")
    monkeypatch.setattr(compare, "ceilings", lambda: {"tflops": 0.05, "gbps": 10.0})
    return importlib.import_module


def test_architectures_are_those_published(load, monkeypatch):
    """Parameters of Qwen2.5-0.5B, 1.5B and 7B as their model cards' files have them."""
    common = load("train_common")
    monkeypatch.setattr(common, "device", lambda: torch.device("meta"))
    counts = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}
    for name, count in counts.items():
        model = common.random_model(common.SHAPES[name], torch.bfloat16, "sdpa")
        assert sum(p.numel() for p in model.parameters()) == count
        assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_flops_are_those_that_torch_counts(load):
    common = load("train_common")
    shape, tokens = common.SHAPES["tiny"], 19
    model = common.random_model(shape, torch.float32, "eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None] + 3)
    size = shape.hidden // shape.heads
    masked = tokens**2 - tokens * (tokens + 1) // 2  # computed by it, and thrown away
    others = 4 * shape.layers * shape.heads * size * masked
    found = common.forward_flops(shape, [(tokens, tokens)])
    assert found == counter.get_total_flops() - others
    assert common.forward_flops(shape, [(tokens, 5), (3, 1)]) < found


@pytest.mark.skipif("PREFUSE_DATA" not in os.environ, reason="PREFUSE_DATA names no data")
def test_lengths_are_those_of_the_data(load):
    """A prefix of them: the whole takes long to tokenize."""
    lengths = load("lengths")
    kept, found = lengths.read(), lengths.measured(Path(os.environ["PREFUSE_DATA"]), 60, 60)
    assert 50 < len(found["pairs"]) <= 60 and len(found["questions"]) == 60
    assert found["pairs"] == kept["pairs"][: len(found["pairs"])]
    assert found["questions"] == kept["questions"][:60]
    assert max(p + max(c, r) for p, c, r in kept["pairs"]) <= kept["max_length"]
    assert lengths.FILE.stat().st_size < 60_000


def test_rows_have_the_lengths_that_are_counted(load):
    dpo, grpo = load("bench_train_dpo"), load("bench_train_grpo")
    shape = load("train_common").SHAPES["tiny"]
    pairs = dpo.random_pairs(shape, 6)
    task = dpo.task_of("pairs", shape, pairs, 3)
    examples = dpo.examples_of(pairs)
    assert task.tokens == [sum(e.n_tokens for e in examples[i : i + 3]) for i in (0, 3)]
    for example, (prompt, chosen, rejected) in zip(examples, pairs, strict=True):
        scored = [int(s.scored.sum()) for s in example.sequences]
        assert scored == [len(chosen), len(rejected)]
        assert [len(prompt), *scored] in load("lengths").read()["pairs"]
        assert all(3 <= int(s.tokens.min()) for s in example.sequences)
    groups = grpo.random_groups(shape, 4)
    own, with_reference = (grpo.task_of("g", shape, groups, 16, b) for b in (0.0, 0.1))
    assert own.tokens[0] == sum(
        8 * len(g.prompt) + sum(map(len, g.completions)) for g in groups[:2]
    )
    assert [4 * x / 3 for x in own.flops] == pytest.approx(with_reference.flops)


def test_a_setting_that_fails_is_told_and_not_taken(load, capsys, monkeypatch):
    compare, common = load("train_compare"), load("train_common")
    monkeypatch.setattr(common, "free", lambda: None)
    task = common.Task("task", [100, 200, 300, 400], [1e9, 2e9, 3e9, 4e9])

    fails_after = 9

    def run(setting, clock):
        if setting == "big":
            raise torch.OutOfMemoryError("asked for much")
        if setting == "odd":
            raise ValueError("odd\nand more")
        for _ in range(clock.total):
            time.sleep({"slow": 0.02, "fast": 0.002}[setting])
            clock.computed += 400
            if clock.mark():
                break
            if setting == "fast" and len(clock.ends) > fails_after:
                raise torch.OutOfMemoryError("a longer step")
        return 1.0 if setting == "fast" else 3.0

    first = common.System("ours", [lambda _: ["big", "slow", "fast"], lambda best: [best]], run)
    other = common.System("theirs", [lambda _: ["odd", "slow"]], run)
    args = compare.parsed("", 8, [*QUICK, "--seconds", "60"])
    rows = compare.compare(task, [first, other], args)
    found = {(r["part"], r["system"], r.get("setting")): r for r in rows}
    assert found["search", "ours", "big"]["failed"] == "out of memory"
    assert found["search", "theirs", "odd"]["failed"] == "ValueError: odd"
    ours, theirs = found["measured", "ours", "fast"], found["measured", "theirs", "slow"]
    assert ours["real tokens a step"] == 200  # of the step after the warm-up
    assert ours["real tokens/s"] == pytest.approx(200e3 / ours["ms a step"])
    assert ours["TFLOP/s"] == pytest.approx(2e-3 / (ours["ms a step"] / 1e3))
    assert ours["MFU"] == pytest.approx(ours["TFLOP/s"] / 0.05)
    ratio = found["ratio", "ours / theirs", None]
    assert ratio["real tokens/s"] == pytest.approx(theirs["ms a step"] / ours["ms a step"]) and (
        ratio["real tokens/s"] > 2
    )
    assert "gradient norms" in compare.disagreements(rows, "bfloat16")[0]  # 1 beside 3
    assert "ValueError: odd" in capsys.readouterr().err
    args.seconds = 0
    late = common.System("theirs", [lambda _: ["slow", "fast"]], run)
    hurried = {r.get("setting"): r for r in compare.compare(task, [late], args)[1:]}
    assert hurried["slow"]["real tokens/s"] > 0  # the first is tried whatever the time
    assert hurried["fast"]["failed"] == "not tried: no time"
    fails_after, args.steps, args.seconds = 3, 4, 60  # more steps than the search had
    rows = compare.compare(task._replace(tokens=[100] * 6, flops=[1e9] * 6), [first], args)
    assert [r["setting"] for r in rows if r["part"] == "measured"] == ["slow"]
    assert "out of memory" in [r.get("failed") for r in rows if r.get("setting") == "fast"]
    with pytest.raises(SystemExit, match="no setting worked"):
        only = common.System("broken", [lambda _: ["big"]], run)
        compare.run_all("nothing", [(task, [only])], args)


def test_what_was_measured_before_an_end_is_written(load, tmp_path, monkeypatch):
    """Whoever ended the process, by a time limit say."""
    compare, common = load("train_compare"), load("train_common")
    monkeypatch.setattr(common, "free", lambda: None)
    turns = []

    def run(setting, clock):
        turns.append(setting)
        if len(turns) == 3:  # one run of the search and one turn are over
            raise KeyboardInterrupt
        while not clock.mark():
            pass
        return 1.0

    task = common.Task("task", [100] * 4, [1e9] * 4)
    system = common.System("ours", [lambda _: ["a"]], run)
    given = [*QUICK, "--rounds", "2", "--output", str(tmp_path / "result")]
    with pytest.raises(KeyboardInterrupt):
        compare.run_all("all", [(task, [system])], compare.parsed("", 8, given))
    measured, searched = json.loads((tmp_path / "result.json").read_text())["results"]
    assert measured["real tokens/s"] > 0 and searched["part"] == "search"


def test_a_run_ends_when_the_time_is_over(load):
    clock = load("train_common").Clock(warmup=2, steps=5, deadline=time.perf_counter() - 1)
    assert [clock.mark() for _ in range(3)] == [False, False, True]
    assert len(clock.seconds) == 1


@pytest.mark.parametrize("script", ["bench_train_dpo", "bench_train_grpo"])
def test_prefuse_alone(load, tmp_path, script):
    options = [*QUICK, "--alone", "--batch", "8", "--seconds", "0"]
    load(script).main([*options, "--output", str(tmp_path / "result")])
    result = json.loads((tmp_path / "result.json").read_text())
    measured, *search = result["results"]
    assert measured["part"] == "measured" and {r["part"] for r in search} == {"search"}
    assert [r["failed"] for r in search if "failed" in r][-1] == "not tried: no time"
    assert measured["ms a step"] > 0 and measured["first gradient norm"] > 0
    assert measured["computed / real tokens"] < 0.95  # prefixes are shared
    assert result["machine"]["precision"] == "float32"
    assert f"{measured['MFU']:.3g}" in (tmp_path / "result.md").read_text()


def test_a_profile_on_a_cpu(load, tmp_path):
    given = ["--shape", "tiny", "--batch", "4", "--warmup", "1", "--steps", "1"]
    load("profile_dpo").main([*given, "--output", str(tmp_path / "profile")])
    rows = json.loads((tmp_path / "profile.json").read_text())["results"]
    groups = {r["name"]: r["share"] for r in rows if r["part"] == "group"}
    assert {"GEMM", "attention", "optimizer and clipping", "elementwise"} <= groups.keys()
    assert math.isclose(sum(groups.values()), 1.0, rel_tol=1e-6)


def test_a_profile_of_kernels(load, tmp_path):
    """A trace as the profiler writes it, of two steps."""
    profile = load("profile_dpo")
    names = ["nvjet_tst_128x256", "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>"]
    names += ["_forward_kernel", "void forward_kernel<float>(Block, float*, long)"]
    names += ["void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>"]
    times = [(0, 40), (40, 20), (55, 15), (80, 10), (100, 100)]  # the third begins in the second
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur}
        for name, (ts, dur) in zip(names, times, strict=True)
    ]
    events.append({"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 90, "dur": 5})
    host = {"ph": "X", "cat": "cuda_runtime", "ts": 0, "dur": 1}
    events += [{**host, "name": n} for n in ("cudaLaunchKernel", "cudaStreamSynchronize")]
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500})
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events[::-1]}))
    rows = profile.table_of(*profile.read_trace(file), steps=2)
    found = {(r["part"], r["name"]): r for r in rows}
    assert found["total", "first kernel to last"]["ms"] == 0.1
    assert found["total", "no kernel runs"]["share"] == pytest.approx(15 / 200)
    assert found["total", "kernels and copies"]["count"] == 3
    assert found["host", "cudaStreamSynchronize"]["count"] == 0.5
    gaps = [r["ms"] for r in rows if r["part"] == "gap"]
    assert gaps == pytest.approx([0.010, 0.005])
    shares = {r["name"]: r["share"] * 200 for r in rows if r["part"] == "group"}
    ours = {k: v for k, v in shares.items() if k.startswith("prefuse: ")}
    assert sorted(ours.values()) == pytest.approx([10, 15])
    assert any("fold.py" in k for k in ours) and any("token_stats.cu" in k for k in ours)
    others = {"GEMM": 40, "attention": 20, "elementwise": 100, "casts and copies": 5}
    assert {k: v for k, v in shares.items() if k not in ours} == pytest.approx(others)


@pytest.mark.full
@needs("trl", "peers")
@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("script", ["bench_train_dpo", "bench_train_grpo"])
def test_both_systems_train_the_same(load, tmp_path, script, precision):
    """The script itself ends with an error where their gradients' norms differ."""
    beta = ["--beta", "0.1"] if "grpo" in script else []
    options = [*QUICK, "--batch", "8", "--seconds", "5", "--precision", precision, *beta]
    load(script).main([*options, "--output", str(tmp_path / "result")])
    rows = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [r["part"] for r in rows[:3]] == ["measured", "measured", "ratio"]
    assert rows[0]["real tokens a step"] == rows[1]["real tokens a step"]
    assert rows[0]["computed / real tokens"] < 1 < rows[1]["computed / real tokens"]


@pytest.mark.full
@needs("trl", "peers")
def test_what_trl_s_grpo_is_given_is_what_it_makes_itself(load, tmp_path):
    """Beside completions that it is handed by its own `rollout_func`."""
    import trl
    from datasets import Dataset

    grpo, peer, common = (load(n) for n in ("bench_train_grpo", "train_trl", "train_common"))
    shape = common.SHAPES["tiny"]
    groups = grpo.random_groups(shape, 2, 64)
    each = {"prompt_ids": [g.prompt.tolist() for g in groups for _ in g.completions]}
    each["completion_ids"] = [c.tolist() for g in groups for c in g.completions]
    each["logprobs"] = [[0.0] * len(c) for c in each["completion_ids"]]
    rewards = [float(r) for g in groups for r in g.rewards]
    with peer.alone():
        options = peer.options(
            str(tmp_path), peer.TRL(8), 16, common.Clock(1, 1, math.inf), autocast=False
        )
        trainer = trl.GRPOTrainer(
            model=common.random_model(shape, torch.float32, "sdpa"),
            reward_funcs=lambda completions, **_: rewards,
            args=trl.GRPOConfig(**options | {"beta": 0.0}, num_generations=8),
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(2)]),
            processing_class=peer.tokenizer(),
            rollout_func=lambda prompts, trainer: each,
        )
        trainer.model.train()
        inputs = [{"prompt": str(i)} for i in range(2) for _ in range(8)]
        own = trainer._generate_and_score_completions(inputs)
        made = grpo.prepared(trainer, groups, 8)
    assert made.keys() == {k for k in own if k != "sampling_per_token_logps"}
    for name, value in made.items():
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
@needs("liger_kernel", "peers")
def test_liger_s_layers_do_not_stay(load):
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    from transformers.models.qwen2 import modeling_qwen2

    peer = load("train_trl")
    before = modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2MLP
    with peer.alone():
        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)
        assert modeling_qwen2.apply_rotary_pos_emb is not before[0]
    assert (modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2MLP) == before
