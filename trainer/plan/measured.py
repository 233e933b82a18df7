"""An estimate beside what a run took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dist import Ranks
from ..estimate import Run, estimate
from ..model import config_of
from .device import Device
from .work import Work


def measured_bytes(device: torch.device) -> int | None:
    """The most that tensors took at once; a CPU does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def beside(config, ranks: Ranks, work: Callable[[Any], tuple[Work, Work, int]]) -> str | None:
    """In a line, of this rank; work: as `Run` has it. None where memory was not measured."""
    most = measured_bytes(ranks.device)
    if most is None:
        return None
    device = Device("here", torch.device("cuda"), None, 1.0, 1.0, 1.0)
    shape = config_of(config.model_name_or_path, config.trust_remote_code)
    try:
        found = estimate(Run(config, shape, device, ranks.world, work)).peak
    except Exception as error:  # the run is done: whatever a model does to fake tensors
        return f"memory: {most / 2**30:.2f} GiB of tensors at most; no estimate: {error}"
    return (
        f"memory: {most / 2**30:.2f} GiB of tensors at most; estimated {found.total / 2**30:.2f} "
        f"GiB ({found.total / most - 1:+.0%}), in {found.name}"
    )
