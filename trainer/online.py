"""Online training: sample -> feedback -> learn, by the optimizer steps of offline training."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prefuse.kernels.objective import Mean

from . import objectives
from .batch import PackedBatch, pack
from .critic import ActorCritic, load_critic
from .data import Example, Sequence
from .dist import Ranks, start
from .errors import UserError
from .experience import Window
from .guards import naming_lost_ranks
from .held_out import HeldOut
from .judging import Functions, Judge, functions
from .learners import checks
from .learners.controls import Controls
from .learners.extragradient import Extragradient
from .learners.learner import Learner
from .learners.pairs import pairs
from .learners.policy import policy
from .learners.ppo import ppo, ppo_method
from .learners.raft import raft
from .loop import autocast, make_optimizer, train
from .model import load_tokenizer
from .offline import (
    begin,
    compile_layers,
    export_all,
    load_scorer,
    placed,
    prepare,
    resolve,
    train_and_held_out,
)
from .online_config import OnlineConfig, OnlineDPOConfig, PolicyConfig, PPOConfig, RAFTConfig
from .plan import measured
from .plan.work import uniform
from .prompts import Prompt, load_prompts
from .replay import Replay
from .report import Meter, Report, claim_folder
from .sampling import Sampler, play, sources
from .scores import Scorer, Unadapted
from .sharding import shard, sharding_of
from .window_state import dealt, fingerprint, read, written

Frozen = Scorer | Unadapted | None


class Models(NamedTuple):
    """Of a run; trained is what the optimizer steps: the policy, or it and its critics."""

    policy: Scorer
    trained: nn.Module
    reference: Frozen = None
    critic: nn.Module | None = None
    cost_critic: nn.Module | None = None


def run_online(config: OnlineConfig, name: str) -> None:
    """`prefuse grpo`, `rloo`, `online-dpo`, ...: one engine, other learners."""
    checks.check(config)
    ranks = start(config.ddp_timeout)
    with naming_lost_ranks(ranks, lambda: "before or after the steps"):
        _run(config, name, ranks)


def _run(config: OnlineConfig, name: str, ranks: Ranks) -> None:
    config = resolve(config, ranks)
    claim_folder(config, ranks)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    asked, talk = functions(config), play(config, tokenizer)
    prompts, held_out, ledgers = _prompts(config, tokenizer, asked)
    longest = [_longest(p, config) for p in prompts + held_out]
    config, scorer, note = _load(config, config.model_name_or_path, tokenizer, longest, ranks)
    report = begin(config, name, scorer, note, ranks)
    report.rows(ledgers)
    reference = None
    if checks.needs_reference(config):
        own = config.use_peft and config.ref_model_name_or_path is None
        given = (config, tokenizer, longest, ranks)
        reference = Unadapted(scorer) if own else _reference(*given)
    models = _sharded(config, scorer, reference, tokenizer, ranks)
    sampled_from = sources(config, scorer.model, models.reference, tokenizer, talk)
    controls = Controls()
    if isinstance(config, PolicyConfig):
        controls = Controls(config.beta, float(np.log(config.multiplier_init)))
    learner = _learner(config, models, controls, ranks)
    optimizer = make_optimizer(models.trained, config)
    ahead = getattr(config, "extragradient", False)
    between = Extragradient(models.policy, optimizer) if ahead else None
    sampler = Sampler(config, prompts, sampled_from, ranks, between)
    meter = Meter(ranks)
    judge = Judge(config, tokenizer, asked, ranks, report, meter, models.policy)
    schedule = OnlineSchedule(config, sampler, judge, learner, models, controls, ranks)
    evaluation = None
    if held_out:
        given = asked._replace(preference=None), ranks, report, Meter(ranks), models.policy
        own = Judge(config, tokenizer, *given, "eval_samples.jsonl")
        evaluation = HeldOut(config, held_out, sampled_from.own[0], own, models.policy, ranks)
    run = (config, learner.method, models.trained, optimizer, schedule, evaluation)
    try:
        train(*run, ranks, report, meter)
    finally:
        sampled_from.close()
    widest = max(e.n_tokens for e in longest), max(len(p.tokens) for p in prompts + held_out)
    if memory := measured.beside(config, ranks, lambda c: uniform(c, *widest)):
        report.say(memory)
    _export(config, models, tokenizer, ranks, report)


def _prompts(
    config: OnlineConfig, tokenizer, asked: Functions
) -> tuple[list[Prompt], list[Prompt], dict[str, Any]]:
    """To train on and to evaluate on, with what is read of them, and what became of the rows."""
    rows, others = train_and_held_out(config)
    prompts, ledger = load_prompts(rows, tokenizer, config.max_prompt_length)
    asked.check(prompts)
    if not others:
        return prompts, [], {"data": ledger}
    same = {} if config.eval_dataset_name else prompts[0].columns
    held_out, told = load_prompts(others, tokenizer, config.max_prompt_length, same)
    asked._replace(preference=None).check(held_out)
    return prompts, held_out, {"data": ledger, "held-out data": told}


def _export(config: OnlineConfig, models: Models, tokenizer, ranks: Ranks, report: Report) -> None:
    kept = {".": models.policy, "critic": models.critic, "cost_critic": models.cost_critic}
    kept = {name: model for name, model in kept.items() if model is not None}
    export_all(config, kept, tokenizer, ranks, report)


def _load(config: OnlineConfig, name: str, tokenizer, examples: list[Example], ranks: Ranks):
    """Demonstrations are learnt as they are; samples at the temperature they came from."""
    temperature = 1.0 if isinstance(config, RAFTConfig) else config.temperature
    return load_scorer(config, name, tokenizer, examples, ranks, temperature)


def _longest(prompt: Prompt, config: OnlineConfig) -> Example:
    """What a prompt may become, for the checks of lengths and vocabulary."""
    more = config.max_completion_length
    if config.environment is not None and config.max_episode_length is not None:
        more = max(more, config.max_episode_length - len(prompt.tokens))
    tokens = np.concatenate([prompt.tokens, np.zeros(more, dtype=np.int64)])
    return Example(prompt.index, (Sequence(tokens, np.arange(len(tokens)) > 0),), prompt.where)


def _reference(config: OnlineConfig, tokenizer, examples: list[Example], ranks: Ranks) -> Scorer:
    name = config.ref_model_name_or_path or config.model_name_or_path
    _, scorer, note = _load(config, name, tokenizer, examples, ranks)
    if scorer.layout != config.layout:
        raise UserError(f"--ref_model_name_or_path {name}: {note}; pass --layout padded")
    return scorer.requires_grad_(False)


def _sharded(
    config: OnlineConfig, scorer: Scorer, reference: Frozen, tokenizer, ranks: Ranks
) -> Models:
    """Over ranks, with the critics where there are any."""
    policy = placed(config, scorer, ranks)
    prepare(config, policy)
    if isinstance(reference, Scorer):
        reference = placed(config, reference, ranks, frozen=True)
        compile_layers(config, reference)
    if not isinstance(config, PPOConfig):
        return Models(policy, policy, reference)
    flags = ["critic_model_name_or_path"]
    flags += ["cost_critic_model_name_or_path"] if config.cost_funcs else []
    how = sharding_of(config, ranks)
    critics = [shard(load_critic(config, tokenizer, ranks, f), ranks, how) for f in flags]
    return Models(policy, ActorCritic(policy, *critics), reference, *critics)


def _learner(config: OnlineConfig, models: Models, controls: Controls, ranks: Ranks) -> Learner:
    """That of the configuration's command."""
    if isinstance(config, PPOConfig):
        learner = ppo(config, ppo_method(config, controls), controls, ranks.total)
    elif isinstance(config, PolicyConfig):
        learner = policy(config, controls, ranks.total)
    elif isinstance(config, OnlineDPOConfig):
        learner = pairs(config, _live(models.reference, config, ranks))
    else:
        assert isinstance(config, RAFTConfig)
        learner = raft(config)
    if config.sync_ref_model and isinstance(models.reference, Scorer):
        share, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        method = objectives.following(learner.method, models.policy, models.reference, share, every)
        learner = learner._replace(method=method)
    return learner


