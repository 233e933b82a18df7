"""`prefuse reward`: which loss of a reward model is trained, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefuse.kernels import reward
from prefuse.kernels.objective import Objective, Unit
from prefuse.kernels.segments import segment_sum

from .batch import PackedBatch
from .config import RewardConfig, updated
from .data import Example
from .dist import Ranks
from .errors import UserError
from .model import can_share_prefixes, check_vocabulary
from .objectives import Method
from .reward_data import FORMATS, reward_examples
from .reward_model import RewardScorer, Scores, fresh_head, load_scores

LOSSES = {name: reward.LOSSES[name] for name in FORMATS}
UNITS: dict[str, Unit] = {
    "pairs": "pair",
    "costs": "pair",
    "lists": "group",
    "steps": "token",
    "labels": "sequence",
    "ratings": "sequence",
}


class Read(NamedTuple):
    """What a loss reads: scores and numbers of the scored tokens [M], and their sequences."""

    scores: Scores
    columns: dict[str, Tensor]
    cu_seqlens: Tensor
    groups: int = 0  # prompts
    widest: int = 1  # answers of a prompt, at most
    moments: Tensor | None = None

    def column(self, name: str) -> Tensor:
        """A column that may be absent where there are no rows at all."""
        value = self.columns.get(name)
        if value is None and not len(self.scores.values):
            return self.scores.values.detach().float()
        assert value is not None, name
        return value

    def halves(self, name: str) -> tuple[Tensor, Tensor]:
        column = self.column(name)
        return column[0::2], column[1::2]

    def answers(self) -> tuple[Tensor, Tensor]:
        """Scores of chosen and of rejected answers."""
        return self.scores.values[0::2], self.scores.values[1::2]

    def optional(self, *names: str) -> dict[str, Tensor]:
        """Columns of pairs that the data may have: they are the same for both answers."""
        return {name: self.columns[name][0::2] for name in names if name in self.columns}


def _bradley_terry(x: Read, **hyperparameters) -> Objective:
    return reward.bradley_terry(
        *x.answers(), **x.optional("margin", "preference"), **hyperparameters
    )


def _bradley_terry_returns(x: Read, **hyperparameters) -> Objective:
    returns = segment_sum(x.scores.values, x.cu_seqlens)
    chosen, rejected = returns[0::2], returns[1::2]
    each = torch.arange(len(chosen) + 1, dtype=torch.int32, device=chosen.device)
    given = {}
    if "preference" in x.columns:
        given["preference"] = x.columns["preference"][x.cu_seqlens[:-1:2].long()]
    return reward.bradley_terry_returns(chosen, each, rejected, each, **given, **hyperparameters)


def _odin(x: Read, **hyperparameters) -> Objective:
    assert x.scores.weights is not None
    return reward.odin(*_odin_inputs(x), *x.scores.weights, moments=x.moments, **hyperparameters)


def _odin_inputs(x: Read) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert x.scores.length is not None
    length = x.scores.length
    return (*x.answers(), length[0::2], length[1::2], *x.halves("length"))


def _cost(x: Read, **hyperparameters) -> Objective:
    safer, worse = x.answers()
    safer_unsafe, worse_unsafe = (flags > 0.5 for flags in x.halves("unsafe"))
    return reward.cost(worse, safer, worse_unsafe, safer_unsafe, **hyperparameters)


def _listed(loss: Callable[..., Objective]):
    def of_lists(x: Read, **hyperparameters) -> Objective:
        place = x.column("answer").long()
        group = (place == 0).cumsum(0) - 1
        shape = (x.groups, x.widest)
        spread = lambda v: v.new_zeros(shape).index_put((group, place), v)  # noqa: E731
        mask = spread(torch.ones_like(place)) > 0
        return loss(spread(x.scores.values), spread(x.column("quality")), mask, **hyperparameters)

    return of_lists


def _prm(x: Read, **hyperparameters) -> Objective:
    values = x.scores.values
    every = torch.ones(len(values), dtype=torch.bool, device=values.device)
    return reward.prm(values, x.column("label"), every, **hyperparameters)


def _binary(x: Read, **hyperparameters) -> Objective:
    return reward.binary(x.scores.values, x.column("label"), **hyperparameters)


def _regression(x: Read, **hyperparameters) -> Objective:
    target = x.column("target").reshape(x.scores.values.shape)
    rated = ~target.isnan()
    return reward.regression(x.scores.values, target.nan_to_num(), rated, **hyperparameters)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "bradley_terry": _bradley_terry,
    "bradley_terry_returns": _bradley_terry_returns,
    "odin": _odin,
    "cost": _cost,
    "k_wise": _listed(reward.k_wise),
    "all_pairs": _listed(reward.all_pairs),
    "prm": _prm,
    "binary": _binary,
    "regression": _regression,
}


def check(loss_type: str, hyperparameters: dict[str, Any]) -> None:
    """Raises a ValueError for a hyperparameter out of range."""
    two = torch.ones(2)
    names = ("length", "unsafe", "quality", "label", "target")
    columns = dict.fromkeys(names, two) | {"answer": torch.tensor([0.0, 1.0])}
    bounds = torch.arange(3, dtype=torch.int32)
    read = Read(Scores(two, two, (two, two)), columns, bounds, groups=1, widest=2)
    OBJECTIVES[loss_type](read, **hyperparameters)


def method(loss_type: str, hyperparameters: dict[str, Any], ranks: Ranks, widest: int) -> Method:
    """The loss on packed batches; ODIN's correlations are those of the whole optimizer step.

    A first pass without gradients takes them, over ranks and micro-batches: half a step more.
    """
    step: dict[str, Tensor] = {}

    def read(scorer: RewardScorer, batch: PackedBatch) -> Read:
        moments = step.get("moments")
        numbers = batch.columns, batch.score_cu_seqlens, len(batch.examples)
        return Read(scorer(batch), *numbers, widest, moments)

    def objective(scorer: Any, batch: PackedBatch) -> Objective:
        return OBJECTIVES[loss_type](read(scorer, batch), **hyperparameters)

    @torch.no_grad()
    def take_moments(scorer: Any, batches: list[PackedBatch]) -> None:
        parts = [reward.odin_moments(*_odin_inputs(read(scorer, batch))) for batch in batches]
        step["moments"] = ranks.summed(torch.stack(parts).double().sum(0))

    found = Method(objective, UNITS[FORMATS[loss_type]])
    return found._replace(before_step=take_moments) if loss_type == "odin" else found


def run_reward(config: RewardConfig, go=None) -> None:
    """`prefuse reward`; go: in place of `run`, with its arguments."""
    from .offline import run

    def tokenize(rows, tokenizer):
        return reward_examples(
            rows, tokenizer, config.max_length, config.loss_type, config.step_separator
        )

    def make(config: RewardConfig, scorer, examples: list[Example], ranks: Ranks, report) -> Method:
        widest = max(len(e.sequences) for e in examples)
        return method(config.loss_type, config.hyperparameters, ranks, widest)

    (go or run)(config, "reward", tokenize, make, load_reward_scorer)


def load_reward_scorer(config, name: str, tokenizer, examples: list[Example], ranks: Ranks):
    """As `offline.load_scorer`, with a head of scores."""
    widths = {_width(e) for e in examples}
    if len(widths) > 1:
        raise UserError(f"'target': wanted as many numbers in every row; got {sorted(widths)}")
    (width,) = widths
    dtype = getattr(torch, config.dtype)

    def load(layout: str):
        return load_scores(
            name,
            num_labels=width,
            dtype=dtype,
            layout=layout,
            seed=config.seed,
            pad_token_id=tokenizer.pad_token_id,
            trust_remote_code=config.trust_remote_code,
            in_shards=ranks.world > 1,
        )

    model: Any = load(config.layout)
    check_vocabulary(model, tokenizer, examples, name)
    longest = max(len(s.tokens) for e in examples for s in e.sequences)
    obstacle = None if config.layout == "padded" else can_share_prefixes(model, longest)
    note = None
    if obstacle:
        note = f"layout: padded, because the model has {obstacle}"
        config = updated(config, layout="padded")
        model = load("padded")
    second = None
    if config.loss_type == "odin":
        second = nn.Linear(model.score.in_features, 1, bias=False, dtype=dtype)
        fresh_head(second, config.seed + 1)
    return config, RewardScorer(model, config.layout, second).eval(), note


def _width(example: Example) -> int:
    """How many numbers a score has."""
    target = example.columns.get("target")
    return 1 if target is None else target.shape[1]
