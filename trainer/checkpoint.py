"""Checkpoints by torch.distributed.checkpoint: sharded as the model is, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from .dist import Ranks
from .errors import UserError


def save(
    folder: Path,
    ranks: Ranks,
    modules: Mapping[str, nn.Module],
    optimizer,
    progress: dict[str, Any],
    keep: int | None,
) -> Path:
    """Writes `folder/checkpoint-N`, N = progress["step"]; it has its name only once complete.

    modules: the policy as "model", whose parameters the optimizer has, and what else changes.
    """
    final = folder / f"checkpoint-{progress['step']}"
    partial = folder / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
        dcp.save(_state(modules, optimizer), checkpoint_id=partial)
    if ranks.is_main:
        (partial / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(folder)[:-keep] if keep else ():
            shutil.rmtree(old)
    ranks.barrier()
    return final


def load(path: Path, modules: Mapping[str, nn.Module], optimizer) -> dict[str, Any]:
    """Restores a checkpoint in place; returns its progress."""
    state = _state(modules, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no process group.*|.*single process.*")
        dcp.load(state, checkpoint_id=path)
    set_state_dict(
        modules["model"],
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )
    for name in modules.keys() - {"model"}:
        set_model_state_dict(modules[name], state[name])
    return json.loads((path / "progress.json").read_text())


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
