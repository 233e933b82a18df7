"""Online training: sample -> feedback -> learn, by the optimizer steps of offline training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefuse.kernels.objective import Mean

from . import checkpoint, learners, objectives
from .batch import PackedBatch, pack
from .data import Example, Sequence
from .dist import Ranks, shard, start
from .errors import UserError
from .experience import Window
from .loop import autocast, train
from .model import export, load_tokenizer
from .offline import load_scorer, prepare, resolve
from .online_config import OnlineConfig, PPOConfig, RAFTConfig
from .ppo import ActorCritic, load_critic, ppo, ppo_method
from .prompts import Prompt, load_prompts
from .report import Meter, Report, claim_folder
from .rewards import Feedback, combine
from .rollout import Engine, Sampling, make_engine
from .rows import load_rows
from .scores import Scorer


def run_online(config: OnlineConfig, name: str) -> None:
    """`prefuse grpo`, `rloo`, `reinforce`, `online-dpo`, `raft`: one engine, other learners."""
    learners.check(config)
    ranks = start()
    config = resolve(config, ranks)
    claim_folder(config, ranks)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    feedback = Feedback(
        config.reward_funcs,
        config.reward_weights,
        on_failure=config.reward_failure,
        timeout=config.reward_timeout,
    )
    rows = load_rows(config.dataset_name, config.dataset_train_split, config.dataset_config)
    prompts, ledger = load_prompts(rows, tokenizer, config.max_prompt_length)
    longest = [_longest(p, config.max_completion_length) for p in prompts]
    # demonstrations are learnt as they are; a policy's samples at the temperature they came from
    temperature = 1.0 if isinstance(config, RAFTConfig) else config.temperature
    config, scorer, note = load_scorer(
        config, config.model_name_or_path, tokenizer, longest, ranks, temperature
    )
    report = Report(config, name, ranks)
    report.say(note or f"layout: {config.layout}")
    report.rows({"data": ledger})
    reference = _reference(config, tokenizer, longest, ranks, temperature)
    engine = make_engine(config.engine, scorer.model, tokenizer)
    prepare(config, scorer)
    scorer = shard(scorer, ranks)
    trained: nn.Module = scorer
    readers: dict[str, Any] = {"old_logp": scorer, "ref_logp": reference}
    if isinstance(config, PPOConfig):
        critic = shard(load_critic(config, tokenizer).to(ranks.device), ranks)
        trained, readers["values"] = ActorCritic(scorer, critic), critic
        learner = ppo(config, ppo_method(config), ranks.total)
    else:
        learner = learners.learner(config, scorer, reference, _live(reference, config, ranks))
    meter = Meter(ranks)
    sampler = Sampler(config, prompts, tokenizer, engine, ranks)
    judge = Judge(config, tokenizer, feedback, ranks, report, meter)
    schedule = OnlineSchedule(config, sampler, judge, learner, scorer, readers, ranks)
    try:
        train(config, learner.method, trained, schedule, [], ranks, report, meter)
    finally:
        engine.close()
    folder = Path(config.output_dir)
    kept = {folder: scorer} | ({folder / "critic": readers["values"]} if trained != scorer else {})
    for place, module in kept.items():
        state = checkpoint.full_state(module, ranks)
        if ranks.is_main:
            export(module.model, state, tokenizer, place)
            report.say(f"exported {place}")
    ranks.barrier()


def _longest(prompt: Prompt, completion: int) -> Example:
    """What a prompt may become, for the checks of lengths and vocabulary."""
    tokens = np.concatenate([prompt.tokens, np.zeros(completion, dtype=np.int64)])
    return Example(prompt.index, (Sequence(tokens, np.arange(len(tokens)) > 0),), prompt.where)


def _reference(
    config: OnlineConfig, tokenizer, examples: list[Example], ranks: Ranks, temperature: float
) -> Scorer | None:
    if not learners.needs_reference(config):
        return None
    name = config.ref_model_name_or_path or config.model_name_or_path
    _, scorer, note = load_scorer(config, name, tokenizer, examples, ranks, temperature)
    if scorer.layout != config.layout:
        raise UserError(f"--ref_model_name_or_path {name}: {note}; pass --layout padded")
    return shard(scorer.requires_grad_(False), ranks, frozen=True)


def _live(reference: Scorer | None, config: OnlineConfig, ranks: Ranks):
    """The reference as offline methods take it."""
    if reference is None:
        return None
    score = objectives.live_reference(reference)

    def autocast_score(batch: PackedBatch) -> Tensor:
        with autocast(config, ranks):
            return score(batch)

    return autocast_score


class Sampler:
    """Completions of prompts. Prompts come in a new order every epoch; what is sampled for one
    depends on the seed, the epoch and the weights alone, not on ranks or an interruption."""

    def __init__(
        self, config: OnlineConfig, prompts: list[Prompt], tokenizer, engine: Engine, ranks: Ranks
    ):
        self.config, self.prompts, self.engine, self.ranks = config, prompts, engine, ranks
        completions = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.size = completions * config.num_mini_batches // config.num_generations
        self.sampling = Sampling(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            eos_token_ids=(tokenizer.eos_token_id,),
        )

    def sample(self, number: int, model) -> Window:
        """This rank's part of window `number`, by the weights as they are."""
        first = (number * self.ranks.world + self.ranks.rank) * self.size
        chosen, seeds = [], []
        for place in range(first, first + self.size):
            epoch, at = divmod(place, len(self.prompts))
            prompt = self.prompts[self._order(epoch)[at]]
            key = f"{self.config.seed} {epoch} {prompt.index}".encode()
            chosen.append(prompt)
            seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        self.engine.update_weights(model)
        each, tokens = self.config.num_generations, [p.tokens for p in chosen]
        groups = self.engine.generate(tokens, each, self.sampling, seeds)
        completions = [completion for group in groups for completion in group]
        window = Window(chosen, completions, each, self.config.per_device_train_batch_size, number)
        logps = [torch.from_numpy(c.logp) for c in completions]
        window.set("rollout_logp", torch.cat([*logps, torch.zeros(0)]))
        return window

    def _order(self, epoch: int) -> list[int]:
        if not self.config.shuffle_dataset:
            return list(range(len(self.prompts)))
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()


