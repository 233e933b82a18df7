"""Ranks: one process without torchrun, those that it starts with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
        """Sums a float64 tensor over ranks; on the CPU."""
        return self.summed(values).cpu()

    def summed(self, values: Tensor) -> Tensor:
        """The same on the ranks' device, which is not waited for."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank gets the same answer."""
        return bool(self.total(torch.tensor([float(flag)], dtype=torch.float64)).item())

    def largest(self, value: int) -> int:
        """Over ranks."""
        return max(self.gather(value)) if self.any(bool(value)) else 0

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


def start(timeout: float = 1800) -> Ranks:
    """Joins the process group torchrun describes in the environment, if it does; timeout: seconds
    that a rank waits for others."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        wait = timedelta(seconds=timeout)
        # gloo too on GPUs: shards that --fsdp_cpu_offload keeps on the host are summed there
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=wait)
    return Ranks(int(os.environ.get("RANK", 0)), world, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
