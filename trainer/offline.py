"""Offline training: load, check, score, train, export."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import activations, checkpoint, lora, objectives
from .batch import pack
from .config import DPOConfig, OfflineConfig, SFTConfig, TrainConfig, updated
from .critic import ActorCritic
from .data import Example, pair_examples, sft_examples
from .dist import Ranks, start
from .errors import UserError
from .guards import naming_lost_ranks
from .loop import autocast, evaluate, make_optimizer, train
from .model import can_share_prefixes, check_vocabulary, export, load_model, load_tokenizer
from .objectives import Method, Reference
from .plan import measured
from .plan.work import largest
from .reference_cache import ReferenceCache, identity_of
from .report import Meter, Report, claim_folder
from .resume import same_rows
from .reward_model import RewardScorer, probe_scores
from .rows import Row, load_rows
from .schedule import Schedule, share_out
from .scores import Scorer, Unadapted, probe
from .sharding import decoder_layers, reshard, shard, sharding_of
from .weights import stored, write


def run_sft(config: SFTConfig, go=None) -> None:
    """`prefuse sft`; go: in place of `run`, with its arguments."""

    def tokenize(rows, tokenizer):
        return sft_examples(
            rows,
            tokenizer,
            config.max_length,
            config.completion_only_loss,
            config.assistant_only_loss,
        )

    (go or run)(config, "sft", tokenize, lambda *_: objectives.sft())


def run_dpo(config: DPOConfig, go=None) -> None:
    """`prefuse dpo`; go: in place of `run`, with its arguments."""
    needed = objectives.needs_reference(config.loss_type)
    if config.sync_ref_model and not needed:
        raise UserError(f"--sync_ref_model: {config.loss_type} has no reference to move")

    def tokenize(rows, tokenizer):
        judged = objectives.judged_columns(config.loss_type)
        identical = objectives.learns_from_identical(config.loss_type, config.hyperparameters)
        return pair_examples(rows, tokenizer, config.max_length, judged, identical)

    def method(config: DPOConfig, scorer, examples, ranks, report) -> Method:
        if not needed:
            return objectives.dpo(None, config.loss_type, config.hyperparameters)
        return referenced(
            config,
            scorer,
            examples,
            ranks,
            report,
            lambda ref: objectives.dpo(ref, config.loss_type, config.hyperparameters),
        )

    (go or run)(config, "dpo", tokenize, method)


def referenced(
    config: OfflineConfig, scorer: Scorer, examples: list[Example], ranks: Ranks, report, make
) -> Method:
    """The method that `make` makes of a reference, which moves if the user asks for it."""
    reference, model = _reference(config, scorer, examples, ranks, report)
    method = make(reference)
    if config.sync_ref_model:
        assert isinstance(model, Scorer)
        share, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        method = objectives.following(method, scorer, model, share, every)
    return method


def run(config: TrainConfig, name: str, tokenize, make_method, load=None, beside=None) -> None:
    """beside: loads a critic that is trained with the policy, for methods that have one."""
    ranks = start(config.ddp_timeout)
    with naming_lost_ranks(ranks, lambda: "before or after the steps"):
        _run(config, name, tokenize, make_method, load, beside, ranks)


def _run(config: TrainConfig, name: str, tokenize, make_method, load, beside, ranks: Ranks) -> None:
    config = resolve(config, ranks)
    claim_folder(config, ranks)
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    train_rows, eval_rows = train_and_held_out(config)
    examples, ledger = tokenize(train_rows, tokenizer)
    ledgers = {"data": ledger}
    held_out: list[Example] = []
    if eval_rows:
        held_out, ledgers["held-out data"] = tokenize(eval_rows, tokenizer)
        held_out = [replace(e, index=e.index + len(examples)) for e in held_out]
    config, scorer, note = (load or load_scorer)(
        config, config.model_name_or_path, tokenizer, examples + held_out, ranks
    )
    report = begin(config, name, scorer, note, ranks)
    report.say(f"head: {scorer.plan(ranks.device)}")
    report.rows(ledgers)
    scorer = placed(config, scorer, ranks)
    method = make_method(config, scorer, examples + held_out, ranks, report)
    prepare(config, scorer)
    trained, kept = scorer, {".": scorer}
    if beside is not None:
        critic = beside(config, tokenizer, ranks)
        kept["critic"] = shard(critic, ranks, sharding_of(config, ranks))
        trained = ActorCritic(scorer, kept["critic"])
    schedule = Schedule(examples, config, ranks)
    optimizer = make_optimizer(trained, config)
    evaluation = partial(evaluate, config, method, trained, held_out, ranks) if held_out else None
    train(config, method, trained, optimizer, schedule, evaluation, ranks, report, Meter(ranks))
    if memory := measured.beside(config, ranks, partial(largest, examples, ranks)):
        report.say(memory)
    export_all(config, kept, tokenizer, ranks, report)


def begin(config, name: str, scorer, note: str | None, ranks: Ranks) -> Report:
    """Puts adapters into the model, and begins the report with what became of it."""
    adapters = lora.attach(config, scorer.model)
    report = Report(config, name, ranks)
    report.say(note or f"layout: {config.layout}")
    if why := getattr(scorer.model, "whole_because", None):
        report.say(f"weights: every rank loads them whole before it keeps its shard: {why}")
    if adapters:
        report.say(adapters)
    return report


def placed(config, scorer: Any, ranks: Ranks, frozen: bool = False) -> Any:
    """In shards, on the ranks' devices, after the probe."""
    how = sharding_of(config, ranks)
    scorer = shard(scorer, ranks, how, frozen)
    exact = config.dtype == "float32" and (ranks.world == 1 or how.param_dtype is None)
    check: Any = probe_scores if isinstance(scorer, RewardScorer) else probe
    check(scorer, ranks.device, tolerance=1e-3 if exact else 0.2)
    if config.bf16 and exact:  # whose attention is another kernel on a GPU
        with autocast(config, ranks):
            check(scorer, ranks.device, tolerance=0.5)  # the model's own logits are rounded
    reshard(scorer)
    return scorer


