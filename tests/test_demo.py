"""The demo, shortened: the whole road from nothing to a model that prefers what it should."""

import json

from prefuse.trainer.cli import main


def test_demo_learns_the_preference(tmp_path, capsys):
    main(["demo", "--output_dir", str(tmp_path), "--sft_steps", "80", "--dpo_steps", "20"])
    shown = capsys.readouterr().out
    assert "Held-out pairs, before and after DPO" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["before"]["eval_rewards/accuracies"] == 0.5
    assert result["after"]["eval_rewards/accuracies"] >= 0.85
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert (tmp_path / "dpo" / "model.safetensors").exists()
