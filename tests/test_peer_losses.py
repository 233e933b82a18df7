"""Pair losses against TRL 1.16's own code, value and gradient in float64, and where the two differ.

TRL's loss sits inside its trainer: it is called here on a stand-in that hands it log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.preference import (
    LOSSES,
    hyperparameters,
    inputs,
    preference_loss,
    unpaired_loss,
)
from prefuse.kernels.segments import segment_sum
from prefuse.kernels.sequence_weights import length_desensitised, shared_lengths

trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}", allow_module_level=True)

P, LONGEST = 6, 7
# our name -> TRL's settings of the same loss, ours where they are not TRL's names
DPO = {
    "sigmoid": ({}, {}),
    "sigmoid_norm": ({}, {}),
    "hinge": ({}, {}),
    "ipo": ({}, {}),
    "robust": (dict(label_smoothing=0.2), dict(label_smoothing=0.2)),
    "exo_pair": (dict(label_smoothing=0.01), dict(label_smoothing=0.01)),
    "nca_pair": ({}, {}),
    "bco_pair": ({}, {}),
    "sppo_hard": ({}, {}),
    "apo_zero": ({}, {}),
    "apo_down": ({}, {}),
    "discopop": ({}, {}),
    "aot": (dict(label_smoothing=0.2), dict(label_smoothing=0.2)),
    "aot_unpaired": (dict(label_smoothing=0.2), dict(label_smoothing=0.2)),
    "fdpo_forward_kl": (dict(loss_type="sigmoid", f_divergence_type="forward_kl"), {}),
    "fdpo_jsd": (dict(loss_type="sigmoid", f_divergence_type="js_divergence"), {}),
}


def token_logps() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [2 P, L] of chosen, then rejected, completions, and their mask."""
    lengths = torch.randint(1, LONGEST + 1, (2 * P,))
    mask = torch.arange(LONGEST) < lengths[:, None]
    return -torch.rand(2 * P, LONGEST, dtype=torch.float64) * 3 * mask, mask


def trl_dpo(logps, mask, ref, beta: float, **settings) -> torch.Tensor:
    """TRL's mean loss over the pairs."""
    ahead = torch.ones(2 * P, 1, dtype=torch.bool)
    zeros = torch.zeros(2 * P, LONGEST, dtype=torch.float64)
    out = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=mask)
    config = dict(beta=beta, label_smoothing=0.0, ld_alpha=None, use_weighting=False)
    config |= dict(f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5)
    config |= settings
    loss_type = config.pop("loss_type")
    identity = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        **config,
        loss_types=[loss_type],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        accelerator=identity,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.ones(2 * P, LONGEST + 1, dtype=torch.long)
    chosen_ref, rejected_ref = ref.sum(1).chunk(2)
    batch = dict(
        input_ids=ids,
        attention_mask=ids,
        completion_mask=torch.cat([~ahead, mask], 1).long(),
        ref_chosen_logps=chosen_ref,
        ref_rejected_logps=rejected_ref,
    )
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: out, batch, return_outputs=False)


def ours(name: str, logps, mask, ref, **options) -> torch.Tensor:
    chosen, rejected = logps.sum(1).chunk(2)
    ref_chosen, ref_rejected = ref.sum(1).chunk(2)
    lengths = mask.sum(1).chunk(2)
    return preference_loss(
        chosen, rejected, ref_chosen, ref_rejected,
        loss_type=name, chosen_len=lengths[0], rejected_len=lengths[1], **options,
    ).loss  # fmt: skip


