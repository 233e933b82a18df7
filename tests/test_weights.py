"""Weights that no rank holds whole: read into shards, and written back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import finish, launch, tiny_model, told, write_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefuse.trainer import weights
from prefuse.trainer.errors import UserError
from prefuse.trainer.model import load_model

NAMES = ["llama", "tied", "prefixless", "parts", "scores"]


def gpt2():
    shape = dict(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1))


def prefixless(folder: Path) -> None:
    """GPT-2 as it was published: its body's names without the prefix."""
    gpt2().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    plain = {k.removeprefix("transformer."): v for k, v in state.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("weights")
    write_model(top / "llama", tiny_model(vocab_size=49))
    write_model(top / "tied", tiny_model("Qwen2", tie=True, vocab_size=51).bfloat16())
    prefixless(top / "prefixless")
    tiny_model("Gemma2").save_pretrained(top / "parts", max_shard_size="20KB")
    (top / "names.json").write_text(json.dumps(NAMES))
    return top


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_shards_are_the_whole_model(folder, world):
    """Odd vocabularies, tied heads, other names, other dtypes, several files, a new head."""
    started = launch(world, "weights_worker.py", folder)
    assert finish(started) == [0] * world, told(folder)
    written = list((folder / str(world)).iterdir())
    assert len(written) == 2 * 2 * (len(NAMES) + 3)
    for out in written:
        name, dtype = out.name.split("-")[:2]
        source = folder / ("llama" if name == "scores" else name)
        given, got = tensors(source), tensors(out)
        if name == "scores":
            assert got.pop("score.weight").shape == (1, 32)
            del given["lm_head.weight"]
        assert got.keys() == given.keys()
        assert (out / "model.safetensors.index.json").exists() == out.name.endswith("-4000")
        for key, value in given.items():
            assert torch.equal(got[key], value.to(getattr(torch, dtype.removeprefix("torch."))))
        if name != "scores":
            loaded = AutoModelForCausalLM.from_pretrained(out)
            wanted = AutoModelForCausalLM.from_pretrained(source, dtype=loaded.dtype)
            pairs = zip(loaded.parameters(), wanted.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def drop_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def repeat_a_file(folder: Path) -> None:
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def write_both_of_a_tie(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "spoil, why",
    [
        (drop_a_tensor, "no file has model.norm.weight"),
        (reshape_a_tensor, "model.norm.weight is of another shape in its files"),
        (repeat_a_file, "two files have lm_head.weight"),
        (write_both_of_a_tie, "are tied, and differ in its files"),
        (quantize, "its weights are quantized"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no safetensors files"),
    ],
)
def test_a_model_that_must_be_loaded_whole_says_why(tmp_path, spoil, why):
    write_model(tmp_path)
    spoil(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(weights.Whole, match=why):
        weights.skeleton(AutoModelForCausalLM, str(tmp_path), config)


def test_a_quantized_model_is_refused(tmp_path):
    write_model(tmp_path)
    quantize(tmp_path)
    with pytest.raises(UserError, match="in floating point; got them quantized by bits"):
        load_model(str(tmp_path), dtype=torch.float32, layout="shared")


def test_a_mixture_of_experts_is_loaded_whole(tmp_path):
    tiny_model("Mixtral").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, layout="shared", in_shards=True)
    assert "converts the weights of a MixtralForCausalLM" in model.whole_because
    assert not any(p.is_meta for p in model.parameters())
