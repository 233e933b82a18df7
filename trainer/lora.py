"""Adapters of low rank, by peft: put into a model, switched off, merged, written.

They are injected into the transformers model itself, by its own `add_adapter`: no wrapper changes
its class, its `base_model` or its head, so nothing else of the trainer knows of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .errors import UserError

ADAPTER = "default"  # peft's own name
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach(config, model: Any, base: str | None = None) -> str | None:
    """Freezes `model`, which loads from `base`, but for new adapters and for a head of scores; says
    what is trained."""
    if not config.use_peft:
        return None
    peft, base = _peft(), base or config.model_name_or_path
    if is_adapter(base) and not config.merge_on_export:
        raise UserError(
            f"{base}: an adapter, which is merged into its model before training, so a new one "
            "would load on neither; pass --merge_on_export, which writes the whole model"
        )
    scores = isinstance(getattr(model, "score", None), nn.Linear)
    saved = [*(config.lora_modules_to_save or []), *(["score"] if scores else [])]
    targets = config.lora_target_modules
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=saved or None,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    kept = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.random.fork_rng([]):
        try:
            model.add_adapter(settings, ADAPTER)
        except ValueError as error:
            raise UserError(f"--lora_target_modules: {error}") from error
        _check(model, [module for module in kept if module is not None])
        torch.manual_seed(config.seed)  # the same on every rank
        _draw(model)
    for name, p in model.named_parameters():
        if ".lora_" in name and p.dtype == torch.bfloat16:
            p.data = p.data.float()  # their small steps would be lost
    settings.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    places = sorted({name.rsplit(".", 1)[-1] for name, _ in _layers(model)})
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad or r) for r in (0, 1)]
    return (
        f"lora: rank {config.lora_r} at {', '.join(places)}; {count[0]} of {count[1]} parameters "
        "are trained"
    )


def _peft():
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "--use_peft: wanted the package peft; got none. pip install 'prefuse[peft]'"
        ) from error
    return peft


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that stand in for others: with adapters, or trained copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def _check(model: nn.Module, vocabulary: list[nn.Module]) -> None:
    for name, layer in _layers(model):
        copied = hasattr(layer, "original_module")
        flag = "lora_modules_to_save" if copied else "lora_target_modules"
        own = layer.original_module if copied else layer.get_base_layer()
        if any(own is module for module in vocabulary):
            raise UserError(
                f"--{flag}: wanted modules between the embedding and the head, whose weight the "
                f"fused head reads as it is; got {name}. Leave it out"
            )
        if not copied and not isinstance(own, nn.Linear | Conv1D):
            raise UserError(
                f"--{flag}: wanted linear modules; got {name}, a {type(own).__name__}. Leave it out"
            )


def _draw(model: nn.Module) -> None:
    """First values of the adapters, the same whether the weights below them are there or not."""
    nowhere = getattr(model, "stored", None) is None  # a model that no one will fill
    for _, layer in _layers(model):
        if hasattr(layer, "original_module"):
            continue
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            if part.weight.is_meta and not nowhere:
                part.to_empty(device="cpu")
        layer.reset_lora_parameters(ADAPTER, True)


def has_adapters(model: Any) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def without_adapters(model: nn.Module):
    """`model` as it was before them."""
    layers = [layer for _, layer in _layers(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for p in trained:
        p.requires_grad_(True)  # peft takes it away; FSDP keeps what it sees at its first gathering
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_of(model: Any) -> Any:
    """Another object of the model before its adapters, on the same tensors."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    base = copy.deepcopy(model, shared)
    for name, layer in _layers(base):
        own = layer.original_module if hasattr(layer, "original_module") else layer.base_layer
        base.set_submodule(name, own)
    _forget(base)
    return base


def plain(model: Any) -> Any:
    """Its shape alone, without adapters and without tensors: what a merged state is written by."""
    with torch.device("meta"):
        shape = type(model)._from_config(model.config)
    shape.generation_config = getattr(model, "generation_config", None)
    return shape


def _forget(model: Any) -> None:
    model._hf_peft_config_loaded = False
    del model.peft_config


def merged(
    model: Any, tensors: Mapping[str, Tensor], adapted: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Its parameters or its state with the adapters in the weights, or without them if not
    `adapted`, by the names of the model without them; each whole where it is sharded: a collective
    call."""
    copies = ".original_module." if adapted else f".modules_to_save.{ADAPTER}."
    for name, value in tensors.items():
        if not has_adapters(model):
            yield name, whole(value)
        elif ".lora_" not in name and copies not in name:
            tensor = whole(value)
            if adapted and name.endswith(".base_layer.weight"):
                tensor = tensor + _delta(model, name.removesuffix(".base_layer.weight"), tensors)
            yield plain_name(name), tensor.to(value.dtype)


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters; a trained copy has that of what it
    replaces."""
    name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    return name.replace(f".modules_to_save.{ADAPTER}.", ".")


def _delta(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    layer: Any = model.get_submodule(name)
    down, up = (whole(tensors[f"{name}.lora_{x}.{ADAPTER}.weight"]).float() for x in "AB")
    delta = up @ down * layer.scaling[ADAPTER]
    return delta.T if layer.fan_in_fan_out else delta


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    here: Any = tensor.to(tensor.device_mesh.device_type)  # the host may have had it
    return here.full_tensor()


def is_adapter(name: str) -> bool:
    """Whether it is a folder with an adapter and no model."""
    folder = Path(name)
    return (folder / SETTINGS).is_file() and not (folder / "config.json").is_file()


def base_name(name: str) -> str:
    """The model that loads from `name`, or whose adapter it is."""
    if not is_adapter(name):
        return name
    base = json.loads(Path(name, SETTINGS).read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{name}/{SETTINGS}: wanted base_model_name_or_path, its model; got none")
    return base


def labels_of(name: str) -> int | None:
    """How many numbers a saved adapter's head of scores says, if it has one."""
    if not is_adapter(name) or not Path(name, WEIGHTS).is_file():
        return None
    with safe_open(Path(name, WEIGHTS), framework="pt") as file:
        heads = [key for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def merge_saved(model: Any, name: str) -> Any:
    """`model` with the adapter of a folder in its weights, where `name` is one."""
    if not is_adapter(name):
        return model
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(name)
    prefix = "base_model.model."
    state = {k.removeprefix(prefix): v for k, v in peft.load_peft_weights(name, "cpu").items()}
    peft.inject_adapter_in_model(settings, model, ADAPTER)
    found = peft.set_peft_model_state_dict(model, state, ADAPTER)
    if found.unexpected_keys:
        raise UserError(
            f"{name}: an adapter of another model than {type(model).__name__}: it has "
            f"{found.unexpected_keys[0]}"
        )
    for place, layer in _layers(model):
        if hasattr(layer, "original_module"):
            own = layer.modules_to_save[ADAPTER]
        else:
            layer.merge()
            own = layer.get_base_layer()
        model.set_submodule(place, own)
    del model.peft_config
    return model.requires_grad_(True)
