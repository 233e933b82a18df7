"""The demo, shortened: the whole road from nothing to a model that prefers what it should."""

import json

from prefuse.trainer.cli import main


def test_demo_learns_the_preference(tmp_path, capsys):
    steps = ["--sft_steps", "80", "--dpo_steps", "20", "--grpo_steps", "8"]
    main(["demo", "--output_dir", str(tmp_path), *steps])
    shown = capsys.readouterr().out
    assert "After each stage, on lists never seen" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["before"]["eval_rewards/accuracies"] == 0.5
    assert result["after"]["eval_rewards/accuracies"] >= 0.85
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert len(result["reward"]) == 2 and len(result["sorted_as_preferred"]) == 3
    for stage in ("dpo", "grpo"):
        assert (tmp_path / stage / "model.safetensors").exists()
