"""Every recipe is run by a test; here those on given pairs, completions and texts."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import pair_rows, write_model, write_rows

from prefuse.trainer.cli import main

RECIPES = {
    path: yaml.safe_load(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
}
OFFLINE = [path for path, keys in RECIPES.items() if keys["method"] in ("sft", "dpo", "kto")]


def rows_of(loss_type: str) -> list[dict]:
    rows = [{**row, "margin": k % 3 - 0.5} for k, row in enumerate(pair_rows(24))]
    if loss_type != "dro_v":
        return rows
    return [{"prompt": r["prompt"], "completion": r["chosen"], "reward": r["margin"]} for r in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("recipe", OFFLINE, ids=lambda path: path.stem)
def test_recipes_run(model, tmp_path, recipe):
    """Its settings are those of the run, and a few rows teach something."""
    wanted = RECIPES[recipe]
    rows = rows_of(wanted.get("loss_type", "sft"))
    if wanted["method"] == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    argv = ["train", str(recipe), "--model_name_or_path", model, "--bf16", "false"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", rows), "--disable_tqdm"]
    argv += ["--output_dir", str(tmp_path / "out"), "--logging_steps", "1", "--max_steps", "3"]
    main([*argv, "--lr_scheduler_type", "constant", "--shuffle_dataset", "false"])
    used = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    kept = wanted.keys() - {"lr_scheduler_type"}
    assert {key: used[key] for key in kept} == {key: wanted[key] for key in kept}
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"] and min(x["grad_norm"] for x in lines) > 0


def test_every_recipe_is_run():
    """The others by tests/test_reward_training.py and tests/test_online_methods.py."""
    for path, keys in RECIPES.items():
        others = path.stem.startswith("reward"), "REWARD" in path.read_text()
        assert (path in OFFLINE) + sum(others) == 1, path.name
        assert (keys["method"] == "reward") == others[0]
