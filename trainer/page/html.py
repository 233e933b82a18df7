"""report.html: what a run wrote in its folder, as one page that opens from disk.

Everything in the folder is data: it is escaped, and the page's policy allows no script but its own
and no address outside the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..flags import CONFIGS
from .checks import checks, ends, is_guard, planned
from .figures import CHARTS, SPEED, Figures, escape
from .plot import short
from .run import Run, Series, number, read_run
from .style import SCRIPT, STYLE

SAMPLED_STEPS, SAMPLES_A_STEP, TEXT = 12, 6, 2000

# the numbers at the top: name, title, which direction is good
TILES = (
    ("reward", "reward", 1),
    ("kl", "KL", 0),
    ("eval_rewards/accuracies", "held-out accuracy", 1),
    ("rewards/accuracies", "accuracy", 1),
    ("eval_rewards/margins", "held-out margin", 1),
    ("eval_loss", "held-out loss", -1),
    ("mean_token_accuracy", "token accuracy", 1),
    ("completions/mean_length", "completion length", 0),
    ("entropy", "entropy", 0),
    ("loss", "loss", -1),
)


def write_report(folder: Path) -> Path:
    """(Re)makes report.html of a finished or interrupted run from the files in its folder."""
    path = Path(folder) / "report.html"
    path.write_bytes(page(read_run(Path(folder))).encode("utf-8", "replace"))
    return path


def page(run: Run) -> str:
    figures = Figures(run)
    title = _title(run)
    body = [
        _header(run, title),
        _tiles(run),
        _checks(run),
        _section("Curves", figures.grid(CHARTS, reward_against_kl=True)),
        _samples(run.samples),
        _section("Speed and memory", figures.grid(SPEED)),
        _guards(run),
        _section("Other metrics", figures.others()),
        _every_metric(run),
        _settings(run),
        f'<p class="quiet">{escape(_reading(figures))}</p>',
    ]
    points = json.dumps(figures.points, separators=(",", ":"), allow_nan=False)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(x for x in body if x)
        + f'\n</main><script type="application/json" id="points">{points}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _title(run: Run) -> str:
    method = str(run.config.get("method", "run"))
    kind = run.config.get("loss_type")
    return f"{method} ({kind})" if kind and kind != method else method


def _header(run: Run, title: str) -> str:
    finished, progress = planned(run)
    mark = "good" if finished else "warn" if run.steps else "bad"
    state = "finished" if finished else "ended early" if run.steps else "nothing logged"
    told = [f"folder {run.name}"]
    for key, label in (("model_name_or_path", "model"), ("dataset_name", "data")):
        if key in run.config:
            told.append(f"{label} {run.config[key]}")
    return (
        f'<header><h1>{escape(title)}</h1><span class="chip {mark}">{state}</span>'
        f'<span class="quiet">{escape(progress)}</span></header>'
        f'<p class="quiet">{escape(" · ".join(told))}</p>'
    )


def _tiles(run: Run) -> str:
    parts = []
    for name, title, direction in TILES:
        found = ends(run.metrics[name]) if name in run.metrics else None
        first, last = found or (None, run.last(name))
        if last is None or len(parts) == 6:
            continue
        # a policy-gradient loss falls or rises whether or not the policy improves
        told = name != "loss" or "reward" not in run.metrics
        better = direction * (last - first) if told and first is not None else 0
        mark = "good" if better > 0 else "bad" if better < 0 else ""
        before = "" if first is None else f"from {short(first)}"
        parts.append(_tile(title, short(last), before, mark))
    seconds, tokens = _time(run)
    if tokens:
        parts.append(_tile("training time", _clock(seconds), f"{short(tokens)} tokens"))
        parts.append(_tile("speed", f"{short(tokens / seconds)}", "tokens a second"))
    memory = [v for _, v in run.metrics.get("memory_gib", Series([], [])).finite()]
    if memory:
        whose = "of the process" if run.versions.get("device") == "cpu" else "of the GPU"
        parts.append(_tile("peak memory", f"{short(max(memory))} GiB", whose))
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""


def _tile(title: str, value: str, note: str, mark: str = "") -> str:
    spans = f'<span class="quiet">{escape(title)}</span><b class="{mark}">{escape(value)}</b>'
    return f'<div>{spans}<span class="quiet">{escape(note) or "&nbsp;"}</span></div>'


def _time(run: Run) -> tuple[float, float]:
    """Seconds and tokens of the logged stretches."""
    tokens = dict(run.metrics.get("num_tokens", Series([], [])).finite())
    speeds = dict(run.metrics.get("tokens_per_second", Series([], [])).finite())
    both = [(tokens[s], speeds[s]) for s in tokens if speeds.get(s, 0) > 0]
    return sum(n / speed for n, speed in both), sum(n for n, _ in both)


def _clock(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _checks(run: Run) -> str:
    items = "".join(f'<li class="{mark}">{escape(text)}</li>' for mark, text in checks(run))
    return f'<ul class="checks card">{items}</ul>'


def _samples(samples: list[dict[str, Any]]) -> str:
    """Some steps from the first to the last; a few completions each, the ends open."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = list(by_step)
    if len(steps) > SAMPLED_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (SAMPLED_STEPS - 1))] for i in range(SAMPLED_STEPS)]
    rewards = [x for x in map(_reward, samples) if x is not None]
    bounds = (min(rewards, default=0.0), max(rewards, default=0.0))
    parts, shown = [], 0
    for step in steps:
        rows = by_step[step][:SAMPLES_A_STEP]
        shown += len(rows)
        told = [x for x in map(_reward, by_step[step]) if x is not None]
        mean = f" · mean reward {short(sum(told) / len(told))}" if told else ""
        cards = "".join(_sample(row, bounds) for row in rows)
        is_open = " open" if step in (steps[0], steps[-1]) else ""
        head = f'<summary>step {step}<span class="quiet">{escape(mean)}</span></summary>'
        parts.append(f'<details class="card"{is_open}>{head}{cards}</details>')
    note = f'<p class="quiet">{shown} of the {len(samples)} in samples.jsonl.</p>'
    return _section("Completions over time", "".join(parts) and note + "".join(parts))


