"""The registry of losses as text: `prefuse methods`, `prefuse methods NAME`, docs/losses.md."""

from __future__ import annotations

import inspect

from prefuse.kernels.registry import (
    ADVANTAGES,
    ESTIMATORS,
    FAMILIES,
    METHODS,
    REQUIRED,
    Family,
    Method,
)

HEAD = """# Losses

Made by `prefuse methods --markdown` from the functions themselves: each is its docstring, what it
reads and its signature. `prefuse methods NAME` prints one of them.

A loss is *per unit*: `objective.loss` has one entry for each pair, sequence, group or token, and
`objective.mean()` is the mean of a batch that is neither accumulated nor spread over ranks. Where
it is, divide the sum by the number of units of the whole optimizer step: then no split changes a
gradient. `objective.metrics` are detached.
"""


NAMES = {**METHODS, **ADVANTAGES}


def listing() -> str:
    """Every method on a line, by family."""
    width = max(map(len, NAMES))
    lines = []
    for family in (*FAMILIES, ESTIMATORS):
        lines.append(f"\n{family.about} ({_called(family)})")
        for method in _of(family):
            own = ", ".join(_hyperparameters(method))
            lines.append(f"  {method.name:<{width}} {_head(method)}  [{own}]")
    return "\n".join(lines)


def explain(name: str) -> str:
    """One method whole; the loss and the estimator where both have the name."""
    return "\n\n".join(_whole(table[name]) for table in (METHODS, ADVANTAGES) if name in table)


def _whole(method: Method) -> str:
    facts = "\n".join(f"{label + ':':<17}{text}" for label, text in _facts(method))
    notes = f"\n{method.notes}\n" if method.notes else ""
    return f"{_head(method)}\n{notes}\n{facts}\n\n{_indented(method.example())}"


def markdown() -> str:
    """docs/losses.md."""
    parts = [HEAD]
    for family in (*FAMILIES, ESTIMATORS):
        parts.append(f"## {family.about}\n\n{_legend(family)}\n")
        for method in _of(family):
            paper = f" ({_link(method.paper)})" if method.paper else ""
            notes = f"{method.notes}\n\n" if method.notes else ""
            facts = "\n".join(f"- {label}: {text}" for label, text in _facts(method, "`"))
            parts.append(
                f"### `{method.name}`\n\n{method.title}{paper}\n\n"
                f"    {method.formula}\n\n{notes}{facts}\n\n"
                f"```python\n{method.example()}\n```\n"
            )
    return "\n".join(parts)


def _of(family: Family) -> list[Method]:
    return [m for m in (*METHODS.values(), *ADVANTAGES.values()) if m.family is family]


def _called(family: Family) -> str:
    return f"prefuse.kernels.{family.module}" + (f".{family.call}" if family.call else "")


def _hyperparameters(method: Method) -> list[str]:
    """Each with its default, if it has one."""
    own = method.hyperparameters.items()
    return [k if v is REQUIRED else f"{k}={v}" for k, v in own]


def _legend(family: Family) -> str:
    """How the family is called, and the notation that its module's docstring gives."""
    if family.call is None:
        start = "Each is a function; its example says where it is."
    else:
        start = f"`{_called(family)}(..., {family.option}=NAME)`; what they read is {family.shape}."
    modules = dict.fromkeys(inspect.getmodule(f) for f in family.table.values())
    notes = [inspect.cleandoc(m.__doc__ or "") for m in modules if m is not None]
    return "\n\n".join([start, *notes])


def _head(method: Method) -> str:
    paper = f", {method.paper}" if method.paper else ""
    return f"{method.title}{paper}: {method.formula}"


def _facts(method: Method, quote: str = "") -> list[tuple[str, str]]:
    def names(values) -> str:
        return ", ".join(f"{quote}{value}{quote}" for value in values)

    facts = [("reads", names(method.inputs))]
    if method.unit:
        how = f", by {method.aggregation}" if method.aggregation else ""
        facts.insert(0, ("unit", method.unit + how))
    if method.optional:
        facts.append(("optional", names(method.optional)))
    if method.hyperparameters:
        facts.append(("hyperparameters", names(_hyperparameters(method))))
    return facts


def _link(paper: str) -> str:
    if not paper.startswith("arXiv:"):
        return paper
    number = paper.split()[0].removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
