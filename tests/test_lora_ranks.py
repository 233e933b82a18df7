"""Adapters on one rank and on two: the same gradients, steps, resumption and files."""

import lora_worker
import pytest
import ranks_worker as worker
import torch
from online_runs import PROMPTS, REWARDS
from tiny import (
    alone_and_on_two,
    command,
    each_rank,
    finish,
    gradients,
    launch,
    pair_rows,
    relative_error,
    tiny_model,
    told,
    write_model,
    write_rows,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from prefuse.trainer import lora
from prefuse.trainer.batch import pack
from prefuse.trainer.dist import Ranks
from prefuse.trainer.schedule import Schedule

peft = pytest.importorskip("peft", reason="needs peft: pip install 'prefuse[peft]'")
pytestmark = pytest.mark.full
ALONE = Ranks(0, 1, torch.device("cpu"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 40)[None], use_cache=False).logits


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """What one rank found, here, and what two did."""
    top = tmp_path_factory.mktemp("ranks")
    write_model(top / "model", tiny_model(tie=True))
    write_rows(top / "rows.jsonl", pair_rows(24))
    (top / "1").mkdir()
    (top / "2").mkdir()
    started = launch(2, "lora_worker.py", top / "2")
    known = worker.models_of
    try:
        alone = lora_worker.every_case(top / "1", ALONE)
        lora_worker.command(top / "1", 1)
        statuses = finish(started)
    finally:
        worker.models_of = known
        for p in started:
            p.kill()
    assert not any(statuses), told(top)
    return top, {1: alone, 2: torch.load(top / "2/found.pt", weights_only=True)}


def oracle(method: str) -> dict:
    """The gradient in float64 by hand: one batch, one process, no loop."""
    scorer, objective = lora_worker.models_of(method, torch.float64, ALONE)
    config = worker.config_of("unused", **worker.splits(1)["8x1"])
    (rows,) = Schedule(worker.PAIRS, config, ALONE).step(1)
    objective.objective(scorer, pack(rows, share=False)).loss.mean().backward()
    return gradients(scorer)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", lora_worker.CASES)
def test_ranks_change_nothing(ranked, case, world):
    """Gradients and five steps, to 1e-6 in float32 and to 1e-12 in float64."""
    method, _ = lora_worker.CASES[case]
    wanted = oracle(method)
    assert wanted and all(".lora_" in n or ".modules_to_save." in n for n in wanted)
    exact = ranked[1][1][case, "float64"]
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        got = ranked[1][world][case, dtype]
        assert relative_error(got["gradients"], wanted) <= tolerance
        for name, p in exact["parameters"].items():
            limit = tolerance * float(p.abs().max())
            assert_close(got["parameters"][name], p, rtol=0, atol=limit, msg=name)
        assert_close(got["losses"], exact["losses"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_resume_straight_through(ranked, world):
    (losses, weights), (resumed_losses, resumed) = ranked[1][world]["resumed"]
    assert resumed_losses == losses
    assert all(torch.equal(resumed[name], p) for name, p in weights.items())


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_export_adapters_alone(ranked, world):
    state, weights, sampler = ranked[1][world]["exported"]
    trained = {n for n in weights if ".lora_" in n or ".modules_to_save." in n}
    assert {f"model.{name}" for name in state} == trained
    for name, p in state.items():
        assert torch.equal(p.double(), weights[f"model.{name}"]), name
    shared = ranked[1][1]["exported"][2]
    model = lora_worker.adapted(tie=True)
    merged = dict(lora.merged(model, dict(model.named_parameters())))
    if world == 2:  # a copy, with the adapters in its weights
        assert sampler.keys() == merged.keys() != shared.keys()
        for name, p in merged.items():
            assert_close(sampler[name], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, more",
    [("grpo", ["--beta", "0.01"]), ("online-dpo", ["--loss_type", "xpo"]), ("ppo", [])],
)
def test_ranks_sample_and_learn_alike(tmp_path, name, more):
    """One body is policy and reference, in shards; samplers have copies of either."""
    argv = [name, "--model_name_or_path", write_model(tmp_path / "model", tiny_model(seed=3))]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", PROMPTS), "--disable_tqdm"]
    argv += ["--reward_funcs", f"{REWARDS}:share_of_w7", "--logging_steps", "1", "--bf16", "false"]
    argv += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--use_peft", *more]
    argv += ["--max_completion_length", "6", "--max_steps", "4", "--output_dir"]
    found = alone_and_on_two(argv, tmp_path)
    for one, two in zip(*found, strict=True):
        for key in one.keys() & {"loss", "reward", "kl", "grad_norm", "value_loss"}:
            assert_close(two[key], one[key], rtol=1e-4, atol=1e-6, msg=key)


def test_ranks_merge_what_they_leave(tmp_path):
    """A whole model from shards, tied, is the adapters of one process."""
    argv = ["dpo", "--model_name_or_path", write_model(tmp_path / "model", tiny_model(tie=True))]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", pair_rows(24)), "--disable_tqdm"]
    argv += ["--learning_rate", "1e-2", "--max_steps", "3", "--bf16", "false", "--use_peft"]
    argv += ["--lora_target_modules", "all-linear", "--per_device_train_batch_size", "4"]
    merged = ("--merge_on_export", "--output_dir", str(tmp_path / "two"))
    both = [command(*argv, *merged, env=env) for env in each_rank(2)]
    more = ("--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one"))
    assert finish([*both, command(*argv, *more)]) == [0, 0, 0]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    adapters = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    assert_close(logits(whole), logits(adapters), rtol=0, atol=1e-5)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_ranks_leave_the_same_adapters(ranked):
    loaded = [
        logits(peft.AutoPeftModelForCausalLM.from_pretrained(ranked[0] / world / "command"))
        for world in ("1", "2")
    ]
    assert_close(*loaded, rtol=1e-4, atol=1e-5)
    assert (loaded[0] - logits(tiny_model(tie=True).eval())).abs().max() > 1e-2
