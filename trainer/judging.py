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
from .environments import token_rewards
from .errors import UserError
from .experience import Window
from .feedback.dense import Dense, on_tokens
from .feedback.preferences import load_preference
from .feedback.self_signals import Reader, Signal, load_signal
from .online_config import OnlineConfig, PolicyConfig, PPOConfig
from .prompts import Prompt
from .report import Meter, Report
from .rewards import Feedback, Scores, Spans, combine
from .scores import Scorer
from .win_rates import unmet, win_rates, wins_of


class Functions(NamedTuple):
    """What is asked of every completion. signals: by their places among the rewards."""

    rewards: Feedback | None
    costs: Feedback | None
    preference: Feedback | None
    signals: dict[int, Signal]

    def check(self, prompts: list[Prompt]) -> None:
        """A UserError if one of them reads a column that the rows lack."""
        columns = prompts[0].columns
        for asked in (self.rewards, self.costs):
            if asked is not None:
                asked.check(columns)
        if self.preference is not None:
            self.preference.check([*columns, "opponents"])


def functions(config: OnlineConfig) -> Functions:
    """Those of the command line, looked up before anything is loaded."""
    options: dict[str, Any] = dict(on_failure=config.reward_failure, timeout=config.reward_timeout)
    if config.reward_cache is not None:
        options["cache"] = _cache_file(config.reward_cache)
    found = {i: load_signal(spec) for i, spec in enumerate(config.reward_funcs)}
    signals = {i: signal for i, signal in found.items() if signal is not None}
    plain, weights = [i for i in found if i not in signals], config.reward_weights
    rewards = preference = None
    if plain:
        own = None if weights is None else [weights[i] for i in plain]
        rewards = Feedback([config.reward_funcs[i] for i in plain], own, **options)
    if config.preference_func is not None:
        asked = [load_preference(config.preference_func)]
        preference = Feedback(asked, kind="preference", neutral=0.5, **options)
    costs = config.cost_funcs if isinstance(config, PolicyConfig) else []
    return Functions(
        rewards, Feedback(costs, None, **options) if costs else None, preference, signals
    )


def _cache_file(given: str) -> Path:
    """A folder has it under a name of ours."""
    path = Path(given)
    return path / "rewards.sqlite" if path.is_dir() or not path.suffix else path