class Judge:
    """Rewards of a window's completions, what is left out, and what the log tells of both."""

    def __init__(
        self,
        config: OnlineConfig,
        tokenizer,
        feedback: Feedback,
        ranks: Ranks,
        report: Report,
        meter: Meter,
    ):
        self.config, self.tokenizer, self.feedback = config, tokenizer, feedback
        self.ranks, self.report, self.meter = ranks, report, meter

    def judge(self, window: Window, step: int) -> learners.Judged:
        count = len(window.completions)
        answers = [self._answer(window, i) for i in range(count)]
        prompts = [window.prompt_of(i) for i in range(count)]
        scores = self.feedback(
            [p.prompt for p in prompts],
            answers,
            [c.tokens.tolist() for c in window.completions],
            {k: [p.columns.get(k) for p in prompts] for k in prompts[0].columns},
            [p.where for p in prompts],
        )
        rewards = torch.from_numpy(combine(scores.rewards, self.feedback.weights))
        each = torch.from_numpy(scores.rewards)
        finished = np.array([c.finished for c in window.completions])
        window.kept &= ~rewards.isnan().numpy()
        if self.config.mask_truncated_completions:
            window.kept &= finished
        self._measure(window, rewards, each, torch.from_numpy(finished))
        failed = torch.tensor(sum(scores.failures.values()))
        self.meter.add({"rewards/failed": Mean(failed, torch.tensor(count))})
        for kind, times in scores.failures.items():
            self.report.say(f"step {step}: rewards: {times} {kind}")
        self._write_samples(window, answers, rewards, each, step)
        return learners.judged_by(
            window, self.config, each, rewards, self.feedback.weights, self.ranks.total
        )

    def _answer(self, window: Window, i: int) -> Any:
        """A completion as rewards read it: text, or a message after messages."""
        tokens = window.completions[i].tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        is_text = isinstance(window.prompt_of(i).prompt, str)
        return text if is_text else [{"role": "assistant", "content": text}]

    def _measure(self, window: Window, rewards: Tensor, each: Tensor, finished: Tensor) -> None:
        lengths, groups = window.cu_seqlens.diff(), rewards.view(-1, window.each)
        whole = ~groups.isnan().any(1)
        values = {
            "reward": _mean(rewards, ~rewards.isnan()),
            "reward_std": _mean(groups.std(1, correction=0), whole),
            "frac_reward_zero_std": _mean(groups.amax(1) == groups.amin(1), whole),
            "completions/mean_length": _mean(lengths),
            "completions/clipped_ratio": _mean(~finished),
            "completions/trained_on": _mean(torch.from_numpy(window.kept)),
        }
        for k, name in enumerate(self.feedback.names):
            values[f"rewards/{name}/mean"] = _mean(each[:, k], ~each[:, k].isnan())
        self.meter.add(values)

    def _write_samples(self, window: Window, answers, rewards, each, step: int) -> None:
        """A few completions of every window to samples.jsonl."""
        if not self.ranks.is_main:
            return
        with (Path(self.config.output_dir) / "samples.jsonl").open("a") as file:
            for i in range(min(self.config.log_completions, len(answers))):
                parts = dict(zip(self.feedback.names, each[i].tolist(), strict=True))
                row = {
                    "step": step,
                    "prompt": window.prompt_of(i).prompt,
                    "completion": answers[i],
                    "reward": _or_none(float(rewards[i])),
                    "rewards": {name: _or_none(value) for name, value in parts.items()},
                }
                file.write(json.dumps(row) + "\n")


