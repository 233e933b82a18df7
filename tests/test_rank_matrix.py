"""Ranks x accumulation x layout x head x method: one gradient, that of a float64 oracle."""

import pytest
import rank_matrix_worker as worker
import torch
from tiny import finish, launch, relative_error, told


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("matrix")
    results = {1: worker.every_case(worker.ALONE)}
    for world in (2, 4):
        started = launch(world, "rank_matrix_worker.py", folder)
        assert finish(started, timeout=900) == [0] * world, told(folder)
        results[world] = torch.load(folder / f"{world}.pt", weights_only=True)
    return results


@pytest.mark.full
@pytest.mark.parametrize("method", worker.METHODS)
def test_one_gradient(found, method):
    """To 1e-6 of the whole gradient, in float32; each head has the oracle of its embeddings."""
    wanted = {
        head: worker.gradient(method, "packed", head, worker.ALONE, 1, torch.float64)
        for head in worker.HEADS
    }
    worst = {}
    for world, results in found.items():
        for case, got in results.items():
            if case[0] == method:
                worst[(world, *case)] = relative_error(got, wanted[case[2]])
    assert len(worst) == 3 * (18 if method == "reward" else 36)
    assert max(worst.values()) <= 1e-6, max(worst.items(), key=lambda item: item[1])
