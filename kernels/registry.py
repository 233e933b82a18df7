"""Every objective and advantage estimator by name: what it is, what it reads, how it is called.

METHODS has the objectives, ADVANTAGES the estimators: some names, such as grpo, are in both.

A function's first docstring line, `Title, paper: formula.`, its signature and what it reads are all
there is to know; nothing is written twice. `prefuse methods` and docs/losses.md show it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from . import divergence, group_advantage, policy, preference, reward, value_losses
from .policy_parts import Actions
from .preference_parts import Inputs, Labelled, Listed, Pair, hyperparameters, probe
from .surrogate import detached_clip


class Family(NamedTuple):
    """Methods that are called alike.

    shape: of what they read, where it is one for all.
    call: the function that takes a loss by name, as `option`; None if each is called itself.
    kind: what the losses of `call` read.
    """

    name: str
    about: str
    module: str
    table: dict[str, Callable]
    unit: str
    shape: str = ""
    call: str | None = None
    kind: type[Inputs] | None = None
    option: str = "loss_type"


FAMILIES = (
    Family(
        "pair",
        "Pairs of a chosen and a rejected completion",
        "preference",
        preference.LOSSES,
        "pair",
        "[P]",
        "preference_loss",
        Pair,
    ),
    Family(
        "unpaired",
        "Completions judged one at a time",
        "preference",
        preference.UNPAIRED_LOSSES,
        "sequence",
        "[S]",
        "unpaired_loss",
        Labelled,
    ),
    Family(
        "list",
        "K completions of a prompt",
        "preference",
        preference.LIST_LOSSES,
        "group",
        "[G, K]",
        "list_loss",
        Listed,
    ),
    Family(
        "policy",
        "Tokens with an advantage",
        "policy",
        policy.LOSSES,
        "token",
        "[M]",
        "policy_loss",
        Actions,
    ),
    Family("value", "Values of a critic", "value_losses", value_losses.LOSSES, "token", "[M]"),
    Family("reward", "Reward, cost and process models", "reward", reward.LOSSES, "pair"),
    Family(
        "divergence",
        "Divergences over the vocabulary, between a student's and a teacher's head",
        "divergence",
        divergence.DIVERGENCES,
        "token",
        "[N, H] and [V, H]",
        "linear_divergence",
        option="kind",
    ),
)
ESTIMATORS = Family(
    "advantage", "Advantages and returns", "group_advantage", group_advantage.ESTIMATORS, ""
)
REQUIRED = inspect.Parameter.empty  # the default of a hyperparameter that has none


class Method(NamedTuple):
    """One entry. `notes` is the docstring after its first line."""

    name: str
    family: Family
    function: Callable
    title: str
    paper: str
    formula: str
    notes: str
    unit: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    hyperparameters: dict[str, Any]
    aggregation: str = ""  # of a policy loss; `unit` is "" for an estimator

    def example(self) -> str:
        """Three lines of a training loop, on tensors that are named as the inputs are."""
        family = self.family
        call = family.call or self.function.__name__
        given = _arguments(self.inputs, family)
        wanted = [k for k, v in self.hyperparameters.items() if v is REQUIRED]
        given += [f"{name}={name}" for name in wanted]
        if family.call is not None:
            given.append(f'{family.option}="{self.name}"')
        if self.aggregation == "seq-mean-token-sum-norm":
            given.append("max_length=1024")
        start = f"from prefuse.kernels.{self.module} import {call}\n\n"
        if family.unit == "":
            return f"{start}{_call('advantages', call, given)}"
        return f"{start}{_call('objective', call, given)}\nobjective.mean().backward()"

    @property
    def module(self) -> str:
        """Where to import what is called from."""
        family = self.family
        return family.module if family.call else self.function.__module__.rpartition(".")[2]


def _call(result: str, function: str, given: list[str]) -> str:
    """`result = function(...)`, broken where a formatter of 100 columns breaks it."""
    for inside in (", ".join(given), f"\n    {', '.join(given)}\n"):
        line = f"{result} = {function}({inside})"
        if max(map(len, line.splitlines())) <= 100:
            return line
    return f"{result} = {function}(\n    " + ",\n    ".join(given) + ",\n)"


def _arguments(names: tuple[str, ...], family: Family) -> list[str]:
    """By position as long as the call's own order goes, then by keyword."""
    if family.call is None:
        return list(names)
    first = [n for n, p in PARAMETERS[family.call].items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    straight = 0
    while names[: straight + 1] == tuple(first[: straight + 1]) and straight < len(names):
        straight += 1
    return [*names[:straight], *(f"{name}={name}" for name in names[straight:])]


PARAMETERS = {
    call.__name__: inspect.signature(call).parameters
    for call in (
        preference.preference_loss,
        preference.unpaired_loss,
        preference.list_loss,
        policy.policy_loss,
        divergence.linear_divergence,
    )
}


_PAPER = re.compile(
    r"^(?P<title>.*?), "
    r"(?P<paper>arXiv:\d{4}\.\d{5}( (eq|sec|app)\. [\w.]+)?|[A-Z]\w+ \d{4})"
    r"(?P<rest>.*)$"
)


def _method(name: str, function: Callable, family: Family) -> Method:
    head, _, notes = inspect.cleandoc(function.__doc__ or "").partition("\n")
    title, _, formula = head.partition(": ")
    paper = ""
    found = _PAPER.match(title)
    if found:
        title, paper = found["title"] + found["rest"], found["paper"]
    unit = re.search(r"Unit:\s+(\w+)", notes)
    aggregation = ""
    if family.kind is Actions:
        aggregation = probe(function, Actions)[1].aggregation
    needed, optional, found_unit = _reads(function, family)
    return Method(
        name,
        family,
        function,
        title,
        paper,
        formula.removesuffix("."),
        notes.strip(),
        unit.group(1) if unit else found_unit,
        needed,
        optional,
        hyperparameters(function),
        aggregation,
    )


def _reads(function: Callable, family: Family) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Inputs, optional inputs and unit."""
    if family.kind is None:
        called = PARAMETERS.get(family.call or "", inspect.signature(function).parameters)
        parameters = called.values()
        given = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        needed = tuple(p.name for p in given if p.default is inspect.Parameter.empty)
        return needed, tuple(p.name for p in given if p.name not in needed), family.unit
    found, surrogate = probe(function, family.kind)
    if family.kind is not Actions:
        return found, (), family.unit
    needed = ["logp"]
    ratio = surrogate.rule is not detached_clip or surrogate.low != surrogate.high
    if ratio or "old_logp" in found:
        needed.append("old_logp")
    if surrogate.advantages is None:
        needed.append("advantages")
    needed += [name for name in found if name not in ("logp", "old_logp", "advantages")]
    unit = "token" if surrogate.aggregation == "token-mean" else "sequence"
    if unit == "sequence" and "cu_seqlens" not in needed:
        needed.append("cu_seqlens")
    extras = ("mask", "ref_logp", "rollout_logp", "entropy", "weight", "steps")
    return tuple(needed), tuple(name for name in extras if name not in needed), unit


METHODS: dict[str, Method] = {
    name: _method(name, function, family)
    for family in FAMILIES
    for name, function in family.table.items()
}
ADVANTAGES: dict[str, Method] = {
    name: _method(name, function, ESTIMATORS) for name, function in ESTIMATORS.table.items()
}