def assert_same(name: str, theirs, mine, logps) -> None:
    assert_close(mine, theirs, rtol=1e-6, atol=1e-12, msg=name)
    wanted, got = (torch.autograd.grad(x, logps)[0] for x in (theirs, mine))
    assert_close(got, wanted, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", DPO)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_the_same_as_trl(name, beta):
    (logps, mask), (ref, _) = token_logps(), token_logps()
    ref = ref * mask
    logps.requires_grad_()
    theirs, options = DPO[name]
    theirs = trl_dpo(logps, mask, ref, beta, **dict(loss_type=name) | theirs)
    mine = ours(name, logps, mask, ref, beta=beta, **options).mean()
    assert_same(name, theirs, mine, logps)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_fdpo_alpha_is_trls_of_one_minus_alpha(alpha):
    """TRL bounds the exponent by float32's even in float64, and computes it there."""
    (logps, mask), (ref, _) = token_logps(), token_logps()
    ref = ref * mask
    logps, ref = logps.float().requires_grad_(), ref.float()
    settings = dict(loss_type="sigmoid", f_divergence_type="alpha_divergence")
    theirs = trl_dpo(logps, mask, ref, 0.1, f_alpha_divergence_coef=1 - alpha, **settings)
    mine = ours("fdpo_alpha", logps, mask, ref, alpha=alpha).mean()
    assert_close(mine, theirs, rtol=1e-5, atol=0)
    wanted, got = (torch.autograd.grad(x, logps)[0] for x in (theirs, mine))
    assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_ld_dpo_is_a_weight_of_tokens():
    """sigmoid on sums whose tokens beyond the shorter completion count alpha, as in TRL; TRL takes
    the reference's sums as they come when they are computed beforehand, so do both here. Its shared
    part takes in the padding, which is 0."""
    (logps, mask), (ref, _) = token_logps(), token_logps()
    ref = ref * mask
    logps.requires_grad_()
    theirs = trl_dpo(logps, mask, ref, 0.5, loss_type="sigmoid", ld_alpha=0.3)
    pairs = torch.stack([x for i in range(P) for x in (logps[i], logps[P + i])])
    inside = torch.stack([x for i in range(P) for x in (mask[i], mask[P + i])])
    cu = torch.cat([torch.zeros(1), inside.sum(1).cumsum(0)]).int()
    packed = pairs[inside]
    weights = length_desensitised(cu, len(packed), shared_lengths(cu), alpha=0.3)
    sums = segment_sum(weights * packed, cu)
    mine = preference_loss(sums[0::2], sums[1::2], *ref.sum(1).chunk(2), beta=0.5).loss.mean()
    assert_close(mine, theirs)
    wanted, got = (torch.autograd.grad(x, logps)[0] for x in (theirs, mine))
    assert_close(got, wanted * mask)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_trl_ignores_label_smoothing_where_we_do_not(name):
    """cDPO is its use for DPO; TRL 1.16 reads it for robust, exo_pair and aot alone."""
    (logps, mask), (ref, _) = token_logps(), token_logps()
    ref = ref * mask
    theirs = trl_dpo(logps, mask, ref, 0.1, loss_type=name, label_smoothing=0.3)
    assert_close(theirs, ours(name, logps, mask, ref).mean())
    smoothed = ours(name, logps, mask, ref, label_smoothing=0.3).mean()
    assert abs(float(smoothed - theirs)) > 1e-3


CPO = {
    "simpo": dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0, alpha=0.0),
    "alphapo": dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0, alpha=0.25),
    "cpo": dict(loss_type="sigmoid", beta=0.1, simpo_gamma=0.0, alpha=0.0),
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", CPO)
def test_reference_free_losses_are_trls(name, label_smoothing):
    """TRL takes log-probs per token for SimPO and AlphaPO, sums for CPO; CPO's NLL is apart."""
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    options = {"label_smoothing": label_smoothing} if name != "alphapo" else {}
    settings = CPO[name] | dict(label_smoothing=0.0) | options
    trainer = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    logps, mask = token_logps()
    logps.requires_grad_()
    given = logps.sum(1) / (1 if name == "cpo" else mask.sum(1))
    theirs = cpo.cpo_loss(trainer, *given.chunk(2))[0].sum()
    if name == "cpo":
        options["nll_coef"] = 0.0
    assert_same(name, theirs, ours(name, logps, mask, logps, **options).sum(), logps)


