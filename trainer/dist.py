"""Ranks: one process without torchrun, FSDP2 over all of them with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sums a float64 tensor over ranks."""
        if self.world > 1:
            values = values.to(self.device if self.device.type == "cuda" else "cpu")
            dist.all_reduce(values)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank gets the same answer."""
        return bool(self.total(torch.tensor([float(flag)], dtype=torch.float64)).item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        every = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value)
        return every

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any rank has, in order."""
        return sorted({name for found in self.gather(list(names)) for name in found})

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start() -> Ranks:
    """Joins the process group torchrun describes in the environment, if it does."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(int(os.environ.get("RANK", 0)), world, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(scorer: Model, ranks: Ranks, frozen: bool = False) -> Model:
    """FSDP2: each decoder layer, and the rest with the scorer itself as the root.

    frozen: no backward follows, which would reshard the root: its own forward does.
    """
    if ranks.world > 1:
        for layer in decoder_layers(scorer):
            fully_shard(layer)
        fully_shard(scorer, reshard_after_forward=True if frozen else None)
    return scorer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, by the class names transformers gives for them."""
    names = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]
