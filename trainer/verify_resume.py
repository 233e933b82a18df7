"""`prefuse verify-resume`: whether a run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from . import checkpoint
from .errors import UserError

TIMES = ("tokens_per_second", "memory_gib", "runtime")  # of metrics: never the same twice


def verify_resume(command: str, argv: list[str], config) -> None:
    """Runs a few steps of `prefuse command argv` twice, in processes of their own: straight
    through, and from the checkpoint that it left on its way. Under torchrun every rank calls it."""
    main = int(os.environ.get("RANK", 0)) == 0
    folder = Path(f"{config.output_dir.rstrip('/')}.verify-resume")
    stop = steps_to_stop(config)
    argv = [*argv, *_overrides(stop)]
    straight, resumed = folder / "straight", folder / "resumed"
    if main:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"verify-resume: {2 * stop} steps straight through in {straight}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f".{folder.name}.log"
    _run([command, *argv, f"--output_dir={straight}"], 0, log)
    place = straight / f"checkpoint-{stop}"
    if main:
        print(f"verify-resume: stopped after step {stop} and resumed in {resumed}", flush=True)
    _run([command, *argv, f"--output_dir={resumed}", f"--resume_from_checkpoint={place}"], 1, log)
    if not main:
        return
    ends = [run / f"checkpoint-{2 * stop}" for run in (straight, resumed)]
    different = differences(*(digests(end) for end in ends))
    different += differences(*(_metrics(run, stop) for run in (straight, resumed)))
    whole = _one(digests(ends[0]))
    shutil.rmtree(folder)
    if different:
        shown = "\n  ".join(different[:20]) + ("\n  ..." if len(different) > 20 else "")
        raise UserError(f"verify-resume: not equal after {2 * stop} steps, in:\n  {shown}")
    print(
        f"verify-resume: equal after {2 * stop} steps: parameters, optimizer, random streams and "
        f"metrics, bit by bit (SHA-256 {whole})"
    )


def steps_to_stop(config) -> int:
    """In the middle of a window of samples, where there are windows of several steps."""
    window = getattr(config, "num_mini_batches", 1) * getattr(config, "num_iterations", 1)
    if getattr(config, "extragradient", False):
        return 2 * window  # two windows are one update
    return max(2, window + window // 2)


def _overrides(stop: int) -> list[str]:
    wanted = dict(max_steps=2 * stop, save_steps=stop, logging_steps=1, save_total_limit="none")
    wanted |= dict(report_to="none", disable_tqdm="true", resume_from_checkpoint="none")
    return [f"--{name}={value}" for name, value in wanted.items()]


def _run(argv: list[str], attempt: int, log: Path) -> None:
    """In a process of its own, with none of this one's memory; torchrun's ranks meet anew."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) * 2 + attempt + 1
    env = {**os.environ, "TORCHELASTIC_RESTART_COUNT": str(again)}
    place = log.with_name(f"{log.name}.{os.environ.get('RANK', 0)}")
    command = [sys.executable, "-m", "prefuse.trainer.cli", *argv]
    with place.open("w") as file:
        run = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = run.wait()
        finally:
            run.kill()
    told = place.read_text()
    place.unlink()
    if status:
        raise UserError(f"verify-resume: a run of it failed ({status}):\n{told[-4000:]}")


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of all that a checkpoint holds, by name; one tensor at a time is in memory."""
    found = {}
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            checkpoint.read_alone({name: tensor}, path)
            found[name] = _digest(tensor)
    progress = checkpoint.progress_of(path)
    for rank in range(progress["world"]):
        own = checkpoint.own_of(path, rank)
        own["meter"].pop("seconds")
        found |= {name: _digest(leaf) for name, leaf in _leaves(own, f"rank {rank}")}
    return found | {name: _digest(leaf) for name, leaf in _leaves(progress, "progress")}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names under which they differ, or that only one has."""
    return [name for name in one | other if one.get(name) != other.get(name)]


def _metrics(folder: Path, after: int) -> dict[str, str]:
    """Of the steps that both runs did."""
    found = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        kept = {k: v for k, v in line.items() if not k.endswith(TIMES)}
        if line["step"] > after:
            found |= {f"step {line['step']}: {k}": repr(v) for k, v in kept.items()}
    return found


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        value = "".join(map(_digest, value)).encode()
    else:
        value = repr(value).encode()
    return hashlib.sha256(value).hexdigest()


def _one(found: dict[str, str]) -> str:
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()
