"""`prefuse COMMAND --flag value ...`: every YAML key is a flag, and a flag overrides the YAML."""

from __future__ import annotations

import os
import sys
from functools import partial

from .errors import UserError

USAGE = """usage: prefuse COMMAND [--flag value ...] [--config FILE.yaml]

  sft                 supervised fine-tuning
  dpo                 offline preference optimisation, on pairs
  kto                 on completions judged one at a time
  reward              reward, cost and process models
  grpo ppo rloo reinforce
                      policy gradients, from rewards of sampled completions
  online-dpo nash-md raft
                      preferences among them, and fine-tuning on the best
  train FILE.yaml     what the file's `method` says, with its other keys as flags
  methods [NAME]      the losses: formulas, papers, what they read, hyperparameters
  verify-resume COMMAND ... (or FILE.yaml ...)
                      a few steps of a run, straight through and resumed: are they equal?
  estimate COMMAND    memory, FLOPs and time of a run, from the model's config.json
  report FOLDER       makes report.html of a run again, finished or not
  demo                SFT, DPO and GRPO of a tiny model on a generated task

prefuse COMMAND --help lists the flags. COMMAND ... --dry_run walks the whole configuration
without weights and training, --world_size N as the first of N ranks.
"""


def main(argv: list[str] | None = None) -> None:
    """The console script. Exits with 2 for a mistake of the user's, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
    except BrokenPipeError:  # `prefuse methods | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"prefuse: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(argv: list[str]) -> None:
    """Imports what the command needs and no more: --help should not wait for torch."""
    command, *rest = argv or ["--help"]
    asks = {"-h", "--help"} & {command, *rest[:1]}
    if asks and command in ("-h", "--help", "train", "methods", "report", "verify-resume"):
        print(USAGE, end="")  # which says all there is of those without flags of their own
        return
    from .flags import CONFIGS, ONLINE, from_file, nearest

    if command == "train":
        command, rest = from_file(rest)
    known = {"sft": _sft, "dpo": _dpo, "kto": _kto, "reward": _reward}
    known |= {
        "estimate": _estimate,
        "methods": _methods,
        "report": _report,
        "demo": _demo,
        "train": None,
    }
    known |= {"verify-resume": _verify_resume}
    known |= {name: partial(_online, name) for name in ONLINE}
    run = known.get(command)
    if command in CONFIGS and {"--dry_run", "--dry-run"} & set(rest):
        run = partial(_dry_run, command)
    if run is None:
        raise UserError(f"{command}: no such command{nearest(command, known)}\n\n{USAGE}")
    from . import dist

    try:
        run(rest)
    finally:
        dist.stop()


def _sft(rest: list[str]) -> None:
    from .config import SFTConfig
    from .flags import parse

    config = parse(SFTConfig, rest)
    from .offline import run_sft

    run_sft(config)


def _dpo(rest: list[str]) -> None:
    from .config import DPOConfig
    from .flags import parse

    config = parse(DPOConfig, rest)
    from .offline import run_dpo

    run_dpo(config)


def _kto(rest: list[str]) -> None:
    from .config import KTOConfig
    from .flags import parse

    config = parse(KTOConfig, rest)
    from .kto import run_kto

    run_kto(config)


def _reward(rest: list[str]) -> None:
    from .config import RewardConfig
    from .flags import parse

    config = parse(RewardConfig, rest)
    from .reward import run_reward

    run_reward(config)


def _online(command: str, rest: list[str]) -> None:
    from .flags import CONFIGS, parse

    config = parse(CONFIGS[command], rest)
    from .online import run_online

    run_online(config, command)


def _estimate(rest: list[str]) -> None:
    from .plan.command import estimate_command

    estimate_command(rest)


def _dry_run(command: str, rest: list[str]) -> None:
    from .plan.command import dry_run

    dry_run(command, rest)


def _demo(rest: list[str]) -> None:
    from .demo import DemoConfig, run_demo
    from .flags import parse

    run_demo(parse(DemoConfig, rest))


def _verify_resume(rest: list[str]) -> None:
    from .flags import CONFIGS, command_or_file, parse

    command, argv = command_or_file("verify-resume", rest)
    config = parse(CONFIGS[command], argv)
    from .verify_resume import verify_resume

    verify_resume(command, argv, config)


def _report(rest: list[str]) -> None:
    from pathlib import Path

    from .page.html import write_report

    if len(rest) != 1 or not (Path(rest[0]) / "metrics.jsonl").is_file():
        got = " ".join(rest) or "nothing"
        raise UserError(f"report: wanted one run's folder, with its metrics.jsonl; got {got}")
    print(write_report(Path(rest[0])))


def _methods(rest: list[str]) -> None:
    """Prints the losses, or one of them whole."""
    from . import methods
    from .loss_flags import nearest_loss

    if not rest:
        print(methods.listing())
    elif rest == ["--markdown"]:
        print(methods.markdown(), end="")
    elif rest[0] in methods.NAMES:
        print(methods.explain(rest[0]))
    else:
        raise UserError(f"{rest[0]}: no such loss{nearest_loss(rest[0], methods.NAMES)}")


if __name__ == "__main__":
    main()
