"""--torch_compile compiles a model's layers for good: batches differ in tokens and in segments."""

import pytest
import torch
from tiny import ragged_pairs, scorer_of, tiny_model
from torch import nn

from prefuse.trainer.batch import pack
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.offline import compile_layers, prepare


def scorer():
    return scorer_of(tiny_model("Qwen2", num_hidden_layers=2))


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.full)])
def test_batches_of_any_size_are_compiled_once(more, monkeypatch):
    """more: with a reference that is compiled too, and checkpointing."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiles = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compiles(self, backend=counting, **how)
    )
    torch.compiler.reset()
    config = DPOConfig("m", "d", "o", torch_compile=True, gradient_checkpointing=more, bf16=True)
    policy, frozen, plain = scorer().train(), scorer().requires_grad_(False), scorer()
    prepare(config, policy)
    compile_layers(config, frozen)
    known = []
    for i in range(5):
        batch = pack(ragged_pairs(4 + 2 * i, seed=i))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logp = policy(batch).logp
            with torch.no_grad():
                torch.testing.assert_close(logp, plain(batch).logp, rtol=1e-2, atol=1e-2)
                if more:
                    frozen(batch)
        logp.sum().backward()
        known.append(len(graphs))
    assert known[0] >= 4  # before and after attention, and after the first graph's end
    assert known[2:] == [known[2]] * 3, known
