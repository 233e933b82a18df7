"""What a reader of a run should know first, each as one sentence with its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from .plot import short
from .run import Run, Series

# counts and shares of what was cut, refused, filtered or failed
GUARD = re.compile(
    r"guards?/|fail|(?<!squared_)error|time_?out|timed_out|skipp?ed|truncat|dropped|masked|filtered|refill"
    r"|zero_std|stale|retr(y|ies)|clipped_ratio|without_eos|not_finite|cache_(hits|misses)"
)
KEPT = ("rows", "kept", "tokens", "scored_tokens")


class Check(NamedTuple):
    mark: Literal["good", "warn", "bad"]
    text: str


def checks(run: Run) -> list[Check]:
    found = [*_end(run), *_finite(run), *_progress(run), *_limits(run), *_rows(run)]
    order = ("bad", "warn", "good")
    return sorted(found, key=lambda check: order.index(check.mark))


def is_guard(name: str) -> bool:
    return bool(GUARD.search(name.removeprefix("eval_")))


def planned(run: Run) -> tuple[bool, str]:
    """Whether the run reached its planned end, and how far it came, in words."""
    wanted: Any = run.config.get("max_steps")
    if isinstance(wanted, int) and wanted > 0:
        return run.steps >= wanted, f"{run.steps:,} of {wanted:,} steps"
    epochs: Any = run.config.get("num_train_epochs")
    done = run.last("epoch")
    if isinstance(epochs, (int, float)) and done is not None:
        return done >= epochs - 1e-9, f"{run.steps:,} steps, {short(done)} of {epochs:g} epochs"
    return bool(run.steps), f"{run.steps:,} steps"


def ends(series: Series) -> tuple[float, float] | None:
    """The means of the first and of the last tenth: what noise leaves of a beginning and end."""
    values = [v for _, v in series.finite()]
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _end(run: Run) -> Iterator[Check]:
    finished, progress = planned(run)
    if not run.steps:
        yield Check("bad", "No step was logged.")
    elif finished:
        yield Check("good", f"Ran to its planned end: {progress}.")
    else:
        yield Check("warn", f"Ended before its planned end: {progress}.")
    for file, count in run.unreadable.items():
        lines = f"{count} line{'s' * (count > 1)} of " if file.endswith(".jsonl") else ""
        yield Check("warn", f"{lines}{file} could not be read and is left out.")


def _finite(run: Run) -> Iterator[Check]:
    bad = {name: series.bad() for name, series in run.metrics.items() if series.bad()}
    for name, steps in bad.items():
        many = len(run.metrics[name].steps)
        text = f"{name} is not a finite number in {len(steps)} of {many} logged steps"
        yield Check("bad", f"{text}, first at step {steps[0]}.")
    if run.metrics and not bad:
        yield Check("good", "Every logged number is finite.")


PROGRESS = {
    "reward": ("Reward", 1),
    "eval_reward": ("Held-out reward", 1),
    "eval_rewards/accuracies": ("Held-out accuracy", 1),
    "eval_mean_token_accuracy": ("Held-out token accuracy", 1),
    "loss": ("Training loss", -1),
}


def _progress(run: Run) -> Iterator[Check]:
    for name, (title, direction) in PROGRESS.items():
        found = ends(run.metrics[name]) if name in run.metrics else None
        if found is None or (name == "loss" and "reward" in run.metrics):
            continue  # a policy-gradient loss says nothing of progress
        if name == "reward" and _compares(run):
            continue  # nor do win rates among a policy's own completions
        first, last = found
        verb = "rose" if last > first else "fell" if last < first else "went"
        text = f"{title} {verb} from {short(first)} to {short(last)}."
        yield Check("good" if direction * (last - first) > 0 else "warn", text)
    held_out = run.metrics["eval_loss"].finite() if "eval_loss" in run.metrics else []
    if len(held_out) > 1:
        best_step, best = min(held_out, key=lambda point: point[1])
        last = held_out[-1][1]
        if last - best > 0.05 * max(abs(best), 1e-12):
            text = f"Held-out loss was lowest at step {best_step} ({short(best)})"
            yield Check("warn", f"{text} and ended at {short(last)}: overfitting.")
        else:
            yield Check("good", f"Held-out loss ended at {short(last)}; lowest: {short(best)}.")


def _compares(run: Run) -> bool:
    """Whether completions are compared with each other and have no rewards."""
    rewards = run.config.get("reward_funcs") or run.config.get("environment")
    return bool(run.config.get("preference_func")) and not rewards


def _limits(run: Run) -> Iterator[Check]:
    limit = run.config.get("max_grad_norm")
    norms = run.metrics["grad_norm"].finite() if "grad_norm" in run.metrics else []
    if norms and not any(v for _, v in norms):
        yield Check("bad", "The gradient was 0 in every logged step: nothing was learned.")
    elif norms and isinstance(limit, (int, float)) and limit > 0:
        over = sum(v > limit for _, v in norms)
        text = f"Gradient norm above its limit of {limit:g} in {over} of {len(norms)} logged steps"
        yield Check("warn" if over > 0.9 * len(norms) else "good", f"{text}.")
    found = ends(run.metrics["entropy"]) if "entropy" in run.metrics else None
    if found and "reward" in run.metrics:
        first, last = found
        text = f"Entropy went from {short(first)} to {short(last)} nats a token"
        collapsed = last < 0.1 * first
        yield Check("warn" if collapsed else "good", text + (": collapsed." if collapsed else "."))
    for name, most, what in (
        ("completions/clipped_ratio", 0.3, "{:.0%} of completions were cut at the length limit"),
        ("frac_reward_zero_std", 0.5, "{:.0%} of groups had equal rewards and taught nothing"),
        ("sampling/logp_difference", 0.05, "log-probs of sampling and training were {:.2g} apart"),
    ):
        found = ends(run.metrics[name]) if name in run.metrics else None
        if found:
            mark = "warn" if found[1] > most else "good"
            yield Check(mark, f"At the end {what.format(found[1])}.")
    for name, what in (("rewards/failed", "Rewards"), ("preferences/failed", "Preferences")):
        failed = run.metrics[name].finite() if name in run.metrics else []
        if failed:
            steps = sum(v != 0 for _, v in failed)
            text = f"{what} failed in {steps} of {len(failed)} logged steps."
            yield Check("warn" if steps else "good", text)


def _rows(run: Run) -> Iterator[Check]:
    for data, counts in run.ledgers.items():
        rows, kept = counts.get("rows"), counts.get("kept")
        if not isinstance(rows, int) or not isinstance(kept, int):
            continue
        notes = ", ".join(
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in counts.items()
            if name not in KEPT and isinstance(count, int) and count
        )
        many = kept < 0.9 * rows
        text = f"{data}: {kept:,} of {rows:,} rows kept" + (f"; {notes}" if notes else "")
        yield Check("warn" if many else "good", f"{text}.")
