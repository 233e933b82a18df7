"""A saved model's reward, given to the parts of a completion that earned it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prefuse.kernels.credit import attention_credit, line_rewards

from ..errors import UserError
from ..model import load_tokenizer
from ..reward_data import answer, read_at_end
from ..reward_model import RewardModel, load_scores, placed_on
from ..rows import Row
from .dense import Spans, text_of


class AttentionCredit:
    """ABC, arXiv:2402.00782: the reward by what the reward model attended to when it gave it.

    A token of the completion gets beta of the reward by the last layer's attention to it, mean over
    heads, from the token that is scored; the rest is paid at the end.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any = None,
        *,
        beta: float = 1.0,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        if not 0 <= beta <= 1:
            raise UserError(f"{path}: beta: wanted a number in [0, 1]; got {beta}")
        self.tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        check_offsets(path, self.tokenizer)
        self.device, dtype = placed_on(path, device, dtype)
        self.pad = self.tokenizer.pad_token_id
        model: Any = load_scores(
            path, num_labels=None, dtype=dtype, layout="padded", pad_token_id=self.pad
        )
        model.set_attn_implementation("eager")  # others do not tell their weights
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.beta, self.batch_size = beta, batch_size
        blocks = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
        if not blocks:
            raise UserError(f"{path}: credit=attention finds no attention in {type(model)}")
        self.last: nn.Module = blocks[-1]
        self.__name__ = f"attention_credit({path})"

    def __call__(self, prompts: Sequence, completions: Sequence, **_columns) -> list[Spans | float]:
        """Spans that end where the reward model's own tokens do."""
        both = zip(prompts, completions, strict=True)
        read = [read_ends(self.tokenizer, *texts) for texts in both]
        found = []
        for k in range(0, len(read), self.batch_size):
            rows = read[k : k + self.batch_size]
            scores, attention = self.attend([tokens for tokens, _ in rows])
            for (tokens, ends), score, weight in zip(rows, scores, attention, strict=True):
                found.append(self._spans(ends, score, weight[: len(tokens)]))
        return found

    @torch.no_grad()
    def attend(self, sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The score of each, and the last layer's attention from where it was read, [B, L]."""
        rows = [torch.from_numpy(tokens) for tokens in sequences]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.pad).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        places = torch.arange(tokens.shape[1], device=self.device)
        at = [int(read_at_end(row, 0, self.pad).scored.argmax()) for row in sequences]
        each = torch.arange(len(rows), device=self.device), torch.tensor(at, device=self.device)
        seen: list[Tensor] = []

        def keep(_module, _given, output) -> None:
            seen.append(output[1][each[0], :, each[1]].double().mean(1))

        hook = self.last.register_forward_hook(keep)
        try:
            out = self.model.base_model(
                input_ids=tokens, attention_mask=(places < lengths[:, None]).long(), use_cache=False
            )
        finally:
            hook.remove()
        head, hidden = self.model.score, out.last_hidden_state[each].float()
        bias = None if head.bias is None else head.bias.float()
        scores = F.linear(hidden, head.weight.float(), bias)[:, 0].double()
        return scores.cpu(), seen[0].cpu()

    def _spans(self, ends: np.ndarray, score: Tensor, attention: Tensor) -> Spans | float:
        inside = torch.from_numpy(ends > 0)
        if not inside.any():
            return float(score)
        bounds = torch.tensor([0, int(inside.sum())], dtype=torch.int32)
        paid = attention_credit(score[None], attention[inside], bounds, beta=self.beta)
        return Spans(tuple(zip(ends[ends > 0].tolist(), paid.tolist(), strict=True)))


