"""The search for a system's best settings, the systems in turn, the rows of a result."""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import ceilings, machine, publish
from train_common import (
    CONVENTION,
    PRECISIONS,
    SHAPES,
    Clock,
    Outcome,
    System,
    Task,
    attempt,
    free,
    speed,
)

from prefuse.trainer.plan.device import KNOWN

SEARCHED = 2, 2  # steps of a short run: to warm up, timed
SHORTEST = 30.0  # seconds that a run may have, whatever is left: compilers need some


def search(
    system: System, task: Task, until: float, within_gb: float | None, args
) -> list[Outcome]:
    """Outcomes of short runs, the best first: of those in `within_gb` if any is. What is not tried
    before `until` is told as such; where nothing has worked, there is twice the time."""
    found: list[Outcome] = []
    last = until + max(0.0, until - time.perf_counter())
    for stage in system.stages:
        ranked = _ranked(found, task, within_gb)
        best = ranked[0].setting if ranked and ranked[0].seconds else None
        for setting in stage(best):
            if any(x.setting == setting for x in found):
                continue
            late = until if any(x.seconds for x in found) else last
            if found and time.perf_counter() > late:
                nothing = float("nan")
                found.append(Outcome(setting, [], nothing, nothing, nothing, "not tried: no time"))
                continue
            limit = max(SHORTEST, args.seconds / 2)
            found.append(attempt(system, setting, Clock(*SEARCHED, until), task, limit))
    return _ranked(found, task, within_gb)


def _ranked(found: list[Outcome], task: Task, within_gb: float | None) -> list[Outcome]:
    def rank(x: Outcome) -> tuple[bool, float]:
        fits = within_gb is None or x.peak_gb <= within_gb
        return not (bool(x.seconds) and fits), -speed(x, SEARCHED[0], task)

    return sorted(found, key=rank)


def compare(task: Task, systems: list[System], args, save=lambda rows: None) -> list[dict]:
    """Rows of the search, of the runs in turn at the best settings, of their ratios. The last
    system is judged first, and the others may take no more memory than its best if they can.

    save: is given the rows that there are after each turn.
    """
    ceilings()  # before the models are there
    free()
    start = time.perf_counter()
    found: dict[str, list[Outcome]] = {}
    within = None
    shares = [0.55] if len(systems) == 1 else [0.4, 0.55]
    for i, (system, share) in enumerate(zip(reversed(systems), shares, strict=True)):
        until = start + args.seconds * share
        found[system.name] = search(system, task, until, within, args)
        if torch.cuda.is_available() and i == 0 and found[system.name][0].seconds:
            within = found[system.name][0].peak_gb
    runs: dict[str, list[Outcome]] = {s.name: [] for s in systems}
    for turn in range(args.rounds):
        if turn and time.perf_counter() > start + args.seconds:
            break
        for system in systems:
            _take_turn(system, found[system.name], runs[system.name], task, args, start)
        save(_rows(task, systems, found, runs, args))
    return _rows(task, systems, found, runs, args)


def _take_turn(
    system: System, ranked: list[Outcome], runs: list[Outcome], task: Task, args, start: float
) -> None:
    """Adds a run at the best setting. One that was fine in the search may fail at a later step:
    then it counts as failed, and the next one is the best."""
    end = start + args.seconds
    while ranked[0].seconds:
        clock = Clock(args.warmup, args.steps, end)
        limit = max(SHORTEST, end - time.perf_counter() + SHORTEST / 2)
        outcome = attempt(system, ranked[0].setting, clock, task, limit)
        if not outcome.failed:
            runs.append(outcome)
            return
        runs.clear()
        ranked.append(outcome)
        del ranked[0]


def _rows(task, systems, found, runs, args) -> list[dict]:
    rows = []
    steps = min((max(len(x.seconds) for x in done) for done in runs.values() if done), default=0)
    for system in systems:
        if runs[system.name]:
            rows.append(_measured(task, system.name, runs[system.name], steps, args))
        else:
            rows.append({"part": "measured", "task": task.name, "system": system.name})
            rows[-1]["failed"] = "no setting worked, see search"
    whole = [row for row in rows if "failed" not in row]
    if len(whole) == 2:
        ours, theirs = whole
        compared = ("real tokens/s", "MFU", "peak GB", "first gradient norm")
        ratio = {k: ours[k] / theirs[k] for k in compared}
        name = " / ".join(row["system"] for row in whole)
        rows.append({"part": "ratio", "task": task.name, "system": name, **ratio})
    for system in systems:
        for x in found[system.name]:
            told = {"part": "search", "task": task.name, "system": system.name}
            told["setting"] = str(x.setting)
            if x.failed:
                rows.append({**told, "failed": x.failed})
                continue
            ms = 1e3 * sum(x.seconds) / len(x.seconds)
            told |= {"ms a step": ms, "real tokens/s": speed(x, SEARCHED[0], task)}
            rows.append({**told, "peak GB": x.peak_gb, "computed / real tokens": x.computed})
    return rows


