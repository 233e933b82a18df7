"""What a run tells: the console, metrics.jsonl, config.yaml, ledger.json, TensorBoard, and at the
end report.html."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefuse.kernels.objective import Mean

from .dist import Ranks
from .errors import UserError
from .page.html import write_report

LINES = ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl")
SHOWN = (
    "loss",
    "reward",
    "kl",
    "rewards/accuracies",
    "rewards/margins",
    "mean_token_accuracy",
    "tokens_per_second",
)


class Report:
    """The voice of a run; silent on every rank but the first."""

    def __init__(self, config, method: str, ranks: Ranks):
        self.folder = Path(config.output_dir)
        self.ranks = ranks
        self.console = Console(quiet=not ranks.is_main, highlight=False, soft_wrap=True)
        self.tensorboard = None
        if not ranks.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if config.report_to == "tensorboard":
            self.tensorboard = _tensorboard(self.folder)
        resolved = {"method": method, **flat(config), "versions": versions()}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same on the console."""
        if not self.ranks.is_main:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = "  ".join(f"{k} {_short(values[k])}" for k in _shown(values))
        self.say(f"step {step}  {shown}")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def rows(self, ledgers: Mapping[str, Any]) -> None:
        """What became of the rows of each data set: on the console and in ledger.json."""
        for data, ledger in ledgers.items():
            for line in ledger.lines():
                self.say(f"{data}: {line}")
        if self.ranks.is_main:
            counts = {data: asdict(ledger) for data, ledger in ledgers.items()}
            (self.folder / "ledger.json").write_text(json.dumps(counts, indent=1) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the lines past `step`, which a resumed run will write again."""
        for name in LINES:
            file = self.folder / name
            if self.ranks.is_main and file.exists():
                lines = file.read_text().splitlines(keepends=True)
                whole = [x for x in lines if x.endswith("\n")]  # a kill may have cut the last one
                file.write_text("".join(x for x in whole if json.loads(x)["step"] <= step))

    @contextmanager
    def page(self) -> Iterator[None]:
        """Writes report.html when the run ends, however it ends."""
        try:
            yield
        finally:
            if self.ranks.is_main:
                try:
                    self.say(f"report: {write_report(self.folder)}")
                except Exception as error:  # the model, not yet exported, is worth more
                    self.say(f"no report.html: {type(error).__name__}: {error}")

    def progress(self, hidden: bool) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=hidden or not self.ranks.is_main,
        )


def claim_folder(config, ranks: Ranks) -> None:
    """Refuses a folder that holds another run, unless it is resumed or overwritten."""
    folder = Path(config.output_dir)
    if folder.is_dir() and folder.resolve() == Path(config.model_name_or_path).resolve():
        raise UserError(f"--output_dir {folder}: is --model_name_or_path; choose another folder")
    if config.resume_from_checkpoint:
        return
    ours = [*(folder / name for name in LINES), *folder.glob("checkpoint-*")]
    held = any(path.exists() for path in (*ours, *folder.glob("*.safetensors")))
    # rank 0 looks for all: another rank might look when rank 0 has already begun to write
    if ranks.any(ranks.is_main and held) and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder}: wanted a new or empty folder; got one that holds another run "
            "or a model. Choose another, or pass --resume_from_checkpoint true or "
            "--overwrite_output_dir"
        )
    if ranks.is_main:
        for path in ours:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flat(config) -> dict[str, Any]:
    """A configuration as the flags that would make it again."""
    values = asdict(config)
    hyperparameters = values.pop("hyperparameters", {})
    return {**values, **hyperparameters}


def versions() -> dict[str, str]:
    names = ("prefuse", "torch", "transformers", "triton")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


class Meter:
    """Sums of detached metrics since the last log line; read, and reduced over ranks, there."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor | int] = {}
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, values: Mapping[str, torch.Tensor | Mean]) -> None:
        for name, value in values.items():
            if isinstance(value, Mean):
                total, count = value.total.double(), value.count
            else:
                total, count = value.detach().double().sum(), value.numel()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts[name] + count if name in self.counts else count

    def state(self) -> dict[str, Any]:
        """As plain numbers, for a checkpoint between two log lines."""
        return {
            "sums": {name: float(value) for name, value in self.sums.items()},
            "counts": {name: float(value) for name, value in self.counts.items()},
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.started,
        }

    def restore(self, states: list[dict[str, Any]]) -> None:
        """The sum of what ranks had."""
        self.clear()
        for state in states:
            for name, value in state["sums"].items():
                count = torch.tensor(state["counts"][name], dtype=torch.float64)
                self.add({name: Mean(torch.tensor(value, dtype=torch.float64), count)})
            self.tokens += state["tokens"]
        self.started -= max((state["seconds"] for state in states), default=0.0)

    def read(self) -> dict[str, float]:
        names = self.ranks.union(self.sums)  # a reward's own metrics may be of one rank alone
        found = [known.get(n, 0) for known in (self.sums, self.counts) for n in names]
        packed = _on_host([*found, self.tokens], self.ranks.device)
        totals = self.ranks.total(packed).tolist()
        sums, counts, tokens = totals[: len(names)], totals[len(names) : -1], totals[-1]
        values = {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}
        values["num_tokens"] = tokens
        values["tokens_per_second"] = tokens / (time.perf_counter() - self.started)
        return {**values, **peak_memory()}


def _on_host(numbers: list[torch.Tensor | int], device: torch.device) -> torch.Tensor:
    """[n] float64, by one copy of those that are on the device."""
    there = [i for i, x in enumerate(numbers) if isinstance(x, torch.Tensor) and x.device == device]
    known = [0.0 if i in there else float(x) for i, x in enumerate(numbers)]
    host = torch.tensor(known, dtype=torch.float64)
    if there:
        host[there] = torch.stack([torch.as_tensor(numbers[i]).double() for i in there]).cpu()
    return host


def peak_memory() -> dict[str, float]:
    """Of this rank's GPU, or of its process; nothing where the system does not tell."""
    if torch.cuda.is_available():
        return {"memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    if sys.platform != "linux":
        return {}
    import resource

    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # from KiB


def _shown(values: dict[str, float]) -> list[str]:
    return [k for name in SHOWN for k in (name, f"eval_{name}") if k in values]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--report_to tensorboard: tensorboard is not installed; pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
