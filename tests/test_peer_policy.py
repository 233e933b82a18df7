"""Policy losses against TRL 1.16's own code and Liger 0.8.5's, value and gradient, and where the
peers differ from each other.

TRL's loss sits inside its trainer: it is called here on a stand-in that hands it log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.policy import policy_loss

trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}", allow_module_level=True)

B, L, LONGEST = 6, 9, 16
CLIP = dict(epsilon=0.2, epsilon_high=0.28)
# our name and options -> TRL's loss_type and settings
CASES = {
    "ppo": ("dapo", CLIP, {}),
    "grpo": ("grpo", CLIP, {}),
    "grpo two-sided": ("grpo", CLIP | dict(delta=1.5), dict(delta=1.5)),
    "dapo": ("bnpo", CLIP, {}),
    "dr_grpo": ("dr_grpo", CLIP | dict(max_length=LONGEST), {}),
    "gspo": ("grpo", CLIP, dict(importance_sampling_level="sequence")),
    "luspo": ("luspo", CLIP, dict(importance_sampling_level="sequence")),
    "cispo": ("cispo", dict(epsilon_high=1.3), dict(epsilon_high=1.3)),
    "sapo": ("sapo", {}, {}),
    "vespo": ("vespo", {}, {}),
}


def draw(dtype=torch.float64) -> dict[str, torch.Tensor]:
    lengths = torch.randint(1, L + 1, (B,))
    given = {k: -torch.rand(B, L, dtype=dtype) for k in ("old", "ref", "rollout")}
    given |= dict(logp=given["old"] + 0.4 * torch.randn(B, L, dtype=dtype))
    given |= dict(advantages=torch.randn(B, dtype=dtype), entropy=torch.rand(B, L, dtype=dtype))
    return given | dict(mask=torch.arange(L) < lengths[:, None])


def trl_loss(x, loss_type: str, rollout_weight=None, trainer=trl.GRPOTrainer, **settings):
    """TRL's mean loss over the batch."""
    identity = dict(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    config = dict(delta=None, use_bias_correction_kl=False)
    config |= dict(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1)
    config |= dict(vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
    names = set(config) & set(settings)
    config |= {k: settings.pop(k) for k in names}
    fields = dict(
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        entropy_coef=0.0,
    )
    fields |= settings
    stand_in = SimpleNamespace(
        **fields,
        args=SimpleNamespace(**config),
        loss_type=loss_type,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=fields["entropy_coef"] != 0,
        use_vllm=rollout_weight is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(**identity, sync_gradients=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["logp"], x["entropy"], None),
        get_high_entropy_mask=trl.GRPOTrainer.get_high_entropy_mask,
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
    )
    mask = x["mask"].to(torch.int64)
    inputs = dict(
        prompt_ids=mask[:, :0],
        prompt_mask=mask[:, :0],
        completion_ids=mask,
        completion_mask=mask,
        advantages=x["advantages"],
        old_per_token_logps=x["old"],
        ref_per_token_logps=x["ref"],
        num_items_in_batch=mask.sum(),
    )
    if rollout_weight is not None:
        inputs["importance_sampling_ratio"] = rollout_weight
        inputs["sampling_per_token_logps"] = x["rollout"]
    return trainer._compute_loss(stand_in, None, inputs), stand_in._metrics["train"]


def ours(x, name: str, **options):
    return policy_loss(x["logp"], x["old"], x["advantages"], x["mask"], loss_type=name, **options)


def assert_same(theirs, mine, logp, rtol=1e-6, atol=1e-12) -> None:
    assert_close(mine.double(), theirs.double(), rtol=rtol, atol=atol)
    wanted, got = (torch.autograd.grad(x, logp)[0] for x in (theirs, mine))
    assert_close(got, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_same_as_trl(case, beta):
    x = draw()
    x["logp"].requires_grad_()
    loss_type, options, settings = CASES[case]
    theirs, metrics = trl_loss(x, loss_type, beta=beta, **settings)
    objective = ours(x, case.split()[0], ref_logp=x["ref"], beta=beta, **options)
    assert_same(theirs, objective.mean(), x["logp"])
    if beta:
        total, count = objective.metrics["kl"]
        assert_close(float(total / count), metrics["kl"][0])
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        if name in metrics and settings.get("importance_sampling_level") != "sequence":
            total, count = objective.metrics[name]
            assert_close(float(total / count), metrics[name][0], msg=name, rtol=1e-6, atol=0)


def test_bias_corrected_kl():
    x = draw()
    x["logp"].requires_grad_()
    theirs, _ = trl_loss(x, "grpo", beta=0.3, use_bias_correction_kl=True)
    mine = ours(x, "grpo", ref_logp=x["ref"], beta=0.3, kl="ratio_k3", epsilon_high=0.28).mean()
    assert_same(theirs, mine, x["logp"])


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_mask"])
def test_rollout_correction(mode):
    """TRL computes the weight where it generates; here it is written out from its formula."""
    x = draw()
    x["logp"].requires_grad_()
    difference = (x["old"] - x["rollout"]) * x["mask"]
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    weight = difference.exp()
    weight = weight.clamp(max=2) if mode == "token_truncate" else weight * (weight <= 2)
    theirs, _ = trl_loss(x, "dapo", rollout_weight=weight, beta=0.3)
    options = dict(rollout_logp=x["rollout"], rollout_mode=mode, ref_logp=x["ref"], beta=0.3)
    assert_same(theirs, ours(x, "dapo", **options).mean(), x["logp"])


def test_vespo_takes_the_rollout_policy_into_its_weight():
    x = draw()
    x["logp"].requires_grad_()
    weight = ((x["old"] - x["rollout"]) * x["mask"]).exp()
    theirs, _ = trl_loss(x, "vespo", rollout_weight=weight)
    assert_same(theirs, ours(x, "vespo", rollout_logp=x["rollout"]).mean(), x["logp"])


def test_off_policy_mask():
    from prefuse.kernels.policy_weights import off_policy_mask

    x = draw()
    x["logp"].requires_grad_()
    theirs, _ = trl_loss(x, "dapo", rollout_weight=torch.ones(B, 1), off_policy_mask_threshold=0.0)
    cu = torch.arange(B + 1, dtype=torch.int32) * L
    flat = {k: x[k].flatten() for k in ("logp", "rollout", "mask")}
    advantages = x["advantages"].repeat_interleave(L)
    keep = off_policy_mask(
        flat["logp"], flat["rollout"], advantages, flat["mask"], cu, threshold=0.0
    )
    assert 0 < keep[flat["mask"]].sum() < flat["mask"].sum()
    mine = ours(x, "dapo", weight=keep.double().view(B, L)).mean()
    assert_same(theirs, mine, x["logp"])


def test_entropy_bonus():
    """The same where the loss is a mean over tokens; TRL's bonus is always that."""
    x = draw()
    x["logp"].requires_grad_()
    theirs, _ = trl_loss(x, "dapo", entropy_coef=0.2)
    mine = ours(x, "dapo", entropy=x["entropy"], entropy_coef=0.2).mean()
    assert_same(theirs, mine, x["logp"])


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_gmpo(epsilon):
    trainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    x = draw()
    x["logp"].requires_grad_()
    theirs, _ = trl_loss(x, "grpo", trainer=trainer, epsilon_low=epsilon, epsilon_high=epsilon)
    assert_same(theirs, ours(x, "gmpo", epsilon=epsilon).mean(), x["logp"])


def test_rloo():
    """A whole sequence is one action: TRL sums the log-probs before its clip."""
    x = draw()
    x["logp"].requires_grad_()
    x["old"] = x["logp"].detach() - 0.1 * torch.randn(B, L, dtype=torch.float64)
    identity = dict(gather=lambda x: x, reduce=lambda x, reduction: x)
    stand_in = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.28,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(**identity),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (x["logp"], x["entropy"], None),
    )
    mask = x["mask"].to(torch.int64)
    inputs = dict(prompt_ids=mask[:, :0], prompt_mask=mask[:, :0], completion_ids=mask)
    inputs |= dict(completion_mask=mask, advantages=x["advantages"])
    inputs |= dict(old_logps=(x["old"] * mask).sum(1))
    theirs = trl.RLOOTrainer._compute_loss(stand_in, None, inputs)
    assert_same(theirs, ours(x, "rloo", **CLIP).mean(), x["logp"])


@pytest.mark.parametrize("sampled", ["rollout", None])
def test_importance_weighted_distillation(sampled):
    peer = pytest.importorskip("trl.experimental.iw_opd").IWOPDTrainer
    x, vocab = draw(), 5
    logits = torch.randn(B, L, vocab, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(vocab, (B, L))
    stand_in = SimpleNamespace(
        temperature=0.8,
        iw_opd_gamma=0.7,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    rollout = None if sampled is None else x[sampled]
    labels = tokens.masked_fill(~x["mask"], -100)
    theirs = peer._compute_iw_opd_loss(stand_in, logits, tokens, labels, x["ref"], rollout)
    logp = (logits / 0.8).log_softmax(-1).gather(-1, tokens[:, :, None]).squeeze(-1)
    given = dict(teacher_logp=x["ref"], rollout_logp=rollout, loss_type="iw_opd", gamma=0.7)
    mine = policy_loss(logp, None, None, x["mask"], **given)
    assert_same(theirs, mine.mean(), logits)


def liger_loss(x, loss_type: str, **settings):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs Liger")
    loss, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        x["logp"],
        x["mask"].to(x["logp"].dtype),
        x["advantages"],
        x["mask"].to(x["logp"].dtype),
        ref_per_token_logps=x["ref"],
        old_per_token_logps=x["old"],
        loss_type=loss_type,
        max_completion_length=LONGEST,
        **dict(epsilon_low=0.2, epsilon_high=0.28) | settings,
    )
    return loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_same_as_liger(case, beta):
    """Liger's LUSPO with a KL penalty is another loss: below."""
    if case == "luspo" and beta:
        pytest.skip("Liger multiplies by the padded width: test_luspo_of_the_peers")
    x = draw()
    x["logp"].requires_grad_()
    loss_type, options, settings = CASES[case]
    theirs = liger_loss(x, loss_type, beta=beta, **settings)
    mine = ours(x, case.split()[0], ref_logp=x["ref"], beta=beta, **options).mean()
    assert_same(theirs, mine, x["logp"])


def test_luspo_of_the_peers():
    """With a KL penalty the loss differs over tokens. The paper's is a sequence's loss times its
    length, summed over its tokens here and in TRL; Liger takes the mean over the padded width."""
    x = draw()
    options = dict(ref_logp=x["ref"], beta=0.3, **CLIP)
    settings = dict(beta=0.3, importance_sampling_level="sequence")
    theirs, _ = trl_loss(x, "luspo", **settings)
    mine = ours(x, "luspo", **options).mean()
    assert_close(mine, theirs)
    assert abs(float(liger_loss(x, "luspo", **settings) - mine)) > 1e-2


def test_trl_ignores_nothing_we_have():
    """Every loss_type of TRL's GRPO is covered above."""
    import inspect
    import re

    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    listed = re.findall(r'loss_type (?:==|in) (\[[^\]]*\]|"\w+")', source)
    names = set(re.findall(r'"(\w+)"', " ".join(listed)))
    assert names == {loss_type for loss_type, *_ in CASES.values()}