def _mean(x: Tensor, where: Tensor | None = None) -> Mean:
    where = torch.ones_like(x, dtype=torch.bool) if where is None else where
    return Mean(torch.where(where, x.double(), 0.0).sum(), where.sum())


def _or_none(value: float) -> float | None:
    return None if value != value else value


class OnlineSchedule:
    """The optimizer steps of a run that samples what they are made of.

    A window is num_mini_batches steps' completions, sampled together and passed over
    num_iterations times.
    """

    def __init__(
        self,
        config: OnlineConfig,
        sampler: Sampler,
        judge: Judge,
        learner: learners.Learner,
        scorer: Scorer,
        readers: dict[str, Any],
        ranks: Ranks,
    ):
        self.config, self.sampler, self.judge, self.learner = config, sampler, judge, learner
        self.scorer, self.readers, self.ranks = scorer, readers, ranks
        self.steps_per_window = config.num_mini_batches * config.num_iterations
        windows = len(sampler.prompts) / (sampler.size * ranks.world)
        self.steps_per_epoch = max(1, round(windows * self.steps_per_window))
        self.total_steps = config.max_steps
        if config.max_steps <= 0:
            self.total_steps = max(1, round(config.num_train_epochs * self.steps_per_epoch))
        self.batches: list[list[Example]] = []

    def resumable(self, done: int) -> bool:
        """Whether nothing of a window is left over, which a checkpoint would not hold."""
        return done % self.steps_per_window == 0

    def step(self, step: int) -> list[list[Example]]:
        """This rank's micro-batches of optimizer step `step`."""
        number, place = divmod(step, self.steps_per_window)
        if place == 0:
            self.batches = self._collect(number)
        size = self.config.gradient_accumulation_steps
        first = place % self.config.num_mini_batches * size
        return self.batches[first : first + size]

    def _collect(self, number: int) -> list[list[Example]]:
        self.scorer.eval()
        window = self.sampler.sample(number, self.scorer.model)
        self._score(window)
        judged = self.judge.judge(window, number * self.steps_per_window + 1)
        batches = self.learner.batches(window, judged)
        self.scorer.train()
        return batches

    @torch.no_grad()
    def _score(self, window: Window) -> None:
        """What the learner reads of all sampled tokens: log-probs, a critic's values."""
        names = self.learner.scores
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for rows in window.micro_batches() if names else ():
            batch = pack(rows, self.config.layout == "shared").to(self.ranks.device)
            for name in names:
                with autocast(self.config, self.ranks):
                    found = self.readers[name](batch)
                parts[name].append(found if name == "values" else found.logp)
        for name, tensors in parts.items():
            window.set(name, torch.cat(tensors))
