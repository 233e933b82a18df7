"""A run's metrics as figures: which share a chart, and in which order."""

from __future__ import annotations

import html
import re
from typing import Any

from .plot import (
    COLOURS,
    LEFT,
    POINTS,
    RIGHT,
    WIDTH,
    Chart,
    Curve,
    line_chart,
    scatter_chart,
    short,
)
from .run import Run

# titles, and the metrics (without eval_) that share the chart; the rest get one each
CHARTS = {
    "Reward": r"reward",
    "KL to the reference": r"kl",
    "Loss": r"loss",
    "Accuracy": r"(rewards|costs|similarities|verdicts)/(sign_)?accurac(y|ies)|accuracy",
    "Margin": r"(rewards|verdicts)/margins?|margin",
    "Rewards of the two": r"rewards/(chosen|rejected)",
    "Log-probs of the two": r"logps/(chosen|rejected)",
    "Token accuracy": r"mean_token_accuracy",
    "Mean of each reward": r"rewards/.+/mean",
    "Spread of rewards": r"reward_std|rewards/.+/std",
    "Completion length, tokens": r"completions/.*length",
    "Shares of completions": r"completions/(clipped_ratio|trained_on)|frac_reward_zero_std",
    "Entropy, nats a token": r"entropy",
    "Clip ratio": r"clip_ratio(/.*)?|cispo_clip_ratio",
    "KL to the policy that sampled": r"policy/approx_kl",
    "Train/rollout log-prob gap": r"sampling/.*logp_difference(/.*)?",
    "Train/rollout importance ratio": r"sampling/importance_sampling_ratio(/.*)?",
    "Learning rate": r"learning_rate",
    "Gradient norm": r"grad_norm",
}
SPEED = {
    "Tokens a second": r"(.+_)?tokens_per_second",
    "Memory, GiB": r"memory_gib|memory/.*",
    "Seconds of each phase": r"time/.*|(.+_)?(runtime|seconds)",
}


class Figures:
    """Draws each metric once, in the first chart that wants it; gathers what hovering reads."""

    def __init__(self, run: Run):
        self.run = run
        self.points: list[dict[str, Any]] = []
        self.bases = dict.fromkeys(name.removeprefix("eval_") for name in run.metrics)
        self.drawn: set[str] = set()
        self.limit = max(40, min(POINTS, 12_000 // max(1, len(run.metrics))))
        self.thinned = any(len(s.steps) > self.limit for s in run.metrics.values())

    def grid(self, charts: dict[str, str], reward_against_kl: bool = False) -> str:
        parts = []
        for title, pattern in charts.items():
            names = [n for n in self.bases if re.fullmatch(pattern, n) and n not in self.drawn]
            parts += [
                self.lines(title, names[i : i + COLOURS]) for i in range(0, len(names), COLOURS)
            ]
            if reward_against_kl and title == "Reward":
                parts += self.scatter()
        self.drawn |= {n for n in self.bases if any(re.fullmatch(p, n) for p in charts.values())}
        return f'<div class="charts">{"".join(parts)}</div>' if parts else ""

    def others(self) -> str:
        claimed = "|".join(f"(?:{p})" for p in (*CHARTS.values(), *SPEED.values()))
        names = [n for n in self.bases if not re.fullmatch(claimed, n)]
        parts = "".join(self.lines(name, [name]) for name in names)
        return f'<div class="charts small">{parts}</div>' if parts else ""

    def lines(self, title: str, names: list[str]) -> str:
        curves, legend, alone = [], [], len(names) == 1
        for colour, base in enumerate(names):
            for name, held_out in ((base, False), (f"eval_{base}", True)):
                if name not in self.run.metrics:
                    continue
                colour += held_out and alone
                curves.append(Curve(self.run.metrics[name], colour, held_out))
                label = base + " held out" * held_out
                legend.append((colour, held_out, label, self.run.last(name)))
        return self._figure(title, line_chart(curves, self.limit), legend)

    def scatter(self) -> list[str]:
        """Reward against KL over the steps that logged both."""
        if not {"reward", "kl"} <= self.run.metrics.keys():
            return []
        kl = dict(self.run.metrics["kl"].finite())
        points = [(s, kl[s], v) for s, v in self.run.metrics["reward"].finite() if s in kl]
        if not points:
            return []
        _, x, y = points[-1]
        legend = [(0, False, "KL (across)", x), (0, False, "reward (up); darker is later", y)]
        return [self._figure("Reward against KL", scatter_chart(points), legend)]

    def _figure(self, title: str, chart: Chart, legend: list) -> str:
        svg = chart.svg.replace("<svg ", f'<svg aria-label="{escape(title)}" ', 1)
        edges = {"width": WIDTH, "left": LEFT, "right": WIDTH - RIGHT}
        self.points.append({"curves": chart.curves, "x": chart.x, **edges})
        items = "".join(
            f'<span><i class="s{colour % COLOURS}{" held-out" * held_out}"></i>{escape(label)} '
            f"<output>{'–' if value is None else short(value)}</output></span>"
            for colour, held_out, label, value in legend
        )
        notes = "".join(f'<div class="quiet">{escape(note)}</div>' for note in chart.notes)
        return (
            f'<figure data-chart="{len(self.points) - 1}"><figcaption>{escape(title)}'
            f'<span class="at quiet">step {chart.last}</span></figcaption>'
            f'{svg}<div class="legend">{items}</div>{notes}</figure>'
        )


def escape(text: str) -> str:
    """Escaped; control characters, which HTML forbids, as their pictures."""
    pictures = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}
    return html.escape(text.translate(pictures), quote=True)
