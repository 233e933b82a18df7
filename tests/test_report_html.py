"""report.html: whole, safe, small, and made of any folder a run may leave."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import yaml
from tiny import pair_rows, write_model, write_rows

from prefuse.trainer.cli import main
from prefuse.trainer.page.html import write_report
from prefuse.trainer.page.plot import Axis, labelled, moving_mean, thin

VOID = {"meta", "br", "path", "circle"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'\x00\u202e"


class Page(HTMLParser):
    """Tags that nest, what their attributes are, and the text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def page_of(folder, metrics=(), samples=(), config=None, ledger=None) -> Page:
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        lines = [x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines]
        (folder / name).write_text("".join(lines))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if ledger is not None:
        (folder / "ledger.json").write_text(json.dumps(ledger))
    return Page(write_report(folder).read_text())


def shown(page: Page) -> str:
    return " ".join(page.text)


def charts(page: Page) -> list[str]:
    """Titles, in order."""
    titles = [page.text[i] for i, x in enumerate(page.text) if x.startswith("step ")]
    found = re.findall(r"(?:^|\x1f)([^\x1f]+)\x1fstep \d+", "\x1f".join(page.text))
    assert len(titles) >= len(found)
    return found


def rl_line(step: int) -> dict:
    return {
        "step": step,
        "loss": 0.01 * math.sin(step),
        "reward": 0.1 * step + 0.0123456,
        "kl": 0.001 * step,
        "entropy": 2.0 / step,
        "completions/mean_length": 40.5 + step,
        "completions/clipped_ratio": 0.125,
        "clip_ratio/low_mean": 0.0625,
        "sampling/logp_difference": 2.5e-06,
        "rewards/accuracy/mean": 0.1 * step,
        "a_metric_of_mine": 7.0 * step,
        "learning_rate": 1e-6 / step,
        "grad_norm": 1.5,
        "num_tokens": 1234.0,
        "tokens_per_second": 567.8,
        "epoch": step / 4,
    }


def test_the_page_of_an_rl_run(tmp_path):
    metrics = [rl_line(step) for step in range(1, 13)]
    sample = {
        "prompt": "2 + 2 =",
        "completion": "four",
        "reward": 0.75,
        "rewards": {"a": 1, "b": 0},
    }
    samples = [{"step": s, **sample} for s in (1, 1, 12)]
    config = {"method": "grpo", "max_steps": 12, "max_grad_norm": 1.0, "versions": {"torch": "9.8"}}
    ledger = {"data": {"rows": 50, "kept": 40, "too_long": 10, "tokens": 999}}
    page = page_of(tmp_path, metrics, samples, config, ledger)
    text = shown(page)
    for name, value in metrics[-1].items():
        assert f"{value:.6g}" in text, name
    assert charts(page)[:3] == ["Reward", "Reward against KL", "KL to the reference"]
    for title in (
        "Clip ratio",
        "Train/rollout log-prob gap",
        "Tokens a second",
        "a_metric_of_mine",
    ):
        assert charts(page).count(title) == 1
    for told in ("finished", "12 of 12 steps", "four", "0.75", "999", "9.8", "max_grad_norm"):
        assert told in text, told
    assert "40 of 50 rows kept; 10 too long" in text
    assert "above its limit of 1 in 12 of 12" in text


def test_no_chart_for_what_was_not_logged(tmp_path):
    page = page_of(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}])
    assert charts(page) == ["Loss"]
    (points,) = re.findall(r'id="points">(.*?)<', write(tmp_path))
    (drawn,) = json.loads(points)
    assert drawn["curves"] == [[[1, 2], [2.0, 1.0]], [[2], [1.5]]]
    assert "Completions" not in shown(page) and "Configuration" not in shown(page)


def write(folder) -> str:
    return write_report(folder).read_text()


def test_nothing_in_the_folder_is_trusted(tmp_path):
    line = {"step": 1, "loss": 1.0, EVIL: 2.0, "eval_" + EVIL: 2.0}
    row = {"step": 1, "prompt": EVIL, "completion": EVIL, "reward": 1.0, "rewards": {EVIL: EVIL}}
    chat = row | {"prompt": [{"role": EVIL, "content": EVIL}], "rewards": {EVIL: 1, "b": [EVIL]}}
    config = {"method": EVIL, "loss_type": EVIL, EVIL: [EVIL], "versions": {EVIL: EVIL}}
    page = page_of(tmp_path, [line], [row, chat], config, {EVIL: {EVIL: EVIL, "kept": EVIL}})
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and "img" not in tags
    assert shown(page).count("alert(2)") >= 12
    assert "\x00" not in write(tmp_path)
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert not re.search(r"https?://|url\(|@import", write(tmp_path))


@pytest.mark.parametrize(
    "lines, told",
    [
        ([], "No step was logged"),
        ([{"step": 1, "loss": 0.5}], "1 steps"),
        ([{"step": 0, "loss": 0.0}], "loss"),
        ([{"step": 1, "loss": math.nan}], "loss is not a finite number in 1 of 1"),
        ([{"step": s, "loss": math.inf if s > 2 else 1.0} for s in range(9)], "in 6 of 9"),
        ([{"step": 1, "loss": None}, {"step": 2, "loss": "x"}, {"step": 3, "loss": 1}], "2 of 3"),
        ([{"step": 1, "loss": 1e308}, {"step": 2, "loss": 10**400}], "not a finite number in 2"),
        ([{"step": s, "kl": 0.0, "reward": 0.0} for s in range(50)], "Reward against KL"),
        ([{"step": 1, "grad_norm": 0.0}] * 2, "nothing was learned"),
        ([{"step": 1, "kl": 0.0}, {"step": 2, "reward": 1.0}], "KL to the reference"),
        ([{"step": 1, "loss": 5e-324}, {"step": 2, "loss": -5e-324}], "Loss"),
        (
            [{"step": 1, "loss": 1.0}, '{"step": 2, "lo'],
            "1 line of metrics.jsonl could not",
        ),
        ([{"step": 1, "loss": 1.0}, "[1]\n", {"step": None}, {"loss": 3.0}], "1 line of metrics"),
        ([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 0.5}], "0.5"),
    ],
)
def test_folders_that_a_run_may_leave(lines, told, tmp_path):
    assert told in shown(page_of(tmp_path, lines))


