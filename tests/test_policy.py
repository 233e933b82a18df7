"""Every policy loss: by hand, gradients, masks, layouts, signs, extremes, and what it refuses."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefuse.kernels.objective import Mean
from prefuse.kernels.policy import AGGREGATIONS, LOSSES, policy_loss
from prefuse.kernels.preference import hyperparameters

LN2, E = math.log(2), math.e
# two sequences: ratios 2 and 1/2, then a masked token; and a ratio of 4 with a bad advantage
LOGP = [-1.0, -2.0, -3.0, -0.5]
RATIO = [2.0, 0.5, 7.0, 4.0]
GIVEN = dict(
    old_logp=[p - math.log(r) for p, r in zip(LOGP, RATIO, strict=True)],
    advantages=[1.0, 1.0, 9.0, -1.0],
    mask=[True, True, False, True],
    reward=[1.0, 1.0, 1.0, 0.0],
    pass_rate=[0.2] * 4,
    off_policy=[False, True, False, False],
    selected=[True, False, False, False],
    teacher_logp=[0.0, -3.0, -3.0, 1.5],
)
BEHIND = [old - LN2 for old in GIVEN["old_logp"]]  # a rollout policy half as sure


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


CASES = [
    ("ppo", {}, [-1.2, -0.5, 0, 4]),
    ("ppo", dict(epsilon_high=0.5, delta=3.0), [-1.5, -0.5, 0, 3]),
    ("ppo", dict(aggregation="seq-mean-token-sum"), [-1.7, 4]),
    ("grpo", {}, [-0.85, 4]),
    ("dapo", {}, [-1.28, -0.5, 0, 4]),
    ("dr_grpo", dict(max_length=5), [-0.34, 0.8]),
    ("decoupled_ppo", dict(rollout_logp=BEHIND), [-2.4, -1, 0, 8]),
    ("clip_cov", {}, [0, -0.5, 0, 4]),
    ("kl_cov", dict(kl_coef=0.5), [-2 + 0.5 * LN2, -0.5, 0, 4]),
    ("gspo", {}, [-1, 4]),
    ("gspo_token", {}, [-1, 4]),
    ("luspo", {}, [-2, 4]),
    ("gmpo", dict(epsilon=math.log(1.5)), [-math.sqrt(0.75), 4]),
    ("gmpo", dict(epsilon=math.log(1.5), advantages=[-1.0, -1.0, 9.0, -1.0]), [2 / 3**0.5, 4]),
    ("cispo", dict(epsilon_high=1.5), [1.5, 1, 0, -0.75]),
    ("cispo", dict(epsilon_high=1.5, epsilon=0.2), [1.5, 1.6, 0, -0.75]),
    ("sapo", dict(tau_neg=2.0), [-2 * (s(1) + s(-0.5)), 2 * s(6)]),
    ("vespo", {}, [1, 2, 0, -32 * E**-6]),
    ("vespo", dict(rollout_logp=BEHIND), [16 * E**-9, 32 * E**-9, 0, -256 * E**-14]),
    ("reinforce", {}, [1, 2, 0, -0.5]),
    ("importance", {}, [-2, -0.5, 0, 4]),
    ("rloo", {}, [-1, 4]),
    ("topr", {}, [1, 2, 0, -0.5]),
    ("topr", dict(old_logp=[0.0, 0, 0, 0.5]), [1, 2, 0, -0.5 / E]),
    ("nft", dict(aggregation="token-mean"), [-0.8 * LN2, 0.8 * LN2, 0, 0]),
    ("nft", dict(aggregation="token-mean", scale="std"), [-2 * LN2, 2 * LN2, 0, 0]),
    ("nft", dict(max_length=5, scale="none", epsilon=0.1), [0, 2 * LN2 / 5]),
    ("luffy", {}, [-1.2, -(E**-2) / (E**-2 + 0.1), 0, 4]),
    ("distill", {}, [-2, 0.5, 0, -8]),
    ("iw_opd", dict(rollout_logp=[-1.0, 0, 0, -0.5]), [1.5, -8.25, 0, 1.5]),
    ("iw_opd", dict(rollout_logp=[0.0, -3, 0, 1.5]), [0, 0, 0, 0]),
    ("dft", {}, [1 / E, 2 * E**-2, 0, 0.5 * E**-0.5]),
    ("sft", {}, [1, 2, 0, 0.5]),
]
FREE_OF_ADVANTAGES = {"nft", "distill", "iw_opd", "dft", "sft"}


def tensors(given, dtype=torch.float64) -> dict[str, torch.Tensor]:
    found = {k: torch.tensor(v) for k, v in given.items()}
    return {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in found.items()}


@pytest.mark.parametrize("name, options, values", CASES)
def test_worked_by_hand(name, options, values):
    given = GIVEN | {k: options.pop(k) for k in list(options) if isinstance(options[k], list)}
    given = tensors(given | dict(logp=LOGP))
    found = policy_loss(
        **given,
        cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32),
        loss_type=name,
        rollout_bounds=(0, 9),
        **options,
    )
    assert_close(found.loss, torch.tensor(values, dtype=torch.float64))
    assert found.unit == ("token" if len(values) == 4 else "sequence")
    if found.unit == "token":
        assert found.count is not None and found.count == 3
    assert_close(found.mean(), torch.tensor(sum(values), dtype=torch.float64) / found_units(found))


def found_units(objective) -> int:
    return 3 if objective.unit == "token" else 2


def test_every_loss_has_a_case():
    assert {name for name, *_ in CASES} == set(LOSSES)


LENGTHS = [3, 1, 0, 5, 2]
CU = torch.tensor([0, 3, 4, 4, 9, 11], dtype=torch.int32)


def draw(dtype=torch.float64, on_policy: bool = False) -> dict[str, torch.Tensor]:
    """Packed sequences, one of them empty and one all masked; advantages per token."""
    total = sum(LENGTHS)
    given = {k: -torch.rand(total, dtype=torch.float64) for k in ("logp", "old_logp", "ref_logp")}
    given |= {k: -torch.rand(total, dtype=torch.float64) for k in ("rollout_logp", "teacher_logp")}
    if on_policy:
        given |= dict(old_logp=given["logp"].clone(), rollout_logp=given["logp"].clone())
    advantages = torch.randn(total, dtype=torch.float64)
    given |= dict(advantages=advantages, reward=(advantages > 0).double())
    given |= dict(pass_rate=torch.rand(total, dtype=torch.float64) * 0.8 + 0.1)
    mask = torch.tensor([True, False, True, True, True, True, False, True, True, False, False])
    given |= dict(mask=mask, off_policy=torch.rand(total) < 0.3, selected=torch.rand(total) < 0.3)
    return {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in given.items()}


def call(name, given, **options):
    options = dict(max_length=7.0, cu_seqlens=CU, beta=0.1, kl="ratio_k3") | options
    return policy_loss(**given, loss_type=name, **options)


@pytest.mark.parametrize("options", [{}, dict(aggregation="token-mean"), dict(entropy_coef=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_is_that_of_the_losses(dtype, options):
    given = draw(dtype)
    if "entropy_coef" in options:
        given |= dict(entropy=draw(dtype)["logp"])
    logp = given["logp"].requires_grad_()
    found = call("gspo", given, **options)
    assert (found.summed is None) == (options != dict(aggregation="token-mean"))
    sums = found.sum(), found.loss.sum()
    slopes = [torch.autograd.grad(x, logp, retain_graph=True)[0] for x in sums]
    assert_close((sums[0], slopes[0]), (sums[1], slopes[1]), rtol=1e-6, atol=1e-7)
    tripled = found._replace(loss=3 * found.loss)
    assert_close(tripled.sum(), 3 * sums[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, monkeypatch):
    """Finite differences, with what is detached held at its value: recorded once, then replayed."""
    given = draw()
    logp = given.pop("logp").requires_grad_()
    detach, held = torch.Tensor.detach, []

    def loss(logp):
        calls = iter(list(held))
        first = not held

        def stopped(x):
            if first:
                held.append(detach(x).clone())
                return held[-1]
            return next(calls)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", stopped)
            return call(name, given | dict(logp=logp), impl="reference").loss

    loss(logp)
    assert torch.autograd.gradcheck(loss, (logp,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_tokens_have_no_part(name, dtype):
    """Whatever stands there, NaN too: the same losses, and a gradient of exactly 0."""
    given = draw(dtype)
    spoilt = {
        k: v if v.dtype == torch.bool else torch.where(given["mask"], v, torch.nan)
        for k, v in given.items()
    }
    found = []
    for x in (given, spoilt):
        x["logp"].requires_grad_()
        objective = call(name, x)
        objective.loss.sum().backward()
        found.append((objective.loss.detach(), x["logp"].grad, objective.metrics))
        assert (x["logp"].grad[~x["mask"]] == 0).all()
    assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_alone_packed_or_padded(name):
    """A sequence has the loss and the gradient that it has alone, and in a padded rectangle."""
    given = draw()
    whole = gradient(name, given)
    bounds = CU.tolist()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {k: v[begin:end] for k, v in given.items()}
        alone = gradient(name, part, cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32))
        assert_close(alone[1], whole[1][begin:end])
        if len(whole[0]) == len(LENGTHS):
            assert_close(alone[0], whole[0][i : i + 1])
    inside = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    padded = {}
    for k, v in given.items():
        padded[k] = torch.full(inside.shape, 0, dtype=v.dtype)
        padded[k][inside] = v
    found = gradient(name, padded, cu_seqlens=None)
    assert_close(found[1][inside], whole[1])
    assert (found[1][~inside] == 0).all()
    assert_close(found[0].sum(), whole[0].sum())


def gradient(name, given, **options):
    logp = given["logp"].detach().requires_grad_()
    loss = call(name, given | dict(logp=logp), **options).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), logp)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_sign_on_policy(name):
    """The first step raises tokens with a good advantage and lowers those with a bad one."""
    given = draw(on_policy=True)
    if name == "gmpo":  # per sequence: tokens share a ratio
        given["advantages"] = torch.repeat_interleave(torch.randn(5).double(), CU.diff())
    goal = given["advantages"]
    if name == "distill":
        goal = given["teacher_logp"] - given["logp"]
    if name == "iw_opd":
        goal = given["teacher_logp"] - given["rollout_logp"]
    if name in ("dft", "sft"):
        goal = torch.ones_like(goal)
    if name == "nft":
        goal = given["reward"] - 0.5
    if name in ("gspo", "luspo", "rloo"):
        given["advantages"] = goal = torch.repeat_interleave(torch.randn(5).double(), CU.diff())
    _, grad = gradient(name, given, beta=0.0)
    kept = given["mask"] & ~given["selected"] if name == "clip_cov" else given["mask"]
    assert (grad[kept] * goal[kept] < 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_extremes_stay_finite(name, impl):
    """Log-ratios of +-80 to the old, the reference and the rollout policy, in float32."""
    ratio = torch.tensor([80.0, -80, 80, -80, 0, 80, -80])
    logp = torch.full((7,), -100.0, requires_grad=True)
    given = dict(old_logp=-100 - ratio, ref_logp=-100 - ratio, rollout_logp=-100 + ratio)
    given |= dict(advantages=torch.tensor([1.0, 1, -1, -1, 0, 0, 0]), teacher_logp=-100 + ratio)
    given |= dict(reward=torch.tensor([1.0, 0, 0, 1, 1, 0, 1]), pass_rate=torch.linspace(0, 1, 7))
    given |= dict(off_policy=ratio > 0, selected=ratio > 0)
    cu = torch.tensor([0, 1, 2, 2, 4, 7], dtype=torch.int32)
    options = dict(cu_seqlens=cu, rollout_mode="token_truncate", impl=impl)
    found = call(name, given | dict(logp=logp), **options)
    found.loss.sum().backward()
    assert found.loss.isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics(name):
    given = draw()
    metrics = call(name, given, entropy=given["old_logp"].neg(), entropy_coef=0.1).metrics
    assert set(metrics) == {
        *("kl", "entropy", "policy/approx_kl"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean"),
    }
    for metric in metrics.values():
        assert isinstance(metric, Mean) and not metric.total.requires_grad
        assert metric.count == given["mask"].sum()


def test_clip_counts():
    """Ratios 2, 1/2 and 4 with advantages 1, 1, -1: one is above the range and gains by it."""
    given = tensors(GIVEN | dict(logp=LOGP))
    given = {k: given[k] for k in ("logp", "old_logp", "mask", "advantages")}
    low, high = ("clip_ratio/low_mean", "clip_ratio/high_mean")
    metrics = policy_loss(**given).metrics
    assert (metrics[low].total, metrics[high].total) == (0, 1)
    metrics = policy_loss(**given | dict(advantages=-given["advantages"])).metrics
    assert (metrics[low].total, metrics[high].total) == (1, 1)
    ratio = torch.tensor(RATIO).double()[[0, 1, 3]]
    assert_close(metrics["policy/approx_kl"].total, (ratio - 1 - ratio.log()).sum())


@pytest.mark.parametrize("name", ["reinforce", "vespo"])
def test_a_loss_without_a_clip_counts_none(name):
    metrics = call(name, draw()).metrics
    assert metrics["clip_ratio/low_mean"].total == metrics["clip_ratio/high_mean"].total == 0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregations(how):
    """What each is, on the tokens' own losses; the entropy's bonus and the KL go the same way."""
    given = draw()
    extra = dict(entropy=torch.rand(11).double(), entropy_coef=0.3, full_kl=torch.rand(11).double())
    tokens = call("ppo", given, **extra).loss
    bare = call("ppo", {k: v for k, v in given.items() if k != "ref_logp"}, beta=0.0).loss
    total = bare + torch.where(given["mask"], 0.1 * extra["full_kl"] - 0.3 * extra["entropy"], 0)
    assert_close(tokens, total)
    found = call("ppo", given, aggregation=how, **extra)
    rows = [total[a:b] for a, b in zip(CU[:-1], CU[1:], strict=True)]
    counts = [given["mask"][a:b].sum().clamp(min=1) for a, b in zip(CU[:-1], CU[1:], strict=True)]
    wanted = {
        "token-mean": total,
        "seq-mean-token-mean": torch.stack(
            [r.sum() / n for r, n in zip(rows, counts, strict=True)]
        ),
        "seq-mean-token-sum": torch.stack([r.sum() for r in rows]),
        "seq-mean-token-sum-norm": torch.stack([r.sum() / 7 for r in rows]),
    }[how]
    assert_close(found.loss, wanted)


@pytest.mark.parametrize("name, high", [("gspo", 4e-4), ("luspo", 2.5e-3)])
def test_the_range_of_a_mean_is_the_papers(name, high):
    """GSPO's section 5.1 and LUSPO's: a ratio just within moves, one just beyond does not."""
    old = torch.zeros(2, dtype=torch.float64)
    given = dict(old_logp=old, advantages=torch.ones(2))
    for ratio, moves in ((1 + 0.99 * high, True), (1 + 1.01 * high, False)):
        options = dict(cu_seqlens=torch.tensor([0, 2], dtype=torch.int32), beta=0.0)
        _, slope = gradient(name, given | dict(logp=old + math.log(ratio)), **options)
        assert bool((slope != 0).all()) == moves


def test_nft_pushes_a_wrong_token_by_its_ratio():
    """Its authors' clamp_negative=1 and normalize=1: w q R / ((1 - q) max(..., 1)) = q R."""
    given = tensors(dict(reward=[0.0, 0.0, 1.0], pass_rate=[0.2] * 3))
    given["old_logp"] = -torch.tensor([4.0, 0.5, 4.0], dtype=torch.float64).log()
    options = dict(aggregation="token-mean", cu_seqlens=None, beta=0.0)
    _, slope = gradient("nft", given | dict(logp=torch.zeros(3).double()), **options)
    assert_close(slope, torch.tensor([0.8, 0.1 / (0.9 / 0.8), -0.8], dtype=torch.float64))