def _sample(row: dict[str, Any], bounds: tuple[float, float]) -> str:
    reward, (low, high) = _reward(row), bounds
    told = "–" if reward is None else short(reward)
    bar = ""
    if reward is not None and high > low:
        share = 100 * (reward - low) / (high - low)
        bar = f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'
    each = row.get("rewards")
    each = each if isinstance(each, dict) and len(each) > 1 else {}
    parts = "".join(
        f'<span class="quiet">{escape(f"{name} {_score(value)}")}<br></span>'
        for name, value in each.items()
    )
    return (
        f'<div class="sample"><pre class="prompt">{_text(row.get("prompt"))}</pre>'
        f"<pre>{_text(row.get('completion'))}</pre>"
        f'<div class="reward"><b>{told}</b>{bar}{parts}</div></div>'
    )


def _score(value: Any) -> str:
    return short(value) if isinstance(value, float) and math.isfinite(value) else _plain(value)


def _reward(row: dict[str, Any]) -> float | None:
    reward = number(row.get("reward"))
    return None if math.isnan(reward) else reward


def _text(value: Any) -> str:
    """A prompt or completion: text, or messages."""
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        value = "\n".join(f"[{m.get('role', '')}] {_plain(m['content'])}" for m in value)
    return escape(_cut(_plain(value)))


def _guards(run: Run) -> str:
    """What happened to the data's rows, and every metric that counts failures or cuts."""
    parts = []
    for data, counts in run.ledgers.items():
        rows = [(str(name).replace("_", " "), _plain(count)) for name, count in counts.items()]
        parts.append(_table((data, "count"), rows))
    rows = []
    for name, series in run.metrics.items():
        points = series.finite()
        if is_guard(name) and points:
            values = [v for _, v in points]
            raised = f"{sum(v != 0 for v in values)} of {len(values)}"
            mean = f"{sum(values) / len(values):.4g}"
            rows.append((name, raised, mean, f"{max(values):.4g}", f"{values[-1]:.4g}"))
    head = ("guard", "logged steps not 0", "mean", "most", "last")
    table = _table(head, rows) if rows else ""
    both = f'<div class="two">{"".join(parts)}</div>' * bool(parts) + table
    return _section("Rows and guards", both and f'<div class="card">{both}</div>')


def _every_metric(run: Run) -> str:
    rows = []
    for name, series in run.metrics.items():
        points = series.finite()
        if not points:
            rows.append((name, *["not finite"] * 4, str(len(series.steps))))
            continue
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        at = (f"{v:.6g} at {s}" for s, v in (low, high))
        last = f"{points[-1][1]:.6g}" if points[-1][0] == series.steps[-1] else "not finite"
        rows.append((name, f"{points[0][1]:.6g}", last, *at, str(len(series.steps))))
    head = ("metric", "first", "last", "lowest", "highest", "logged")
    return _details("Every metric in numbers", _table(head, rows) if rows else "")


def _settings(run: Run) -> str:
    versions = [(str(key), _cut(_plain(value))) for key, value in run.versions.items()]
    known = CONFIGS.get(str(run.config.get("method")))
    defaults = {f.name: f.default for f in fields(known)} if known else {}
    everything, chosen = [], []
    for key, value in run.config.items():
        everything.append((str(key), _cut(_plain(value))))
        if key != "method" and (key not in defaults or value != defaults[key]):
            chosen.append(everything[-1])
    some = f'<div class="card">{_table((), chosen)}</div>' if known and chosen else ""
    note = '<p class="quiet">Hyperparameters, and what differs from the defaults.</p>'
    whole = _details(f"All {len(everything)} settings", _table((), everything))
    return _section(
        "Versions", f'<div class="card">{_table((), versions)}</div>' if versions else ""
    ) + _section("Configuration", (some and note + some) + whole if everything else "")


def _reading(figures: Figures) -> str:
    told = "Read from metrics.jsonl, config.yaml, ledger.json and samples.jsonl of the folder. "
    if figures.thinned:
        told += f"Curves are thinned to at most {figures.limit} points each, which keep the lowest "
        told += "and highest of every stretch. "
    return told + "From 40 points on, the strong line is a moving mean over a twentieth of the run."


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    if not content:
        return ""
    return f'<details class="card"><summary>{escape(title)}</summary>{content}</details>'


def _table(head: tuple[str, ...], rows: list) -> str:
    def row(cells, tag: str) -> Iterator[str]:
        for i, cell in enumerate(cells):
            kind = "key" if not i else "number" if head else "value"
            yield f'<{tag} class="{kind}">{escape(str(cell))}</{tag}>'

    lines = ([f"<tr>{''.join(row(head, 'th'))}</tr>"] if head else []) + [
        f"<tr>{''.join(row(cells, 'td'))}</tr>" for cells in rows
    ]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return "–" if value is None or value != value else str(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()


def _cut(text: str) -> str:
    more = len(text) - TEXT
    return text if more <= 0 else f"{text[:TEXT]}… ({more} more characters)"