@pytest.mark.parametrize("name, loss_type", [("tpo", "sigmoid"), ("tpo_l", "tpo-l")])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_three_completions(name, loss_type, smoothing):
    """TRL averages the likelihood of the gold completions over the batch's tokens, so they are
    given one length."""
    tpo = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    (_, mask), vocab = token_logps(), 5
    mask = torch.cat([mask, torch.ones(P, LONGEST, dtype=torch.bool)])
    logits = torch.randn(3 * P, LONGEST + 1, vocab, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(vocab, (3 * P, LONGEST + 1))
    stand_in = SimpleNamespace(
        beta=0.3,
        label_smoothing=smoothing,
        loss_type=loss_type,
        tpo_alpha=0.7,
        tpo_l_gamma=0.5,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ahead = torch.zeros(3 * P, 1, dtype=torch.bool)
    batch = dict(input_ids=ids, attention_mask=ids, completion_mask=torch.cat([ahead, mask], 1))
    model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
    theirs = tpo._compute_loss(stand_in, model, batch, return_outputs=False)

    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask
    chosen, rejected, gold = logp.sum(1).chunk(3)
    lengths = mask.sum(1).chunk(3)
    mine = preference_loss(
        chosen, rejected, gold=gold, chosen_len=lengths[0], rejected_len=lengths[1],
        gold_len=lengths[2], loss_type=name, beta=0.3, nll_coef=0.7, label_smoothing=smoothing,
    )  # fmt: skip
    assert_same(name, theirs, mine.loss.mean(), logits)


def test_orpo_is_trls_with_its_sign():
    """TRL returns beta log sigmoid(...), computed in float32, and subtracts it from the NLL."""
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    logps, mask = token_logps()
    logps = (logps - 0.1 * mask).requires_grad_()
    means = (logps.sum(1) / mask.sum(1)).chunk(2)
    theirs = (-means[0] - orpo.odds_ratio_loss(trainer, *means)[0]).sum()
    mine = ours("orpo", logps, mask, logps, beta=0.3).sum()
    assert_close(mine, theirs, rtol=1e-5, atol=0)
    wanted, got = (torch.autograd.grad(x, logps)[0] for x in (theirs, mine))
    assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_of_single_completions(name):
    """TRL's mean over the batch, its KL from log-probs of mismatched completions."""
    (logps, mask), (ref, _), (other, _) = token_logps(), token_logps(), token_logps()
    ref = ref * mask
    logps.requires_grad_()
    label = torch.arange(2 * P) % 3 == 0
    zeros = torch.zeros(2 * P, LONGEST, dtype=torch.float64)
    out = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=mask)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    stand_in = SimpleNamespace(
        **options,
        loss_type=name,
        calculate_KL=name == "kto",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _compute_kl_logps=lambda model, batch: other.sum(1) + 12,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.ones(2 * P, LONGEST + 1, dtype=torch.long)
    batch = dict(
        input_ids=ids,
        attention_mask=ids,
        completion_mask=torch.cat([torch.zeros(2 * P, 1, dtype=torch.bool), mask], 1).long(),
        label=label,
        ref_logps=ref.sum(1),
        ref_KL_logps=torch.full((2 * P,), 2.0, dtype=torch.float64),
    )
    theirs = trl.KTOTrainer._compute_loss(stand_in, lambda **_: out, batch, return_outputs=False)
    given = dict(ref_logp=ref.sum(1), label=label)
    if name == "kto":
        given["shift"] = (other.sum(1) + 12 - 2).mean()
        assert given["shift"] > 0
    mine = unpaired_loss(logps.sum(1), **given, loss_type=name, **options).mean()
    assert_same(name, theirs, mine, logps)


def test_every_loss_of_trls_dpo_is_here():
    import inspect

    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    names = {line.split('"')[1] for line in source.splitlines() if 'if loss_type == "' in line}
    assert names - set(LOSSES) == {"sft"}  # a loss of tokens: trainer.objectives.sft
    assert all("beta" in hyperparameters(LOSSES[n]) for n in names & set(LOSSES))
    assert all("ref_chosen" in inputs(LOSSES[n]) for n in names & set(LOSSES))