def export_all(config: TrainConfig, kept: dict[str, Any], tokenizer, ranks: Ranks, report) -> None:
    """Each model, or its adapters, where `from_pretrained` loads it, by its place in the run's
    folder."""
    for name, module in kept.items():
        model, place = module.model, Path(config.output_dir, name)
        merges = config.merge_on_export
        if stored(model) is not None and (merges or not lora.has_adapters(model)):
            if ranks.is_main:
                export(lora.plain(model) if merges else model, None, tokenizer, place)
            write(model, place if ranks.is_main else None)
        else:
            state = checkpoint.full_state(module, ranks, frozen=merges)
            if ranks.is_main:
                if merges:
                    assert state is not None
                    model, state = lora.plain(model), dict(lora.merged(model, state))
                export(model, state, tokenizer, place)
        report.say(f"exported {place}")
    ranks.barrier()


def resolve(config, ranks: Ranks):
    """Settings that depend on the machine."""
    if config.bf16 is None:
        on_gpu = ranks.device.type == "cuda" and torch.cuda.is_bf16_supported()
        config = updated(config, bf16=on_gpu)
    return same_rows(config, ranks)


def train_and_held_out(config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows."""
    rows = load_rows(config.dataset_name, config.dataset_train_split, config.dataset_config)
    if config.eval_dataset_name:
        return rows, load_rows(config.eval_dataset_name, "test", config.dataset_config)
    held = round(config.eval_fraction * len(rows))
    if config.eval_fraction and not 0 < held < len(rows):
        raise UserError(
            f"--eval_fraction: wanted a share that leaves rows on both sides; got {held} of "
            f"{len(rows)} rows held out"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    chosen = set(order[:held])
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in order[:held]]


def load_scorer(config, name: str, tokenizer, examples, ranks: Ranks, temperature: float = 1.0):
    """The model, to be `placed`; and what the user should know of its layout."""
    budget = None if config.head_budget_mb is None else config.head_budget_mb << 20
    options = dict(dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code)
    options["in_shards"] = ranks.world > 1
    model = load_model(name, layout=config.layout, **options)
    check_vocabulary(model, tokenizer, examples, name)
    longest = max(len(s.tokens) for e in examples for s in e.sequences)
    obstacle = None if config.layout == "padded" else can_share_prefixes(model, longest)
    note = None
    if obstacle:
        note = f"layout: padded, because the model has {obstacle}"
        config = updated(config, layout="padded")
        model = load_model(name, layout="padded", **options)
    return config, Scorer(model, config.layout, budget, temperature).eval(), note


def prepare(config, scorer: Scorer) -> None:
    """Memory and speed options of the model that is trained."""
    if config.gradient_checkpointing:
        activations.checkpoint(scorer.model, config.gradient_checkpointing_policy)
    if config.torch_compile:
        activations.budget(config.activation_memory_budget)
    compile_layers(config, scorer)


def compile_layers(config, scorer) -> None:
    """For any number of tokens at once: it is another in every batch."""
    if config.torch_compile:
        for layer in decoder_layers(scorer):
            layer.compile(dynamic=True)


def _reference(
    config: OfflineConfig, policy: Scorer, examples: list[Example], ranks: Ranks, report
) -> tuple[Reference, Scorer | Unadapted | None]:
    """pi_ref: a model kept beside the policy, or its scores of the data; and that model."""
    name = config.ref_model_name_or_path or config.model_name_or_path
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    missing, cache = examples, None
    if config.ref_log_probs_cache:
        compute = f"{config.dtype}, autocast {'bfloat16' if config.bf16 else 'off'}"
        identity = identity_of(name, tokenizer, compute) if ranks.is_main else {}
        given = Path(config.ref_log_probs_cache), ranks.gather(identity)[0]
        for turn in (True, False):  # one rank makes the folder; all have read it before any writes
            if ranks.is_main == turn:
                cache = ReferenceCache(*given)
            ranks.barrier()
        assert cache is not None
        missing = _missing(cache, examples, ranks)
        report.say(f"reference: {len(examples) - len(missing)} of {len(examples)} rows remembered")
    scorer = None
    if missing or cache is None:
        own = config.use_peft and config.ref_model_name_or_path is None
        given = (config, name, tokenizer, examples, ranks)
        scorer = Unadapted(policy) if own else _frozen(*given)
    if not config.precomputes:
        assert scorer is not None
        return _autocast(config, ranks, objectives.live_reference(scorer)), scorer
    table = _totals(config, scorer, missing, cache, examples, ranks, report)
    return objectives.cached_reference(table), scorer


def _missing(cache: ReferenceCache, examples: list[Example], ranks: Ranks) -> list[Example]:
    """Those that some rank has not read: nodes may have folders of their own, and another run may
    write to one as it is read."""
    own = [i for i, e in enumerate(examples) if not all(s in cache for s in e.sequences)]
    anywhere = {i for found in ranks.gather(own) for i in found}
    return [e for i, e in enumerate(examples) if i in anywhere]


def _frozen(config: OfflineConfig, name: str, tokenizer, examples, ranks: Ranks) -> Scorer:
    _, scorer, note = load_scorer(config, name, tokenizer, examples, ranks)
    if scorer.layout != config.layout:
        raise UserError(f"--ref_model_name_or_path {name}: {note}; pass --layout padded")
    scorer = placed(config, scorer.requires_grad_(False), ranks, frozen=True)
    compile_layers(config, scorer)
    return scorer


def _autocast(config, ranks: Ranks, score: Reference) -> Reference:
    def autocast_score(batch):
        with autocast(config, ranks):
            return score(batch)

    return autocast_score


@torch.no_grad()
def _totals(
    config: OfflineConfig,
    scorer: Scorer | Unadapted | None,
    missing: list[Example],
    cache: ReferenceCache | None,
    examples: list[Example],
    ranks: Ranks,
    report,
) -> Tensor:
    """Reference log-probs [E, sequences] of all examples: those missing, each scored on one rank,
    and those of the cache."""
    size, places = config.per_device_eval_batch_size, {e.index: i for i, e in enumerate(examples)}
    order = sorted(missing, key=lambda e: e.n_tokens)
    mine = share_out([order[k : k + size] for k in range(0, len(order), size)], ranks)
    table = torch.zeros(len(examples), len(examples[0].sequences), dtype=torch.float64)
    with report.progress(config.disable_tqdm) as progress:
        bar = progress.add_task("reference", total=len(mine), status="")
        for rows in mine:
            assert scorer is not None
            batch = pack(rows, config.layout == "shared").to(ranks.device)
            with autocast(config, ranks):
                logp = scorer(batch).logp.cpu()
            parts = iter(logp.split(batch.score_cu_seqlens.diff().tolist()))
            for example in rows:
                for k, sequence in enumerate(example.sequences):
                    part, place = next(parts), (places[example.index], k)
                    if cache is None:
                        table[place] = part.double().sum()
                    else:
                        cache.add(sequence, part.numpy())
                        table[place] = cache.total(sequence)
            progress.advance(bar)
    table = ranks.total(table)
    if cache is not None:
        cache.flush()
        scored = {e.index for e in missing}
        for example in (e for e in examples if e.index not in scored):
            totals = [cache.total(sequence) for sequence in example.sequences]
            table[places[example.index]] = torch.tensor(totals, dtype=torch.float64)
    return table.float().to(ranks.device)
