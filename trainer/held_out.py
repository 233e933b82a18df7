"""Rewards of completions of held-out prompts, as training goes on."""

from __future__ import annotations

import time

from .dist import Ranks
from .experience import Window
from .judging import Judge
from .online_config import OnlineConfig
from .prompts import Prompt
from .sampling import Source, seed_of
from .scores import Scorer


class HeldOut:
    """Samples as training does, with the same seeds every time: what differs between two
    evaluations is the policy."""

    def __init__(
        self,
        config: OnlineConfig,
        prompts: list[Prompt],
        source: Source,
        judge: Judge,
        policy: Scorer,
        ranks: Ranks,
    ):
        self.config, self.source, self.judge, self.policy = config, source, judge, policy
        self.prompts = prompts[ranks.rank :: ranks.world]

    def __call__(self, step: int) -> dict[str, float]:
        started, each = time.perf_counter(), self.config.num_generations_eval
        self.policy.eval()
        self.source.engine.update_weights(self.policy.model)
        seeds = [seed_of(self.config.seed, "held out", prompt) for prompt in self.prompts]
        groups = self.source._replace(count=each).sample(self.prompts, seeds)
        self.policy.train()
        completions = [completion for group in groups for completion in group]
        self.judge.judge(Window(self.prompts, completions, each, each), step)
        values = self.judge.meter.read()
        self.judge.meter.clear()
        names = ("reward", "cost", "completions/")
        told = {f"eval_{k}": v for k, v in values.items() if k.startswith(names)}
        return {**told, "eval_runtime": time.perf_counter() - started}
