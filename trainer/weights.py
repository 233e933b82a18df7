"""Weights that no rank ever holds whole: read from safetensors files into shards, and written
back a file at a time. The files' names are those of the model's own parameters; a model whose
weights transformers renames or converts as it loads them is loaded whole."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .lora import merged, plain_name

FILE_BYTES = 5 << 30  # of an exported file: what rank 0 holds at a time


class Stored(NamedTuple):
    """Where the weights of a model are, by the names of its parameters."""

    folder: Path
    keys: dict[str, str]


class Whole(Exception):
    """Why a model can only be loaded whole."""


def skeleton(auto, name: str, config, new: tuple[str, ...] = (), **options) -> Any:
    """The model that `auto.from_pretrained(name, config=config, **options)` loads, on no device
    but for its buffers and for parameters called `new`, which no file has to have; its attribute
    `stored` says where the others are.

    Raises:
        Whole: with the reason, if it has to be loaded whole.
    """
    if hasattr(config, "quantization_config"):
        raise Whole("its weights are quantized")
    if options.pop("trust_remote_code", False) and hasattr(config, "auto_map"):
        raise Whole("it is code of its own")
    folder = _folder(name)
    shapes = _shapes(folder)
    with _no_data():
        model = auto.from_config(config, **options)
    if get_model_conversion_mapping(model, add_legacy=False):
        raise Whole(f"transformers converts the weights of a {type(model).__name__}")
    half = model.dtype != torch.float32
    if half and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        raise Whole("some of its weights stay in float32")
    if buffers := model.state_dict().keys() - _every(model).keys():
        raise Whole(f"it has buffers with state: {min(buffers)}")
    keys = _keys(model, shapes, folder)
    for place, p in list(model.named_parameters()):
        if place in new and place not in keys:
            owner, _, own = place.rpartition(".")
            empty = torch.empty_like(p, device="cpu")
            setattr(model.get_submodule(owner), own, nn.Parameter(empty))
        elif place not in keys:
            raise Whole(f"no file has {place}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.stored = Stored(folder, keys)
    return model.eval()


def stored(model: nn.Module) -> Stored | None:
    return getattr(model, "stored", None)


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in the files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if twice := shapes.keys() & found.keys():
            raise Whole(f"two files have {min(twice)}")
        shapes |= found
    if not shapes:
        raise Whole("it has no safetensors files")
    return shapes


def _keys(model: PreTrainedModel, shapes: Mapping[str, tuple], folder: Path) -> dict[str, str]:
    """By name of a parameter, or by each of its names, the tensor that has its numbers."""
    prefix = f"{model.base_model_prefix}."
    names: dict[int, list[str]] = {}
    every = _every(model)
    for name, p in every.items():
        names.setdefault(id(p), []).append(name)
    keys = {}
    for known in names.values():
        candidates = [k for n in known for k in (n, prefix + n, n.removeprefix(prefix))]
        found = [k for k in dict.fromkeys(candidates) if k in shapes]
        shape = tuple(every[known[0]].shape)
        if any(shapes[k] != shape for k in found):
            raise Whole(f"{found[0]} is of another shape in its files")
        if len(found) > 1 and not _equal(folder, found):
            raise Whole(f"{' and '.join(found)} are tied, and differ in its files")
        keys |= dict.fromkeys(known, found[0]) if found else {}
    return keys


def _every(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by all their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _equal(folder: Path, keys: list[str]) -> bool:
    tensors = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors += [file.get_tensor(k) for k in keys if k in file.keys()]  # noqa: SIM118
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


@contextmanager
def _no_data():
    """Parameters are made on no device; buffers are computed as ever."""
    register = nn.Module.register_parameter

    def without(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is tied comes again
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Gives the parameters of a sharded `module`, whose `model` is a skeleton, this rank's rows."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    model: Any = module.model
    wanted: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if key := model.stored.keys.get(plain_name(name)):
            wanted.setdefault(key, []).append(p.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.load(
            {key: tensors[0] for key, tensors in wanted.items()},
            storage_reader=HuggingFaceStorageReader(str(model.stored.folder)),
            no_dist=True,
        )
    for first, *copies in wanted.values():
        for other in copies:
            other.copy_(first)


@torch.no_grad()
def copied(model: Any, dtype: torch.dtype, adapted: bool = True) -> Any:
    """Another model object with whole copies of the weights, adapters merged into them or left
    out: a collective call where they are in shards."""
    first = next(model.parameters())
    sharded = isinstance(first, DTensor)
    device = torch.device(first.device_mesh.device_type) if sharded else first.device
    with _no_data():
        other = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    other._apply(lambda t: torch.empty_like(t, device=device))
    other.tie_weights()
    copy_weights(model, other, adapted)
    return other.requires_grad_(False)


@torch.no_grad()
def copy_weights(model: nn.Module, other: nn.Module, adapted: bool = True) -> None:
    own = _every(other)
    for name, tensor in merged(model, dict(model.named_parameters()), adapted):
        own[name].copy_(tensor)
    buffers = dict(other.named_buffers())
    for name, b in model.named_buffers():
        buffers[plain_name(name)].copy_(b)


@torch.no_grad()
def write(model: Any, folder: Path | None, file_bytes: int = FILE_BYTES) -> None:
    """The weights of what was a skeleton, adapters merged, in files of at most `file_bytes` with an
    index: a collective call. folder: None on ranks that do not write."""
    own = dict(model.named_parameters())
    empty = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in own.items()}
    key = lambda name: model.stored.keys.get(name, name)  # noqa: E731
    split = split_torch_state_dict_into_shards(
        {key(name): tensor for name, tensor in merged(model, empty)},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=file_bytes,
    )
    place = {k: file for file, names in split.filename_to_tensors.items() for k in names}
    held: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, tensor in merged(model, own):
        if folder is None:
            continue
        file = place[key(name)]
        held[file][key(name)] = tensor.cpu().contiguous()
        if len(held[file]) == len(split.filename_to_tensors[file]):
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
    if folder is not None and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
