"""What every entry of the registry inherits: its form, its example, parts and ranks that add up."""

import re
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from registry_cases import MAKE, WHOLE, case, gradients, on_rank
from torch.testing import assert_close

from prefuse.kernels.registry import ADVANTAGES, FAMILIES, METHODS
from prefuse.trainer.methods import explain, listing, markdown

ROOT = Path(__file__).parents[1]
NO_PAPER = {"importance", "sft", "value_mse", "forward_kl", "reverse_kl"}
SPLIT = [name for name in METHODS if name not in WHOLE]


def test_how_many_there_are():
    assert len(METHODS) >= 70 and len(ADVANTAGES) >= 15
    assert sum(len(f.table) for f in FAMILIES) == len(METHODS), "two objectives share a name"
    assert {f.name for f in FAMILIES} == set(MAKE)


@pytest.mark.parametrize("table, name", [(t, n) for t in (METHODS, ADVANTAGES) for n in t])
def test_an_entry_says_what_it_is(table, name):
    method = table[name]
    units = ("token", "sequence", "pair", "group") if table is METHODS else ("",)
    assert method.title and method.formula and method.unit in units
    good = re.fullmatch(r"arXiv:\d{4}\.\d{5}( (eq|sec|app)\. [\w.]+)?|[A-Z]\w+ \d{4}", method.paper)
    assert good if name not in NO_PAPER else method.paper == ""
    assert method.name in listing() and method.formula in explain(name)


def test_the_document_is_made_from_the_code():
    written = (ROOT / "docs" / "losses.md").read_text()
    assert written == markdown(), "run `prefuse methods --markdown > docs/losses.md`"


@pytest.mark.parametrize("name", SPLIT)
def test_the_example_runs(name):
    """As the document shows it, on tensors with the names of what the loss reads."""
    batch = case(name)
    given = {k: v.clone() for k, v in batch.given.items()}
    for learnt in batch.learnt:
        given[learnt].requires_grad_()
    method = METHODS[name]
    assert set(method.inputs) <= set(given)
    scope = dict(given)
    exec(method.example(), scope)
    if method.family.name != "divergence":  # which returns the losses themselves
        assert scope["objective"].unit == method.unit
    assert any(given[k].grad is not None for k in batch.learnt)


@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_add_up(name):
    batch = case(name)
    whole = gradients(batch, list(range(batch.rows)))
    for parts in (2, 3):
        split = [gradients(batch, list(range(i, batch.rows, parts))) for i in range(parts)]
        total, count, *_ = (sum(x) for x in zip(*((t, c) for t, c, _ in split), strict=True))
        assert_close(total, whole[0], rtol=1e-12, atol=1e-12)
        assert count == whole[1]
        for i, wanted in enumerate(whole[2]):
            assert_close(sum(g[i] for *_, g in split), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_add_up(world, tmp_path):
    mp.spawn(on_rank, (world, SPLIT, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found) == set(SPLIT)
    for name in SPLIT:
        batch = case(name)
        total, count, grads = gradients(batch, list(range(batch.rows)))
        wanted = [total / count, *(g / count for g in grads)]
        assert_close(found[name], wanted, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
