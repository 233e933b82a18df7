"""GAE, shaped GAE, V-trace and discounted returns, every impl, against hand-worked values and a sum
over all later actions in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close as close

from prefuse.kernels import advantage_scan
from prefuse.kernels.advantage import (
    discounted_returns,
    gae,
    length_adaptive_lam,
    shaped_gae,
    vapo_gae,
)
from prefuse.kernels.advantage_parts import shaped_rewards
from prefuse.kernels.launch import choose_impl
from prefuse.kernels.vtrace import vtrace
from prefuse.kernels.whitening import whitening_statistics

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _runs(impl):
    try:
        return bool(choose_impl(impl, torch.device(DEVICE), ("cuda", "triton", "cpu")))
    except ValueError:
        return False


FAST = [impl for impl in ("cuda", "triton", "cpu") if _runs(impl)]
IMPLS = ["reference", *FAST]
# Around the lanes, warps, chunks and blocks of the scans: 4, 64, 128, 256, 1024, 2048 tokens.
RAGGED = [1, 3, 0, 4, 127, 0, 129, 1023, 5, 1025, 2300, 2]
SHORT = [5, 0, 1, 60, 33, 2]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Interpreted, a block takes time for each of its lanes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(advantage_scan, "BLOCK", 64)


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def ragged_batch(lengths=RAGGED, device=DEVICE, observed=0.4):
    """Packed float64 rewards, values, mask and bootstrap; rewards at observations too."""
    total = sum(lengths)
    return dict(
        rewards=torch.randn(total, dtype=torch.float64, device=device),
        values=torch.randn(total, dtype=torch.float64, device=device),
        mask=torch.rand(total, device=device) >= observed,
        bootstrap=torch.randn(len(lengths), dtype=torch.float64, device=device),
        cu_seqlens=boundaries(lengths, device),
    )


def random_steps(lengths, longest=7):
    """Boundaries of steps of 1 to `longest` tokens that tile every sequence."""
    cuts = [0]
    for end in boundaries(lengths)[1:].tolist():
        while cuts[-1] < end:
            cuts.append(min(end, cuts[-1] + int(torch.randint(1, longest + 1, ()))))
    return torch.tensor(cuts, dtype=torch.int32, device=DEVICE)


def by_definition(rewards, values, cu_seqlens, gamma, lam, mask, bootstrap, steps):
    """A_k = sum over l of (gamma lam)^l delta_{k+l}, each sum written out. Float64 lists."""
    rewards, values = rewards.tolist(), values.tolist()
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    cuts, ends = steps.tolist(), cu_seqlens.tolist()
    for s, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        groups = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            group = [t for t in range(first, last) if mask[t]]
            if begin <= first < end and group:
                groups.append(group)
        starts = [group[0] for group in groups] + [end]
        value = [values[group[0]] for group in groups] + [float(bootstrap[s])]
        delta = [
            sum(rewards[starts[k] : starts[k + 1]]) + gamma * value[k + 1] - value[k]
            for k in range(len(groups))
        ]
        for k, group in enumerate(groups):
            advantage = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(groups)))
            for t in group:
                advantages[t], returns[t] = advantage, advantage + value[k]
    return torch.tensor([advantages, returns], dtype=torch.float64, device=DEVICE)


def assert_close(got, wanted, impl):
    got, wanted = torch.stack(tuple(got)), torch.stack(tuple(wanted))
    assert got.dtype == (torch.float64 if impl == "reference" else torch.float32)
    tolerance = 1e-11 if impl == "reference" else 2e-6
    scale = wanted.abs().max()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_worked(impl):
    # delta = (1 + .5*2 - 1, 0 + .5*4 - 2, 3 + .5*6 - 4) = (1, 0, 2), gamma lam = 1/4;
    # the second sequence terminates: A = -1 - 5.
    rewards = torch.tensor([1.0, 0.0, 3.0, -1.0], dtype=torch.float64, device=DEVICE)
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64, device=DEVICE)
    got = gae(
        rewards,
        values,
        boundaries([3, 1], DEVICE),
        gamma=0.5,
        lam=0.5,
        bootstrap=torch.tensor([6.0, 0.0], device=DEVICE),
        impl=impl,
    )
    assert got[0].tolist() == [1.125, 0.5, 2.0, -6.0]
    assert got[1].tolist() == [2.125, 2.5, 6.0, -1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_worked_observations_and_steps(impl):
    # Tokens 0 to 5: act, act, observe, act, observe, act; steps (0,1), (2,3), (4), (5).
    # Actions: (0,1) earns 1+2+4 (the observation's reward too), (3) earns 8+16, (5) earns 32.
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64, device=DEVICE)
    values = torch.tensor([1.0, 9.0, 9.0, 2.0, 9.0, 4.0], dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    steps = torch.tensor([0, 2, 4, 5, 6], dtype=torch.int32, device=DEVICE)
    got = gae(
        rewards,
        values,
        boundaries([6], DEVICE),
        gamma=0.5,
        lam=1.0,
        mask=mask,
        steps=steps,
        impl=impl,
    )
    # G = 7 + (24 + 32/2)/2, 24 + 32/2, 32.
    assert got[1].tolist() == [27.0, 27.0, 0.0, 40.0, 0.0, 32.0]
    assert got[0].tolist() == [26.0, 26.0, 0.0, 38.0, 0.0, 28.0]


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)]
)
@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_definition(impl, with_steps, gamma, lam):
    batch = ragged_batch(SHORT)
    tokens = torch.arange(sum(SHORT) + 1, dtype=torch.int32, device=DEVICE)
    steps = random_steps(SHORT) if with_steps else tokens
    wanted = by_definition(**batch, gamma=gamma, lam=lam, steps=steps)
    got = gae(**batch, gamma=gamma, lam=lam, steps=steps if with_steps else None, impl=impl)
    assert_close(got, wanted, impl)


@pytest.mark.parametrize(
    "optional, lam",
    [("all", 1.0), ("all", 0.95), ("mask", 1.0), ("bootstrap", 1.0), ("steps", 1.0), ("none", 1.0)],
)
@pytest.mark.parametrize("impl", FAST)
def test_ragged_batches_equal_the_reference(impl, optional, lam):
    batch = ragged_batch()
    steps = random_steps(RAGGED) if optional in ("all", "steps") else None
    for name in ("mask", "bootstrap"):
        if optional not in ("all", name):
            del batch[name]
    wanted = gae(**batch, lam=lam, steps=steps, impl="reference")
    got = gae(**batch, lam=lam, steps=steps, impl=impl)
    assert_close(got, wanted, impl)


@pytest.mark.parametrize("impl", FAST)
def test_many_tiny_sequences(impl):
    batch = ragged_batch([1, 0, 2] * (4 if impl == "triton" and DEVICE == "cpu" else 2000))
    wanted = gae(**batch, gamma=0.9, impl="reference")
    assert_close(gae(**batch, gamma=0.9, impl=impl), wanted, impl)


@pytest.mark.parametrize("impl", [i for i in FAST if DEVICE == "cuda" or i == "cpu"])
def test_the_same_bits_in_every_run(impl):
    batch, threads = ragged_batch(), torch.get_num_threads()
    first = torch.stack(gae(**batch, lam=1.0, impl=impl))
    try:
        for count in range(1, 6):
            torch.set_num_threads(count)
            assert torch.equal(first, torch.stack(gae(**batch, lam=1.0, impl=impl)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_at_odd_addresses(impl):
    batch = ragged_batch([40, 29])
    wanted = gae(**batch, impl="reference")
    for name in ("rewards", "values", "mask", "bootstrap", "cu_seqlens"):
        x = batch[name].to(torch.float32) if name in ("rewards", "values") else batch[name]
        batch[name] = torch.cat([x[:1], x])[1:]
    got = gae(**batch, impl=impl)
    torch.testing.assert_close(got, tuple(x.float() for x in wanted))


@pytest.mark.parametrize("impl", IMPLS)
def test_another_sequence_changes_nothing(impl):
    batch = ragged_batch([70, 31])
    alone = torch.stack(gae(**batch, impl=impl))
    spoiled = torch.full((50,), float("nan"), dtype=torch.float64, device=DEVICE)
    for before, after in ((0, 50), (50, 0)):
        head, tail = spoiled[:before], spoiled[:after]
        more = dict(
            rewards=torch.cat([head, batch["rewards"], tail]),
            values=torch.cat([head, batch["values"], tail]),
            mask=torch.cat([head.isnan(), batch["mask"], tail.isnan()]),
            bootstrap=torch.cat([head[:1], batch["bootstrap"], tail[:1]]),
            cu_seqlens=boundaries([n for n in (before, 70, 31, after) if n], DEVICE),
        )
        together = torch.stack(gae(**more, impl=impl))
        torch.testing.assert_close(together[:, before : before + 101], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_observations_take_no_time(impl):
    """Observations put in anywhere leave the actions' advantages; their values are not read."""
    batch = ragged_batch([40, 9], observed=0.0)
    bare = gae(**batch, gamma=0.9, impl=impl)
    acts = torch.ones(49, dtype=torch.bool, device=DEVICE)
    acts = torch.stack([acts, ~acts, ~acts], 1).flatten()  # two observations after each action
    padded = dict(mask=acts, bootstrap=batch["bootstrap"], cu_seqlens=3 * batch["cu_seqlens"])
    for name, filler in (("rewards", 0.0), ("values", float("nan"))):
        padded[name] = torch.full((147,), filler, dtype=torch.float64, device=DEVICE)
        padded[name][acts] = batch[name]
    for got, wanted in zip(gae(**padded, gamma=0.9, impl=impl), bare, strict=True):
        torch.testing.assert_close(got[acts], wanted, rtol=1e-6, atol=1e-6)
        assert not got[~acts].any()
    # A reward at an observation is the preceding action's, as if it stood there.
    for _ in range(2):
        padded["rewards"] = padded["rewards"].roll(1)
        later = gae(**padded, gamma=0.9, impl=impl)
        torch.testing.assert_close(torch.stack(later)[:, acts], torch.stack(bare))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_reward_before_the_first_action_reaches_none(impl):
    batch = ragged_batch([20, 20])
    batch["mask"][[0, 1, 20]] = False
    wanted = torch.stack(gae(**batch, impl=impl))
    batch["rewards"][[0, 20]] += 100.0
    assert torch.equal(torch.stack(gae(**batch, impl=impl)), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_of_one_token_are_token_gae(impl):
    batch = ragged_batch([50, 0, 13])
    steps = torch.arange(64, dtype=torch.int32, device=DEVICE)
    plain, stepped = gae(**batch, impl=impl), gae(**batch, steps=steps, impl=impl)
    assert torch.equal(torch.stack(plain), torch.stack(stepped))


@pytest.mark.parametrize("impl", IMPLS)
def test_lambda_one_is_returns_minus_values(impl):
    batch = ragged_batch([60, 0, 41])
    advantages, returns = gae(**batch, gamma=0.9, lam=1.0, impl=impl)
    values, mask = batch.pop("values"), batch["mask"]
    wanted = discounted_returns(**batch, gamma=0.9, impl=impl)
    torch.testing.assert_close(returns, wanted, rtol=1e-6, atol=1e-6)
    baseline = wanted - values.to(wanted.dtype).where(mask, 0.0)
    torch.testing.assert_close(advantages, baseline, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_discounted_returns_by_hand(impl):
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    got = discounted_returns(
        rewards,
        boundaries([3, 1], DEVICE),
        gamma=0.5,
        mask=mask,
        bootstrap=torch.tensor([2.0, 0.0], device=DEVICE),
        impl=impl,
    )
    assert got.tolist() == [1 + 2 + 0.5 * 5, 0.0, 5.0, 8.0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl, lengths):
    empty = torch.zeros(0, device=DEVICE)
    advantages, returns = gae(empty, empty, boundaries(lengths, DEVICE), impl=impl)
    assert advantages.shape == returns.shape == (0,)
    assert discounted_returns(empty, boundaries(lengths, DEVICE), impl=impl).shape == (0,)


def logps(total):
    """Log-probabilities [T] of two models; at observations they do not matter."""
    return {n: torch.randn(total, dtype=torch.float64, device=DEVICE) for n in ("logp", "ref_logp")}


def lambdas(sequences):
    return torch.rand(sequences, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_shaped_hand_worked(impl):
    # k1 = 2, 4, 100; rewards 1 - 2/2, 0, and 3 - 4/2 + the observation's 8, not its KL: 0, 0, 9.
    # delta = (0 + .5*2 - 1, 9 - 2) = (0, 7); A at lam 1/2: 7/4, 7; G at lam 1: 1 + 7/2, 9.
    got = shaped_gae(
        torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64, device=DEVICE),
        torch.tensor([1.0, 2.0, 77.0], dtype=torch.float64, device=DEVICE),
        boundaries([3], DEVICE),
        torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64, device=DEVICE),
        torch.tensor([-3.0, -5.0, -100.0], dtype=torch.float64, device=DEVICE),
        kl_coef=0.5,
        gamma=0.5,
        lam=0.5,
        critic_lam=1.0,
        mask=torch.tensor([True, True, False], device=DEVICE),
        impl=impl,
    )
    assert got.advantages.tolist() == [1.75, 7.0, 0.0]
    assert got.returns.tolist() == [4.5, 9.0, 0.0]
    assert got.statistics.tolist() == [2.0, 8.75, 1.75**2 + 49]


@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_separate_lambdas_are_two_definitions(impl, with_steps):
    batch = ragged_batch(SHORT)
    tokens = torch.arange(sum(SHORT) + 1, dtype=torch.int32, device=DEVICE)
    steps = random_steps(SHORT) if with_steps else tokens
    options = dict(gamma=0.9, steps=steps)
    wanted = [by_definition(**batch, lam=lam, **options)[i] for i, lam in enumerate((0.3, 1.0))]
    options["steps"] = steps if with_steps else None
    got = gae(**batch, lam=0.3, critic_lam=1.0, **options, impl=impl)
    assert_close(got, wanted, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_lambdas_of_sequences_are_calls_per_sequence(impl):
    batch = ragged_batch(SHORT)
    lams, critic_lams = lambdas(len(SHORT)), lambdas(len(SHORT))
    together = torch.stack(gae(**batch, lam=lams, critic_lam=critic_lams, impl=impl))
    alike = torch.stack(gae(**batch, lam=lams, impl=impl))
    ends = batch["cu_seqlens"].tolist()
    for s, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        alone = {k: batch[k][begin:end] for k in ("rewards", "values", "mask")}
        alone |= dict(bootstrap=batch["bootstrap"][s : s + 1])
        alone |= dict(cu_seqlens=boundaries([end - begin], DEVICE))
        lam, critic_lam = float(lams[s]), float(critic_lams[s])
        one = torch.stack(gae(**alone, lam=lam, critic_lam=critic_lam, impl=impl))
        close(together[:, begin:end], one, rtol=1e-5, atol=1e-6)
        one = torch.stack(gae(**alone, lam=lam, impl=impl))
        close(alike[:, begin:end], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "mask bootstrap kl",
        "mask bootstrap kl critic",
        "kl lams",
        "mask lams critic_lams steps kl",
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_shaped_gae_is_the_composition(impl, given):
    lengths = SHORT if impl == "triton" and DEVICE == "cpu" else RAGGED
    batch, options = ragged_batch(lengths), {}
    for name in ("mask", "bootstrap"):
        if name not in given.split():
            del batch[name]
    if "steps" in given.split():
        options["steps"] = random_steps(lengths)
    if "lams" in given.split():
        options["lam"] = lambdas(len(lengths))
    if "critic" in given.split():
        options["critic_lam"] = 1.0
    if "critic_lams" in given.split():
        options["critic_lam"] = lambdas(len(lengths))
    pair = logps(sum(lengths)) if "kl" in given.split() else {}
    got = shaped_gae(**batch, **pair, kl_coef=0.3, **options, impl=impl)
    if pair:
        mask = batch.get("mask")
        batch["rewards"] = shaped_rewards(batch["rewards"], **pair, mask=mask, kl_coef=0.3)
    wanted = gae(**batch, **options, impl="reference")
    assert_close(got[:2], wanted, impl)
    statistics = whitening_statistics(wanted[0], batch.get("mask"))
    close(got.statistics, statistics, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_observations_have_no_kl(impl):
    batch, pair = ragged_batch([40, 9]), logps(49)
    wanted = shaped_gae(**batch, **pair, impl=impl)
    for x in pair.values():
        x[~batch["mask"]] = float("nan")
    got = shaped_gae(**batch, **pair, impl=impl)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_the_same_statistics_in_every_run():
    batch, threads = ragged_batch(), torch.get_num_threads()
    pair = logps(sum(RAGGED))
    first = shaped_gae(**batch, **pair).statistics
    try:
        for count in range(1, 5):
            torch.set_num_threads(count)
            assert torch.equal(first, shaped_gae(**batch, **pair).statistics)
    finally:
        torch.set_num_threads(threads)


def test_vapo_lambda_by_hand():
    cu_seqlens = boundaries([100, 20, 5, 0, 40], DEVICE)
    lam = length_adaptive_lam(cu_seqlens, alpha=0.05)
    close(lam.cpu(), torch.tensor([0.8, 0.0, 0.0, 0.0, 0.5]))
    mask = torch.arange(165, device=DEVICE) % 2 == 0
    halved = length_adaptive_lam(cu_seqlens, mask, alpha=0.1)
    close(halved.cpu(), torch.tensor([0.8, 0.0, 0.0, 0.0, 0.5]))
    batch = ragged_batch([100, 20, 5, 0, 40], observed=0.0)
    got = vapo_gae(**batch, gamma=0.9)
    close(got[0], gae(**batch, gamma=0.9, lam=lam)[0])
    close(got[1], gae(**batch, gamma=0.9, lam=1.0)[1])


def vtrace_by_definition(batch, log_ratio, gamma, lam, rho_bar, c_bar):
    """v_k = V_k + sum over j >= k of gamma^(j-k) (prod of c_i, k <= i < j) delta_j."""
    rewards, values, mask = (batch[k].tolist() for k in ("rewards", "values", "mask"))
    advantages, targets = [0.0] * len(rewards), [0.0] * len(rewards)
    ends, ratio = batch["cu_seqlens"].tolist(), log_ratio.exp().tolist()
    for s, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        at = [t for t in range(begin, end) if mask[t]]
        starts = [*at, end]
        value = [values[t] for t in at] + [float(batch["bootstrap"][s])]
        earned = [sum(rewards[starts[k] : starts[k + 1]]) for k in range(len(at))]
        rho = [min(rho_bar, ratio[t]) for t in at]
        c = [lam * min(c_bar, ratio[t]) for t in at]
        v = list(value)
        for k in range(len(at)):
            trace = 1.0
            for j in range(k, len(at)):
                v[k] += trace * rho[j] * (earned[j] + gamma * value[j + 1] - value[j])
                trace *= gamma * c[j]
        for k, t in enumerate(at):
            targets[t] = v[k]
            advantages[t] = rho[k] * (earned[k] + gamma * v[k + 1] - value[k])
    return torch.tensor([advantages, targets], dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("bars", [(1.0, 1.0), (2.0, 0.7), (float("inf"), float("inf"))])
def test_vtrace_equals_the_definition(bars):
    batch = ragged_batch([5, 0, 1, 30, 2])
    log_ratio = torch.randn(38, dtype=torch.float64, device=DEVICE)
    options = dict(gamma=0.9, lam=0.8, rho_bar=bars[0], c_bar=bars[1])
    wanted = vtrace_by_definition(batch, log_ratio, **options)
    log_ratio[~batch["mask"]] = float("nan")  # not read
    got = vtrace(**batch, log_ratio=log_ratio, **options)
    close(torch.stack(got), wanted, rtol=1e-11, atol=1e-11)


def test_vtrace_by_hand():
    # R = 4, 1/2; rho = 2, 1/2; c = 1, 1/2. delta = 2 (1 + 3 - 1), (2 + 5 - 3) / 2 = 6, 2.
    # v = 1 + 6 + 1 * 2, 3 + 2; A = 2 (1 + 5 - 1), (2 + 5 - 3) / 2.
    got = vtrace(
        torch.tensor([1.0, 2.0], device=DEVICE),
        torch.tensor([1.0, 3.0], device=DEVICE),
        boundaries([2], DEVICE),
        torch.tensor([4.0, 0.5], device=DEVICE).log(),
        rho_bar=2.0,
        bootstrap=torch.tensor([5.0], device=DEVICE),
    )
    close(torch.stack(got).cpu(), torch.tensor([[10.0, 2.0], [9.0, 5.0]]))


def test_vtrace_on_policy_is_gae():
    """At lam = 1: discounted returns, and A = return - value."""
    batch = ragged_batch([40, 0, 9])
    on_policy = torch.zeros_like(batch["rewards"])
    got = vtrace(**batch, log_ratio=on_policy, gamma=0.9)
    close(got, gae(**batch, gamma=0.9, lam=1.0, impl="reference"))
    returns = vtrace(**batch, log_ratio=on_policy, gamma=0.9, lam=0.7)[1]
    close(returns, gae(**batch, gamma=0.9, lam=0.7, impl="reference")[1])


def test_vtrace_extremes_are_finite():
    batch = {k: x.float() if x.is_floating_point() else x for k, x in ragged_batch([9, 1]).items()}
    for log_ratio in (1000.0, -1000.0):
        ratios = torch.full((10,), log_ratio, device=DEVICE)
        for x in vtrace(**batch, log_ratio=ratios):
            assert x.isfinite().all()


CALLS = {
    "gae": lambda batch, pair: gae(**batch, critic_lam=1.0),
    "lams": lambda batch, pair: gae(**batch, lam=batch["bootstrap"].abs().clamp(max=1)),
    "steps": lambda batch, pair: gae(**batch, steps=batch["cu_seqlens"]),
    "shaped_gae": lambda batch, pair: shaped_gae(**batch, **pair),
    "vapo_gae": lambda batch, pair: vapo_gae(**batch),
    "vtrace": lambda batch, pair: vtrace(**batch, log_ratio=pair["logp"]),
    "discounted_returns": lambda batch, pair: (
        discounted_returns(batch["rewards"], batch["cu_seqlens"], mask=batch["mask"]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_value_is_asked_for(name):
    batch, pair = ragged_batch([7, 0, 3]), logps(10)
    with FakeTensorMode() as mode:
        fake = [{k: mode.from_tensor(x) for k, x in given.items()} for given in (batch, pair)]
        for x in CALLS[name](*fake)[:2]:
            assert x.shape == (10,)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole(name):
    batch, pair = ragged_batch([7, 0, 3]), logps(10)
    torch.compiler.reset()
    compiled = torch.compile(CALLS[name], backend="eager", fullgraph=True)
    for got, wanted in zip(compiled(batch, pair), CALLS[name](batch, pair), strict=True):
        close(got.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_low_precision_in_and_no_gradient_out():
    rewards = torch.randn(9, device=DEVICE).bfloat16()
    values = torch.randn(9, device=DEVICE).bfloat16().requires_grad_()
    got = gae(rewards, values, boundaries([9], DEVICE))
    wanted = gae(rewards.double(), values.double(), boundaries([9], DEVICE), impl="reference")
    for mine, exact in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32 and not mine.requires_grad
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(values=torch.zeros(5)), r"values: wanted shape \(6,\); got \(5,\)"),
        (dict(rewards=torch.zeros(6).long()), "rewards: wanted a 1-D floating-point tensor"),
        (dict(mask=torch.ones(6)), "mask: wanted bool; got torch.float32"),
        (dict(bootstrap=torch.zeros(6)), r"bootstrap: wanted shape \(2,\)"),
        (dict(gamma=1.5), r"gamma: wanted a number in \[0, 1\]; got 1.5"),
        (dict(lam=float("nan")), "lam: wanted a number"),
        (dict(critic_lam=-0.1), r"critic_lam: wanted a number in \[0, 1\]; got -0.1"),
        (dict(lam=torch.zeros(3)), r"lam: wanted shape \(2,\); got \(3,\)"),
        (dict(lam=torch.zeros(2).long()), "lam: wanted a floating-point dtype"),
        (dict(cu_seqlens=torch.tensor([0, 2, 6])), "cu_seqlens: wanted a 1-D int32 tensor"),
        (dict(steps=[0, 1, 3, 6]), "steps: .* crosses the sequence boundary at token 2"),
        (dict(steps=[0, 2, 5]), "steps: wanted boundaries that rise from 0 .* 6; got 0 to 5"),
        (dict(steps=[0, 4, 2, 6]), "steps: .* falling in between"),
        (dict(steps=[1, 2, 6]), "steps: .* got 1 to 6"),
        (dict(impl="fast"), "impl: wanted one of auto, reference, cuda, triton, cpu; got 'fast'"),
    ],
)
def test_errors_say_what_was_wanted(change, message):
    good = dict(rewards=torch.zeros(6), values=torch.zeros(6), cu_seqlens=boundaries([2, 4]))
    if isinstance(change.get("steps"), list):
        change = dict(steps=torch.tensor(change["steps"], dtype=torch.int32))
    inputs = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in (good | change).items()
    }
    with pytest.raises(ValueError, match=message):
        gae(**inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="the values are on the GPU")
def test_lambdas_out_of_range():
    zeros = torch.zeros(6)
    with pytest.raises(ValueError, match=r"lam: wanted numbers in \[0, 1\]; got 0.5 to 1.5"):
        gae(zeros, zeros, boundaries([2, 4]), lam=torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, cu: shaped_gae(x, x, cu, x), "ref_logp: wanted both log-probabilities"),
        (lambda x, cu: shaped_gae(x, x, cu, None, x), "^logp: wanted both log-probabilities"),
        (lambda x, cu: shaped_gae(x, x, cu, x, x[1:]), r"ref_logp: wanted shape \(6,\)"),
        (lambda x, cu: vtrace(x, x, cu, x[1:]), r"log_ratio: wanted shape \(6,\); got \(5,\)"),
        (lambda x, cu: vtrace(x, x, cu, x, rho_bar=0.5), "rho_bar: wanted at least c_bar, 1.0"),
        (lambda x, cu: vtrace(x, x, cu, x, c_bar=0.0), "c_bar: wanted a positive number; got 0.0"),
        (lambda x, cu: length_adaptive_lam(cu, alpha=0.0), "alpha: wanted a positive number"),
    ],
)
def test_errors_of_the_others(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(6, device=DEVICE), boundaries([2, 4], DEVICE))
