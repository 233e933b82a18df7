"""`prefuse COMMAND --flag value ...`: every YAML key is a flag, and a flag overrides the YAML."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

from prefuse.kernels.preference import LOSSES, hyperparameters

from .config import DPOConfig, SFTConfig
from .errors import UserError

USAGE = """usage: prefuse COMMAND [--flag value ...] [--config FILE.yaml]

  sft                 supervised fine-tuning
  dpo                 offline preference optimisation
  train FILE.yaml     what the file's `method` says, with its other keys as flags
  methods [NAME]      the losses and their hyperparameters
  demo                SFT, then DPO, of a tiny model on a generated task

prefuse COMMAND --help lists the flags.
"""


def main(argv: list[str] | None = None) -> None:
    """The console script. Exits with 2 for a mistake of the user's, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
    except UserError as error:
        print(f"prefuse: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        from . import dist

        dist.stop()


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    command, *rest = argv
    if command == "train":
        command, rest = _from_file(rest)
    if command == "methods":
        return _methods(rest)
    if command == "sft":
        from .offline import run_sft

        return run_sft(parse(SFTConfig, rest))
    if command == "dpo":
        from .offline import run_dpo

        return run_dpo(parse(DPOConfig, rest))
    if command == "demo":
        from .demo import DemoConfig, run_demo

        return run_demo(parse(DemoConfig, rest))
    known = ("sft", "dpo", "train", "methods", "demo")
    raise UserError(f"{command}: no such command{_nearest(command, known)}\n\n{USAGE}")


def parse(config: type, argv: list[str]) -> Any:
    """A configuration from flags, after those of `--config FILE.yaml`."""
    argv = _expand_config(argv, config)
    parser = _Parser(cast(Any, config), allow_abbrev=False, prog="prefuse")
    losses = _add_hyperparameters(parser, config)
    known = [o.removeprefix("--") for o in parser._option_string_actions if o.startswith("--")]
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            if name not in known:
                raise UserError(f"--{name}: no such flag{_nearest(name, known, '--')}")
    values, rest = parser.parse_known_args([_underscored(a) for a in argv])
    if rest:
        raise UserError(f"{rest[0]}: wanted a --flag; got a bare word")
    chosen = {f.name: getattr(values, f.name) for f in fields(config) if f.init}
    result = config(**chosen)
    if losses:
        _take_hyperparameters(result, values)
    return result


class _Parser(HfArgumentParser):
    """argparse's own errors, told as ours."""

    def error(self, message: str):
        raise UserError(
            message.replace("argument --", "--").replace(": invalid", ": got an invalid")
        )


def _add_hyperparameters(parser: argparse.ArgumentParser, config: type) -> bool:
    """A flag for every hyperparameter of every loss the command may train."""
    if "hyperparameters" not in {f.name for f in fields(config)}:
        return False
    users: dict[str, list[str]] = {}
    for loss_name, loss in LOSSES.items():
        for name, default in hyperparameters(loss).items():
            users.setdefault(name, []).append(f"{loss_name} ({default})")
    for name, losses in users.items():
        parser.add_argument(f"--{name}", type=float, help="loss: " + ", ".join(losses))
    return True


def _take_hyperparameters(config: Any, values: argparse.Namespace) -> None:
    """The chosen loss's hyperparameters, defaults filled in; any other that was given is wrong."""
    if config.loss_type not in LOSSES:
        hint = _nearest(config.loss_type, LOSSES)
        raise UserError(
            f"--loss_type: wanted one of {', '.join(LOSSES)}; got {config.loss_type}{hint}"
        )
    own = hyperparameters(LOSSES[config.loss_type])
    every = {name for loss in LOSSES.values() for name in hyperparameters(loss)}
    given = {n: getattr(values, n) for n in every if getattr(values, n) is not None}
    for name in given:
        if name not in own:
            raise UserError(
                f"--{name}: loss {config.loss_type!r} has no such hyperparameter; it takes "
                f"{', '.join(own)}"
            )
    config.hyperparameters.update({**own, **given})


def _expand_config(argv: list[str], config: type) -> list[str]:
    """Replaces `--config FILE` by the file's keys as flags, ahead of the others."""
    if "--config" not in argv:
        return argv
    place = argv.index("--config")
    if place + 1 == len(argv):
        raise UserError("--config: wanted a YAML file; got nothing")
    file = argv[place + 1]
    values = _read_yaml(file)
    _check_keys(file, values, config)
    return _flags_of(values) + argv[:place] + argv[place + 2 :]


def _from_file(rest: list[str]) -> tuple[str, list[str]]:
    if not rest or rest[0].startswith("--"):
        raise UserError("train: wanted a YAML file first; got " + (rest[0] if rest else "nothing"))
    values = _read_yaml(rest[0])
    method = values.pop("method", None)
    if method not in ("sft", "dpo"):
        raise UserError(f"{rest[0]}: wanted `method: sft` or `method: dpo`; got {method}")
    _check_keys(rest[0], values, {"sft": SFTConfig, "dpo": DPOConfig}[method])
    return method, _flags_of(values) + rest[1:]


def _read_yaml(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: wanted keys and values; got {type(values).__name__}")
    return values


def _flags_of(values: dict[str, Any]) -> list[str]:
    """A YAML file is flags written down."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None or key in ("method", "versions"):
            continue
        items = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(str(item) for item in items)]
    return flags


def _check_keys(file: str, values: dict[str, Any], config: type) -> None:
    known = {f.name for f in fields(config)} | {"method", "versions"}
    known |= {name for loss in LOSSES.values() for name in hyperparameters(loss)}
    lines = Path(file).read_text().splitlines()
    for key in values:
        if key not in known:
            line = next((i for i, text in enumerate(lines, 1) if text.startswith(f"{key}:")), 0)
            raise UserError(f"{file}:{line}: {key}: no such key{_nearest(key, known)}")


def _methods(rest: list[str]) -> None:
    """Prints the losses, or one of them whole."""
    if rest:
        if rest[0] not in LOSSES:
            raise UserError(f"{rest[0]}: no such loss{_nearest(rest[0], LOSSES)}")
        print(LOSSES[rest[0]].__doc__)
        return
    for name, loss in LOSSES.items():
        own = ", ".join(f"{k}={v}" for k, v in hyperparameters(loss).items())
        print(f"{name:<10} {(loss.__doc__ or '').splitlines()[0]}  [{own}]")


def _nearest(name: str, known, prefix: str = "") -> str:
    """ "; did you mean ...?", by the whole name or by its beginning."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        beginning = difflib.SequenceMatcher(None, name, candidate[: len(name)]).ratio()
        return max(whole, 0.95 * beginning)

    best = max(known, key=likeness, default="")
    return f"; did you mean {prefix}{best}?" if best and likeness(best) >= 0.6 else ""


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, *value = argument[2:].split("=", 1)
    return "=".join(["--" + name.replace("-", "_"), *value])


if __name__ == "__main__":
    main()
