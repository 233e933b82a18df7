"""The host memory of a rank that loads a model and exports it: whole, or shards of it.

    python benchmarks/bench_loading.py --ranks 4 --output RESULT

A random Llama in bfloat16 files, which gloo ranks train in float32. Memory is the most that a
process has of its own at any moment (RssAnon, every 5 ms) above what it had before; pages of mapped
files, which ranks share and the system takes back, are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from common import machine, publish
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.trainer import checkpoint, weights
from prefuse.trainer.dist import start, stop
from prefuse.trainer.model import load_model
from prefuse.trainer.scores import Scorer
from prefuse.trainer.sharding import shard

SHAPE: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
)


class Peak:
    """MiB above the beginning, while the context lasts."""

    def __enter__(self):
        self.before = self.most = self._now()
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.since = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.since
        self.ends.set()
        self.thread.join()
        self.mib = (self.most - self.before) >> 10

    def _watch(self):
        while not self.ends.wait(0.005):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def work(rank: int, ranks: int, port: int, folder: str, in_shards: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    own, out = start(), Path(folder, "out") if rank == 0 else None
    with Peak() as loading:
        given: dict[str, Any] = dict(dtype=torch.float32, layout="shared")
        model = load_model(folder, **given, in_shards=in_shards)
        scorer = shard(Scorer(model), own)
    with Peak() as exporting:
        if in_shards:
            weights.write(model, out, file_bytes=256 << 20)
        else:
            state = checkpoint.full_state(scorer, own)
            if out:
                model.save_pretrained(out, state_dict=state, max_shard_size="256MB")
    peaks = loading.mib, loading.seconds, exporting.mib, exporting.seconds
    Path(folder, f"{rank}.json").write_text(json.dumps(peaks))
    stop()


def measure(ranks: int, folder: Path, in_shards: bool) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "out").mkdir(exist_ok=True)
    mp.spawn(work, (ranks, port, str(folder), in_shards), nprocs=ranks)  # type: ignore[attr-defined]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    most = [max(column) for column in zip(*found, strict=True)]
    return {
        "weights": "read into shards" if in_shards else "loaded whole",
        "loading, MiB a rank": most[0],
        "s to load": round(most[1], 1),
        "export, MiB of rank 0": found[0][2],
        "of another": max(row[2] for row in found[1:]),
        "s to export": round(most[3], 1),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        size = sum(p.numel() for p in model.parameters()) * 4 >> 20
        model.bfloat16().save_pretrained(folder, max_shard_size="256MB")
        del model
        rows = [measure(args.ranks, folder, in_shards) for in_shards in (False, True)]
    about = machine() | {"ranks": args.ranks, "model": f"{size} MiB in float32"}
    publish("Loading and exporting in shards", about, rows, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    main()