def test_an_empty_folder_and_broken_files(tmp_path):
    assert "nothing logged" in shown(Page(write(tmp_path)))
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "ledger.json").write_text("3")
    (tmp_path / "samples.jsonl").write_bytes(
        b'{"step": 1, "prompt": "\xff\\ud800"}\n{"step": "x"}\n'
    )
    text = shown(Page(write(tmp_path)))
    assert "config.yaml could not be read" in text and "ledger.json could not be read" in text
    assert "1 of the 1 in samples.jsonl" in text


def test_a_run_that_ended_early(tmp_path):
    lines = [{"step": s, "loss": 1.0, "eval_loss": abs(s - 3) + 1.0} for s in range(1, 7)]
    text = shown(page_of(tmp_path, lines, config={"method": "sft", "max_steps": 10}))
    assert "ended early" in text and "6 of 10 steps" in text
    assert "Held-out loss was lowest at step 3 (1) and ended at 4: overfitting" in text
    config = {"method": "sft", "max_steps": -1, "num_train_epochs": 2.0}
    lines = [{"step": s, "loss": 1.0, "epoch": s / 3} for s in range(1, 7)]
    assert "finished" in shown(page_of(tmp_path, lines, config=config))


def test_a_long_run_is_small_and_says_that_it_is_thinned(tmp_path):
    names = [f"metric_{k}" for k in range(40)]
    noise = [math.sin(s * s) for s in range(10_000)]
    lines = [
        {"step": s, **{n: noise[s - k] * k for k, n in enumerate(names)}} for s in range(10_000)
    ]
    samples = [
        {"step": s, "prompt": "p" * 9_000, "completion": "<" * 9_000, "reward": s}
        for s in range(500)
    ]
    page = page_of(tmp_path, lines, samples)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "thinned to at most 240 points" in shown(page) and "7000 more characters" in shown(page)
    assert "12 of the 500 in samples.jsonl" in shown(page)


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0.0, 1.06, ["0", "0.5", "1"]),
        (-0.33, -0.31, ["-0.33", "-0.325", "-0.32", "-0.315", "-0.31"]),
        (1.1e-6, 1.2e-6, ["1.1e-06", "1.125e-06", "1.15e-06", "1.175e-06", "1.2e-06"]),
        (0, 10_000, ["0", "2500", "5000", "7500", "10k"]),
        (0, 1.9e6, ["0", "500k", "1M", "1.5M"]),
        (1, 1.0001, ["1", "1.000025", "1.00005", "1.000075", "1.0001"]),
    ],
)
def test_ticks_are_round_and_told_apart(low, high, wanted):
    assert [label for _, label in labelled(Axis(low, high, 0, 1).ticks(4))] == wanted


def test_thinning_keeps_ends_and_extremes():
    points = [(float(x), math.sin(x / 50) + (9.0 if x == 777 else 0.0)) for x in range(5000)]
    kept = thin(points, 100)
    assert len(kept) <= 100 and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[777], points[-1], min(points, key=lambda p: p[1])} <= set(kept)
    assert thin(points[:100], 100) == points[:100]


def test_the_moving_mean_of_a_line_is_the_line():
    points = [(float(x), 3.0 + 2.0 * x) for x in range(400)]
    smooth = dict(moving_mean(points))
    inside = {x: y for x, y in smooth.items() if 10 <= x < 390}
    assert len(inside) > 100
    assert all(y == pytest.approx(3.0 + 2.0 * x, rel=1e-12) for x, y in inside.items())


def test_every_run_ends_with_a_page_that_can_be_made_again(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    rows = [*pair_rows(12), {"prompt": "w1", "chosen": " w2", "rejected": " w2"}]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    argv = [f"--model_name_or_path={model}", f"--dataset_name={data}", f"--output_dir={out}"]
    main(["dpo", *argv, "--max_steps=3", "--logging_steps=1", "--disable_tqdm"])
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    first = (out / "report.html").read_bytes()
    text = shown(Page(first.decode()))
    assert "3 of 3 steps" in text and "12 of 13 rows kept; 1 identical" in text
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.1 < last["memory_gib"] < 1000 or sys.platform != "linux"
    assert all(f"{value:.6g}" in text for value in last.values())
    (out / "report.html").unlink()
    main(["report", str(out)])
    assert (out / "report.html").read_bytes() == first
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "report: wanted one run's folder" in capsys.readouterr().err


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path):
    """Also the half of a line that a kill left."""
    model, data = write_model(tmp_path / "model"), write_rows(tmp_path / "r.jsonl", pair_rows(12))
    out = tmp_path / "out"
    argv = ["dpo", f"--model_name_or_path={model}", f"--dataset_name={data}", "--disable_tqdm"]
    argv += [f"--output_dir={out}", "--logging_steps=1", "--lr_scheduler_type=constant"]
    main([*argv, "--max_steps=3", "--save_steps=2"])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (out / "samples.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"step": 4, "pro')
    main([*argv, "--max_steps=4", "--resume_from_checkpoint=true"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (out / "samples.jsonl").read_text() == '{"step": 2}\n'
