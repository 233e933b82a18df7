"""Whole runs of tiny models: they learn, repeat, resume, and leave a model that loads."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import (
    gradients,
    pair_rows,
    ragged_pairs,
    scorer_of,
    sft_rows,
    tiny_model,
    write_model,
    write_rows,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefuse.trainer import checkpoint, loop, objectives
from prefuse.trainer.batch import pack
from prefuse.trainer.cli import main
from prefuse.trainer.config import SFTConfig
from prefuse.trainer.dist import Ranks
from prefuse.trainer.errors import UserError
from prefuse.trainer.model import export
from prefuse.trainer.report import Meter, Report
from prefuse.trainer.schedule import Schedule

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("models")
    return {
        "untied": write_model(top / "untied"),
        "tied": write_model(top / "tied", tiny_model(tie=True)),
        "other": write_model(top / "other", tiny_model(seed=5)),
    }


@pytest.fixture
def run(models, tmp_path):
    """Runs a command in this process; returns the lines of its metrics.jsonl."""

    def run(method: str, name: str, *more: str, rows=None, model: str = "untied") -> list[dict]:
        rows = rows or (pair_rows(24) if method == "dpo" else sft_rows(24))
        argv = ["--model_name_or_path", models.get(model, model), "--output_dir"]
        argv += [str(tmp_path / name), "--dataset_name"]
        argv += [write_rows(tmp_path / f"{name}.jsonl", rows), "--logging_steps", "1"]
        argv += ["--bf16", "false", "--disable_tqdm", "--learning_rate", "3e-3", *more]
        main([method, *argv])
        return metrics_of(tmp_path / name)

    return run


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_first_step_the_last_and_every_nth_are_logged(run):
    steps = ("--max_steps", "6", "--logging_steps", "4")
    assert [x["step"] for x in run("sft", "out", *steps)] == [1, 4, 6]
    later = run("sft", "later", *steps, "--logging_first_step", "false")
    assert [x["step"] for x in later] == [4, 6]


def test_sft_overfits(run):
    options = ("--max_steps", "80", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant")
    lines = run("sft", "out", *options, rows=sft_rows(6))
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.02
    assert lines[-1]["mean_token_accuracy"] == 1.0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_preferences_are_learnt(run, loss_type):
    lines = run("dpo", "out", "--max_steps", "30", "--loss_type", loss_type)
    assert lines[-1]["rewards/accuracies"] == 1.0 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("more", [(), ("--layout", "padded"), ("--precompute_ref_log_probs",)])
def test_the_first_loss_is_ln_2(run, more):
    """Whatever the policy is, it is its own reference at first."""
    first = run("dpo", "out", "--max_steps", "1", *more)[0]
    assert_close(first["loss"], math.log(2), rtol=0, atol=1e-6)
    assert first["rewards/accuracies"] == 0.5 and abs(first["rewards/margins"]) < 1e-5


MOVING = ("--sync_ref_model", "--ref_model_sync_steps", "2", "--ref_model_mixup_alpha")


@pytest.mark.parametrize("method, more", [("sft", ()), ("dpo", ()), ("dpo", (*MOVING, "0.4"))])
def test_resume_is_straight_through(run, tmp_path, method, more):
    """Same losses and parameters, exactly; the break is in the middle of an epoch."""
    options = [*more, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    options += ["--warmup_steps", "2", "--lr_scheduler_type", "cosine", "--max_steps", "8"]
    straight = run(method, "straight", *options)
    run(method, "broken", *options, "--save_steps", "5")
    (tmp_path / "broken" / "checkpoint-7").mkdir()  # one that was never completed
    resumed = run(method, "broken", *options, "--resume_from_checkpoint", "true")
    assert [x["step"] for x in resumed] == list(range(1, 9))
    for name in ("loss", "learning_rate", "grad_norm"):
        assert [x[name] for x in resumed] == [x[name] for x in straight]
    wanted, got = (weights_of(tmp_path / name) for name in ("straight", "broken"))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_reference_replaced_by_the_policy_leaves_ln_2(run):
    """After every second step both are the same model."""
    lines = run("dpo", "out", "--max_steps", "6", *MOVING, "1")
    at_ln_2 = [abs(x["loss"] - math.log(2)) < 1e-6 for x in lines]
    assert at_ln_2 == [True, False, True, False, True, False]


def test_a_moved_reference_is_a_mixture():
    policy, reference = (scorer_of(tiny_model(seed=seed)) for seed in (0, 1))
    wanted = [
        0.3 * new + 0.7 * old
        for new, old in zip(policy.parameters(), reference.parameters(), strict=True)
    ]
    method = objectives.following(objectives.sft(), policy, reference, alpha=0.3, every=3)
    for done in (1, 2, 3, 4, 5):
        method.after_step(done)
    for got, mixed in zip(reference.parameters(), wanted, strict=True):
        assert_close(got, mixed)


def test_checkpoints_kept(run, tmp_path):
    run("sft", "out", "--max_steps", "5", "--save_steps", "1", "--save_total_limit", "2")
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if "checkpoint" in p.name)
    assert names == ["checkpoint-4", "checkpoint-5"]
    named = run("sft", "out", "--max_steps", "6", "--resume_from_checkpoint",
                str(tmp_path / "out" / "checkpoint-4"))  # fmt: skip
    assert [x["step"] for x in named] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("more", [(), ("--ref_model_name_or_path",)])
def test_precomputed_reference_is_the_live_one(run, models, more):
    more = (*more, models["other"]) if more else ()
    options = ("--max_steps", "6", "--eval_fraction", "0.25", "--eval_strategy", "steps")
    options += ("--eval_steps", "3", *more)
    live = run("dpo", "live", *options)
    table = run("dpo", "table", *options, "--precompute_ref_log_probs")
    assert len(live) == len(table) == 8
    for one, other in zip(live, table, strict=True):
        for name in one.keys() & {"loss", "eval_loss", "rewards/chosen", "eval_rewards/margins"}:
            assert_close(other[name], one[name], rtol=0, atol=1e-6)
    assert (abs(live[0]["rewards/chosen"]) > 1e-3) == bool(more)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_gradient_checkpointing_gives_the_same_gradients(layout):
    found = []
    for checkpointing in (False, True):
        model = tiny_model("Qwen2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        objective = objectives.sft().objective
        batch = pack(ragged_pairs(), layout == "shared")
        objective(scorer_of(model, layout), batch).loss.sum().backward()
        found.append(gradients(model))
    plain, checkpointed = found
    assert all(torch.equal(checkpointed[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("tie", [False, True])
def test_an_exported_model_gives_the_same_logits(tmp_path, tie):
    model = tiny_model(tie=tie)
    scorer = scorer_of(model)
    config = SFTConfig(
        model_name_or_path="tiny",
        dataset_name="rows",
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    report = Report(config, "sft", ALONE)
    schedule = Schedule(ragged_pairs(), config, ALONE)
    loop.train(
        *(config, objectives.sft(), scorer, loop.make_optimizer(scorer, config), schedule, None),
        *(ALONE, report, Meter(ALONE)),
    )
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "fresh"))
    export(model, checkpoint.full_state(scorer, ALONE), tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.config.use_cache and loaded.config.tie_word_embeddings == tie
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    tokens = torch.arange(2, 40)[None]
    model.set_attn_implementation("sdpa")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens, use_cache=False).logits)
    assert not torch.equal(loaded.lm_head.weight, tiny_model(tie=tie).lm_head.weight)


def test_a_model_with_odd_generation_settings_is_exported(run, tmp_path):
    """Published models carry settings that transformers refuses to save again."""
    folder = write_model(tmp_path / "odd")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 1}
    Path(folder, "generation_config.json").write_text(json.dumps(settings))
    run("sft", "out", "--max_steps", "1", model=folder)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.top_p == 0.9


def test_held_out_rows(run, tmp_path, capsys):
    """A share is held out and never trained on; a file of its own is used whole."""
    options = ("--max_steps", "4", "--per_device_train_batch_size", "9")
    options += ("--eval_strategy", "epoch", "--eval_on_start")
    lines = run("sft", "share", *options, "--eval_fraction", "0.25")
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 2, 4]
    assert "held-out data: 6 of 6 rows kept" in capsys.readouterr().out
    held = [x for x in lines if "eval_loss" in x]
    trained = sum(x["num_tokens"] for x in lines[1:4] if "loss" in x)
    rows = sft_rows(24)
    everything = sum(len((r["prompt"] + r["completion"]).split()) + 1 for r in rows)
    assert trained + held[0]["eval_num_tokens"] == everything
    file = write_rows(tmp_path / "held.jsonl", sft_rows(5, seed=9))
    lines = run("sft", "file", *options, "--eval_dataset_name", file)
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3]


def test_pure_bf16(run, tmp_path):
    """Weights, gradients and optimizer in bfloat16: it learns, and the export is bfloat16."""
    lines = run("dpo", "out", "--dtype", "bfloat16", "--max_steps", "20")
    assert_close(lines[0]["loss"], math.log(2), rtol=0, atol=1e-6)
    assert lines[-1]["rewards/accuracies"] > 0.9
    assert {w.dtype for w in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_bf16_over_float32_weights(run, tmp_path):
    exact = run("sft", "exact", "--max_steps", "10")
    mixed = run("sft", "mixed", "--max_steps", "10", "--bf16")
    assert_close(losses(mixed), losses(exact), rtol=0.02, atol=0)
    assert losses(mixed) != losses(exact)
    assert {w.dtype for w in weights_of(tmp_path / "mixed").values()} == {torch.float32}


@pytest.mark.parametrize("method, more", [("sft", ()), ("dpo", ("--beta", "0.3"))])
def test_a_runs_own_config_repeats_it(run, tmp_path, method, more):
    options = ("--max_steps", "4", "--per_device_train_batch_size", "5", "--max_length", "none")
    wanted = run(method, "first", *options, *more)
    config = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(config.read_text())["max_length"] is None
    for name, argv in {"dash": [method, "--config"], "train": ["train"]}.items():
        main([*argv, str(config), "--output_dir", str(tmp_path / name)])
        got = metrics_of(tmp_path / name)
        assert losses(got) == losses(wanted)
        assert [x["grad_norm"] for x in got] == [x["grad_norm"] for x in wanted]


def test_splitting_the_batch_changes_nothing(run):
    """per_device 8, 4 x 2, 2 x 4, and repacked by tokens: the same run to float32 rounding."""
    wanted = run("dpo", "8", "--max_steps", "6", "--per_device_train_batch_size", "8")
    for rows, accumulation, more in ((4, 2, ()), (2, 4, ()), (8, 1, ("60",))):
        options = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps"]
        options += [str(accumulation), "--max_steps", "6"]
        options += ["--max_tokens_per_micro_batch", *more] if more else []
        got = run("dpo", f"{rows}x{accumulation}{len(more)}", *options)
        assert_close(losses(got), losses(wanted), rtol=1e-4, atol=0)
        assert_close(got[0]["grad_norm"], wanted[0]["grad_norm"], rtol=1e-5, atol=0)


def test_the_order_of_rows(run):
    """The seed orders them; without shuffling the file does."""
    options = ("--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "0")
    runs = {name: run("sft", name, *options, "--seed", name) for name in ("1", "2")}
    assert losses(runs["1"]) != losses(runs["2"])
    by_file = run("sft", "file", *options, "--shuffle_dataset", "false")
    alone = run("sft", "alone", *options[2:], "--max_steps", "1", rows=sft_rows(24)[:4])
    assert_close(by_file[0]["loss"], alone[0]["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "kind, warmup, wanted",
    [
        ("linear", "0", [1.0, 0.75, 0.5, 0.25]),
        ("linear", "0.5", [0.0, 0.5, 1.0, 0.5]),
        ("constant", "0.3", [0.0, 0.5, 1.0, 1.0]),
        ("constant", "0", [1.0, 1.0, 1.0, 1.0]),
        ("constant", "2", [0.0, 0.5, 1.0, 1.0]),
        ("cosine", "0", [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ("constant_with_warmup", "2", [0.0, 0.5, 1.0, 1.0]),
    ],
)
def test_learning_rates(run, kind, warmup, wanted):
    options = ("--max_steps", "4", "--learning_rate", "1.0", "--optim", "sgd", "--max_grad_norm")
    lines = run(
        "sft", "out", *options, "1e-6", "--lr_scheduler_type", kind, "--warmup_steps", warmup
    )
    assert_close([x["learning_rate"] for x in lines], wanted)


def test_weight_decay_spares_vectors():
    config = SFTConfig("m", "d", "o", weight_decay=0.1, learning_rate=0.5)
    scorer = scorer_of(tiny_model("Qwen2"))
    before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    loop.make_optimizer(scorer, config).step()
    for name, p in scorer.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.dim() > 1 else 1.0
        assert_close(p.detach(), before[name] * factor, msg=name)


def test_the_gradient_is_clipped_and_reported_unclipped():
    scorer = scorer_of(tiny_model())
    config = SFTConfig("m", "d", "o", max_grad_norm=0.5)
    for p in scorer.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in scorer.parameters())
    norm = loop.clip(scorer, config)
    assert_close(float(norm), math.sqrt(count), rtol=1e-6, atol=0)
    clipped = torch.cat([p.grad.flatten() for p in scorer.parameters()]).norm()
    assert_close(float(clipped), 0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_finite_leaves_weights_and_optimizer_as_they_were(tmp_path, what):
    scorer = scorer_of(tiny_model())
    config = SFTConfig("m", "d", str(tmp_path), max_steps=9, learning_rate=0.1, disable_tqdm=True)
    method, steps, before = objectives.sft(), 0, {}

    def spoiled(scorer, batch):
        nonlocal steps, before
        steps += 1
        if steps < 3:
            return method.objective(scorer, batch)
        before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
        result = method.objective(scorer, batch)
        if what == "gradient":
            scorer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
            return result
        return result._replace(loss=result.loss + math.nan)

    with pytest.raises(UserError, match=f"step 3: {what} is not finite .*Rows of rank 0: 4"):
        report = Report(config, "sft", ALONE)
        spoilt, schedule = (
            method._replace(objective=spoiled),
            Schedule(ragged_pairs(), config, ALONE),
        )
        loop.train(
            *(config, spoilt, scorer, loop.make_optimizer(scorer, config), schedule, None),
            *(ALONE, report, Meter(ALONE)),
        )
    assert all(torch.equal(p, before[name]) for name, p in scorer.named_parameters())


@pytest.mark.full
def test_torch_compile(run):
    """Compiled decoder layers give the same run to float32 rounding."""
    wanted = run("dpo", "eager", "--max_steps", "3")
    got = run("dpo", "compiled", "--max_steps", "3", "--torch_compile")
    assert_close(losses(got), losses(wanted), rtol=1e-4, atol=0)
