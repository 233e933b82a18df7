"""Rewards of the online tests, in TRL's form."""


def share_of_w7(prompts, completions, completion_ids, **columns):
    """How much of six tokens is w7, id 13 of tests/tiny.py; ending early leaves the rest out."""
    return [sum(token == 13 for token in ids) / 6 for ids in completion_ids]


def even(prompts, completions, completion_ids, **columns):
    """1 for half of all completions."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
