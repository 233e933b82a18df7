"""Objectives ask no tensor for its value, and compile whole."""

import pytest
import torch
from test_list_and_unpaired import lists, singles
from test_preference import EXTRA, PAIR, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels.preference import (
    LIST_LOSSES,
    LOSSES,
    UNPAIRED_LOSSES,
    list_loss,
    preference_loss,
    unpaired_loss,
)

FAMILIES = [
    (LOSSES, preference_loss, lambda: tensors(PAIR | EXTRA, torch.float32)),
    (UNPAIRED_LOSSES, unpaired_loss, lambda: singles(torch.float32)),
    (LIST_LOSSES, list_loss, lambda: lists(torch.float32)),
]
CASES = [(name, call, given) for losses, call, given in FAMILIES for name in losses]
IDS = [name for name, *_ in CASES]


@pytest.mark.parametrize("name, call, given", CASES, ids=IDS)
def test_no_value_is_asked_for(name, call, given):
    """A fake tensor has none: `.item()`, `bool()` or a mask as an index would raise."""
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) for k, v in given().items()}
        first = next(iter(fake))
        fake[first].requires_grad_()
        found = call(**fake, loss_type=name)
        found.loss.sum().backward()
        assert fake[first].grad.shape == fake[first].shape


@pytest.mark.parametrize("name, call, given", CASES, ids=IDS)
def test_compiles_whole(name, call, given):
    def loss(tensors):
        return call(**tensors, loss_type=name).loss

    torch.compiler.reset()  # else the cases share one limit of recompilations
    tensors = given()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_close(compiled(tensors), loss(tensors))
