"""Models in shards over ranks, by FSDP2; the vocabulary by our own head, which never gathers it."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from prefuse.kernels.vocab_shard import VocabShard, embedding

from .dist import Ranks
from .errors import UserError
from .weights import fill, stored

Model = TypeVar("Model", bound=nn.Module)


class Sharding(NamedTuple):
    """How: the flags of the same names."""

    fsdp: str = "full"
    group_size: int | None = None
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    shard_head: bool = True


def sharding_of(config, ranks: Ranks) -> Sharding:
    name = config.fsdp_param_dtype
    if name is None and config.bf16 and ranks.device.type == "cuda":
        name = "bfloat16"
    return Sharding(
        config.fsdp,
        config.fsdp_group_size,
        config.fsdp_reshard_after_forward,
        None if name in (None, config.dtype) else getattr(torch, name),
        config.fsdp_cpu_offload,
        config.shard_head,
    )


FULL = Sharding()


def shard(model: Model, ranks: Ranks, how: Sharding = FULL, frozen: bool = False) -> Model:
    """On its rank's device; of several ranks by FSDP2: each decoder layer, and the rest with the
    model itself as the root. Gradients are summed over ranks. A skeleton's weights are read.

    frozen: no backward follows, which would reshard the root: its own forward does.
    """
    if ranks.world == 1:
        return model.to(ranks.device)
    mesh = mesh_of(how, ranks)
    ignored = split_vocabulary(model, mesh) if how.shard_head and mesh.ndim == 1 else set()
    pinned = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    options: dict[str, Any] = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(how.param_dtype, torch.float32 if how.param_dtype else None),
        offload_policy=pinned if how.cpu_offload else OffloadPolicy(),
    )
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=how.reshard_after_forward, **options)
    root = True if frozen else None
    fully_shard(model, reshard_after_forward=root, ignored_params=ignored, **options)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums
    for method in ("own_logits", "own_score"):  # ways in other than `forward`
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    if stored(getattr(model, "model", model)) is not None:
        fill(model, torch.device("cpu") if how.cpu_offload else ranks.device)
    return model


def mesh_of(how: Sharding, ranks: Ranks) -> DeviceMesh:
    """[ranks], or [groups, ranks of a group]: whole copies are groups of one."""
    if how.fsdp == "full":
        return _mesh(dist.group.WORLD, ranks.device.type, ranks.world, None)
    size = 1
    if how.fsdp == "hsdp":
        size = how.group_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if ranks.world % size:
        raise UserError(
            f"--fsdp_group_size: wanted a divisor of the {ranks.world} ranks; got {size}"
        )
    return _mesh(dist.group.WORLD, ranks.device.type, ranks.world, size)


@lru_cache(maxsize=8)
def _mesh(world_group, device: str, world: int, size: int | None) -> DeviceMesh:
    """Once for all models of a run: each makes process groups."""
    if size is None:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world // size, size), mesh_dim_names=("replicate", "shard"))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def units(model: nn.Module) -> list[FSDPModule]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """After a forward that no backward follows: what it gathered are not the parameters."""
    for module in units(model):
        module.reshard()


def reduce_at(model: nn.Module, last: bool) -> None:
    """Of a step's micro-batches only the last one's backward sums over copies of the shards."""
    for module in units(model):
        module.set_requires_all_reduce(last)


def split_vocabulary(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leaves this rank its rows of the head, and of an embedding tied to it; returns them."""
    inner: Any = getattr(model, "model", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return set()
    table = inner.get_input_embeddings()
    tied = table.weight is head.weight
    if tied and type(table).forward is not nn.Embedding.forward:  # Gemma scales what it looks up
        return set()
    for name, value in list(head.named_parameters(recurse=False)):
        rows = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
        if rows.is_meta:
            rows = torch.empty_like(rows, device=mesh.device_type)
        head.register_parameter(name, nn.Parameter(rows, value.requires_grad))
    if tied:
        table.weight = head.weight
        table.forward = partial(_look_up, table)
    return set(head.parameters(recurse=False))


def _look_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    weight, place = local_rows(table.weight)
    assert place is not None
    found = embedding(ids.flatten(), weight, place, table.padding_idx)
    return found.view(*ids.shape, -1)


def local_rows(weight: Tensor) -> tuple[Tensor, VocabShard | None]:
    """A head's rows on this rank, and which they are; all of them where the head is whole."""
    if not isinstance(weight, DTensor):
        return weight, None
    mesh, total = weight.device_mesh, len(weight)
    start = min(mesh.get_local_rank() * -(-total // mesh.size()), total)
    return weight.to_local(), VocabShard(mesh.get_group(), start, total, own_tokens=True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, by the class names transformers gives for them."""
    names = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]