class Judge:
    """Sets a window's rewards, parts, costs, wins and kept. policy: for rewards that read it."""

    def __init__(
        self,
        config: OnlineConfig,
        tokenizer,
        functions: Functions,
        ranks: Ranks,
        report: Report,
        meter: Meter,
        policy: Scorer,
        samples: str = "samples.jsonl",
    ):
        self.config, self.tokenizer, self.samples = config, tokenizer, samples
        self.rewards, self.costs, self.preference, self.signals = functions
        plain = iter(self.rewards.names if self.rewards else ())
        places = range(len(config.reward_funcs))
        names = [self.signals[i].name if i in self.signals else next(plain) for i in places]
        weights = list(config.reward_weights or [1.0] * len(names))
        if config.environment is not None:  # its rewards are one more
            names, weights = [*names, "environment"], [*weights, 1.0]
        if not names and self.preference is not None:  # the mean of what it says
            names, weights = [self.preference.names[0]], [1.0]
        self.names, self.weights = tuple(names), np.array(weights)
        self.ranks, self.report, self.meter = ranks, report, meter
        self.reader = Reader(policy, tokenizer, config, ranks, meter)

    def judge(self, window: Window, step: int) -> None:
        if not window.completions:  # on this rank; all of them read the policy together
            self._signalled([window], [])
            return
        others = window.others
        both = [window] if others is None else [window, others]
        own, *_ = sizes = [len(w.completions) for w in both]
        answers = [self._answer(w, i) for w in both for i in range(len(w.completions))]
        if self.preference is not None:
            self._compare(self.preference, window, answers, step)
        found, dense = self._parts(both, answers, step)
        parts = torch.from_numpy(found)
        if isinstance(self.config, PPOConfig):
            self._pay(window, dense)
        rewards = torch.cat(
            [self._combined(p, w) for p, w in zip(parts.split(sizes), both, strict=True)]
        )
        if self.config.win_rates and self.preference is not None:
            rewards[:own] = win_rates(wins_of(window, self.config.preference), others is None)
        if self.costs is not None:
            asked = self._ask(self.costs, [window], answers[:own], step)
            costs = torch.from_numpy(asked.rewards)
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
        if self.config.win_rates and self.preference is None:
            wins = wins_of(window, self.config.preference)
            window.rewards = win_rates(wins, others is None)
        window.kept &= ~window.rewards.isnan().numpy()
        if self.config.mask_truncated_completions:
            window.kept &= window.finished.numpy()
        self._write_samples(window, answers, step)

    def _compare(self, asked: Feedback, window: Window, answers: list, step: int) -> None:
        """Sets the window's wins: of every completion against the others, or against its group."""
        each, others, size = window.each, window.others, len(window.completions)
        wins, met = [], []
        for group in range(len(window.prompts)):
            own = answers[group * each : (group + 1) * each]
            rivals, first = None, size
            if others is not None:
                first += group * others.each
                rivals = answers[first : first + others.each]
            known, pairs = unmet(own, rivals)
            wins.append(known)
            met += [(group, i, j) for i, j in pairs]
        window.wins = torch.stack(wins)
        told = np.zeros((0, 1))
        if met:
            rivals, first = (window, 0) if others is None else (others, size)
            behind = [answers[first + g * rivals.each + j] for g, _, j in met]
            ahead = [g * each + i for g, i, _ in met]
            told = self._told(
                asked,
                [window.prompts[g] for g, _, _ in met],
                [answers[i] for i in ahead],
                [window.completions[i].tokens.tolist() for i in ahead],
                step,
                opponents=behind,
            ).rewards
        for (group, i, j), chance in zip(met, told[:, 0].tolist(), strict=True):
            window.wins[group, i, j] = chance
            if others is None:
                window.wins[group, j, i] = 1 - chance
        count = torch.tensor(len(met)), torch.tensor(len(window.prompts))
        self.meter.add({"preferences/asked": Mean(*count)})

    def _parts(
        self, windows: list[Window], answers: list, step: int
    ) -> tuple[np.ndarray, dict[tuple[int, int], Dense]]:
        """[S, F]: of every function, of the environments, or of comparisons alone; and those that
        were given to parts of completions."""
        columns, dense = np.zeros((len(answers), len(self.names))), {}
        for place, values in self._signalled(windows, answers).items():
            columns[:, place] = values
        plain = [i for i in range(len(self.config.reward_funcs)) if i not in self.signals]
        if self.rewards is not None:
            scores = self._ask(self.rewards, windows, answers, step)
            columns[:, plain] = scores.rewards
            dense = {(i, plain[f]): value for (i, f), value in scores.dense.items()}
        elif not self.signals and self.config.environment is None:
            columns[:, 0] = _won(windows)
        if self.config.environment is not None:
            episodes = [c.episode for w in windows for c in w.completions]
            columns[:, -1] = np.array([e.reward for e in episodes if e is not None])
            notes = [e.failure for e in episodes if e is not None and e.failure]
            failed = torch.tensor(len(notes)), torch.tensor(len(answers))
            self.meter.add({"environment/failed": Mean(*failed)})
            for note in notes[:3]:
                self.report.say(f"step {step}: {note}")
        return columns, dense

    def _pay(self, window: Window, dense: dict[tuple[int, int], Dense]) -> None:
        """Sets what of the rewards stands at tokens, where all of them add up to the reward."""
        summed = self.config.reward_combination == "sum" and not self.config.win_rates
        if dense and not summed:
            raise UserError(
                f"--reward_combination: wanted sum, and no --win_rates, for "
                f"{self.names[min(dense)[1]]} gives rewards to parts of completions; got "
                f"{self.config.reward_combination}"
            )
        if not summed or not dense and window.episodes is None:
            return
        window.token_rewards = window.paid()
        for i, episode in enumerate(window.episodes or ()):
            window.token_rewards[i] += token_rewards(episode)
        for (i, place), value in dense.items():
            if i >= len(window.completions):
                continue  # of the others, which are not trained on
            completion = window.completions[i]
            if isinstance(value, Spans) and completion.episode is not None:
                raise UserError(
                    f"{self.names[place]}: wanted a number for each token, or one in all; got "
                    "Spans of the text of a conversation with an environment"
                )
            paid = on_tokens(value, completion.tokens, self.tokenizer)
            window.token_rewards[i] += self.weights[place] * paid

    def _signalled(self, windows: list[Window], answers: list) -> dict[int, np.ndarray]:
        """[S] of every signal of the policy, by its place."""
        found, bounds = {}, np.cumsum([0, *(len(w.completions) for w in windows)])
        for place, signal in self.signals.items():
            read = [
                signal.read(self.reader, window, answers[start:stop])
                for window, start, stop in zip(windows, bounds, bounds[1:], strict=False)
            ]
            found[place] = torch.cat(read).numpy()
        return found

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

    def _ask(self, feedback: Feedback, windows: list[Window], answers: list, step: int) -> Scores:
        prompts = [w.prompt_of(i) for w in windows for i in range(len(w.completions))]
        tokens = [c.tokens.tolist() for w in windows for c in w.completions]
        return self._told(feedback, prompts, answers, tokens, step)

    def _told(
        self,
        feedback: Feedback,
        prompts: list[Prompt],
        answers: list,
        tokens: list[list[int]],
        step: int,
        **more: list,
    ) -> Scores:
        """What the functions say; failures are counted, and the first of them told."""
        columns = {k: [p.columns.get(k) for p in prompts] for k in prompts[0].columns}
        scores = feedback(
            [p.prompt for p in prompts],
            answers,
            tokens,
            {**columns, **more},
            [p.where for p in prompts],
        )
        failed = torch.tensor(sum(scores.failures.values()))
        self.meter.add({f"{feedback.kind}s/failed": Mean(failed, torch.tensor(len(answers)))})
        for kind, times in scores.failures.items():
            self.report.say(f"step {step}: {feedback.kind}s: {times} {kind}")
        for note in scores.notes[:3]:
            self.report.say(f"step {step}: {note}")
        metrics = {k: torch.tensor([v]) for k, v in scores.metrics.items()}
        self.meter.add({k: v for k, v in metrics.items() if v.isfinite().all()})
        return scores

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
        learnt = rewards[own].view(len(window.prompts), -1)
        if self.config.reward_combination == "normalized_sum":  # z-scores have a mean of 0
            rewards = torch.from_numpy(combine(parts.numpy(), self.weights))
        lengths, groups = window.cu_seqlens.diff(), rewards[own].view(len(window.prompts), -1)
        whole = ~groups.isnan().any(1)
        values = {
            "reward": _mean(rewards, ~rewards.isnan() & own),
            "completions/mean_length": _mean(lengths, own),
            "completions/clipped_ratio": _mean(~window.finished, own),
        }
        if groups.shape[1] > 1:
            values["reward_std"] = _mean(groups.std(1, correction=0), whole)
            values["frac_reward_zero_std"] = _mean(learnt.amax(1) == learnt.amin(1), whole)
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


def _won(windows: list[Window]) -> np.ndarray:
    """[S]: how likely each completion beats one that it was compared with."""
    own, *others = windows
    assert own.wins is not None
    found = [win_rates(own.wins, not others)]
    found += [win_rates(1 - own.wins.mT, False) for _ in others]
    return torch.cat(found).numpy()


def _mean(x: Tensor, where: Tensor | None = None) -> Mean:
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    return Mean(torch.where(where, x.double(), 0.0).sum(), where.sum())


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
