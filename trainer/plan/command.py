"""`prefuse estimate`, and --dry_run of a training command."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from ..config import flag, require
from ..errors import UserError
from ..flags import CONFIGS, ONLINE, command_or_file, parse

USAGE = """usage: prefuse estimate COMMAND [--flag value ...]
       prefuse estimate FILE.yaml [--flag value ...]

What a run of COMMAND, or of the file's `method`, takes on each rank: memory by phase and class,
FLOPs and time of a step. Reads config.json alone. Besides the command's flags:
"""


@dataclass(frozen=True)
class PlanConfig:
    """Flags of an estimate and of --dry_run, beside those of the run."""

    world_size: int = flag(default=1, help="Ranks.")
    gpus_per_node: int = flag(default=8, help="Ranks of a node, which are a group of --fsdp hsdp.")
    device: str | None = flag(
        default=None, help="l4, l40s, a100-40gb, a100-80gb, h100, h200, b200, mi300x, here or cpu."
    )
    device_memory_gb: float | None = flag(default=None, help="Its memory in GiB.")
    device_tflops: float | None = flag(default=None, help="Its rate of matrix products.")
    device_gbps: float | None = flag(default=None, help="Its memory's bandwidth in GB/s.")
    network_gbps: float | None = flag(default=None, help="GB/s that a rank sends and receives.")
    row_tokens: int | None = flag(
        default=None,
        help="Tokens of a row, or of an answer with its prompt. Unset: as long as they may be.",
    )
    prompt_tokens: int | None = flag(
        default=None,
        help="Of them in the prompt, which is not trained on and which answers share. Unset: none; "
        "online, max_prompt_length.",
    )

    def __post_init__(self):
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "prompt_tokens" else 1e-9
            if isinstance(value, int | float):
                require(value >= least, field.name, "a positive number", value)


def split(argv: list[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's own flags, and the others."""
    own, others, names = [], [], {f.name for f in fields(PlanConfig)}
    rest = iter(argv)
    for argument in rest:
        name, *value = argument.removeprefix("--").split("=", 1)
        if argument.startswith("--") and name.replace("-", "_") in names:
            own += [argument] if value else [argument, *_next(rest, argument)]
        else:
            others.append(argument)
    return parse(PlanConfig, own), others


def _next(rest, argument: str) -> list[str]:
    value = next(rest, None)
    if value is None:
        raise UserError(f"{argument}: wanted a value; got none")
    return [value]


def estimate_command(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        for f in fields(PlanConfig):
            print(f"  --{f.name:<18} {f.metadata['help']}")
        return
    from ..dry_run import for_device, model_config
    from ..estimate import Run, estimate
    from .device import find
    from .text import told
    from .work import uniform

    options, rest = split(argv)
    command, flags = command_or_file("estimate", rest)
    given = {a[2:].split("=")[0].replace("-", "_") for a in flags if a.startswith("--")}
    for needed in ("dataset_name", "output_dir"):  # which an estimate does not
        flags += [] if needed in given or "config" in given else [f"--{needed}=none"]
    if command in ONLINE and not given & {"reward_funcs", "config"}:
        flags.append("--reward_funcs=length")
    device = find(options)
    config: Any = for_device(parse(CONFIGS[command], flags), device)
    row, prompt = lengths(config, options, command)
    work = lambda c: uniform(c, row, prompt)  # noqa: E731
    run = Run(config, model_config(config), device, options.world_size, work)
    print(told(run, estimate(run)))


def lengths(config, options: PlanConfig, command: str) -> tuple[int, int]:
    """Tokens of a row and of its prompt, the most that the configuration allows."""
    row, prompt = options.row_tokens, options.prompt_tokens
    if command in ONLINE:
        asked = config.max_prompt_length if prompt is None else prompt
        require(asked is not None, "prompt_tokens", "a number, without --max_prompt_length", None)
        row = asked + config.max_completion_length if row is None else row
        return row, min(asked, row - 1)
    row = config.max_length if row is None else row
    require(row is not None, "row_tokens", "a number, without --max_length", None)
    assert row is not None
    require((prompt or 0) < row, "prompt_tokens", f"less than the row's {row}", prompt)
    return row, prompt or 0


def dry_run(command: str, argv: list[str]) -> None:
    """Walks the run that the flags describe, up to its first step."""
    options, rest = split(argv)
    config = parse(CONFIGS[command], [a for a in rest if a not in ("--dry_run", "--dry-run")])
    from .. import dry_run, kto, offline, reward
    from .device import find

    device = find(options)
    given: dict[str, Any] = dict(device=device, count=options.world_size)
    if command in ONLINE:
        dry_run.walk_online(config, **given)
        return
    runs = {"sft": offline.run_sft, "dpo": offline.run_dpo}
    runs |= {"kto": kto.run_kto, "reward": reward.run_reward}
    runs[command](config, go=partial(dry_run.walk_rows, **given))
