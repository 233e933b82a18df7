"""Checkpoints by torch.distributed.checkpoint: sharded as the model is, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from .dist import Ranks
from .errors import UserError


class Beside(NamedTuple):
    """That saving does not wait; its ranks speak in a group of their own."""

    group: dist.ProcessGroup | None = None


class SaveFailed(Exception):
    """A checkpoint could not be written; the ones before it are as they were."""


class Started(NamedTuple):
    """A checkpoint that is being written; it has its name only once complete."""

    final: Path
    partial: Path
    progress: str  # JSON: what it says may change meanwhile
    shards: Future | None  # None: they are on disk

    def is_written(self, ranks: Ranks) -> bool:
        return not ranks.any(self.shards is not None and not self.shards.done())


def start(
    folder: Path,
    ranks: Ranks,
    modules: Mapping[str, nn.Module],
    optimizer,
    progress: dict[str, Any],
    own: dict[str, Any],
    beside: Beside | None = None,
) -> Started:
    """Begins `folder/checkpoint-N`, N = progress["step"].

    modules: the policy as "model", whose parameters the optimizer has, and what else changes.
    progress: the same on every rank, as JSON. own: this rank's tensors and plain values.
    beside: the shards are copied and written while training goes on.
    """
    final = folder / f"checkpoint-{progress['step']}"
    partial = folder / f".{final.name}.partial"
    found: list[Future | None] = []

    def write() -> None:
        found.append(_write(partial, ranks, modules, optimizer, own, beside))

    _together(ranks, lambda: ranks.is_main and _empty(partial), final)
    _together(ranks, write, final)
    return Started(final, partial, json.dumps(progress), found[0])


def finish(started: Started, ranks: Ranks, keep: int | None) -> Path:
    """Waits for what is still being written, gives the checkpoint its name, and removes those
    before it but for `keep`."""
    final, partial, progress, shards = started
    _together(ranks, lambda: shards is not None and shards.result(), final)
    _together(ranks, lambda: ranks.is_main and _finish(partial, final, progress, keep), final)
    return final


def _empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write(
    partial: Path, ranks: Ranks, modules, optimizer, own: dict[str, Any], beside: Beside | None
) -> Future | None:
    state, shards = _state(modules, optimizer), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
        if beside is None:
            dcp.save(state, checkpoint_id=partial)
        else:
            group = beside.group
            shards = dcp.async_save(state, checkpoint_id=partial, process_group=group)
    with (partial / f"rank-{ranks.rank}.pt").open("wb") as file:
        torch.save(own, file)
        _to_disk(file)
    return shards  # type: ignore[return-value]  a Future, unless a process of its own writes


def _finish(partial: Path, final: Path, progress: str, keep: int | None) -> None:
    with (partial / "progress.json").open("w") as file:
        file.write(progress)
        _to_disk(file)
    if final.exists():
        _unname(final)
    partial.rename(final)
    for old in complete(final.parent)[:-keep] if keep else ():
        _unname(old)
    for left in final.parent.glob(".checkpoint-*"):
        shutil.rmtree(left)


def _unname(path: Path) -> None:
    """Ahead of its removal: what a kill leaves of it is never taken for a checkpoint."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _together(ranks: Ranks, act, final: Path) -> None:
    """All ranks go on, or all give up: a full disk may be that of one node."""
    failure: BaseException | None = None
    try:
        act()
    except (OSError, RuntimeError, CheckpointException) as error:
        failure = error
    if ranks.any(failure is not None):
        told = [text for text in ranks.gather("" if failure is None else _cause(failure)) if text]
        if ranks.is_main:
            shutil.rmtree(final.with_name(f".{final.name}.partial"), ignore_errors=True)
        raise SaveFailed(f"{final} could not be written: {told[0]}") from failure


def _cause(error: BaseException) -> str:
    """In a line; dcp's own exception has those of its ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def load(path: Path, modules: Mapping[str, nn.Module], optimizer) -> None:
    """Restores model, optimizer and other modules in place."""
    state = _state(modules, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
        try:
            dcp.load(state, checkpoint_id=path)
        except CheckpointException as error:
            raise UserError(
                f"--resume_from_checkpoint {path}: wanted the parameters and the optimizer of this "
                f"run; {_cause(error).rstrip('.')}. Give it the model, adapters and --optim that "
                "it was written with, or begin a new run"
            ) from error
    set_state_dict(
        modules["model"],
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )
    for name in modules.keys() - {"model"}:
        set_model_state_dict(modules[name], state[name])


def read_alone(state: dict[str, Tensor], path: Path) -> None:
    """Fills these tensors in this process, whatever ranks wrote them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.load(state, checkpoint_id=path, no_dist=True)


def progress_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "progress.json").read_text())


def own_of(path: Path, rank: int) -> dict[str, Any]:
    """What a rank left beside its shards."""
    return torch.load(path / f"rank-{rank}.pt", weights_only=True)


# of a model with adapters those alone: the weights below them are where they were loaded from
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def _state(modules: Mapping[str, nn.Module], optimizer) -> dict[str, Any]:
    model, optimizer_state = get_state_dict(modules["model"], optimizer, options=TRAINED)
    model = _trained(modules["model"], model)
    others = {k: get_model_state_dict(m) for k, m in modules.items() if k != "model"}
    return {"model": model, "optimizer": optimizer_state, **others}


def _trained(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Without a frozen head that is tied to the embedding, which torch leaves under one name."""
    every = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in every if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "progress.json").exists()]
    return sorted(found, key=lambda p: int(re.sub(r"\D", "", p.name) or 0))


def resolve(folder: Path, wanted: str) -> Path:
    """The checkpoint that --resume_from_checkpoint names; "true" is the newest of the run."""
    if wanted.lower() not in ("true", "1", "yes"):
        path = Path(wanted)
        if not (path / "progress.json").exists():
            raise UserError(f"--resume_from_checkpoint {wanted}: not a complete checkpoint folder")
        return path
    checkpoints = complete(folder)
    if not checkpoints:
        raise UserError(f"--resume_from_checkpoint: {folder} holds no complete checkpoint")
    return checkpoints[-1]


def full_state(scorer: nn.Module, ranks: Ranks, frozen: bool = True) -> dict[str, Tensor] | None:
    """The model's own state dict on rank 0's CPU, for export; None on other ranks.

    frozen: with what is not trained.
    """
    apart = ranks.world > 1
    options = StateDictOptions(
        full_state_dict=apart, cpu_offload=apart, ignore_frozen_params=not frozen
    )
    state = get_model_state_dict(scorer, options=options)
    state = state if frozen else _trained(scorer, state)
    if not ranks.is_main:
        return None
    prefix = "model."
    own = {k: v for k, v in state.items() if k.startswith(prefix)}
    return {k.removeprefix(prefix): torch.as_tensor(v) for k, v in own.items()}
