"""What every rank of tests/test_resume.py runs: `prefuse` commands, one after the other, from the
JSON file argv[1]; the rows of each step go to a ledger beside the run's folder."""

import json
import os
import signal
import sys
from pathlib import Path

import conftest  # noqa: F401  finds prefuse in a clone that was never installed
import torch

from prefuse.trainer import dist, loop
from prefuse.trainer.cli import main

BACKWARD = loop.backward


def run(argv: list[str], dies_in: int | None = None, by: int = signal.SIGKILL) -> None:
    """dies_in: the step in which the last rank is sent a signal."""
    folder = Path(next(a for a in argv if a.startswith("--output_dir=")).split("=")[1])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    steps = 0

    def backward(config, method, scorer, micro_batches, *rest):
        nonlocal steps
        steps += 1
        if steps == dies_in and rank == world - 1:
            os.kill(os.getpid(), by)
        with folder.with_name(f"{folder.name}.{rank}.ledger").open("a") as file:
            rows = [e.where.rsplit(":", 1)[-1] for batch in micro_batches for e in batch]
            file.write(json.dumps(rows) + "\n")
        return BACKWARD(config, method, scorer, micro_batches, *rest)

    loop.backward = backward
    try:
        main(argv)
    finally:
        loop.backward = BACKWARD


def ledger(folder: Path) -> list[list[str]]:
    """The rows of each step, of all ranks."""
    files = [x.read_text().splitlines() for x in folder.parent.glob(f"{folder.name}.*.ledger")]
    return [
        sorted(row for line in lines for row in json.loads(line))
        for lines in zip(*files, strict=True)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.stop = lambda: None  # ranks meet once
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
