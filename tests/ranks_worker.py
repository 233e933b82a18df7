"""What every rank of tests/test_ranks.py runs; rank 0 writes what it found to argv[1]."""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  finds prefuse in a clone that was never installed
import torch
from tiny import gradients, in_float64, ragged_pairs, scorer_of, tiny_model

from prefuse.trainer import checkpoint, loop, objectives
from prefuse.trainer.cli import main
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.data import Example
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback.self_signals import Reader
from prefuse.trainer.report import Meter, Report, claim_folder
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.sharding import FULL, Sharding, shard

ROWS_PER_STEP, STEPS = 8, 5
# 13 rows: every second step has 5, so that of 4 ranks with 2 rows each one has nothing
PAIRS = ragged_pairs(13)
SINGLES = [replace(e, sequences=e.sequences[:1]) for e in PAIRS]
# (method, tied embeddings): the reference is a second, sharded model
METHODS = {"sft": ("sft", True), "dpo": ("sigmoid", False)}
SHARDINGS = {
    "gathered head": Sharding(shard_head=False),
    "hsdp": Sharding("hsdp", group_size=2),
    "copies": Sharding("none"),
    "kept": Sharding(reshard_after_forward=False),
    "offloaded": Sharding(cpu_offload=True),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def examples_of(method: str) -> list[Example]:
    return SINGLES if method == "sft" else PAIRS


def splits(world: int) -> dict[str, dict]:
    """The ways to lay the rows of a step out over micro-batches of `world` ranks."""
    share = ROWS_PER_STEP // world
    found = {}
    for accumulation in (1, 2, 4):
        if share % accumulation == 0:
            rows = share // accumulation
            found[f"{rows}x{accumulation}"] = dict(
                per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation
            )
    found["repacked"] = dict(
        per_device_train_batch_size=share,
        gradient_accumulation_steps=1,
        max_tokens_per_micro_batch=max(e.n_tokens for e in PAIRS) + 1,
    )
    return found


def config_of(folder: Path, **changes) -> DPOConfig:
    settings = dict(
        model_name_or_path="tiny",
        dataset_name="rows",
        output_dir=str(folder),
        max_steps=STEPS,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=0,
        disable_tqdm=True,
        bf16=False,
    )
    return DPOConfig(**settings | changes)


def shardings(world: int) -> dict[str, Sharding]:
    """Groups of two want four ranks; the others are as well seen on two."""
    names = {2: ("gathered head", "kept", "offloaded"), 4: ("hsdp", "copies")}.get(world, ())
    return {name: SHARDINGS[name] for name in names}


def models_of(method: str, dtype: torch.dtype, ranks: Ranks, moving: bool = False, how=FULL):
    """The sharded policy and the method it is trained by; moving: its reference is."""
    loss, tie = METHODS[method]
    made = [tiny_model(tie=tie, seed=seed) for seed in (0, 1)]
    if dtype == torch.float64:
        made = [in_float64(m) for m in made]
    scorer, frozen = (shard(scorer_of(m), ranks, how, k == 1) for k, m in enumerate(made))
    if loss == "sft":
        return scorer, objectives.sft()
    reference = objectives.live_reference(frozen.requires_grad_(False))
    found = objectives.dpo(reference, loss, {})
    return scorer, objectives.following(found, scorer, frozen, 0.5, 2) if moving else found


def parameters(scorer) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in scorer.named_parameters():
        whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        found[name] = whole.double().clone()
    return found


class Losses(Report):
    """A report that remembers its metrics instead of writing them."""

    def __init__(self, config, ranks: Ranks):
        super().__init__(config, "test", ranks)
        self.console.quiet = True
        self.seen: list[dict] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.seen.append(values)


def train(method: str, config, scorer, objective, ranks: Ranks, held_out=()) -> list[dict]:
    report = Losses(config, ranks)
    examples = examples_of(method)
    schedule = Schedule(examples, config, ranks)
    optimizer = loop.make_optimizer(scorer, config)
    evaluation = None
    if held_out:
        evaluation = partial(loop.evaluate, config, objective, scorer, list(held_out), ranks)
    run = (config, objective, scorer, optimizer, schedule, evaluation)
    loop.train(*run, ranks, report, Meter(ranks))
    return report.seen


def gradient_and_training(
    folder: Path, method: str, dtype: str, split: dict, ranks: Ranks, how: Sharding = FULL
):
    """The gradient of the step with 5 rows, then the parameters after 5 steps of SGD."""
    config = config_of(folder, **split)
    scorer, objective = models_of(method, DTYPES[dtype], ranks, how=how)
    schedule = Schedule(examples_of(method), config, ranks)
    loop.backward(config, objective, scorer, schedule.step(1), ranks, Meter(ranks))
    found = gradients(scorer)
    scorer.zero_grad()
    metrics = train(method, config, scorer, objective, ranks)
    return {
        "gradients": found,
        "parameters": parameters(scorer),
        "losses": [m["loss"] for m in metrics],
        "micro_batches": [len(rows) for rows in schedule.step(1)],
    }


def mixed_precision(folder: Path, split: dict, ranks: Ranks) -> dict[str, list[float]]:
    """By autocast; by gathering layers in bfloat16, which one rank does not; by both."""
    found = {}
    for cast, gathered in ((True, None), (False, torch.bfloat16), (True, torch.bfloat16)):
        how = Sharding(param_dtype=gathered)
        scorer, objective = models_of("dpo", torch.float32, ranks, how=how)
        name = f"autocast {cast}, gathered {gathered}"
        config = config_of(folder / name, bf16=cast, learning_rate=0.01, **split)
        found[name] = [m["loss"] for m in train("dpo", config, scorer, objective, ranks)]
    return found


def evaluation(folder: Path, split: dict, ranks: Ranks):
    scorer, objective = models_of("dpo", torch.float32, ranks)
    config = config_of(folder, per_device_eval_batch_size=3, **split)
    return loop.evaluate(config, objective, scorer, PAIRS, ranks)


def read_without_a_gradient(folder: Path, ranks: Ranks):
    """The parameters before, and after an evaluation and a signal, whose layers are gathered in
    bfloat16."""
    scorer, objective = models_of(
        "dpo", torch.float32, ranks, how=Sharding(param_dtype=torch.bfloat16)
    )
    config, found = config_of(folder), [parameters(scorer)]
    loop.evaluate(config, objective, scorer, PAIRS, ranks)
    found.append(parameters(scorer))
    Reader(scorer, None, config, ranks, Meter(ranks)).read([PAIRS[:2]], ("lse",))
    return [*found, parameters(scorer)]


def resumed(folder: Path, split: dict, ranks: Ranks):
    """5 steps of AdamW straight through, and 3 then 2 from the checkpoint in a new model, with a
    reference that has moved once by then."""
    found = []
    adamw = dict(optim="adamw_torch", learning_rate=1e-2, max_grad_norm=1.0, **split)
    for parts in ((5,), (3, 5)):
        losses = []
        for last in parts:
            resume = dict(resume_from_checkpoint="true") if losses else {}
            save = dict(save_steps=3 if len(parts) == 2 else 0)
            config = config_of(folder / str(len(parts)), max_steps=last, **adamw, **resume, **save)
            scorer, objective = models_of("dpo", torch.float32, ranks, moving=True)
            losses += [m["loss"] for m in train("dpo", config, scorer, objective, ranks)]
        found.append((losses, parameters(scorer)))
    return found


def exported(ranks: Ranks):
    """The state that would be exported, tied and untied, beside the parameters themselves."""
    found = {}
    for method in ("sft", "dpo"):
        scorer, _ = models_of(method, torch.float32, ranks)
        found[method] = (checkpoint.full_state(scorer, ranks), parameters(scorer))
    return found


def one_rank_is_not_finite(folder: Path, split: dict, ranks: Ranks):
    """The last rank's loss becomes NaN in step 3: all stop, with the weights of step 2."""
    scorer, objective = models_of("sft", torch.float32, ranks)
    before, steps = {}, 0

    def spoiled(scorer, batch):
        nonlocal before, steps
        steps += 1
        if steps == 3:
            before = shards(scorer)
        result = objective.objective(scorer, batch)
        if steps == 3 and ranks.rank == ranks.world - 1:
            return result._replace(loss=result.loss + float("nan"))
        return result

    method = objective._replace(objective=spoiled)
    try:
        train("sft", config_of(folder, **split), scorer, method, ranks)
    except UserError as error:
        after = shards(scorer)
        return str(error), all(torch.equal(after[n], before[n]) for n in before)


def shards(scorer) -> dict[str, torch.Tensor]:
    """This rank's shards; no collective, so it may be called inside the objective."""
    found = {}
    for name, p in scorer.named_parameters():
        local = getattr(p, "_local_tensor", p)
        found[name] = local.detach().clone()
    return found


def one_rank_is_interrupted(folder: Path, split: dict, ranks: Ranks):
    """Ctrl-C reaches the last rank alone, in step 3: all save that step and stop."""
    scorer, objective = models_of("sft", torch.float32, ranks)
    steps = 0

    def interrupted(scorer, batch):
        nonlocal steps
        steps += 1
        if steps == 3 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal sent too
        return objective.objective(scorer, batch)

    method = objective._replace(objective=interrupted)
    try:
        train("sft", config_of(folder, **split), scorer, method, ranks)
    except KeyboardInterrupt:
        return [p.name for p in checkpoint.complete(folder)]


def late_rank_claims(folder: Path, ranks: Ranks):
    """Rank 0 writes to the folder as soon as it may; the others come to look later."""
    config = config_of(folder)
    if not ranks.is_main:
        time.sleep(0.3)
    claim_folder(config, ranks)
    Report(config, "test", ranks).metrics(1, {"loss": 1.0})
    return True


def every_case(folder: Path, ranks: Ranks) -> dict:
    """All results of this world."""
    found = {}
    for name, split in splits(ranks.world).items():
        for method in METHODS:
            for dtype in DTYPES:
                where = folder / f"{name}-{method}-{dtype}"
                result = gradient_and_training(where, method, dtype, split, ranks)
                found[name, method, dtype] = result
    split = splits(ranks.world)["repacked"]
    for name, how in shardings(ranks.world).items():
        for method in METHODS:
            for dtype in DTYPES:
                where = folder / f"{name}-{method}-{dtype}"
                result = gradient_and_training(where, method, dtype, split, ranks, how)
                found[name, method, dtype] = result
    split = next(iter(splits(ranks.world).values()))
    found["bf16"] = mixed_precision(folder / "bf16", split, ranks)
    found["evaluation"] = evaluation(folder / "evaluation", split, ranks)
    found["read"] = read_without_a_gradient(folder / "read", ranks)
    found["resumed"] = resumed(folder / "resumed", split, ranks)
    found["exported"] = exported(ranks)
    found["not finite"] = one_rank_is_not_finite(folder / "nan", split, ranks)
    found["interrupted"] = one_rank_is_interrupted(folder / "interrupted", split, ranks)
    found["claimed"] = late_rank_claims(folder / "claimed", ranks)
    return found


def commands(folder: Path, world: int) -> None:
    """`prefuse dpo` as torchrun would start it, with precomputed reference log-probs."""
    argv = ["--model_name_or_path", str(folder.parent / "model"), "--dataset_name"]
    argv += [str(folder.parent / "rows.jsonl"), "--output_dir", str(folder / "command")]
    argv += ["--max_steps", "3", "--logging_steps", "1", "--eval_fraction", "0.2"]
    argv += ["--eval_strategy", "epoch", "--precompute_ref_log_probs", "--save_steps", "2"]
    argv += ["--learning_rate", "1e-3", "--gradient_checkpointing", "--disable_tqdm"]
    argv += ["--bf16", "false"]
    main(["dpo", *argv, "--per_device_train_batch_size", str(16 // world)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks = start()
    found = every_case(folder, ranks)
    if ranks.is_main:
        torch.save(found, folder / "found.pt")
    commands(folder, ranks.world)
