"""Every loss of reward, cost, preference and process models, through one table of cases."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prefuse.kernels.objective import Mean
from prefuse.kernels.preference_parts import hyperparameters
from prefuse.kernels.reward import COMBINERS, LOSSES, odin_moments

NAN = float("nan")


def h(z: float) -> float:
    return math.log1p(math.exp(-z))


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def mixed(z: float) -> float:
    return -math.log(0.9 * s(z) + 0.05)


@dataclass
class Case:
    loss: str
    given: dict
    values: list[float]
    options: dict = field(default_factory=dict)
    wrt: tuple[str, ...] = ()  # what learns; the first of `given` if empty
    falls: tuple[str, ...] = ()  # raising it lowers the loss, wherever it is seen
    rises: tuple[str, ...] = ()
    packed: dict[str, str] = field(default_factory=dict)  # tokens -> their boundaries
    shared: tuple[str, ...] = ()  # neither rows nor tokens

    def __post_init__(self):
        self.wrt = self.wrt or tuple(self.given)[:1]

    def tensors(self, dtype=torch.float64, learn=True) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in self.given.items():
            x = torch.tensor(value)
            if x.is_floating_point():
                x = torch.tensor(value, dtype=dtype)
            if name in self.packed.values():
                x = x.to(torch.int32)
            found[name] = x.requires_grad_() if learn and name in self.wrt else x
        if self.loss == "odin":
            found["moments"] = odin_moments(*list(found.values())[:6])
        return found

    def call(self, tensors: dict[str, torch.Tensor]):
        return LOSSES[self.loss](**tensors, **self.options)

    def rows(self, tensors: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
        """Some of the units, in any order, as if they were the batch."""
        found = {}
        for name, x in tensors.items():
            if name in (*self.shared, "moments", *self.packed.values()):
                found[name] = x
            elif name in self.packed:
                bounds = self.packed[name]
                parts = x.split(tensors[bounds].diff().tolist())
                found[name] = torch.cat([x[:0], *(parts[i] for i in rows)])
            else:
                found[name] = x[rows]
        for bounds in set(self.packed.values()):
            lengths = tensors[bounds].diff()[rows]
            found[bounds] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        return found


E = math.e
PAIR = dict(chosen=[1.0, -1.0, 0.5], rejected=[-1.0, 1.0, 0.5])
MARGIN, PREFERENCE = dict(margin=[1.0, 0.0, -1.0]), dict(preference=[0.75, 0.0, 1.0])
UP_DOWN = dict(wrt=("chosen", "rejected"), falls=("chosen",), rises=("rejected",))
COST = dict(more_harmful=[2.0, 1.0], less_harmful=[1.0, -1.0])
COST |= dict(more_harmful_unsafe=[True, True], less_harmful_unsafe=[True, False])
# n = 10 q + 10: corr(q, n) = 1; corr(v, n) = 0; W_q and W_v have cosine 0.6
ODIN = dict(chosen_quality=[3.0, 1.0], rejected_quality=[0.0, 2.0])
ODIN |= dict(chosen_length=[1.0, -1.0], rejected_length=[1.0, -1.0])
ODIN |= dict(chosen_len=[40, 20], rejected_len=[10, 30])
ODIN |= dict(quality_weight=[1.0, 0.0], length_weight=[3.0, 4.0])
LORE = dict(user_logits=[[0.0, 0.0], [math.log(3), 0.0]])
LORE |= dict(chosen_basis=[[1.0, 3.0], [4.0, 0.0]], rejected_basis=[[0.0, 0.0], [0.0, 4.0]])
VPL = dict(chosen=[1.0, 0.0], rejected=[-1.0, 1.0])
VPL |= dict(mean=[[1.0, 0.0], [0.0, 2.0]], log_var=[[0.0, math.log(2)], [0.0, 0.0]])
RATED = dict(rewards=[[1.0, 2.0], [0.0, 3.0]], target=[[0.0, 0.0], [1.0, NAN]])
RATED |= dict(mask=[[True, True], [True, False]])
LIST = dict(rewards=[[1.0, 0.0, -1.0, 9.0], [2.0, 2.0, 1.0, 9.0]])
LIST |= dict(quality=[[3.0, 2.0, 1.0, NAN], [1.0, 1.0, 0.0, 0.5]], mask=[[True] * 3 + [False]] * 2)
RETURNS = dict(chosen_rewards=[1.0, 2.0, -1.0], chosen_cu_seqlens=[0, 2, 3])
RETURNS |= dict(rejected_rewards=[1.0, 0.25, 0.75], rejected_cu_seqlens=[0, 1, 3])
RETURNS_KIND = dict(
    wrt=("chosen_rewards", "rejected_rewards"),
    falls=("chosen_rewards",),
    rises=("rejected_rewards",),
    packed=dict(chosen_rewards="chosen_cu_seqlens", rejected_rewards="rejected_cu_seqlens"),
)
STEPS = dict(scores=[2.0, -1.0, 7.0], labels=[1.0, 0.25, NAN], mask=[True, True, False])
CLASSES = dict(scores=[[0.0, math.log(3)], [0.0, 0.0], [1.0, 2.0]], labels=[1, 0, -100])
CLASSES |= dict(mask=STEPS["mask"])
SOFT_CLASSES = CLASSES | dict(labels=[[0.5, 0.5], [1.0, 0.0], [NAN, NAN]])
IMPLICIT = dict(logp=[-1.0, -2.0, -3.0, -1.0], ref_logp=[-2.0, -2.0, -2.0, -1.5])
IMPLICIT |= dict(cu_seqlens=[0, 2, 2, 4], correct=[1.0, 0.0, 0.25])
IMPLICIT_KIND = dict(packed=dict(logp="cu_seqlens", ref_logp="cu_seqlens"))
VERDICT = dict(first=[-1.0, -3.0], second=[-2.0, -1.0], preference=[1.0, 0.25])
GOALS = dict(state=[[3.0, 4.0], [1.0, 0.0]], goal=[[6.0, 8.0], [0.0, 2.0]])
GOALS |= dict(other_goal=[[4.0, -3.0], [-2.0, 0.0]])
NCE = dict(anchors=[[1.0, 0.0], [0.0, 2.0]], candidates=[[0.0, 1.0], [0.0, -1.0], [5.0, 0.0]])
NCE |= dict(targets=[2, 0])
CASES = [
    Case("bradley_terry", PAIR, [h(2), h(-2), h(0)], **UP_DOWN),
    Case("bradley_terry", PAIR | MARGIN, [h(1), h(-2), h(1)], **UP_DOWN),
    Case("bradley_terry", PAIR | PREFERENCE, [0.75 * h(2) + 0.25 * h(-2), h(2), h(0)]),
    Case("bradley_terry", PAIR, [h(2), h(-2), h(0) + 0.5], dict(centering=0.5), UP_DOWN["wrt"]),
    Case(
        "bradley_terry",
        PAIR,
        [0.9 * h(2) + 0.1 * h(-2), 0.9 * h(-2) + 0.1 * h(2), h(0)],
        dict(label_smoothing=0.1),
    ),
    Case(
        "bradley_terry",
        PAIR | MARGIN | PREFERENCE,
        [0.7 * h(1) + 0.3 * h(-1), 0.1 * h(-2) + 0.9 * h(2), 0.9 * h(1) + 0.1 * h(-1)],
        dict(label_smoothing=0.1),
    ),
    Case(
        "cost",
        COST,
        [h(1) + h(2) + h(1), h(2) + h(1) + h(1)],
        wrt=("more_harmful", "less_harmful"),
        falls=("more_harmful",),
    ),
    Case(
        "odin",
        ODIN,
        [h(3) + 2 * 1.8 + 0.3, h(-1) + 2 * 0.2 + 0.3],
        dict(length_coef=2.0, orthogonality_coef=0.5),
        wrt=(*tuple(ODIN)[:4], "quality_weight", "length_weight"),
        shared=("quality_weight", "length_weight"),
    ),
    Case(
        "lore",
        LORE,
        [h(1), h(1)],
        dict(divisor=2.0),
        wrt=tuple(LORE),
        falls=("chosen_basis",),
        rises=("rejected_basis",),
    ),
    Case(
        "vpl",
        VPL,
        [h(2) + (2 - math.log(2)) / 4, h(-1) + 1],
        dict(kl_coef=0.5),
        wrt=tuple(VPL),
        falls=("chosen",),
        rises=("rejected",),
    ),
    Case(
        "binary",
        dict(rewards=[2.0, -1.0, 0.5], label=[1.0, 0.0, 0.25]),
        [h(2), h(1), 0.25 * h(0.5) + 0.75 * h(-0.5)],
    ),
    Case("binary", dict(rewards=[2.0, -1.0], label=[True] * 2), [h(2), h(-1)], falls=("rewards",)),
    Case("regression", dict(rewards=[2.0, 0.0, 5.0], target=[1.0, 0.5, 1.0]), [1.0, 0.25, 16.0]),
    Case(
        "regression",
        dict(rewards=[2.0, 0.0, 5.0], target=[1.0, -0.5, 1.0]),
        [1.0, 0.25, 12.0],
        dict(huber=2.0),
        rises=("rewards",),
    ),
    Case("regression", RATED, [2.5, 1.0]),
    Case(
        "ordinal",
        dict(rewards=[0.0, 0.5, 2.0], label=[0, 1, 2], thresholds=[0.0, 1.0]),
        [math.log(2), -math.log(s(0.5) - s(-0.5)), h(1)],
        wrt=("rewards", "thresholds"),
        shared=("thresholds",),
    ),
    Case(
        "ordinal",
        dict(rewards=[0.0, 2.0], label=[2, 2], thresholds=[0.0, 1.0]),
        [h(-1), h(1)],
        falls=("rewards",),
        shared=("thresholds",),
    ),
    Case("k_wise", LIST, [math.log(E + 1 + 1 / E) - 1 + math.log(1 + 1 / E), 2 * h(1)]),
    Case("all_pairs", LIST, [(2 * h(1) + h(2)) / 3, h(1)]),
    Case(
        "all_pairs",
        LIST,
        [(1.5 * h(1) + 0.5 * h(-1) + 0.75 * h(2) + 0.25 * h(-2)) / 3, 0.75 * h(1) + 0.25 * h(-1)],
        dict(label_smoothing=0.25),
    ),
    Case("bradley_terry_returns", RETURNS, [mixed(2), mixed(-2)], **RETURNS_KIND),
    Case("bradley_terry_returns", RETURNS, [h(2), h(-2)], dict(random_labels=0.0), **RETURNS_KIND),
    Case(
        "bradley_terry_returns",
        RETURNS | dict(preference=[0.5, 0.25]),
        [(mixed(2) + mixed(-2)) / 2, 0.25 * mixed(-2) + 0.75 * mixed(2)],
        packed=RETURNS_KIND["packed"],
    ),
    Case(
        "time_smoothness",
        dict(rewards=[1.0, 3.0, 0.0, 5.0], cu_seqlens=[0, 3, 3, 4]),
        [13.0, 0.0, 0.0],
        packed=dict(rewards="cu_seqlens"),
    ),
    Case("prm", STEPS, [h(2), 0.25 * h(-1) + 0.75 * h(1), 0.0]),
    Case("prm", STEPS | dict(labels=[True, True, False]), [h(2), h(-1), 0.0], falls=("scores",)),
    Case("prm", CLASSES, [math.log(4 / 3), math.log(2), 0.0]),
    Case("prm", SOFT_CLASSES, [math.log(4 / 3) / 2 + math.log(4) / 2, math.log(2), 0.0]),
    Case(
        "implicit_prm",
        IMPLICIT,
        [h(2), math.log(2), 0.25 * h(-1) + 0.75 * h(1)],
        dict(beta=2.0),
        **IMPLICIT_KIND,
    ),
    Case(
        "implicit_prm",
        IMPLICIT | dict(correct=[True] * 3),
        [h(0.5), math.log(2), h(-0.25)],
        dict(beta=0.5),
        falls=("logp",),
        **IMPLICIT_KIND,
    ),
    Case(
        "token_nll",
        dict(logp=[-3.0, -2.0, NAN], mask=[True, True, False]),
        [3.0, 2.0, 0.0],
        falls=("logp",),
    ),
    Case("verdict_pair", VERDICT, [h(1), 0.25 * h(-2) + 0.75 * h(2)], wrt=("first", "second")),
    Case(
        "verdict_pair",
        VERDICT | dict(preference=[True, True]),
        [h(1), h(-2)],
        wrt=("first", "second"),
        falls=("first",),
        rises=("second",),
    ),
    Case("goal_contrastive", GOALS, [h(1) + h(0), h(0) + h(1)], wrt=tuple(GOALS)),
    Case(
        "goal_contrastive",
        GOALS,
        [h(5) + h(0), h(0) + h(0.2)],
        dict(cosine=False, scale=0.1),
        wrt=tuple(GOALS),
    ),
    Case(
        "info_nce",
        NCE,
        [math.log(E + 2) - 1, math.log(1 + E + 1 / E) - 1],
        dict(temperature=1.0),
        wrt=("anchors", "candidates"),
        shared=("candidates",),
    ),
]
UNITS = dict.fromkeys(LOSSES, "pair")
UNITS |= dict.fromkeys(("k_wise", "all_pairs"), "group")
UNITS |= dict.fromkeys(("prm", "token_nll"), "token")
UNITS |= dict.fromkeys(("binary", "regression", "ordinal", "implicit_prm"), "sequence")
UNITS |= dict.fromkeys(("time_smoothness", "info_nce"), "sequence")
IDS = [f"{i}-{case.loss}" for i, case in enumerate(CASES)]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def gradients(case: Case, loss: torch.Tensor, tensors: dict) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss.sum(), [tensors[name] for name in case.wrt]))


def seen(case: Case, tensors: dict, name: str) -> torch.Tensor:
    """Which entries of an input the loss may see."""
    x, mask = tensors[name], tensors.get("mask", torch.tensor(True))
    return (mask if mask.shape == x.shape else mask[..., None]).expand_as(x)


def test_every_loss_has_a_case():
    """With a sign test, too, where the loss has a direction."""
    assert {case.loss for case in CASES} == set(LOSSES)
    directed = {case.loss for case in CASES if case.falls or case.rises}
    assert set(LOSSES) - directed == {
        "odin",  # what its heads may do is in test_reward_identities.py
        "k_wise",  # a middle answer is pulled both ways: below
        "all_pairs",
        "time_smoothness",
        "goal_contrastive",
        "info_nce",
    }


@every_case
def test_worked_by_hand(case):
    tensors = case.tensors()
    found = case.call(tensors)
    assert found.unit == UNITS[case.loss]
    assert_close(found.loss, torch.tensor(case.values, dtype=torch.float64))
    assert found.loss.requires_grad
    for name, metric in found.metrics.items():
        for x in metric if isinstance(metric, Mean) else (metric,):
            shape = () if isinstance(metric, Mean) else found.loss.shape
            assert not x.requires_grad and x.shape == shape and x.isfinite().all(), name


@every_case
def test_gradcheck(case):
    tensors = case.tensors(learn=False)
    tensors = {k: v.nan_to_num(0.5) if v.is_floating_point() else v for k, v in tensors.items()}
    # an entry of ODIN is a share of the whole batch's loss: only its sum has a derivative
    tensors.pop("moments", None)
    learned = [tensors.pop(name).requires_grad_() for name in case.wrt]

    def loss(*learned):
        found = case.call(tensors | dict(zip(case.wrt, learned, strict=True))).loss
        return found.sum() if case.loss == "odin" else found

    assert torch.autograd.gradcheck(loss, learned)


@every_case
def test_rows_may_be_shuffled_and_the_batch_split(case):
    """Losses of the parts are those of the whole, and their gradients add up to its own."""
    tensors = case.tensors()
    whole = case.call(tensors).loss
    wanted = gradients(case, whole, tensors)
    last = len(whole) - 1
    order = [last, *range(last)]
    for parts in ([order], [[last], list(range(last))]):
        losses = torch.cat([case.call(case.rows(tensors, part)).loss for part in parts])
        assert_close(losses, whole[order])
        assert_close(gradients(case, losses, tensors), wanted)


@every_case
def test_sign(case):
    tensors = case.tensors()
    grads = dict(zip(case.wrt, gradients(case, case.call(tensors).loss, tensors), strict=True))
    for names, sign in ((case.falls, -1), (case.rises, 1)):
        for name in names:
            right = (sign * grads[name] > 0) | ~seen(case, tensors, name)
            assert right.all(), (name, grads[name])


MASKED = [case for case in CASES if "mask" in case.given]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.loss)
def test_what_is_masked_does_not_matter(case):
    """Its gradient is exactly 0, and no value of it, NaN included, reaches a loss."""
    tensors, learned = case.tensors(learn=False), case.wrt[0]
    held = seen(case, tensors, learned)
    x = torch.where(held, tensors[learned], NAN).requires_grad_()
    loss = case.call(tensors | {learned: x}).loss
    assert_close(loss, torch.tensor(case.values, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert (grad[~held] == 0).all() and grad.isfinite().all()
    nothing = tensors | {learned: x, "mask": torch.zeros_like(tensors["mask"])}
    found = case.call(nothing)
    assert (found.loss == 0).all() and found.mean() == 0
    assert (torch.autograd.grad(found.loss.sum(), x)[0] == 0).all()


@every_case
@pytest.mark.parametrize("size", [80.0, 0.0])
def test_extremes_stay_finite(case, size):
    """+-80 in any combination, all zeros, in float32."""
    for pattern in range(4):
        tensors = case.tensors(torch.float32, learn=False)
        for k, name in enumerate(case.wrt):
            if name == "thresholds":
                continue
            signs = torch.arange(tensors[name].numel()).view_as(tensors[name]) // (pattern // 2 + 1)
            tensors[name] = size * (1 - 2 * ((signs + k * pattern) % 2)).float()
        if case.loss == "odin":
            tensors["moments"] = odin_moments(*list(tensors.values())[:6])
        for name in case.wrt:
            tensors[name].requires_grad_()
        loss = case.call(tensors).loss
        assert loss.isfinite().all()
        for grad in gradients(case, loss, tensors):
            assert grad.isfinite().all()


@every_case
def test_bfloat16_is_widened(case):
    tensors = case.tensors(torch.bfloat16)
    loss = case.call(tensors).loss
    assert loss.dtype == torch.float32
    for name, grad in zip(case.wrt, gradients(case, loss, tensors), strict=True):
        assert grad.dtype == torch.bfloat16, name


@every_case
def test_no_value_is_asked_for(case):
    """A fake tensor has none: `.item()`, `bool()` or a mask as an index would raise."""
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) for k, v in case.tensors(torch.float32, False).items()}
        for name in case.wrt:
            fake[name].requires_grad_()
        if case.loss == "odin":
            fake["moments"] = odin_moments(*list(fake.values())[:6])
        for name, grad in zip(case.wrt, gradients(case, case.call(fake).loss, fake), strict=True):
            assert grad.shape == fake[name].shape


@every_case
def test_compiles_whole(case):
    tensors = case.tensors(torch.float32)
    torch.compiler.reset()  # else the cases share one limit of recompilations
    compiled = torch.compile(
        lambda tensors: case.call(tensors).loss, backend="eager", fullgraph=True
    )
    assert_close(compiled(tensors), case.call(tensors).loss)


def test_hyperparameters_are_keywords_with_defaults():
    """And tensors are the positional rest, as everywhere in this repository."""
    for name, loss in LOSSES.items():
        assert all(isinstance(v, (int, float)) for v in hyperparameters(loss).values()), name
        used = {k for case in CASES if case.loss == name for k in case.options}
        assert used == set(hyperparameters(loss)), f"{name}: a hyperparameter without a case"


def test_ensembles():
    rewards = torch.tensor([[1.0, 2.0], [5.0, 2.0]], requires_grad=True)
    wanted = dict(mean=[3.0, 2.0], min=[1.0, 2.0], lcb=[1.0, 2.0], uwo=[2.6, 2.0])
    assert set(wanted) == set(COMBINERS)
    for name, combine in COMBINERS.items():
        assert_close(combine(rewards), torch.tensor(wanted[name]))
        assert_close(combine(rewards[:1]), rewards[0].detach())  # one model: itself
        with pytest.raises(ValueError, match=r"rewards: wanted \[M, S\], of at least one model"):
            combine(rewards[0])
    assert_close(COMBINERS["lcb"](rewards, std_coef=2.0), torch.tensor([-1.0, 2.0]))
    assert_close(COMBINERS["uwo"](rewards, variance_coef=0.5), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "loss, change, options, message",
    [
        ("bradley_terry", dict(rejected=[1.0]), {}, r"rejected: wanted \(3,\); got \(1,\)"),
        ("bradley_terry", dict(margin=[1.0]), {}, r"margin: wanted \(3,\); got \(1,\)"),
        ("bradley_terry", dict(preference=[1.0]), {}, r"preference: wanted \(3,\); got"),
        ("bradley_terry", {}, dict(label_smoothing=1.5), "label_smoothing: wanted a probability"),
        ("bradley_terry", {}, dict(centering=-1.0), "centering: wanted a number from 0"),
        ("cost", dict(more_harmful_unsafe=[1.0, -1.0]), {}, "unsafe: wanted a bool tensor"),
        ("odin", dict(rejected_len=[1]), {}, r"rejected_len: wanted \(2,\); got \(1,\)"),
        ("odin", dict(length_weight=[1.0]), {}, r"length_weight: wanted \(2,\)"),
        ("lore", dict(user_logits=[1.0]), {}, r"user_logits: wanted \[P, B\]"),
        ("lore", {}, dict(divisor=0.0), "divisor: wanted a positive number"),
        ("vpl", dict(mean=[[0.0]]), {}, r"mean: wanted \(2, 1\).*Repeat a user's row"),
        ("binary", dict(label=[True]), {}, r"label: wanted \(3,\); got \(1,\)"),
        ("binary", dict(label=[-1, 1, 1]), {}, "label: wanted probabilities.*got -1 to 1"),
        ("bradley_terry", dict(preference=[0.5, 1, 3]), {}, "preference: wanted probabilities"),
        ("bradley_terry_returns", dict(preference=[2.0, 1]), {}, "preference: wanted prob"),
        ("prm", dict(labels=[1.0, 5, 0]), {}, "labels: wanted probabilities"),
        ("implicit_prm", dict(correct=[-1.0, 1, 1]), {}, "correct: wanted probabilities"),
        ("regression", {}, dict(huber=-1.0), "huber: wanted a number from 0"),
        ("ordinal", dict(thresholds=[1.0, 0.0]), {}, "thresholds: wanted rising.*ordered_thr"),
        ("ordinal", dict(label=[0, 1, 3]), {}, "label: wanted classes 0 to 2"),
        ("ordinal", dict(label=[0.0, 1.0, 2.0]), {}, "label: wanted int64 classes"),
        ("k_wise", dict(rewards=[1.0]), {}, r"rewards: wanted \[G, K\]"),
        ("all_pairs", dict(mask=[[1.0] * 4] * 2), {}, "mask: wanted a bool tensor"),
        ("bradley_terry_returns", {}, dict(random_labels=1.0), "random_labels: wanted a prob"),
        ("bradley_terry_returns", dict(chosen_cu_seqlens=[0, 2]), {}, "cu_seqlens: wanted bound"),
        ("prm", dict(labels=[1.0]), {}, r"labels: wanted \(3,\); got \(1,\)"),
        ("implicit_prm", {}, dict(beta=0.0), "beta: wanted a positive number"),
        ("token_nll", dict(mask=[1, 1, 0]), {}, "mask: wanted a bool tensor"),
        ("verdict_pair", dict(second=[1.0]), {}, r"second: wanted \(2,\); got \(1,\)"),
        ("goal_contrastive", dict(goal=[[1.0]]), {}, r"goal: wanted \(2, 2\); got \(1, 1\)"),
        ("info_nce", dict(candidates=[[1.0]]), {}, r"candidates: wanted \[C, 2\]; got \(1, 1\)"),
        ("info_nce", {}, dict(temperature=0.0), "temperature: wanted a positive number"),
    ],
)
def test_errors_say_what_was_wanted(loss, change, options, message):
    case = next(case for case in CASES if case.loss == loss)
    tensors = {k: torch.tensor(v) for k, v in (case.given | change).items()}
    for bounds in case.packed.values():
        tensors[bounds] = tensors[bounds].int()
    with pytest.raises(ValueError, match=message):
        LOSSES[loss](**tensors, **options)
