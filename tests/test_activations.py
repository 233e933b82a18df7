"""What is kept for the backward pass changes memory, never a gradient."""

import json

import pytest
import torch
from tiny import (
    gradients,
    pair_rows,
    ragged_pairs,
    scorer_of,
    tiny_model,
    write_model,
    write_rows,
)

from prefuse.trainer import activations, objectives
from prefuse.trainer.batch import pack
from prefuse.trainer.cli import main

OFF = ["--activation_offloading"]


class Kept:
    """Counts the bytes that autograd keeps: its own storages, each once, weights apart."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen: dict[int, int] = {}

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return x

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)


def run(family: str, layout: str, policy: str | None = None, offload: bool = False):
    """Gradients of a step, and the bytes that its forward pass keeps."""
    model = tiny_model(family, hidden_size=64, intermediate_size=256).train()
    scorer = scorer_of(model, layout)
    if policy:
        activations.checkpoint(model, policy)
    batch = pack(ragged_pairs(24), layout == "shared")
    kept = Kept(model)
    with kept.hooks(), activations.offloaded(offload):
        loss = objectives.sft().objective(scorer, batch).loss.mean()
    loss.backward()
    return gradients(scorer), sum(kept.seen.values())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_one_gradient(family, layout):
    wanted, most = run(family, layout)
    for policy, offload in (("full", False), ("selective", False), (None, True), ("full", True)):
        found, _ = run(family, layout, policy, offload)
        for name, grad in wanted.items():
            assert torch.equal(found[name], grad), (policy, offload, name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_full_keeps_least(monkeypatch):
    _, everything = run("Llama", "shared")
    _, full = run("Llama", "shared", "full")
    assert full < 0.5 * everything


def test_what_is_offloaded(monkeypatch):
    """Activations go; weights, their views, integers and small tensors stay."""
    monkeypatch.setattr(activations, "SMALL", 8)
    weight = torch.nn.Parameter(torch.randn(16, 16))
    x = torch.randn(16, 16)
    for stays in (weight, weight.t(), torch.arange(64), torch.randn(4)):
        assert activations._pack(stays) is stays
    packed = activations._pack(x)
    assert isinstance(packed, tuple) and packed[0].data_ptr() != x.data_ptr()
    assert torch.equal(activations._unpack(packed), x)


def test_commands_take_the_flags(tmp_path, capsys):
    """Losses are the same with any of them; a budget wants a compiler."""
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    model, losses = write_model(tmp_path / "model"), []
    again = ["--gradient_checkpointing", "--gradient_checkpointing_policy"]
    for name, more in {"plain": [], "again": [*again, "selective"], "away": OFF}.items():
        argv = ["dpo", "--model_name_or_path", model, "--dataset_name", rows, "--output_dir"]
        argv += [str(tmp_path / name), "--max_steps", "3", "--logging_steps", "1"]
        main([*argv, "--bf16", "false", "--disable_tqdm", "--learning_rate", "1e-3", *more])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(SystemExit):
        main([*argv, "--activation_memory_budget", "0.5"])
    assert "a number in [0, 1], with torch_compile" in capsys.readouterr().err
