"""Objectives ask no tensor for its value, and compile whole."""

import pytest
import torch
from test_list_and_unpaired import lists, singles
from test_policy import draw as tokens
from test_preference import EXTRA, PAIR, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels import policy
from prefuse.kernels.preference import (
    LIST_LOSSES,
    LOSSES,
    UNPAIRED_LOSSES,
    list_loss,
    preference_loss,
    unpaired_loss,
)


def policy_loss(logp, cu_seqlens, loss_type, **given):
    """With every part: a KL penalty, an entropy bonus, a correction for the rollout policy."""
    options = dict(beta=0.1, kl="ratio_k3", entropy=given["old_logp"], entropy_coef=0.1)
    options |= dict(max_length=7.0, rollout_mode="sequence_mask")
    return policy.policy_loss(logp, **given, cu_seqlens=cu_seqlens, loss_type=loss_type, **options)


def packed() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, 3, 4, 4, 9, 11], dtype=torch.int32)
    return tokens(torch.float32) | dict(cu_seqlens=lengths)


FAMILIES = [
    (LOSSES, preference_loss, lambda: tensors(PAIR | EXTRA, torch.float32)),
    (UNPAIRED_LOSSES, unpaired_loss, lambda: singles(torch.float32)),
    (LIST_LOSSES, list_loss, lambda: lists(torch.float32)),
    (policy.LOSSES, policy_loss, packed),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, call, given", CASES, ids=IDS)
def test_nothing_waits_for_the_gpu(name, call, given):
    tensors = {k: v.cuda() for k, v in given().items()}
    first = next(iter(tensors))
    tensors[first].requires_grad_()
    call(**tensors, loss_type=name).loss.sum().backward()  # compiles kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(**tensors, loss_type=name).loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.full
@pytest.mark.parametrize("name", ["sigmoid", "orpo", "discopop", "mmpo"])
def test_a_compiled_pair_loss_is_one_kernel_each_way(name):
    """Scalars per sequence stay readable PyTorch, and a compiler makes one launch of them."""
    from torch._inductor import config, metrics

    given = {k: v.expand(64).clone() for k, v in tensors(PAIR | EXTRA, torch.float32).items()}
    given["chosen"].requires_grad_()
    torch.compiler.reset()
    metrics.reset()
    compiled = torch.compile(lambda x: preference_loss(**x, loss_type=name).loss, fullgraph=True)
    with config.patch(force_disable_caches=True):  # a cached forward brings its backward along
        loss = compiled(given)
        assert metrics.generated_kernel_count == 1
        loss.sum().backward()
    assert metrics.generated_kernel_count == 2
