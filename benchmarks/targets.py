"""What the kernels and the trainer must reach on an H200, and whether a result file reaches it.

python benchmarks/targets.py benchmarks/results/kernels-nvidia-h200.json

Floors are those of 790 TFLOP/s of bfloat16 products and 4.3 TB/s of copies; a result has its own
ceilings and floors in its rows. A row with an error, or with a wrong result, reaches nothing. On
another device nothing is judged. What is judged is what a user gets without asking for a variant; a
variant that is faster is named beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

DEVICE = "H200"
IMPLS = ("cuda", "triton", "cpu", "torch")  # as impl="auto" prefers them
NOT_PEERS = ("prefuse", "naive logits", "torch.compile", "eager")
Results = dict[str, list[dict[str, Any]]]


class Target(NamedTuple):
    what: str
    measured: Callable[[Results], float | None]
    must: float
    unit: str
    floor: float | None = None
    at_least: bool = False  # else at most


def rows(results: Results, section: str, ours: bool | None = None, **where: Any) -> list[dict]:
    """The sound rows of a section with these values; `ours`: only those of prefuse, or of peers."""
    return [row for row in told(results, section, ours, **where) if is_sound(row)]


def told(results: Results, section: str, ours: bool | None = None, **where: Any) -> list[dict]:
    """As `rows`, with those that are wrong or failed."""
    found = []
    for row in results.get(section, []):
        if any(row.get(name) != value for name, value in where.items()):
            continue
        name = _name(row)
        if ours is True and not (name.startswith("prefuse") or "impl" in row and _is_impl(name)):
            continue
        if ours is False and name.startswith(NOT_PEERS):
            continue
        found.append(row)
    return found


def is_sound(row: dict[str, Any]) -> bool:
    return not {"error", "wrong", "failed"} & row.keys()


def by_default(found: list[dict]) -> list[dict]:
    """The sound ones of what impl="auto" takes, where rows are told apart by their impl."""
    taken = next((x for x in IMPLS if any(_impl(row) == x for row in found)), None)
    return [row for row in found if is_sound(row) and _impl(row) in (None, taken)]


def _name(row: dict[str, Any]) -> str:
    return str(row.get("method", row.get("impl", "")))


def _impl(row: dict[str, Any]) -> str | None:
    return str(row["impl"]).split(",")[0] if "impl" in row else None


def _is_impl(name: str) -> bool:
    return name.split(",")[0] in IMPLS


def least(found: Iterable[dict], number: str = "ms") -> float | None:
    return min((row[number] for row in found if number in row), default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


class Of(NamedTuple):
    """The least number of ours in a section's rows with the values of `where`, and of `mode`: what
    is chosen unless asked otherwise."""

    section: str
    where: dict[str, Any]
    mode: dict[str, Any] = {}  # noqa: B006 - never changed
    number: str = "ms"

    def __call__(self, results: Results) -> float | None:
        where = {**self.where, **self.mode}
        return least(by_default(told(results, self.section, ours=True, **where)), self.number)

    def best(self, results: Results) -> dict[str, Any] | None:
        """The row with the least, of all variants of the mode."""
        mode = dict(self.mode)
        method = str(mode.pop("method", ""))
        found = rows(results, self.section, ours=True, **self.where, **mode)
        found = [row for row in found if str(row.get("method", "")).startswith(method)]
        found = [row for row in found if self.number in row]
        return min(found, key=lambda row: row[self.number], default=None)


LARGE: dict[str, Any] = dict(N=8192, H=4096, V=128256)
SMALL: dict[str, Any] = dict(N=8192, H=896, V=151936)
BOTH = "forward + backward"
PLAIN = dict(method="prefuse stash")
STASH: dict[str, Any] = dict(method="prefuse stash", weight="float32")
RECOMPUTE: dict[str, Any] = dict(method="prefuse recompute", weight="float32")


def faster_than_peers(results: Results) -> float | None:
    """Than the best of those that give every token a gradient of its own."""
    case: dict[str, Any] = {"pass": BOTH, **LARGE}
    case_of_peers: dict[str, Any] = {"token gradients": "any", **case}
    peers = rows(results, "linear_logp", ours=False, **case_of_peers)
    return ratio(least(peers), least(rows(results, "linear_logp", **STASH, **case)))


def ragged_per_token(results: Results) -> float | None:
    def per_token(**where: Any) -> float | None:
        found = by_default(told(results, "advantage", ours=True, **where))
        return min((row["ms"] / row["tokens"] for row in found), default=None)

    return ratio(per_token(op="ragged gae"), per_token(op="gae", sequences=1024))


def faster_than_eager(results: Results) -> float | None:
    case: dict[str, Any] = dict(loss="ppo", KL=False)
    eager = rows(results, "policy", method="eager (TRL's formula)", **case)
    return ratio(least(eager), least(rows(results, "policy", ours=True, **case)))


def worst_logp(results: Results) -> float | None:
    # a row with too large an error is one of them
    found = told(results, "linear_logp", ours=True) + told(results, "logp", ours=True)
    errors = [row["max error"] for row in found if "max error" in row]
    return max(errors, key=lambda error: (error != error, error), default=None)  # NaN is worst


def training(section: str, number: str, part: str) -> Callable[[Results], float | None]:
    """Of the shape 1.5b: a ratio to TRL, or a number of prefuse's."""

    def measured(results: Results) -> float | None:
        found = rows(results, section, part=part)
        found = [row for row in found if "1.5b" in str(row.get("task", "")).lower()]
        found = [row for row in found if str(row.get("system", "")).startswith("prefuse")]
        return found[0].get(number) if len(found) == 1 else None

    return measured


