"""Rewards and costs of a window's completions, what is left out, and what the log tells of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels.credit import missing_eos
from prefuse.kernels.objective import Mean

from .dist import Ranks
from .experience import Window
from .online_config import OnlineConfig, PolicyConfig
from .report import Meter, Report
from .rewards import Feedback, combine
from .win_rates import win_rates


class Functions(NamedTuple):
    """What is asked of every completion."""

    rewards: Feedback | None
    costs: Feedback | None


def functions(config: OnlineConfig) -> Functions:
    """Those of the command line, looked up before anything is loaded."""
    options: dict[str, Any] = dict(on_failure=config.reward_failure, timeout=config.reward_timeout)
    rewards = None
    if config.reward_funcs:
        rewards = Feedback(config.reward_funcs, config.reward_weights, **options)
    costs = config.cost_funcs if isinstance(config, PolicyConfig) else []
    return Functions(rewards, Feedback(costs, None, **options) if costs else None)


class Judge:
    """Sets a window's rewards, parts, costs and kept."""

    def __init__(
        self,
        config: OnlineConfig,
        tokenizer,
        functions: Functions,
        ranks: Ranks,
        report: Report,
        meter: Meter,
        samples: str = "samples.jsonl",
    ):
        self.config, self.tokenizer, self.samples = config, tokenizer, samples
        self.rewards, self.costs = functions
        self.names = self.rewards.names if self.rewards else ()
        weights = self.rewards.weights if self.rewards else np.zeros(0)
        if config.environment is not None:  # its rewards are one more
            self.names, weights = (*self.names, "environment"), np.append(weights, 1.0)
        self.weights = weights
        self.ranks, self.report, self.meter = ranks, report, meter

    def judge(self, window: Window, step: int) -> None:
        others = window.others
        both = [window] if others is None else [window, others]
        own, *_ = sizes = [len(w.completions) for w in both]
        answers = [self._answer(w, i) for w in both for i in range(len(w.completions))]
        parts = torch.from_numpy(self._parts(both, answers, step))
        rewards = torch.cat(
            [self._combined(p, w) for p, w in zip(parts.split(sizes), both, strict=True)]
        )
        if self.costs is not None:
            costs = torch.from_numpy(self._ask(self.costs, [window], answers[:own], step))
            window.costs = costs.sum(1)
            window.kept &= ~window.costs.isnan().numpy()
        if self.config.missing_eos_penalty is not None:
            finished = torch.cat([w.finished for w in both])
            penalty = -self.config.missing_eos_penalty
            rewards = missing_eos(rewards, finished, penalty=penalty, replace=False)
        window.rewards, window.parts = rewards[:own], parts[:own]
        self._measure(window)
        if others is not None:
            others.rewards, others.parts = rewards[own:], parts[own:]
            self.meter.add({"reward_others": _mean(others.rewards, ~others.rewards.isnan())})
        if self.config.win_rates:
            window.rewards = win_rates(window.rewards, window.cu_groups, self.config.preference)
        window.kept &= ~window.rewards.isnan().numpy()
        if self.config.mask_truncated_completions:
            window.kept &= window.finished.numpy()
        self._write_samples(window, answers, step)

    def _parts(self, windows: list[Window], answers: list, step: int) -> np.ndarray:
        """[S, F]: of every function, and of the environments."""
        columns = [np.zeros((len(answers), 0))]
        if self.rewards is not None:
            columns.append(self._ask(self.rewards, windows, answers, step))
        if self.config.environment is not None:
            episodes = [c.episode for w in windows for c in w.completions]
            columns.append(np.array([[e.reward] for e in episodes if e is not None]))
            notes = [e.failure for e in episodes if e is not None and e.failure]
            failed = torch.tensor(len(notes)), torch.tensor(len(answers))
            self.meter.add({"environment/failed": Mean(*failed)})
            for note in notes[:3]:
                self.report.say(f"step {step}: {note}")
        return np.concatenate(columns, axis=1)

    def _combined(self, parts: Tensor, window: Window) -> Tensor:
        """[S]: one reward of those of several functions."""
        kind, normal = self.config.reward_combination, "normalized_sum"
        found = combine(
            parts.numpy(),
            self.weights,
            "per_function" if kind == normal else "none",
            how="min" if kind == "min" else "sum",
            group_size=window.each,
        )
        return torch.from_numpy(found)

    def _ask(self, feedback: Feedback, windows: list[Window], answers: list, step: int):
        """[S, F]; failures are counted, and the first of them told."""
        prompts = [w.prompt_of(i) for w in windows for i in range(len(w.completions))]
        scores = feedback(
            [p.prompt for p in prompts],
            answers,
            [c.tokens.tolist() for w in windows for c in w.completions],
            {k: [p.columns.get(k) for p in prompts] for k in prompts[0].columns},
            [p.where for p in prompts],
        )
        failed = torch.tensor(sum(scores.failures.values()))
        self.meter.add({"rewards/failed": Mean(failed, torch.tensor(len(answers)))})
        for kind, times in scores.failures.items():
            self.report.say(f"step {step}: rewards: {times} {kind}")
        for note in scores.notes[:3]:
            self.report.say(f"step {step}: {note}")
        metrics = {k: torch.tensor([v]) for k, v in scores.metrics.items()}
        self.meter.add({k: v for k, v in metrics.items() if v.isfinite().all()})
        return scores.rewards

    def _answer(self, window: Window, i: int) -> Any:
        """A completion as rewards read it: text, or messages after messages."""
        completion, is_text = window.completions[i], isinstance(window.prompt_of(i).prompt, str)
        if completion.episode is not None and not is_text:
            return completion.episode.messages
        if completion.episode is not None:
            return "".join(message["content"] for message in completion.episode.messages)
        text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        return text if is_text else [{"role": "assistant", "content": text}]

    def _measure(self, window: Window) -> None:
        """Of what the policy sampled."""
        rewards, parts, own = window.rewards, window.parts, window.own
        lengths, groups = window.cu_seqlens.diff(), rewards[own].view(len(window.prompts), -1)
        whole = ~groups.isnan().any(1)
        values = {
            "reward": _mean(rewards, ~rewards.isnan() & own),
            "reward_std": _mean(groups.std(1, correction=0), whole),
            "frac_reward_zero_std": _mean(groups.amax(1) == groups.amin(1), whole),
            "completions/mean_length": _mean(lengths, own),
            "completions/clipped_ratio": _mean(~window.finished, own),
        }
        for k, name in enumerate(self.names):
            values[f"rewards/{name}/mean"] = _mean(parts[:, k], ~parts[:, k].isnan() & own)
        if window.foreign:
            values["reward_others"] = _mean(rewards, ~rewards.isnan() & ~own)
        if window.costs is not None:
            values["cost"] = _mean(window.costs, ~window.costs.isnan() & own)
        self.meter.add(values)

    def _write_samples(self, window: Window, answers: list, step: int) -> None:
        """A few completions of every window to samples.jsonl."""
        if not self.ranks.is_main:
            return
        with (Path(self.config.output_dir) / self.samples).open("a") as file:
            for i in range(min(self.config.log_completions, len(window.completions))):
                parts = dict(zip(self.names, window.parts[i].tolist(), strict=True))
                row = {
                    "step": step,
                    "prompt": window.prompt_of(i).prompt,
                    "completion": answers[i],
                    "reward": _or_none(float(window.rewards[i])),
                    "rewards": {name: _or_none(value) for name, value in parts.items()},
                }
                file.write(json.dumps(row) + "\n")


def _mean(x: Tensor, where: Tensor | None = None) -> Mean:
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    return Mean(torch.where(where, x.double(), 0.0).sum(), where.sum())


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
