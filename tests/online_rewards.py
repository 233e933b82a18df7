"""Rewards of the online tests, in TRL's form."""

import os
import random
import re
import time

from prefuse.trainer.rewards import Spans


def share_of_w7(prompts, completions, completion_ids, **columns):
    """How much of six tokens is w7, id 13 of tests/tiny.py; ending early leaves the rest out."""
    return [sum(token == 13 for token in ids) / 6 for ids in completion_ids]


def noisy(prompts, completions, completion_ids, **columns):
    """A judge of moods: it draws from the process's own stream."""
    return [random.random() + share for share in share_of_w7(prompts, completions, completion_ids)]


def even(prompts, completions, completion_ids, **columns):
    """1 for half of all completions."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


class Echo:
    """An environment of two turns: each pays for the w7 in its reply."""

    def __init__(self, pay: float = 0.5):
        self.pay, self.turns = float(pay), 0

    def step(self, messages):
        self.turns += 1
        share = messages[-1]["content"].split().count("w7") / 3
        return f" w{self.turns} :", self.pay * share, self.turns == 2


def hangs_on_rank_1(prompts, completions, completion_ids, **columns):
    time.sleep(600 if os.environ.get("RANK") == "1" else 0)
    return share_of_w7(prompts, completions, completion_ids)


def slow(prompts, completions, completion_ids, **columns):
    """So that a run can be killed between two of its steps."""
    time.sleep(0.4)
    return share_of_w7(prompts, completions, completion_ids)


def fails_on_w2(prompts, completions, completion_ids, **columns):
    """A reward with every kind of failure, by the prompt's first word."""
    kinds = {"w2": float("nan"), "w3": None}
    pairs = zip(prompts, completion_ids, strict=True)
    return [kinds.get(prompt.split()[0], float(sum(ids) % 2)) for prompt, ids in pairs]


def raises(prompts, **columns):
    raise RuntimeError("no reward today")


def w7_of_tokens(prompts, completions, completion_ids, **columns):
    """share_of_w7 where it is earned."""
    return [[(token == 13) / 6 for token in ids] for ids in completion_ids]


def w7_of_text(prompts, completions, **columns):
    """The same by the text alone, in which a word is two or three characters long."""
    words = [re.finditer(r"\bw7\b", completion) for completion in completions]
    return [Spans([(word.end(), 1 / 6) for word in found]) for found in words]
