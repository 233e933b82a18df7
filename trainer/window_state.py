"""A window of samples in a checkpoint: as plain tensors and values, and dealt to other ranks."""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from typing import Any

import numpy as np
import torch

from .dist import Ranks
from .errors import UserError
from .experience import Window
from .prompts import Prompt
from .rollout import Completion, Episode


def written(window: Window) -> dict[str, Any]:
    """Of types that load without running code."""
    paid = window.token_rewards
    return {
        "prompts": [prompt.index for prompt in window.prompts],
        "lengths": [len(c.tokens) for c in window.completions],
        "tokens": _joined([c.tokens for c in window.completions], np.int64),
        "logp": _joined([c.logp for c in window.completions], np.float32),
        "finished": [bool(c.finished) for c in window.completions],
        "episodes": [_episode(c.episode) for c in window.completions],
        "each": window.each,
        "number": window.number,
        "foreign": window.foreign,
        "others": None if window.others is None else written(window.others),
        "rewards": window.rewards,
        "parts": window.parts,
        "costs": window.costs,
        "wins": window.wins,
        "paid": None if paid is None else [torch.from_numpy(x) for x in paid],
        "columns": {name: torch.from_numpy(x) for name, x in window.columns.items()},
        "kept": torch.from_numpy(window.kept),
    }


def read(state: dict[str, Any], prompts: list[Prompt], micro_rows: int) -> Window:
    """prompts: of the run, by their index."""
    ends = np.cumsum([0, *state["lengths"]])
    parts = [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
    tokens, logp = state["tokens"].numpy(), state["logp"].numpy()
    completions = [
        Completion(tokens[part], logp[part], finished, _read_episode(episode))
        for part, finished, episode in zip(parts, state["finished"], state["episodes"], strict=True)
    ]
    return Window(
        [prompts[i] for i in state["prompts"]],
        completions,
        state["each"],
        micro_rows,
        state["number"],
        state["foreign"],
        None if state["others"] is None else read(state["others"], prompts, micro_rows),
        state["rewards"],
        state["parts"],
        state["costs"],
        state["wins"],
        None if state["paid"] is None else [x.numpy() for x in state["paid"]],
        {name: x.numpy() for name, x in state["columns"].items()},
        state["kept"].numpy(),
    )


def dealt(windows: list[Window], parts: int, ranks: Ranks) -> Window:
    """This rank's share of all ranks' windows; every optimizer step, of which a pass has `parts`,
    keeps the prompts that it had."""
    whole, each = reduce(Window.joined, windows), len(windows[0].prompts)
    if each % parts or len(whole.prompts) % (parts * ranks.world):
        raise UserError(
            f"--resume_from_checkpoint: wanted {len(windows)} ranks, as it was saved with, for a "
            f"window of {len(whole.prompts)} prompts and {parts} steps is unfinished in it; got "
            f"{ranks.world}. Choose a checkpoint between windows"
        )
    places = np.arange(len(whole.prompts)).reshape(len(windows), parts, -1)
    steps = places.swapaxes(0, 1).reshape(parts, ranks.world, -1)
    return whole.taken(steps[:, ranks.rank].flatten().tolist())


def fingerprint(prompts: list[Prompt]) -> str:
    """A SHA-256 of their tokens and columns."""
    found = hashlib.sha256()
    for prompt in prompts:
        columns = json.dumps(prompt.columns, sort_keys=True, default=lambda x: type(x).__name__)
        found.update(len(prompt.tokens).to_bytes(8, "little") + prompt.tokens.tobytes())
        found.update(columns.encode())
    return found.hexdigest()


def _joined(arrays: list[np.ndarray], kind: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *arrays]).astype(kind, copy=False))


def _episode(episode: Episode | None) -> dict[str, Any] | None:
    if episode is None:
        return None
    given = episode._asdict()
    arrays = {k: torch.from_numpy(v) for k, v in given.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in given.items() if k not in (*arrays, "messages")}
    return {**arrays, **plain, "messages": json.dumps(episode.messages)}


def _read_episode(state: dict[str, Any] | None) -> Episode | None:
    if state is None:
        return None
    plain = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    return Episode(**{**plain, "messages": json.loads(state["messages"])})