def read_ends(tokenizer: Any, prompt: Any, completion: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of both, and where in the completion's text each ends; 0 where it is not of it."""
    tokens, _ = answer(tokenizer, prompt, completion, Row({}, "a completion"))
    if isinstance(prompt, str):
        whole, begin, text = prompt + completion, len(prompt), completion
        told = tokenizer(whole, return_offsets_mapping=True)
        skipped = 0
    else:
        text = text_of(completion)
        whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        shown, skipped = text.strip(), len(text) - len(text.lstrip())
        begin = whole.rfind(shown)
        if begin < 0:
            raise UserError("credit: the chat template does not show the completion")
        text = shown
        told = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    if told["input_ids"] != tokens[: len(told["input_ids"])].tolist():
        raise UserError("credit: the chat template's tokens are not its text's")
    first, last = np.array(told["offset_mapping"]).reshape(-1, 2).T - begin
    inside = (last > 0) & (first < len(text)) & (last > first)
    ends = np.zeros(len(tokens), dtype=np.int64)
    ends[: len(last)] = np.where(inside, skipped + last.clip(max=len(text)), 0)
    return tokens, ends


def check_offsets(path: str, tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise UserError(f"{path}: credit wants a fast tokenizer, which tells offsets")


class TokenCredit:
    """A model that pays every token of an answer, trained by bradley_terry_returns: each token's
    reward where the token ends. Their sum is what it was trained to compare."""

    def __init__(
        self,
        path: str,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        self.model = RewardModel(path, tokenizer, batch_size=batch_size, device=device, dtype=dtype)
        check_offsets(path, self.model.tokenizer)
        self.__name__ = f"token_credit({path})"

    def __call__(self, prompts: Sequence, completions: Sequence, **_columns) -> list[Spans | float]:
        """What ends the answer, EOS say, is paid with its last token of text."""
        scores = self.model.tokens(prompts, completions)
        found: list[Spans | float] = []
        for prompt, completion, paid in zip(prompts, completions, scores, strict=True):
            _, ends = read_ends(self.model.tokenizer, prompt, completion)
            own = np.maximum.accumulate(ends[len(ends) - len(paid) :])
            pairs = tuple(zip(own.clip(min=1).tolist(), paid.double().tolist(), strict=True))
            found.append(Spans(pairs) if own.any() else float(paid.double().sum()))
        return found


class StepCredit:
    """A process model's rewards, paid where the steps end: arXiv:2410.17621's for lines of code.

    Each is a probability, weighed by min(1, max_lines / steps): without that every further step
    would pay. Steps part at step_separator; blank ones are none.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any = None,
        *,
        max_lines: float = 1.0,
        batch_size: int = 8,
        step_separator: str = "\n",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
    ):
        if not max_lines > 0:
            raise UserError(f"{path}: max_lines: wanted a positive number; got {max_lines}")
        self.model = RewardModel(
            path, tokenizer, batch_size=batch_size, step_separator=step_separator, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.separator, self.max_lines = step_separator, max_lines
        self.__name__ = f"step_credit({path})"

    def __call__(self, prompts: Sequence, completions: Sequence, **_columns) -> list[Spans]:
        """A prompt of messages is read as their contents, a line each."""
        split = [steps_of(text_of(c), self.separator) for c in completions]
        told = [i for i, steps in enumerate(split) if steps]
        texts = [p if isinstance(p, str) else "\n".join(map(_content, p)) for p in prompts]
        steps = [[step for step, _ in split[i]] for i in told]
        found = [Spans(())] * len(split)
        for i, scores in zip(told, self.model.steps([texts[i] for i in told], steps), strict=True):
            paid = self._capped(scores.double())
            ends = [end for _, end in split[i]]
            found[i] = Spans(tuple(zip(ends, paid.tolist(), strict=True)))
        return found

    def _capped(self, scores: Tensor) -> Tensor:
        lines = torch.arange(len(scores) + 1, dtype=torch.int32)
        one = torch.tensor([0, len(scores)], dtype=torch.int32)
        nothing = scores.new_zeros(1)
        return line_rewards(scores, lines, nothing, one, len(scores), max_lines=self.max_lines)


def steps_of(text: str, separator: str) -> list[tuple[str, int]]:
    """Steps that are not blank, and where each ends with its separator."""
    found, end = [], 0
    for step in text.split(separator):
        end = min(end + len(step) + len(separator), len(text))
        if step.strip():
            found.append((step, end))
    return found


def _content(message: dict) -> str:
    return str(message.get("content") or "")


CREDITS = {"attention": AttentionCredit, "steps": StepCredit, "tokens": TokenCredit}
