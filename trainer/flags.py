"""Flags and YAML keys -> a configuration; a flag overrides the YAML."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from . import loss_flags
from .config import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from .errors import UserError
from .loss_flags import nearest
from .online_config import (
    GRPOConfig,
    NashMDConfig,
    OnlineDPOConfig,
    PPOConfig,
    RAFTConfig,
    ReinforceConfig,
    RLOOConfig,
)

CONFIGS = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "reward": RewardConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
    "rloo": RLOOConfig,
    "reinforce": ReinforceConfig,
    "online-dpo": OnlineDPOConfig,
    "nash-md": NashMDConfig,
    "raft": RAFTConfig,
}
ONLINE = ("grpo", "ppo", "rloo", "reinforce", "online-dpo", "nash-md", "raft")
NOT_FLAGS = ("method", "versions")  # keys that a run's config.yaml has besides its flags


def parse(config: type, argv: list[str]) -> Any:
    """A configuration from flags, after those of `--config FILE.yaml`."""
    argv = _expand_config(argv, config)
    parser = _Parser(cast(Any, config), allow_abbrev=False, prog="prefuse")
    _widen_optional(parser, config)
    losses = loss_flags.losses_of(config)
    if losses is not None:
        loss_flags.add_flags(parser, losses)
    known = [o.removeprefix("--") for o in parser._option_string_actions if o.startswith("--")]
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            if name not in known:
                raise UserError(f"--{name}: no such flag{nearest(name, known, '--')}")
    values, rest = parser.parse_known_args([_underscored(a) for a in argv])
    if rest:
        raise UserError(f"{rest[0]}: wanted a --flag; got a bare word")
    chosen = {f.name: getattr(values, f.name) for f in fields(config) if f.init}
    chosen = {name: None if value == [None] else value for name, value in chosen.items()}
    result = config(**chosen)
    if losses is not None:
        loss_flags.take(result, losses, values)
    return result


class _Parser(HfArgumentParser):
    """argparse's own errors, told as ours; a list's flag may be repeated."""

    def add_argument(self, *names, **options):
        if options.get("nargs") == "+":
            options["action"] = "extend"
        return super().add_argument(*names, **options)

    def error(self, message: str):
        message = re.sub(r"/--[\w-]+", "", message).removeprefix("argument ")
        for theirs, ours in (
            (r"invalid (.+?) value: (.*)", r"wanted \1; got \2"),
            (r"invalid choice: (.*) \(choose from (.*)\)", r"wanted one of \2; got \1"),
            (r"the following arguments are required: (.*)", r"\1: wanted a value; got none"),
            (r"expected one argument", r"wanted a value; got none"),
        ):
            message = re.sub(theirs, ours, message)
        raise UserError(message)


def _widen_optional(parser: argparse.ArgumentParser, config: type) -> None:
    """`none` for a field that may be None, or `false` if it is text; a bare flag for one that may
    be True."""
    parser._negative_number_matcher = re.compile(r"^-\.?\d")  # argparse's own knows no -1e-6
    kinds = get_type_hints(config)
    for action in parser._actions:
        if _is_optional(kinds.get(action.dest)):
            action.type = _or_none(cast(Any, action.type))
            if action.choices is not None:
                action.choices = [*action.choices, None]
            if bool in get_args(kinds[action.dest]):
                action.nargs, action.const = "?", True


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _or_none(kind):
    # `resume_from_checkpoint: false` is what TRL's users write
    nothing = ("none", "null", "false") if kind is str else ("none", "null")

    def convert(text: str):
        return None if text.lower() in nothing else kind(text)

    convert.__name__ = f"{kind.__name__} or none"
    return convert


def _expand_config(argv: list[str], config: type) -> list[str]:
    """Replaces `--config FILE` by the file's keys as flags, ahead of the others."""
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in argv:
        return argv
    place = argv.index("--config")
    if place + 1 == len(argv):
        raise UserError("--config: wanted a YAML file; got nothing")
    values = _read_yaml(argv[place + 1], config)
    return _flags_of(values, config, argv) + argv[:place] + argv[place + 2 :]


def from_file(rest: list[str]) -> tuple[str, list[str]]:
    """The command and the flags of `prefuse train FILE.yaml --flag value ...`."""
    if not rest or rest[0].startswith("--"):
        raise UserError("train: wanted a YAML file first; got " + (rest[0] if rest else "nothing"))
    method = _read_yaml(rest[0]).get("method")
    if method not in CONFIGS:
        wanted = "`method:` one of " + ", ".join(CONFIGS)
        raise UserError(f"{rest[0]}: wanted {wanted}; got {method}")
    values = _read_yaml(rest[0], CONFIGS[method])
    return method, _flags_of(values, CONFIGS[method], rest[1:]) + rest[1:]


def command_or_file(asker: str, rest: list[str]) -> tuple[str, list[str]]:
    """The command and the flags of `prefuse ASKER COMMAND ...` or `prefuse ASKER FILE.yaml ...`."""
    if rest and rest[0] in CONFIGS:
        return rest[0], rest[1:]
    if not rest or not rest[0].endswith((".yaml", ".yml")):
        got = rest[0] + nearest(rest[0], CONFIGS) if rest else "nothing"
        raise UserError(f"{asker}: wanted a command or a FILE.yaml first; got {got}")
    return from_file(rest)


def _read_yaml(file: str, config: type | None = None) -> dict[str, Any]:
    """Keys and values; with `config`, every key must be one of its flags."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: wanted keys and values; got {type(values).__name__}")
    if config is not None:
        _check_keys(path, values, config)
    return values


def _flags_of(values: dict[str, Any], config: type, argv: list[str]) -> list[str]:
    """A YAML file is flags written down, of which those in `argv` take the place; an empty value
    is None, or the default where None is not allowed."""
    kinds = get_type_hints(config)
    given = {_underscored(a)[2:].split("=")[0] for a in argv if a.startswith("--")}
    flags: list[str] = []
    for key, value in values.items():
        empty = value == [] or (value is None and not _is_optional(kinds.get(key)))
        if empty or key in given or key in NOT_FLAGS:
            continue
        many = isinstance(value, list)
        flags += [f"--{key}", *map(str, value)] if many else [f"--{key}={value}"]
    return flags


def _check_keys(file: Path, values: dict[str, Any], config: type) -> None:
    known = {f.name for f in fields(config) if f.init} | set(NOT_FLAGS) | loss_flags.keys(config)
    lines = file.read_text().splitlines()
    for key in values:
        if key not in known:
            line = next((i for i, text in enumerate(lines, 1) if text.startswith(f"{key}:")), 1)
            raise UserError(f"{file}:{line}: {key}: no such key{nearest(str(key), known)}")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, *value = argument[2:].split("=", 1)
    return "=".join(["--" + name.replace("-", "_"), *value])