def _measured(task: Task, name: str, runs: list[Outcome], steps: int, args) -> dict:
    """Medians over the rounds, step by step, of the steps that every system has."""
    row: dict[str, Any] = {"part": "measured", "task": task.name, "system": name}
    row |= {"precision": args.precision, "setting": str(runs[0].setting)}
    every = [[x.seconds[i] for x in runs if i < len(x.seconds)] for i in range(steps)]
    seconds = [median(times) for times in every]
    spread = max((max(times) - min(times)) / median(times) for times in every)
    place = slice(args.warmup, args.warmup + steps)
    tokens, flops = sum(task.tokens[place]), sum(task.flops[place])
    tflops = flops / sum(seconds) / 1e12
    row |= {
        "rounds x steps": f"{len(runs)} x {steps}",
        "real tokens a step": tokens / steps,
        "ms a step": 1e3 * sum(seconds) / steps,
        "spread": spread,
        "real tokens/s": tokens / sum(seconds),
        "TFLOP/s": tflops,
        "MFU": tflops / ceilings()["tflops"],
    }
    if peak := datasheet_tflops():
        row["MFU of the datasheet"] = tflops / peak
    row |= {"peak GB": max(x.peak_gb for x in runs), "computed / real tokens": runs[0].computed}
    return {**row, "first gradient norm": runs[0].norm}


def datasheet_tflops() -> float | None:
    """Dense bfloat16, of a GPU whose datasheet prefuse knows."""

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((float(rates[1]) for known, rates in KNOWN.items() if known in name.split()), None)


def disagreements(rows: list[dict], precision: str) -> list[str]:
    """Tasks whose systems do not train the same, by the first step's gradient norm."""
    allowed = 0.1 if precision != "float32" else 1e-3
    ratios = [row for row in rows if row["part"] == "ratio"]
    return [
        f"{row['task']}: gradient norms {row['system']} = {row['first gradient norm']:.4g}"
        for row in ratios
        if not abs(row["first gradient norm"] - 1) <= allowed
    ]


def _arguments(about: str | None, batch: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES], help="default: 0.5b 1.5b")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU in a minute")
    parser.add_argument("--batch", type=int, help=f"rows an optimizer step; default: {batch}")
    parser.add_argument("--precision", choices=[*PRECISIONS], help="default: bfloat16 on a GPU")
    parser.add_argument("--steps", type=int, default=4, help="timed in a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="in which the systems take turns")
    parser.add_argument("--seconds", type=float, help="for a shape, search included; default: 60")
    parser.add_argument("--compile", action="store_true", help="try torch.compile in both, too")
    parser.add_argument("--alone", action="store_true", help="prefuse without TRL")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    return parser


def parsed(about: str | None, batch: int, given: list[str] | None, **lists: tuple) -> Any:
    """lists: more flags, of several numbers each, with their defaults."""
    parser = _arguments(about, batch)
    for name, default in lists.items():
        parser.add_argument(f"--{name}", type=float, nargs="+", default=list(default))
    args = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    args.shape = ["tiny"] if args.tiny else args.shape or ["0.5b", "1.5b"]
    args.batch = args.batch or (8 if args.tiny else batch)
    args.seconds = (15.0 if args.tiny else 60.0) if args.seconds is None else args.seconds
    args.precision = args.precision or ("bfloat16" if on_gpu else "float32")
    if args.warmup < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--warmup, --steps and --rounds: wanted 1 or more")
    return args


def tell(title: str, rows: list[dict], args, **more: object) -> None:
    """Prints and writes what there is."""
    info = machine() | versions() | more
    info |= {"precision": args.precision, "ceiling TFLOP/s": ceilings()["tflops"]}
    memory = "allocator" if torch.cuda.is_available() else "process"
    info |= {"MFU": CONVENTION, "memory": f"peak of the {memory}, all models included"}
    info |= {"settings": "the fastest in short runs; of prefuse's, on a GPU, within TRL's memory"}
    info |= {"spread": "of a step's times in the rounds, over their median; the worst step's"}
    publish(title, info, rows, args.output)


def run_all(title: str, jobs: Iterable[tuple[Task, list[System]]], args, **more: object) -> None:
    """Compares in every job; what is there is written after each turn. Ends with an error where a
    system has no result, or trains otherwise than its peer."""
    rows: list[dict] = []

    def save(more_rows: list[dict]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            tell(title, rows + more_rows, args, **more)

    for task, systems in jobs:
        rows += compare(task, systems, args, save)
    tell(title, rows, args, **more)
    broken = [f"{r['task']}: {r['system']}: {r['failed']}" for r in rows if _is_missing(r)]
    broken += disagreements(rows, args.precision)
    if broken:
        raise SystemExit("; ".join(broken))


def _is_missing(row: dict) -> bool:
    return row["part"] == "measured" and "failed" in row


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("transformers", "trl", "liger-kernel", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
