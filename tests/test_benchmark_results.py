"""What is made of a benchmark's result: judged targets, README's tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def module(name: str) -> Any:
    return importlib.import_module(name)


def head_row(method: str, ms: float, **more) -> dict:
    row = {"pass": "forward + backward", "N": 8192, "H": 4096, "V": 128256, "method": method}
    return row | {"weight": "float32", "token gradients": "any", "ms": ms, "max error": 1e-6} | more


def result_of(device: str) -> dict:
    head = [
        head_row("prefuse stash", 38.0),
        head_row("prefuse stash", 35.0, weight="bfloat16"),
        head_row("prefuse stash, fused", 36.0),
        head_row("prefuse recompute", 49.0, **{"extra MB": 500.0}),
        head_row("naive logits", 60.0, weight="bfloat16"),
        head_row("TRL fused head", 76.0),
        head_row("Liger", 20.0, **{"token gradients": "ones"}),
        head_row("CCE", 20.0, wrong="d weight off 3.0e-01 > 1e-01"),
    ]
    advantage = [
        {"op": "gae", "sequences": 1024, "tokens": 1 << 23, "impl": "cuda", "ms": 0.040},
        {"op": "gae", "sequences": 1024, "tokens": 1 << 23, "impl": "padded loop", "ms": 400.0},
        {"op": "ragged gae", "sequences": 9, "tokens": 1 << 22, "impl": "cuda", "ms": 0.036},
    ]
    policy = [
        {"loss": "ppo", "KL": False, "method": "prefuse", "ms": 0.015},
        {"loss": "ppo", "KL": False, "method": "eager (TRL's formula)", "ms": 0.165},
    ]
    training = [
        {"part": "measured", "task": "DPO 1.5b", "system": "prefuse", "real tokens/s": 9.0}
        | {"MFU": 0.44},
        {"part": "measured", "task": "DPO 1.5b", "system": "TRL", "real tokens/s": 3.0},
        {"part": "ratio", "task": "DPO 1.5b", "system": "prefuse / TRL", "real tokens/s": 3.0}
        | {"peak GB": 0.5},
    ]
    sections = {"linear_logp": head, "advantage": advantage, "policy": policy}
    return {"machine": {"device": device}, "results": sections | {"train_dpo": training}}


def test_targets_are_judged_by_the_rows():
    targets = module("targets")
    found = {row["what"]: row for row in targets.judged(result_of("NVIDIA H200"))}
    judged = {what: (row["measured"], row["met"]) for what, row in found.items()}
    head, over_peers, *_ = found.values()
    assert (head["measured"], head["met"]) == (38.0, "no")
    assert head["missed by %"] == pytest.approx(100 / 37)
    assert head["best of ours"] == "36 (prefuse stash, fused)"
    assert "best of ours" not in found["recompute"]
    assert (over_peers["measured"], over_peers["met"]) == (2.0, "yes")  # 76 / 38
    assert judged["recompute"] == (49.0, "yes")
    assert judged["its memory beyond inputs and gradients"] == (500.0, "yes")
    ragged = found["GAE of ragged lengths over that of even ones, a token"]
    assert ragged["measured"] == pytest.approx(1.8) and ragged["missed by %"] == pytest.approx(20)
    assert judged["its speed over eager"] == (pytest.approx(11.0), "yes")
    assert judged["DPO step, 1.5b: real tokens/s over TRL's"] == (3.0, "yes")
    assert found["its MFU on real tokens"]["missed by %"] == pytest.approx(100 * (0.45 / 0.44 - 1))
    assert judged["forward only"] == (None, "not measured")
    assert targets.judged(result_of("NVIDIA A100")) == []


def test_what_is_wrong_counts_and_what_nobody_asked_for_does_not():
    targets, result = module("targets"), result_of("NVIDIA H200")
    what = "GAE 1024 x 8192, mask, returns (17 bytes a token)"
    worst = "logp against float64, the worst of all"

    def judged(name: str) -> dict:
        return next(row for row in targets.judged(result) if row["what"] == name)

    assert judged(worst)["met"] == "yes"
    for error in (1e-3, float("nan")):
        wrong = head_row("prefuse recompute", 1.0, wrong="max error", **{"max error": error})
        result["results"]["linear_logp"].append(wrong)
        assert judged(worst)["met"] == "no"
    rows = result["results"]["advantage"]
    rows.append(rows[0] | {"impl": "triton", "ms": 0.030})  # not what impl="auto" takes
    assert judged(what)["measured"] == 0.040
    assert judged(what)["best of ours"] == "0.03 (triton)"
    rows[0]["error"] = "of the default"
    assert judged(what)["met"] == "not measured"
    del rows[0]  # as where nothing was built
    assert judged(what)["measured"] == 0.030


def test_every_target_names_a_case_that_is_measured():
    """The selectors against the columns of the cases that a GPU runs."""
    bench = {name: module(f"bench_{name}") for name in ("linear_logp", "logp", "divergence")}
    results: dict[str, list] = {}
    for name, found in bench.items():
        results[name] = [
            case.columns
            | {case.label: who, "weight": "float32", "ms": 1.0, "max error": 0.0}
            | {"extra MB": 1.0, "token gradients": "any"}
            for case in found.cases("cuda")
            for who in ("prefuse stash", "prefuse recompute", "triton", "TRL")
        ]
    for name, ours, other in (
        ("policy", "prefuse", "eager (TRL's formula)"),
        ("advantage", "cuda", "x"),
    ):
        results[name] = [
            case.columns | {case.label: who, "ms": 1.0}
            for case in module(f"bench_{name}").cases("cuda")
            for who in (ours, other)
        ]
    for row in module("targets").judged({"machine": {"device": "H200"}, "results": results}):
        measured = row["met"] != "not measured"
        of_training = "TRL's" in row["what"] or "MFU" in row["what"]
        assert measured != of_training, row


def test_the_readme_gets_a_gpu_table_from_its_result(tmp_path, monkeypatch):
    readme_table, gpu = module("readme_table"), module("readme_gpu")
    readme = (ROOT / "README.md").read_text()
    assert readme_table.written(readme) == readme
    for path in readme_table.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "kernels-nvidia-h200.json"
    path.write_text(json.dumps(result_of("NVIDIA H200")))
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    one = readme_table.written(readme)
    block = gpu.table(json.loads(path.read_text()))
    assert f"\n\n{block}\n" in one and one.count("| prefuse |") == 2
    assert "| **38** | 76 (TRL fused head) | 60 |" in block
    assert "real tokens/s | **9** | 3 (TRL) |  |" in block
    assert "| **40** |  | 400000 |" in block
    assert readme_table.written(one) == one
    path.write_text(json.dumps(result_of("NVIDIA H200 NVL")))
    other = readme_table.written(one)
    assert "NVIDIA H200 NVL, bfloat16" in other and other.count("| prefuse |") == 2
