"""Tiles of the kernels of logits, tried on this device: the fastest belong in their tables.

    python benchmarks/tune.py [--only gemm fold tiles]

gemm: the tiles and stages of gemm_fold.py, by log-probs of hidden states without a gradient.
fold: the block and the warps of fold.py, by log-probs of logits. tiles: how much of the logits the
tiled head holds at once, forward and backward. The first row of each is what the tables say now;
results do not depend on any of these but for the order of float32 sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from bench_linear_logp import fused_products, inputs
from common import ceilings, device, table
from timing import timed, told

from prefuse.kernels import fold, gemm_fold, tiled_head
from prefuse.kernels.linear_logp import linear_logp
from prefuse.kernels.logp import token_logp

Setting = tuple[dict[str, Any], list[Any]]  # its columns; (module, name, value) of each change
SHAPES = {
    "cuda": [(8192, 4096, 128256), (8192, 896, 151936)],
    "cpu": [(1024, 384, 50257)],
    "tiny": [(16, 16, 300)],
}
GEMM_TILES = [(128, 256, 64, 3), (128, 256, 64, 4), (128, 256, 128, 2), (256, 128, 64, 3)]
GEMM_TILES += [(128, 128, 64, 4), (128, 128, 128, 3)]
MIB = 1 << 20


@contextmanager
def patched(changes: list) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def gemm_settings() -> list[Setting]:
    found: list[Setting] = []
    for height, width, depth, stages in GEMM_TILES:
        for group, flatten in ((16, False), (16, True), (8, False), (64, False)):
            tile = dict(BM=height, BN=width, BK=depth, GROUP=group, FLATTEN=flatten)
            launch = dict(num_warps=8, num_stages=stages)
            changes = [(gemm_fold, "TILE", tile), (gemm_fold, "LAUNCH", launch)]
            found.append((tile | launch, changes))
    return found


def fold_settings() -> list[Setting]:
    sizes = [(fold.FOLD_BLOCK, 8), (4096, 4), (2048, 8), (2048, 4), (8192, 8), (8192, 16)]
    return [
        (
            dict(block=block, warps=warps),
            [(fold, "FOLD_BLOCK", block), (fold, "_warps", lambda *_, warps=warps: warps)],
        )
        for block, warps in sizes
    ]


def tile_settings() -> list[Setting]:
    kind, found = device().type, []
    now = [table[kind] for table in (tiled_head.FORWARD_TILE, tiled_head.BACKWARD_TILE)]
    forward, backward = (1, 2, 4, 8), (4, 16, 64)
    if kind == "cuda":  # beyond the L2 too: a tile of few products may not outlast its launches
        forward, backward = (16, 64, 128, 256), (128, 512)
    pairs = [now, *([x * MIB, now[1]] for x in forward), *([now[0], x * MIB] for x in backward)]
    for first, second in pairs:
        changes = [
            (tiled_head, "FORWARD_TILE", dict.fromkeys(("cpu", "cuda"), first)),
            (tiled_head, "BACKWARD_TILE", dict.fromkeys(("cpu", "cuda"), second)),
        ]
        found.append(({"forward MiB": first / MIB, "backward MiB": second / MIB}, changes))
    return found


def head_step(mode: str, impl: str, backward: bool, x: tuple[torch.Tensor, ...]) -> None:
    with torch.set_grad_enabled(backward):
        logp = linear_logp(*x, mode=mode, impl=impl).logp
    if backward:
        torch.autograd.grad(logp.sum(), x[:2])


def fold_step(impl: str, logits: torch.Tensor, targets: torch.Tensor) -> None:
    with torch.no_grad():
        token_logp(logits, targets, impl=impl)


def tried(settings: list[Setting], run: Callable[[], object], seconds: float) -> list[dict]:
    """Milliseconds of each setting, in turns; or why it does not run."""

    def with_setting(changes) -> None:
        with patched(changes):
            run()

    runs, failed = {}, {}
    for number, (_, changes) in enumerate(settings):
        try:
            with_setting(changes)  # compiles
            runs[str(number)] = partial(with_setting, changes)
        except Exception as error:  # more shared memory than there is, say
            failed[str(number)] = told(error)
    times = timed(runs, seconds)
    return [
        columns | ({"ms": times[key].ms} if (key := str(number)) in times else {"no": failed[key]})
        for number, (columns, _) in enumerate(settings)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=["gemm", "fold", "tiles"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each table")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all?")
    args = parser.parse_args()
    kind, dtype = device().type, torch.bfloat16 if device().type == "cuda" else torch.float32
    print(ceilings())
    for n, h, v in SHAPES["tiny" if args.tiny else kind]:
        x = inputs((n, h, v), dtype)
        shape = f"N={n} H={h} V={v}"
        if "gemm" in args.only and fused_products():
            run = partial(head_step, "recompute", "fused", False, x)
            print(f"\n{shape}: gemm\n\n{table(tried(gemm_settings(), run, args.seconds))}")
        if "tiles" in args.only:
            for mode in ("stash", "recompute"):
                run = partial(head_step, mode, "auto", True, x)
                print(f"\n{shape}: tiles, {mode}\n")
                print(table(tried(tile_settings(), run, args.seconds)))
        if "fold" in args.only and kind == "cuda":
            logits = torch.randn(n, v, device=device()).to(dtype)
            run = partial(fold_step, "triton", logits, x[2])
            print(f"\n{shape}: fold\n\n{table(tried(fold_settings(), run, args.seconds))}")


if __name__ == "__main__":
    main()
