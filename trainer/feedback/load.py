"""Functions that reward completions: found by name, by path or in a file; what they read."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..loss_flags import nearest
from ..reward_model import RewardModel
from .credit import CREDITS
from .ifeval import ifeval
from .judge import judge
from .maths import accuracy, gsm8k, math
from .programs import code
from .text import format, length, repetition, soft_overlong

BUILTINS: dict[str, Callable] = {
    "gsm8k": gsm8k,
    "math": math,
    "accuracy": accuracy,
    "code": code,
    "ifeval": ifeval,
    "judge": judge,
    "format": format,
    "length": length,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
}


@dataclass(frozen=True)
class Reward:
    """A function and what it reads."""

    name: str
    function: Callable
    reads: frozenset[str]  # the parameters it names
    needs: tuple[str, ...]  # those without a default
    takes_all: bool  # whether it has **kwargs
    is_async: bool
    version: str  # changes when its source or options do
    compares: bool  # completions with each other, so that none can be remembered alone

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What of `given` to call it with."""
        for name in self.needs:
            if name not in given:
                raise UserError(
                    f"{self.name}: wanted a column {name!r}, which the reward reads; the rows have "
                    f"{sorted(given)}{nearest(name, given)}"
                )
        return given if self.takes_all else {k: v for k, v in given.items() if k in self.reads}


def load(spec: str | Callable | Reward) -> Reward:
    """A Reward from a function, a built-in's name, package.module.name, file.py:function or the
    folder of a saved reward model.

    After a `?` come options of the function: "soft_overlong?max_length=512&cache=128".
    """
    if isinstance(spec, Reward):
        return spec
    if not isinstance(spec, str):
        return describe(spec, getattr(spec, "__name__", type(spec).__name__), {})
    path, options = parts(spec)
    if path in BUILTINS:
        return describe(BUILTINS[path], path, options)
    if (Path(path) / "config.json").is_file():
        return _saved_model(path, options)
    return describe(found(path), path.rpartition(":" if ".py:" in path else ".")[2], options)


def parts(spec: str) -> tuple[str, dict[str, Any]]:
    """A path, and the options after its `?`."""
    path, _, query = spec.partition("?")
    return path, _options(spec, query)


def found(path: str) -> Any:
    """What package.module.name or file.py:name names."""
    return _from_file(path) if ".py:" in path else _from_module(path)


def describe(function: Callable, name: str, options: dict[str, Any]) -> Reward:
    """Reads the signature. Options are bound to it, and so are no columns."""
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"{type(function).__name__}"
        raise UserError(f"{name}: wanted a function (prompts, completions, ...); got {kind}")
    function, bound = _unwrap(function)
    if isinstance(getattr(function, "__name__", None), str) and name == "partial":
        name = function.__name__
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"{name}: its signature cannot be read; wrap it in a function") from None
    named = {
        n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    every = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()) or not (named or every):
        raise UserError(
            f"{name}: wanted parameters that can be given by name, as in f(prompts, completions, "
            f"**kwargs); got {name}{inspect.signature(function)}"
        )
    for option in options:
        if option not in named:
            raise UserError(f"{name}: no such option {option!r}{nearest(option, named)}")
    options = {**bound, **options}
    ours = any(function is f for f in BUILTINS.values())  # with options by keyword alone
    free = {
        n: p
        for n, p in named.items()
        if n not in options and not (ours and p.kind is p.KEYWORD_ONLY)
    }
    call = functools.partial(function, **options) if options else function
    return Reward(
        name=name,
        function=call,
        reads=frozenset(free),
        needs=tuple(n for n, p in free.items() if p.default is p.empty),
        takes_all=bool(every) and not every[0].startswith("_"),
        is_async=_is_async(function),
        version=_version(function, options),
        compares=function is judge,
    )


def _unwrap(function: Callable) -> tuple[Callable, dict[str, Any]]:
    """The function inside partials, and what they bind by name."""
    bound: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        bound = {**function.keywords, **bound}
        function = function.func
    return function, bound


def _is_async(function: Callable) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def _version(function: Callable, options: dict[str, Any]) -> str:
    """A hash of the source, the options and what else tells it apart, for the cache's keys."""
    try:
        source = inspect.getsource(function if hasattr(function, "__code__") else type(function))
    except (OSError, TypeError):
        source = repr(getattr(function, "__qualname__", type(function)))
    text = f"{source}\n{options!r}\n{_held(function)}"
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _held(function: Any) -> str:
    """Texts and numbers that two functions of one source may differ in: what they close over, their
    defaults, what their object has. A list may be one's notes, and other objects tell no value."""
    plain = getattr(function, "__func__", function)
    owner = getattr(function, "__self__", None if hasattr(function, "__code__") else function)
    named = {**(getattr(plain, "__kwdefaults__", None) or {}), **(getattr(owner, "__dict__", {}))}
    held = list(enumerate(getattr(plain, "__defaults__", None) or ())) + sorted(named.items())
    try:
        held += sorted(inspect.getclosurevars(plain).nonlocals.items())
    except (TypeError, ValueError):
        pass  # no function, or one with a cell that is still empty
    return repr([(name, v) for name, v in held if isinstance(v, (str, int, float, bool))])


def _options(spec: str, query: str) -> dict[str, Any]:
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{spec}: wanted name?option=value&option=value; got {part!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value  # plain words need no quotes
    return options


def _from_file(spec: str) -> Callable:
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{spec}: there is no file {path}; wanted file.py:function")
    module_spec = importlib.util.spec_from_file_location(f"prefuse_reward_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass in it looks itself up
    _run(spec, lambda: module_spec.loader.exec_module(module))  # type: ignore[union-attr]
    return _attribute(spec, module, name)


def _saved_model(path: str, options: dict[str, Any]) -> Reward:
    """A reward model by its folder; the options are those of RewardModel, or of its `credit`."""
    given = dict(options)
    credit = given.pop("credit", None)
    if credit is not None and credit not in list(CREDITS):
        wanted = " or ".join(CREDITS)
        raise UserError(f"{path}: credit: wanted {wanted}; got {credit!r}")
    make = RewardModel if credit is None else CREDITS[credit]
    known = [*list(inspect.signature(make).parameters)[2:], "credit"]  # without path, tokenizer
    for option in given:
        if option not in known:
            raise UserError(f"{path}: no such option {option!r}{nearest(option, known)}")
    folder = Path(path).resolve()
    reward = describe(make(path, **given), folder.name, {})
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir())
    version = hashlib.sha256(f"{folder}\n{files}\n{options!r}".encode()).hexdigest()[:16]
    return replace(reward, version=version)


def _from_module(spec: str) -> Callable:
    path, _, name = spec.rpartition(".")
    if not path:
        raise UserError(
            f"{spec}: no such reward{nearest(spec, BUILTINS)} Built in are "
            f"{', '.join(sorted(BUILTINS))}, and own_verdict and self_certainty among "
            "--reward_funcs; others are package.module.name, file.py:function or a reward model's "
            "folder"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does: a module beside the run
    return _attribute(spec, _run(spec, lambda: importlib.import_module(path)), name)


def _run(spec: str, load_module: Callable) -> Any:
    try:
        return load_module()
    except Exception as error:
        raise UserError(
            f"{spec}: its module does not import: {type(error).__name__}: {error}; wanted a "
            "built-in's name, package.module.name or file.py:function"
        ) from error


def _attribute(spec: str, module: Any, name: str) -> Callable:
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value)]
        raise UserError(f"{spec}: there is no {name!r} in it{nearest(name, known)}")
    return getattr(module, name)
