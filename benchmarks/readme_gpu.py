"""README's table of a GPU, from a result file of run.py; for readme_table.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from targets import BOTH, LARGE, SMALL, STASH, Results, rows

HEAD = "| on one "


class Row(NamedTuple):
    """The best of ours, of other packages, and plain PyTorch's, by a number of their rows."""

    what: str
    section: str
    where: dict[str, Any]
    plain: str = "naive logits"
    ours: dict[str, Any] = {}  # noqa: B006 - never changed
    number: str = "ms"
    scale: float = 1.0
    most: bool = False  # the largest is best


HEADS = [
    Row("head forward + backward, N=8192, H=4096, V=128256: ms", "linear_logp",
        {"pass": BOTH, **LARGE}, ours=STASH),
    Row("the same, N=8192, H=896, V=151936: ms", "linear_logp",
        {"pass": BOTH, **SMALL}, ours=STASH),
    Row("log-probs alone, H=4096: ms", "linear_logp", {"pass": "forward", **LARGE}),
    Row("frozen head, H=4096: ms", "linear_logp", {"pass": "frozen weight", **LARGE}),
    Row("memory beyond inputs and gradients, H=4096: MB", "linear_logp",
        {"pass": BOTH, **LARGE}, ours={"method": "prefuse recompute"}, number="extra MB"),
    Row("error against float64, H=4096: nats", "linear_logp",
        {"pass": BOTH, **LARGE}, ours=STASH, number="max error"),
]  # fmt: skip
ROWS = [
    Row("DPO, Qwen2.5-1.5B's shape, HH-RLHF: real tokens/s", "train_dpo", {"part": "measured"},
        "", number="real tokens/s", most=True),
    Row("GRPO, the same shape, GSM8K, groups of 8: real tokens/s", "train_grpo",
        {"part": "measured"}, "", number="real tokens/s", most=True),
    *HEADS,
    Row("KL between two heads, N=8192, H=4096, V=128256: ms", "divergence",
        {"kind": "forward_kl", **LARGE}),
    Row("log-probs of existing logits, 8192 x 128256: ms", "logp",
        {"pass": "forward", "N": 8192, "V": 128256}, "reference"),
    Row("PPO loss of 1M tokens, forward + backward: us", "policy", {"loss": "ppo", "KL": False},
        "eager (TRL's formula)", scale=1000),
    Row("GAE, 1024 sequences of 8192 tokens: us", "advantage", {"op": "gae", "sequences": 1024},
        "padded loop", scale=1000),
    Row("attention of groups of 8 with a shared prompt: ms", "attention", {},
        "PyTorch, dense mask", ours={"method": "prefuse, shared prompts"}),
]  # fmt: skip


def files(results: Path) -> list[Path]:
    return sorted(results.glob("kernels-nvidia-*.json"))


def table(result: dict[str, Any]) -> str:
    """Rows of what was measured of ours; cells of others are empty where nothing was."""
    device = result["machine"]["device"]
    lines = [f"{HEAD}{device}, bfloat16 | prefuse | best of others | plain PyTorch |"]
    lines.append("|---|---|---|---|")
    for row in ROWS:
        ours = _best(row, _candidates(row, result["results"], row.ours, ours=True))
        if ours is None:
            continue
        others = _candidates(row, result["results"], {}, ours=False)
        peers = _best(row, [x for x in others if not _is_plain(row, x)])
        plain = _best(row, [x for x in others if _name(x) == row.plain])
        cells = [
            f"**{_told(row, ours, named=False)}**",
            _told(row, peers),
            _told(row, plain, False),
        ]
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return str(row.get("method", row.get("impl", row.get("system", ""))))


def _is_plain(row: Row, found: dict[str, Any]) -> bool:
    return _name(found) == row.plain or _name(found).startswith("torch.compile")


def _candidates(row: Row, results: Results, where: dict[str, Any], ours: bool) -> list[dict]:
    """Heads that cannot give every token its own gradient are other ops."""
    found = rows(results, row.section, **row.where, **where)
    mine = {id(x) for x in rows(results, row.section, ours=True)}
    mine |= {id(x) for x in found if _name(x).startswith("prefuse")}
    found = [x for x in found if (id(x) in mine) == ours]
    return [x for x in found if x.get("token gradients", "any") == "any" and row.number in x]


def _best(row: Row, found: list[dict]) -> dict[str, Any] | None:
    best: Callable[..., Any] = max if row.most else min
    return best(found, key=lambda x: x[row.number], default=None)


def _told(row: Row, found: dict[str, Any] | None, named: bool = True) -> str:
    if found is None:
        return ""
    value = row.scale * found[row.number]
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} ({_name(found)})" if named else text
