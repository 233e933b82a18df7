"""What each of test_rollout's two ranks runs; prints its completions."""

import json

import numpy as np
import torch
from tiny import scorer_of, tiny_model, tiny_tokenizer

from prefuse.trainer import dist
from prefuse.trainer.rollout import Sampling, make_engine
from prefuse.trainer.sharding import shard

LENGTHS = (5, 33, 9)  # rank 0 samples all, rank 1 the first, so that their steps differ
SAMPLING = Sampling(max_new_tokens=12, eos_token_ids=(1,))


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 48, n) for n in LENGTHS]


def sampled(engine, count: int) -> list:
    groups = engine.generate(prompts()[:count], 2, SAMPLING, range(count))
    return [[c.tokens.tolist() for c in group] for group in groups]


def main() -> None:
    ranks = dist.start()
    scorer = shard(scorer_of(tiny_model(tie=True)), ranks)
    engine = make_engine("transformers", scorer.model, tiny_tokenizer())
    count = 3 - 2 * ranks.rank
    found = [sampled(engine, count)]
    with torch.no_grad():
        for p in scorer.parameters():
            p.mul_(1.5)
    engine.update_weights(scorer.model)
    found.append(sampled(engine, count))
    print(json.dumps(found))
    dist.stop()
