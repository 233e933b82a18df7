"""Pair and single losses against Liger 0.8.5's, value and gradient in float64.

Liger's losses are functions of log-probs inside its fused heads; they are called as they are.
"""

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.preference import preference_loss, unpaired_loss

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="parity needs the `peers` extra")
P = 7
DPO = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": dict(label_smoothing=0.01),
    "nca_pair": {},
    "robust": dict(label_smoothing=0.2),
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
}
LENGTHS = torch.arange(1, P + 1).double(), torch.arange(P, 0, -1).double()


def logps() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((-n * (0.2 + torch.rand(P).double())).requires_grad_() for n in LENGTHS)


def assert_same(theirs, mine, given) -> None:
    assert_close(mine, theirs, rtol=1e-6, atol=1e-12)
    wanted, got = (torch.autograd.grad(x, given, retain_graph=True) for x in (theirs, mine))
    assert_close(got, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", DPO)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_dpo_losses(name, beta):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as peer

    given, ref = logps(), [x.detach() for x in logps()]
    rows = torch.zeros(2 * P, 1)
    settings = dict(beta=beta, loss_type=name, **DPO[name])
    theirs = peer.preference_loss_fn(*given, rows, *ref, **settings)[0]
    assert_same(theirs, preference_loss(*given, *ref, **settings).loss.mean(), given)


def test_liger_ignores_label_smoothing_in_sigmoid_too():
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as peer

    given, ref = logps(), [x.detach() for x in logps()]
    theirs = peer.preference_loss_fn(*given, torch.zeros(2 * P, 1), *ref, label_smoothing=0.3)[0]
    assert_close(theirs, preference_loss(*given, *ref).loss.mean())
    cdpo = preference_loss(*given, *ref, label_smoothing=0.3).loss.mean()
    assert abs(float((cdpo - theirs).detach())) > 1e-3


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_losses_without_a_reference(label_smoothing):
    """CPO's logistic term on sums, SimPO on means; their NLL is a term of Liger's head."""
    from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction as cpo
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction as simpo

    given, rows = logps(), torch.zeros(2 * P, 1)
    lengths = dict(chosen_len=LENGTHS[0], rejected_len=LENGTHS[1])
    settings = dict(beta=0.3, label_smoothing=label_smoothing)
    theirs = cpo.preference_loss_fn(*given, rows, **settings)[0]
    mine = preference_loss(*given, loss_type="cpo", nll_coef=0.0, **lengths, **settings)
    assert_same(theirs, mine.loss.mean(), given)
    means = [x / n for x, n in zip(given, LENGTHS, strict=True)]
    theirs = simpo.preference_loss_fn(*means, rows, gamma=0.7, **settings)[0]
    mine = preference_loss(*given, loss_type="simpo", gamma=0.7, **lengths, **settings)
    assert_same(theirs, mine.loss.mean(), given)


def test_orpo():
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction as peer

    given = logps()
    means = [x / n for x, n in zip(given, LENGTHS, strict=True)]
    theirs = peer.preference_loss_fn(*means, torch.zeros(2 * P, 1), beta=0.3)[0] - means[0].mean()
    lengths = dict(chosen_len=LENGTHS[0], rejected_len=LENGTHS[1])
    mine = preference_loss(*given, loss_type="orpo", beta=0.3, **lengths).loss.mean()
    assert_same(theirs, mine, given)


def test_kto():
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction as peer

    logp, ref = logps()
    ref = ref.detach()
    label, kl = torch.arange(P) % 3 == 0, torch.tensor(0.4).double()
    theirs = peer.preference_loss_fn(logp, label, torch.zeros(P, 1), ref, beta=0.3, kl=kl)[0]
    mine = unpaired_loss(logp, ref_logp=ref, label=label, shift=kl, beta=0.3).loss.mean()
    assert_same(theirs, mine, (logp,))
