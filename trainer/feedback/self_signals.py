"""Rewards that the policy gives itself: how certain it is, and whether it calls its answer right.

They read the model that learns, all ranks at once, so they run with the trainer and not in threads
that may be left behind, as the functions of Feedback do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefuse.kernels import divergence_kinds
from prefuse.kernels.objective import Mean
from prefuse.kernels.segments import segment_mean

from ..batch import pack
from ..data import Example, Sequence, common_prefix, tokenize
from ..dist import Ranks
from ..errors import UserError
from ..experience import Window
from ..loop import autocast
from ..loss_flags import nearest
from ..model import output_head
from ..report import Meter
from ..rollout import context_of
from ..rows import Row
from ..scores import Scorer
from ..sharding import reshard
from .load import parts
from .text import shown, texts

VERDICT = (
    "<question>\n{question}\n</question>\n\n<answer>\n{answer}\n</answer>\n\n"
    "Is the answer to the question right? Say yes or no.\n\nVerdict:"
)


class Reader(NamedTuple):
    """The policy, as signals read it."""

    policy: Scorer
    tokenizer: Any
    config: Any
    ranks: Ranks
    meter: Meter

    @torch.no_grad()
    def read(self, batches: list[list[Example]], outputs: tuple[str, ...]) -> list[tuple]:
        """TokenStats and bounds of the sequences of every micro-batch. Ranks with fewer of them
        read empty ones, for FSDP gathers weights with all."""
        most, found = max(self.ranks.gather(len(batches))), []
        for rows in batches + [[]] * (most - len(batches)):
            batch = pack(rows, self.policy.layout == "shared").to(self.ranks.device)
            with autocast(self.config, self.ranks):
                found.append((self.policy(batch, outputs), batch.score_cu_seqlens))
        reshard(self.policy)
        return found[: len(batches)]


class Signal(NamedTuple):
    """read: a number for each completion of a window [S], given as text or messages too; NaN where
    the signal does not apply."""

    name: str
    read: Callable[[Reader, Window, list], Tensor]


def self_certainty(reader: Reader, window: Window, answers: list) -> Tensor:
    """Intuitor, arXiv:2505.19590: KL(U || p), the mean over a completion's tokens."""
    vocabulary = output_head(reader.policy.model).weight.shape[0]
    means = []
    for stats, bounds in reader.read(window.micro_batches(every=True), ("lse", "mean_logit")):
        certainty = divergence_kinds.self_certainty(stats, vocabulary).double()
        means.append(segment_mean(certainty, bounds).cpu())
    told = torch.tensor([len(c.tokens) > 0 for c in window.completions], dtype=torch.bool)
    found = torch.full((len(told),), torch.nan, dtype=torch.float64)
    found[told] = torch.cat([*means, found.new_zeros(0)])
    return found


def own_verdict(
    reader: Reader,
    window: Window,
    answers: list,
    *,
    template: str = VERDICT,
    yes: str = "yes",
    no: str = "no",
) -> Tensor:
    """P(yes) / (P(yes) + P(no)) of the policy, asked whether its answer is right.

    Of each word the first token that tells them apart is read. A question longer than the model's
    context is not asked, and counted.
    """
    longest = context_of(reader.policy.model) or 1 << 40
    asked: list[Example] = []
    for i, said in enumerate(texts(answers)):
        prompt = window.prompt_of(i)
        question = _filled(template, shown(prompt.prompt), said)
        both = _verdicts(reader.tokenizer, question, prompt, (yes, no))
        if len(both[0].tokens) <= longest:
            asked.append(Example(i, both, prompt.where))
    count = torch.tensor(len(answers) - len(asked)), torch.tensor(len(answers))
    reader.meter.add({"own_verdict/too_long": Mean(*count)})
    size = window.micro_rows
    batches = [asked[k : k + size] for k in range(0, len(asked), size)]
    found = torch.full((len(answers),), torch.nan, dtype=torch.float64)
    odds = [s.logp[0::2].double() - s.logp[1::2] for s, _ in reader.read(batches, ("logp",))]
    places = torch.tensor([example.index for example in asked], dtype=torch.int64)
    found[places] = torch.cat([*(x.cpu() for x in odds), found.new_zeros(0)]).sigmoid()
    return found


def _filled(template: str, question: str, answer: str) -> str:
    try:
        return template.format(question=question, answer=answer)
    except (LookupError, ValueError) as error:
        raise UserError(
            "own_verdict: wanted a template with {question} and {answer}, other braces doubled; "
            f"got {template!r}: {type(error).__name__} {error}"
        ) from None


def _verdicts(tokenizer, question: str, prompt, words: tuple[str, str]) -> tuple[Sequence, ...]:
    """The question answered by each word, up to the token in which they differ."""
    row = Row({}, prompt.where)
    said: list[Any] = [f"{question} {word}" for word in words]
    if not isinstance(prompt.prompt, str):
        asked = {"role": "user", "content": question}
        said = [[asked, {"role": "assistant", "content": word}] for word in words]
    tokens = [np.asarray(t, dtype=np.int64) for t in tokenize(tokenizer, said, [row] * 2)]
    place = common_prefix(*tokens)
    if place == min(map(len, tokens)):
        raise UserError(
            "own_verdict: wanted yes and no, words that the tokenizer tells apart; got "
            f"{words[0]!r} and {words[1]!r}"
        )
    read = np.arange(place + 1) == place
    return tuple(Sequence(t[: place + 1], read) for t in tokens)


SIGNALS: dict[str, Callable[..., Tensor]] = {
    "self_certainty": self_certainty,
    "own_verdict": own_verdict,
}


def load_signal(spec: str) -> Signal | None:
    """By its name, with options after a `?`; None for what is no signal."""
    name = spec.partition("?")[0]
    if name not in SIGNALS:
        return None
    options = parts(spec)[1]
    parameters = inspect.signature(SIGNALS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known or not isinstance(value, str):
            wanted = f"options {', '.join(known)}, which are texts" if known else "no options"
            raise UserError(f"{name}: wanted {wanted}; got {option!r}{nearest(option, known)}")
    return Signal(name, functools.partial(SIGNALS[name], **options))
