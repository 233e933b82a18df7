"""What every rank of tests/test_weights.py runs: models read into shards, against those loaded
whole, and written back."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  finds prefuse in a clone that was never installed
import torch

from prefuse.trainer import weights
from prefuse.trainer.critic import Critic
from prefuse.trainer.dist import Ranks, start, stop
from prefuse.trainer.lora import whole
from prefuse.trainer.model import load_model
from prefuse.trainer.reward_model import load_scores
from prefuse.trainer.scores import Scorer
from prefuse.trainer.sharding import Sharding, shard

HOW = {
    "head split": Sharding(),
    "head gathered": Sharding(shard_head=False),
    "copies": Sharding(fsdp="none"),
    "hsdp": Sharding(fsdp="hsdp", group_size=2),
}


def check(folder: Path, name: str, dtype: torch.dtype, how: str, ranks: Ranks) -> None:
    """Every parameter and buffer; then the files that these ranks write, of two sizes."""
    if name == "scores":
        options = dict(num_labels=1, dtype=dtype, layout="shared", pad_token_id=0)
        wanted = load_scores(str(folder / "llama"), **options)
        model = load_scores(str(folder / "llama"), **options, in_shards=True)
        scorer = shard(Critic(model, "shared"), ranks, HOW[how])
    else:
        options = dict(dtype=dtype, layout="shared")
        wanted = load_model(str(folder / name), **options)
        model = load_model(str(folder / name), **options, in_shards=True)
        assert all(p.is_meta for p in model.parameters()), name
        scorer = shard(Scorer(model), ranks, HOW[how])
    got = dict(model.named_parameters())
    for place, p in wanted.named_parameters():
        assert got[place].dtype == p.dtype and torch.equal(whole(got[place]), p), (name, place)
    assert len(got) == len(list(wanted.parameters()))
    buffers = dict(model.named_buffers())
    for place, b in wanted.named_buffers():
        assert torch.equal(buffers[place], b), (name, place)
    first = next(scorer.parameters())
    assert how == "copies" or first.to_local().numel() < first.numel()
    for size in (1 << 30, 4000):
        out = folder / str(ranks.world) / f"{name}-{dtype}-{how}-{size}"
        if ranks.is_main:
            out.mkdir(parents=True)
            model.config.save_pretrained(out)
        weights.write(model, out if ranks.is_main else None, size)


def main(folder: Path) -> None:
    ranks = start()
    for name in json.loads((folder / "names.json").read_text()):
        for how in HOW if name == "llama" else ("head split",):
            for dtype in (torch.float32, torch.bfloat16):
                check(folder, name, dtype, how, ranks)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
