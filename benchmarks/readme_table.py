"""The table of README.md, from the result files.

python benchmarks/readme_table.py            prints it
python benchmarks/readme_table.py --write    puts it into README.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import readme_gpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = "kernels-amd-epyc-2-threads"
BOTH = "forward + backward"
HEAD = "| on 2 threads of an AMD EPYC, float32 | prefuse | plain PyTorch | TRL 1.16 |"


class Cell(NamedTuple):
    """A number of the one row of a file that has these values."""

    file: str
    section: str | None
    number: str
    where: dict[str, Any]

    def read(self) -> float:
        rows = json.loads((RESULTS / f"{self.file}.json").read_text())["results"]
        rows = [_as_now(row) for row in (rows[self.section] if self.section else rows)]
        found = [r for r in rows if all(r.get(k) == v for k, v in self.where.items())]
        if len(found) != 1:
            raise SystemExit(f"{self}: wanted one such row; got {len(found)}")
        return found[0][self.number]


def _as_now(row: dict[str, Any]) -> dict[str, Any]:
    """Rows of files from before every pass had a row of its own."""
    old = {"ms": row[f"{BOTH} ms"]} if f"{BOTH} ms" in row else {}
    return {"pass": BOTH, **old, **row}


def head(method: str, number: str = "ms", section: str = "linear_logp", **where) -> Cell:
    return Cell(KERNELS, section, number, {"method": method, "pass": BOTH, **where})


def step(trainer: str, stands: str) -> Cell:
    given = {"V": 151936, "trainer": f"TRL {trainer}", "with": stands}
    return Cell("drop_in_cpu", None, "ms", given)


def kernel(section: str, impl: str, number: str = "ms", **where) -> Cell:
    return Cell(KERNELS, section, number, {"impl": impl, **where})


def logits(impl: str) -> Cell:
    return kernel("logp", impl, **{"pass": BOTH})


def policy(method: str) -> Cell:
    given = {"loss": "ppo", "KL": False, "tokens": 1048576, "method": method}
    return Cell("policy-amd-epyc-2-threads", "policy", "ms", given)


def training(who: str) -> Cell:
    return Cell("dpo_vs_trl_cpu", None, f"{who} tokens/s", {"precision": "float32"})


def groups(layout: str) -> Cell:
    return Cell("group_sharing_cpu", None, "real tokens/s", {"layout": layout})


def whole(x: float) -> str:
    return f"{x:.0f}"


def short(x: float) -> str:
    return f"{x:.3g}"


def power(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-")


SMALL: dict[str, Any] = dict(H=384, V=50257)
LARGE: dict[str, Any] = dict(H=896, V=151936)
GAE: dict[str, Any] = dict(op="gae", sequences=64)
MEMORY = ("extra MB", "linear_logp: peak memory")
# what, its numbers' form, ours, plain PyTorch's, TRL's
Row = tuple[str, Callable[[float], str], Cell, Cell | None, Cell | None]
ROWS: list[Row] = [
    (
        "DPO, 18.7M-parameter Llama, 512 HH-RLHF pairs: real tokens/s",
        whole, training("prefuse"), None, training("TRL"),
    ),
    (
        "forward + backward in TRL's DPOTrainer, V=151936, with our head in it: ms",
        whole, step("DPOTrainer", "fuse_head"), None, step("DPOTrainer", "stock"),
    ),
    (
        "the same in TRL's GRPOTrainer: ms",
        whole, step("GRPOTrainer", "fuse_head"), None, step("GRPOTrainer", "stock"),
    ),
    (
        "head forward + backward, N=1024, H=384, V=50257: ms",
        whole,
        head("prefuse stash", **SMALL), head("naive logits", **SMALL),
        head("TRL fused head", **SMALL),
    ),
    (
        "the same, N=1024, H=896, V=151936: ms",
        whole,
        head("prefuse stash", **LARGE), head("naive logits", **LARGE),
        head("TRL fused head", **LARGE),
    ),
    (
        "its error against float64, H=896, V=151936: nats",
        power,
        head("prefuse stash", "max error", **LARGE), head("naive logits", "max error", **LARGE),
        head("TRL fused head", "max error", **LARGE),
    ),
    (
        "memory of a step beyond its gradients, N=4096, H=896, V=151936: MB",
        whole,
        head("prefuse recompute", *MEMORY), head("naive logits", *MEMORY),
        head("TRL fused head", *MEMORY),
    ),
    (
        "KL between two heads, N=1024, H=896, V=151936: ms",
        whole,
        head("prefuse stash", "ms", "divergence", kind="forward_kl", **LARGE),
        head("naive logits", "ms", "divergence", kind="forward_kl", **LARGE),
        head("TRL chunked", "ms", "divergence", kind="forward_kl", **LARGE),
    ),
    (
        "log-probs of existing logits, forward + backward, 1024 x 50257: ms",
        whole, logits("cpu"), logits("reference"), None,
    ),
    (
        "PPO loss of 1M tokens, forward + backward: ms",
        short, policy("prefuse"), policy("eager (TRL's formula)"), None,
    ),
    (
        "GAE, 64 sequences of 2048 tokens: ms",
        short, kernel("advantage", "cpu", **GAE), kernel("advantage", "padded loop", **GAE), None,
    ),
]  # fmt: skip


def table() -> str:
    """That of the CPU, and that of a GPU below it, if there is a result of one."""
    lines = [HEAD, "|---|---|---|---|"]
    for what, form, ours, *others in ROWS:
        cells = ["" if cell is None else form(cell.read()) for cell in others]
        lines.append(f"| {what} | **{form(ours.read())}** | {cells[0]} | {cells[1]} |")
    apart, shared = (whole(groups(layout).read()) for layout in ("packed", "shared prompts"))
    what = f"groups of 8 that share their prompt, GSM8K: tokens/s (ours, packed apart: {apart})"
    lines.append(f"| {what} | **{shared}** | | |")
    gpus = [readme_gpu.table(json.loads(path.read_text())) for path in readme_gpu.files(RESULTS)]
    return "\n\n".join(["\n".join(lines), *gpus])


def _blocks(readme: str) -> list[str]:
    heads = [re.escape(HEAD), rf"{re.escape(readme_gpu.HEAD)}.*"]
    return [m[0].strip() for h in heads for m in re.finditer(rf"{h}\n(\|.*\n)+", readme)]


def in_readme() -> str:
    return "\n\n".join(_blocks((ROOT / "README.md").read_text()))


def written(readme: str) -> str:
    """The README with the tables of now, where the first of them stands."""
    first, *others = _blocks(readme)
    for block in others:
        readme = readme.replace(f"\n\n{block}", "")
    return readme.replace(first, table())


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv:
        path = ROOT / "README.md"
        path.write_text(written(path.read_text()))