def test_advantages_of_sequences_and_steps():
    """[S] stands for all tokens of a sequence; GSPO of steps has a ratio for each."""
    given = draw()
    advantages = torch.randn(5).double()
    spread = torch.repeat_interleave(advantages, CU.diff())
    found = call("gspo", given | dict(advantages=advantages))
    assert_close(found.loss, call("gspo", given | dict(advantages=spread)).loss)
    each = torch.arange(12, dtype=torch.int32)
    by_token = call("gspo", given, steps=each, epsilon=0.2, epsilon_high=0.2)
    assert_close(by_token.loss, call("grpo", given).loss)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_whole_numbers_are_numbers(dtype):
    """Rewards of 0 and 1 make advantages that nobody thinks of making floats."""
    given = draw(torch.float32)
    given["advantages"] = given["advantages"].sign()
    given["weight"] = torch.arange(len(CU) - 1.0)
    wanted = call("ppo", given, aggregation="seq-mean-token-sum")
    for name in ("advantages", "weight"):
        given[name] = given[name].to(dtype)
    assert_close(call("ppo", given, aggregation="seq-mean-token-sum").loss, wanted.loss)


def test_rollout_correction_is_a_weight_on_the_policy_term():
    given = draw()
    corrected = call("ppo", given, beta=0.0).loss
    rollout = given.pop("rollout_logp")
    weight = (given["old_logp"] - rollout).exp().clamp(max=2)
    assert_close(corrected, call("ppo", given, beta=0.0).loss * weight)
    assert_close(call("ppo", given, weight=weight, beta=0.0).loss, corrected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_log_prob_that_the_engine_did_not_give_is_the_trainers(name):
    """NaN, as in a replayed completion, counts as a ratio of 1, whichever loss corrects."""
    given = draw()
    unknown = torch.arange(len(given["logp"])) % 3 == 0
    found = []
    for nothing in (given["old_logp"], torch.nan):
        rollout = torch.where(unknown, nothing, given["rollout_logp"])
        found.append(gradient(name, given | dict(rollout_logp=rollout)))
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_hyperparameters_come_from_the_signature():
    assert hyperparameters(LOSSES["sapo"]) == dict(tau_pos=1.0, tau_neg=1.05)


BAD = {
    "loss_type: wanted one of ppo": dict(loss_type="gppo"),
    "kl: wanted one of k1": dict(kl="k4"),
    "tau: wanted an input or a hyperparameter of ppo: epsilon": dict(tau=1.0),
    "epsilon: wanted a number in": dict(epsilon=-0.1),
    "delta: wanted more than 1": dict(delta=1.0),
    "ref_logp: wanted a tensor, or full_kl": dict(beta=0.1),
    "entropy: wanted a tensor": dict(entropy_coef=0.1),
    "advantages: wanted a tensor": dict(advantages=None),
    r"advantages: wanted \(4,\), or a number per sequence; got \(3,\)": dict(
        advantages=torch.zeros(3)
    ),
    "mask: wanted bool; got torch.float32": dict(mask=torch.ones(4)),
    "mask: wanted a tensor on cpu; got meta": dict(mask=torch.ones(4, device="meta").bool()),
    "weight: wanted a tensor on cpu; got meta": dict(weight=torch.ones(4, device="meta")),
    "old_logp: wanted numbers; got torch.bool": dict(old_logp=torch.ones(4).bool()),
    "cu_seqlens: wanted a tensor": dict(loss_type="grpo", cu_seqlens=None),
    "cu_seqlens: wanted boundaries that rise": dict(
        cu_seqlens=torch.tensor([0, 3, 2, 4], dtype=torch.int32)
    ),
    "steps: wanted boundaries that rise from 0 .* 4; got 0 to 3": dict(
        loss_type="gspo", steps=torch.tensor([0, 3], dtype=torch.int32)
    ),
    "steps: wanted steps that each lie inside one.* at token 3": dict(
        loss_type="gspo", steps=torch.tensor([0, 2, 4], dtype=torch.int32)
    ),
    "max_length: wanted a length": dict(loss_type="dr_grpo"),
    "aggregation: wanted one of token-mean": dict(aggregation="mean"),
    "mode: wanted one of token_truncate": dict(rollout_logp=torch.zeros(4), rollout_mode="clip"),
    "low: wanted from 0 to below high": dict(
        rollout_logp=torch.zeros(4), rollout_bounds=(2.0, 1.0)
    ),
    "pass_rate: wanted a tensor": dict(loss_type="nft", reward=torch.ones(4)),
    "scale: wanted one of std": dict(
        loss_type="nft", reward=torch.ones(4), pass_rate=torch.ones(4), scale="var"
    ),
    "gamma: wanted a positive": dict(loss_type="luffy", off_policy=torch.ones(4).bool(), gamma=0.0),
    "logp: wanted": dict(logp=torch.zeros(2, 2, 2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = dict(logp=torch.zeros(4), old_logp=torch.zeros(4), advantages=torch.ones(4))
    given |= dict(cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        policy_loss(**given | BAD[message])
