"""Functions that say which of two completions is better.

f(prompts, completions, opponents, **columns) -> for each pair P(completion beats opponent), plain
or `async`; None where it does not know. Which of the two is shown first is the function's business:
of a pair only one order is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import UserError
from ..reward_model import RewardModel
from .call import Failure
from .load import Reward, describe, load

WANTED = "f(prompts, completions, opponents, **columns), P(completion beats opponent) of each pair"


def load_preference(spec: str | Callable) -> Reward:
    """What Feedback asks for probabilities in the place of rewards: `judge`, package.module.name,
    file.py:function, a function, or the folder of a saved reward model."""
    found = load(spec)
    if isinstance(found.function, RewardModel):
        model = describe(bradley_terry(found.function), found.name, {})
        found = replace(model, version=found.version)
    if "opponents" not in found.reads and not found.takes_all:
        raise UserError(
            f"--preference_func {found.name}: wanted {WANTED}; this one reads no opponents. "
            "A reward belongs into --reward_funcs, and --preference makes preferences of it"
        )
    return replace(found, function=_checked(found.function), compares=False)


def bradley_terry(model: Callable[[list, list], list[float]]) -> Callable:
    """sigmoid(r - r') of a reward model, which sees each completion once."""

    def prefer(prompts, completions, opponents):
        sides = [
            side
            for prompt, *both in zip(prompts, completions, opponents, strict=True)
            for side in ((prompt, both[0]), (prompt, both[1]))
        ]
        places: dict[str, int] = {}
        rows = [places.setdefault(repr(side), len(places)) for side in sides]
        first = [rows.index(place) for place in range(len(places))]
        found = model([sides[i][0] for i in first], [sides[i][1] for i in first])
        rewards = torch.tensor(found, dtype=torch.float64)[rows]
        return (rewards[0::2] - rewards[1::2]).sigmoid().tolist()

    return prefer


def _checked(function: Callable) -> Callable:
    """The same, with a Failure in the place of what is no probability."""

    async def later(result: Any, pairs: int) -> list:
        return _probabilities(await result, pairs)

    def call(**given):
        result, pairs = function(**given), len(given["opponents"])
        if inspect.isawaitable(result):
            return later(result, pairs)
        return _probabilities(result, pairs)

    return call


def _probabilities(result: Any, pairs: int) -> Any:
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (list, tuple)):
        return result  # Feedback tells of it
    if len(result) != pairs:
        raise Failure("wrong count", f"returned {len(result)} probabilities for {pairs} pairs")
    return [_probability(value) for value in result]


def _probability(value: Any) -> Any:
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
        return Failure("wrong type", f"returned {str(value)[:60]} for a pair, not a probability,")
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, (int, float)) and (number < 0 or number > 1):  # Feedback tells of NaN
        return Failure("no probability", f"returned {number}, no probability,")
    return number
