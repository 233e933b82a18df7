"""A head whose vocabulary is split over gloo ranks is the whole head: values and gradients."""

import pytest
import torch
from tiny import finish, launch, told

from prefuse.kernels.linear_logp import VocabShard, linear_logp


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_shards_are_the_whole(world, tmp_path):
    """Odd vocabularies, empty shards, ranks without tokens; against float64 on one process."""
    started = launch(world, "sharded_head_worker.py", tmp_path)
    assert finish(started) == [0] * world, told(tmp_path)


def test_a_shard_outside_the_vocabulary_is_told():
    shard = VocabShard(None, 6, 9)
    with pytest.raises(ValueError, match="group: wanted 4 entries from start 6 within 9"):
        linear_logp(torch.zeros(1, 3), torch.zeros(4, 3), torch.zeros(1).long(), group=shard)