TARGETS = [
    Target(
        f"linear_logp {BOTH}, 8192 x 4096 x 128256, float32 d weight",
        Of("linear_logp", {"pass": BOTH, **LARGE}, STASH), 37, "ms", 32.7,
    ),
    Target("its speed over the best peer's for any token gradients", faster_than_peers, 1.3, "x",
           at_least=True),
    Target(
        "the same, 8192 x 896 x 151936",
        Of("linear_logp", {"pass": BOTH, **SMALL}, STASH), 11, "ms", 8.5,
    ),
    Target(
        "forward only", Of("linear_logp", {"pass": "forward", **LARGE}, PLAIN), 12.5, "ms", 10.9,
    ),
    Target(
        f"frozen head, {BOTH}", Of("linear_logp", {"pass": "frozen weight", **LARGE}, PLAIN),
        25.5, "ms", 21.8,
    ),
    Target("recompute", Of("linear_logp", {"pass": BOTH, **LARGE}, RECOMPUTE), 50, "ms", 43.6),
    Target(
        "its memory beyond inputs and gradients",
        Of("linear_logp", {"pass": BOTH, **LARGE}, RECOMPUTE, "extra MB"), 600, "MB",
    ),
    Target(
        "logp from logits, 8192 x 128256, forward",
        Of("logp", {"pass": "forward", "N": 8192, "V": 128256}), 0.56, "ms", 0.49,
    ),
    Target(
        "the same + in-place backward",
        Of("logp", {"pass": "in place", "N": 8192, "V": 128256}), 1.70, "ms", 1.47,
    ),
    Target(
        "full-vocabulary KL of two heads",
        Of("divergence", {"kind": "forward_kl", **LARGE}, PLAIN), 51, "ms", 43.6,
    ),
    Target(
        "GAE 1024 x 8192, mask, returns (17 bytes a token)",
        Of("advantage", {"op": "gae", "sequences": 1024}), 0.048, "ms", 0.033,
    ),
    Target(
        "the same, KL reward and statistics in the launch (25 bytes a token)",
        Of("advantage", {"op": "shaped gae", "sequences": 1024}), 0.048, "ms", 0.049,
    ),
    Target("GAE of ragged lengths over that of even ones, a token", ragged_per_token, 1.5, "x"),
    Target(
        f"policy loss of 1M tokens, {BOTH}", Of("policy", {"loss": "ppo", "KL": False}),
        0.020, "ms", 0.006,
    ),
    Target("its speed over eager", faster_than_eager, 10, "x", at_least=True),
    Target("logp against float64, the worst of all", worst_logp, 2e-5, "nats"),
    Target(
        "DPO step, 1.5b: real tokens/s over TRL's",
        training("train_dpo", "real tokens/s", "ratio"), 3, "x", at_least=True,
    ),
    Target("its memory over TRL's", training("train_dpo", "peak GB", "ratio"), 1, "x"),
    Target(
        "its MFU on real tokens", training("train_dpo", "MFU", "measured"), 0.45, "",
        at_least=True,
    ),
    Target(
        "GRPO update, 1.5b: real tokens/s over TRL's",
        training("train_grpo", "real tokens/s", "ratio"), 2.5, "x", at_least=True,
    ),
]  # fmt: skip


def judge(target: Target, results: Results) -> dict[str, Any]:
    value = target.measured(results)
    sign = ">=" if target.at_least else "<="
    row: dict[str, Any] = {"what": target.what, "floor": target.floor}
    row |= {"must": f"{sign} {target.must:g} {target.unit}".strip(), "measured": value}
    if value is None:
        return row | {"met": "not measured"}
    miss = target.must / value - 1 if target.at_least else value / target.must - 1
    row["met"] = "yes" if miss <= 0 else "no"
    if not miss <= 0:
        row["missed by %"] = 100 * miss
    best = target.measured.best(results) if isinstance(target.measured, Of) else None
    if best is not None and best[target.measured.number] < value:
        row["best of ours"] = f"{best[target.measured.number]:.3g} ({_name(best)})"
    return row


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every target; none if the device is another one."""
    if DEVICE not in str(result["machine"]["device"]):
        return []
    return [judge(target, result["results"]) for target in TARGETS]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    from common import table

    result = json.loads(Path(sys.argv[1]).read_text())
    found = judged(result)
    device = result["machine"]["device"]
    print(table(found) if found else f"targets are for an {DEVICE}, not for {device}")


if __name__ == "__main__":
    main()
