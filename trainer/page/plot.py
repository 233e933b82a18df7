"""Charts as SVG text: lines over steps and a scatter, thinned, with the points that hovering reads.

Colours and strokes are classes (s0, s1, ...) which the page's style sheet sets, light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .run import Series

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
POINTS = 240  # at most so many of a curve are drawn
SMOOTH_FROM = 40  # a curve with so many points gets a moving mean
COLOURS = 6

Points = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    series: Series
    colour: int
    held_out: bool = False


class Chart(NamedTuple):
    svg: str
    curves: list[list[list[float]]]  # the columns of each: steps and values; or step, x and y
    x: tuple[float, float]  # what lies at the left and at the right edge of the axis
    last: int  # step
    notes: list[str]  # what the drawing leaves out


class Axis(NamedTuple):
    """A range of numbers laid onto a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def line_chart(curves: Sequence[Curve], limit: int = POINTS) -> Chart:
    """Curves over steps, of at most `limit` points each; numbers not finite mark the foot."""
    finite = [c.series.finite() for c in curves]
    steps = [s for c in curves for s in c.series.steps]
    first = min(steps) if min(steps) > 0.05 * max(steps) else 0
    across = Axis(*_range([first, max(steps)], pad=0.0), LEFT, WIDTH - RIGHT)
    low, high, beyond = _robust([v for points in finite for _, v in points])
    up = Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts, drawn, notes = [_frame(across, up, whole_x=True)], [], []
    if beyond:
        notes.append(beyond)
    for curve, points in zip(curves, finite, strict=True):
        shown = thin(points, limit)
        drawn.append(_columns(shown))
        smoothed = len(points) >= SMOOTH_FROM and not curve.held_out
        kind = f"s{curve.colour % COLOURS}" + (" held-out" if curve.held_out else "")
        parts.append(_path(shown, across, up, kind + (" raw" if smoothed else "")))
        if smoothed:
            parts.append(_path(moving_mean(points), across, up, kind))
        if len(shown) <= 40:
            parts += [_dot(across.at(x), up.at(y), kind) for x, y in shown]
        bad = curve.series.bad()
        if bad:
            notes.append(f"{len(bad)} not finite, first at step {bad[0]}")
        foot = HEIGHT - BOTTOM
        marks = "".join(f"M{across.at(s):.1f} {foot}v-8" for s in bad[:: max(1, len(bad) // 60)])
        parts.append(f'<path class="bad" d="{marks}"/>' if marks else "")
    edges = (across.low, across.high)
    return Chart(_svg(parts), drawn, edges, max(steps), notes)


def scatter_chart(points: list[tuple[int, float, float]]) -> Chart:
    """(step, x, y), each a dot that darkens with the steps, joined in their order."""
    every = max(1, math.ceil(len(points) / POINTS))
    shown = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    across = Axis(*_range([x for _, x, _ in shown]), LEFT, WIDTH - RIGHT)
    up = Axis(*_range([y for _, _, y in shown]), HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up, whole_x=False)]
    parts.append(_path([(x, y) for _, x, y in shown], across, up, "s0 trail"))
    for i, (_, x, y) in enumerate(shown):
        age = 0.2 + 0.8 * i / max(1, len(shown) - 1)
        parts.append(_dot(across.at(x), up.at(y), "s0", f' fill-opacity="{age:.2f}" r="3"'))
    for name, (_, x, y) in (("first", shown[0]), ("last", shown[-1])):
        parts.append(_dot(across.at(x), up.at(y), f"ring {name}", ' r="5.5"'))
    notes = [f"1 logged step in {every} is drawn"] if every > 1 else []
    drawn = [[float(step), _rounded(x), _rounded(y)] for step, x, y in shown]
    columns = [list(column) for column in zip(*drawn, strict=True)]
    edges = (across.low, across.high)
    return Chart(_svg(parts, "scatter"), [columns], edges, points[-1][0], notes)


def thin(points: Points, limit: int = POINTS) -> Points:
    """The first, the last, and the lowest and highest of equal stretches between them."""
    if len(points) <= limit:
        return points
    inner, stretches = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        pair = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(pair)
    return [*kept, points[-1]]


def moving_mean(points: Points) -> Points:
    """Centred, over a twentieth of the curve, less beyond its ends; at so many places that it
    looks smooth."""
    half, many = max(1, len(points) // 40), len(points)
    sums = list(accumulate((y for _, y in points), initial=0.0))
    smooth = []
    for i in sorted({*range(0, many, max(1, many // 120)), many - 1}):
        low, high = max(0, i - half), min(many, i + half + 1)
        smooth.append((points[i][0], (sums[high] - sums[low]) / (high - low)))
    return smooth


def short(value: float) -> str:
    """For an axis or a tile: four digits."""
    if not math.isfinite(value):
        return "not finite"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _robust(values: list[float]) -> tuple[float, float, str]:
    """The range to draw: without the spikes that would flatten the rest; and what they are."""
    low, high = _range(values)
    ordered = sorted(values)
    if len(ordered) < 20:
        return low, high, ""
    under, over = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
    reach = 3 * (over - under)
    inside = [v for v in ordered if under - reach <= v <= over + reach]
    if not reach or len(inside) == len(ordered):
        return low, high, ""
    outside = len(ordered) - len(inside)
    to = f"from {short(ordered[0])} to {short(ordered[-1])}"
    points = "1 point lies" if outside == 1 else f"{outside} points lie"
    return *_range(inside), f"{points} beyond the axis; the whole range is {to}"


def _range(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= max(1e-300, 1e-9 * max(abs(low), abs(high))):
        if not low:
            return -pad, 1.0
        width = 0.1 * abs(low) if abs(low) > 1e-290 else 1.0
        return low - width, high + width
    margin = pad * (high - low)
    return low - margin, high + margin


def _frame(across: Axis, up: Axis, *, whole_x: bool) -> str:
    """Grid lines and numbers."""
    parts = []
    for tick, label in labelled(up.ticks(4)):
        y = up.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{label}</text>')
    ticks = [t for t in across.ticks(4) if not whole_x or t == int(t)]
    for tick, label in labelled(ticks):
        x, foot = across.at(tick), HEIGHT - BOTTOM
        parts.append(f'<path class="tick" d="M{x:.1f} {foot}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" class="middle">{label}</text>')
    return "".join(parts)


def labelled(ticks: list[float]) -> list[tuple[float, str]]:
    """With as many digits as tell them apart."""
    texts: list[str] = []
    for digits in range(1, 12):
        texts = [f"{tick:.{digits}g}" for tick in ticks]
        if all(math.isclose(float(x), t, rel_tol=1e-9) for x, t in zip(texts, ticks, strict=True)):
            break
    whole = [short(t) if abs(t) >= 1 and "e" in x else x for t, x in zip(ticks, texts, strict=True)]
    return list(zip(ticks, whole, strict=True))


def _path(points: Points, across: Axis, up: Axis, kind: str) -> str:
    if len(points) < 2:
        return ""
    line = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in points)
    return f'<path class="line {kind}" d="M{line}"/>'


def _dot(x: float, y: float, kind: str, more: str = ' r="2.5"') -> str:
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}"{more}/>'


def _columns(points: Points) -> list[list[float]]:
    return [[x for x, _ in points], [_rounded(y) for _, y in points]]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _svg(parts: list[str], kind: str = "lines") -> str:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    guide = f'<path class="guide" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>'
    return f'<svg class="{kind}" {box} role="img">{"".join(parts)}{guide}</svg>'
