"""What every rank of tests/test_lora.py runs; rank 0 writes what it found to argv[1]."""

import sys
from pathlib import Path

import ranks_worker as worker
import torch
from tiny import in_float64, scorer_of, tiny_model

from prefuse.trainer import checkpoint, lora, objectives
from prefuse.trainer.cli import main
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.engines.twin import Twin
from prefuse.trainer.scores import Unadapted
from prefuse.trainer.sharding import FULL, Sharding, shard

CASES = {
    "head in shards": ("untied", FULL),
    "tied": ("tied", FULL),
    "gathered head": ("untied", Sharding(shard_head=False)),
    "copies": ("untied", Sharding("none")),
}


def adapted(tie: bool = False):
    """A model with adapters that do something, and norms that are trained whole."""
    model = tiny_model(tie=tie)
    named = dict(use_peft=True, lora_target_modules=["q_proj", "down_proj"])
    lora.attach(DPOConfig("tiny", "rows", "out", **named, lora_modules_to_save=["norm"]), model)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))
    return model


def models_of(method: str, dtype: torch.dtype, ranks: Ranks, moving: bool = False, how=FULL):
    """The sharded policy, and DPO with the same body as reference."""
    model = adapted(method == "tied")
    scorer = scorer_of(in_float64(model) if dtype == torch.float64 else model)
    reference = objectives.live_reference(Unadapted(scorer))

    def first(_, batches):  # as KTO and online commands do
        for batch in batches:
            reference(batch)

    method = objectives.dpo(reference, "sigmoid", {})
    return shard(scorer, ranks, how), method._replace(before_step=first)


def exported(ranks: Ranks):
    """The adapters that would be exported, and what a sampler is given, beside the parameters."""
    scorer, _ = models_of("tied", torch.float32, ranks)
    state = checkpoint.full_state(scorer, ranks, frozen=False)
    twin = Twin(scorer.model, "sdpa")
    sampler = {name: p.detach().clone() for name, p in twin.model.named_parameters()}
    return state, worker.parameters(scorer), sampler


def every_case(folder: Path, ranks: Ranks) -> dict:
    """All results of this world."""
    worker.models_of = models_of
    split = worker.splits(ranks.world)["repacked"]
    found = {}
    for name, (method, how) in CASES.items():
        for dtype in worker.DTYPES:
            given = (folder / f"{name}-{dtype}", method, dtype, split, ranks, how)
            found[name, dtype] = worker.gradient_and_training(*given)
    found["resumed"] = worker.resumed(folder / "resumed", split, ranks)
    found["exported"] = exported(ranks)
    return found


def command(folder: Path, world: int) -> None:
    """`prefuse dpo` as torchrun would start it."""
    argv = ["--model_name_or_path", str(folder.parent / "model"), "--dataset_name"]
    argv += [str(folder.parent / "rows.jsonl"), "--output_dir", str(folder / "command")]
    argv += ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2"]
    argv += ["--gradient_checkpointing", "--disable_tqdm", "--bf16", "false", "--use_peft"]
    main(["dpo", *argv, "--per_device_train_batch_size", str(8 // world)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks = start()
    found = every_case(folder, ranks)
    if ranks.is_main:
        torch.save(found, folder / "found.pt")
    command(folder, ranks.world)