def _live(reference: Frozen, config: OnlineConfig, ranks: Ranks):
    """The reference as offline methods take it."""
    if reference is None:
        return None
    score = objectives.live_reference(reference)

    def autocast_score(batch: PackedBatch) -> Tensor:
        with autocast(config, ranks):
            return score(batch)

    return autocast_score


class OnlineSchedule:
    """The optimizer steps of a run that samples what they are made of.

    A window is num_mini_batches steps' completions, sampled together and passed over
    num_iterations times.
    """

    known_ahead = False

    def __init__(
        self,
        config: OnlineConfig,
        sampler: Sampler,
        judge: Judge,
        learner: Learner,
        models: Models,
        controls: Controls,
        ranks: Ranks,
    ):
        self.config, self.sampler, self.judge, self.learner = config, sampler, judge, learner
        self.models, self.controls, self.ranks = models, controls, ranks
        self.steps_per_window = config.num_mini_batches * config.num_iterations
        windows = len(sampler.prompts) / (sampler.size * ranks.world)
        self.steps_per_epoch = windows * self.steps_per_window
        self.total_steps = config.max_steps
        if config.max_steps <= 0:
            self.total_steps = max(1, round(config.num_train_epochs * self.steps_per_epoch))
        least = config.replay_success if isinstance(config, PolicyConfig) else None
        self.replay = None if least is None else Replay(least, ranks)
        self.window: Window | None = None
        self.fresh: Window | None = None  # the same as it was before the learner read it
        self.batches: list[list[Example]] = []

    def resumable(self, done: int) -> bool:
        """Of an extragradient update both halves: the second begins where the first began, with
        weights that no checkpoint holds."""
        return self.sampler.between is None or done % (2 * self.steps_per_window) == 0

    def rows(self) -> dict[str, Any]:
        prompts, config = self.sampler.prompts, self.config
        return {
            "rows": len(prompts),
            "sha256": fingerprint(prompts),
            "seed": config.seed if config.shuffle_dataset else None,
            "prompts of a window": self.sampler.size * self.ranks.world,
            "steps of a window": self.steps_per_window,
        }

    def state(self) -> dict[str, Any]:
        stored = self.replay.stored if self.replay else {}
        return {"windows": self.sampler.drawn, "replay": stored, **self.controls.state()}

    def own(self, done: int) -> dict[str, Any]:
        """The window that steps are left of."""
        left = self.fresh is not None and done % self.steps_per_window
        return {"window": written(self.fresh) if left and self.fresh else None}

    def restore(self, done: int, state: dict[str, Any], owned: list[dict[str, Any]]) -> None:
        self.sampler.drawn = state["windows"]
        if self.replay:
            self.replay.stored = state["replay"]
        for name in self.controls.state():
            setattr(self.controls, name, state[name])
        iteration, part = divmod(done % self.steps_per_window, self.config.num_mini_batches)
        if not iteration and not part:
            return
        rows = self.config.per_device_train_batch_size
        windows = [read(own["window"], self.sampler.prompts, rows) for own in owned]
        if len(windows) > 1 or len(windows[0].prompts) != self.sampler.size:
            windows = [dealt(windows, self.config.num_mini_batches, self.ranks)]
        self.window = windows[0]
        self.fresh = self.window.copy()
        for passed in range(iteration + bool(part)):  # what the learner left in it
            self.batches = self.learner.batches(self.window, passed)

    def step(self, step: int) -> list[list[Example]]:
        """This rank's micro-batches of optimizer step `step`."""
        place = step % self.steps_per_window
        iteration, part = divmod(place, self.config.num_mini_batches)
        if place == 0:
            self.window = self._collect(step + 1)
            self.fresh = self.window.copy()
        if part == 0:
            assert self.window is not None
            self.batches = self.learner.batches(self.window, iteration)
            learnt = sum(len(e.sequences) for batch in self.batches for e in batch)
            share = Mean(torch.tensor(learnt), torch.tensor(len(self.window.completions)))
            self.judge.meter.add({"completions/trained_on": share})
        size = self.config.gradient_accumulation_steps
        return self.batches[part * size : (part + 1) * size]

    def _collect(self, step: int) -> Window:
        """A window, judged, with what the learner reads of its tokens."""
        self.models.trained.eval()
        window = self._judged(step)
        if isinstance(self.config, PolicyConfig) and self.config.refill:
            window = self._refilled(window, step, self.config.refill)
        logps = [torch.from_numpy(c.logp) for c in window.completions]
        window.set("rollout_logp", torch.cat([*logps, torch.zeros(0)]))
        self._score(window)
        if isinstance(self.config, PolicyConfig):
            self.judge.meter.add(self.controls.adjust(self.config, window, self.ranks))
        self.models.trained.train()
        return window

    def _refilled(self, window: Window, step: int, most: int) -> Window:
        """DAPO's dynamic sampling, arXiv:2503.14476: prompts whose rewards differ, as far as `most`
        more samplings find them, then others."""
        times, size = 0, self.sampler.size
        while times < most and self.ranks.any(int(window.informative().sum()) < size):
            window, times = window.joined(self._judged(step)), times + 1
        self.judge.meter.add({"sampling/refills": torch.tensor([float(times)])})
        order = np.argsort(~window.informative(), kind="stable")[:size]
        return window.taken(sorted(order.tolist()))

    def _judged(self, step: int) -> Window:
        window = self.sampler.sample(self.models.policy.model)
        self.judge.judge(window, step)
        if self.replay:
            self.judge.meter.add(self.replay(window))
        return window

    @torch.no_grad()
    def _score(self, window: Window) -> None:
        """Log-probs of all sampled tokens, a critic's values."""
        names = self.learner.scores
        readers = {
            "old_logp": self.models.policy,
            "ref_logp": self.models.reference,
            "values": self.models.critic,
            "cost_values": self.models.cost_critic,
        }
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for rows in window.micro_batches(every=True) if names else ():
            batch = pack(rows, self.config.layout == "shared").to(self.ranks.device)
            for name in names:
                model = readers[name]
                assert model is not None
                with autocast(self.config, self.ranks):
                    found = model(batch)
                parts[name].append(found if isinstance(found, Tensor) else found.logp)
        for name, tensors in parts.items():
            window.set(name, torch.cat(tensors))
