"""Preference functions of the tests: P(completion beats opponent) of each pair."""

import asyncio
import os
import time

BEATS = {("w4", "w6"), ("w5", "w4"), ("w6", "w5")}


async def rock_paper_scissors(prompts, completions, opponents, **columns):
    await asyncio.sleep(0)
    pairs = zip(completions, opponents, strict=True)
    return [0.5 if a == b else float((a, b) in BEATS) for a, b in pairs]


def _on_p1(prompts, value):
    return [value if prompt == "p1" else 0.5 for prompt in prompts]


def raises(prompts, completions, opponents):
    if "p1" in prompts:
        raise RuntimeError("no word on it")
    return [0.5] * len(opponents)


def no_probability(prompts, completions, opponents):
    return _on_p1(prompts, 1.5)


def not_finite(prompts, completions, opponents):
    return _on_p1(prompts, float("nan"))


def nested(prompts, completions, opponents):
    return _on_p1(prompts, [0.5])


def too_few(prompts, completions, opponents):
    return [0.5] * (len(prompts) - ("p1" in prompts))


def hangs(prompts, completions, opponents):
    time.sleep(2)
    return [0.5] * len(prompts)


def no_word_on_paper(prompts, completions, opponents):
    pairs = zip(completions, opponents, strict=True)
    return [None if "w5" in (a, b) else float((a, b) in BEATS) for a, b in pairs]


def w7_wins(prompts, completions, opponents, **columns):
    """The better at the task of online_rewards.py wins: it says more w7."""
    counts = [[text.split().count("w7") for text in side] for side in (completions, opponents)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(*counts, strict=True)]


def _asked(what):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{what}\n")


def counted(prompts, completions, scale: float = 1.0):
    _asked("reward")
    return [scale * text.count("w1") for text in completions]


def counted_cost(prompts, completions):
    _asked("cost")
    return [float(text.count("w2")) for text in completions]


def counted_preference(prompts, completions, opponents):
    _asked("preference")
    return w7_wins(prompts, completions, opponents)


def circle(prompts, completions, opponents, **columns):
    """Rock, paper and scissors beat every other word, and each other in a circle."""
    words = {word for pair in BEATS for word in pair}
    found = []
    for a, b in zip(completions, opponents, strict=True):
        if a in words and b in words:
            found.append(0.5 if a == b else float((a, b) in BEATS))
        else:
            found.append(0.5 + 0.5 * ((a in words) - (b in words)))
    return found
