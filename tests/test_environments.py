"""Multi-turn rollouts: which tokens are the policy's, seeds, failures, and where episodes end."""

import asyncio
import math
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from test_rollout import ENGINES, EOS, policy
from tiny import WORDS, scorer_of, tiny_tokenizer
from torch.testing import assert_close
from transformers import AutoTokenizer

from prefuse.kernels.advantage import gae
from prefuse.kernels.credit import at_ends, over_spans
from prefuse.trainer.batch import pack
from prefuse.trainer.data import Example, Sequence
from prefuse.trainer.environments import load_environment, rollout_turns, turn_rewards
from prefuse.trainer.errors import UserError
from prefuse.trainer.prompts import load_prompts
from prefuse.trainer.rollout import Completion, Sampling, make_engine
from prefuse.trainer.rows import Row

SAMPLING = Sampling(max_new_tokens=6, eos_token_ids=EOS)


def prompts_of(*texts, tokenizer=None, chat=True, **columns):
    asked = [[{"role": "user", "content": t}] if chat else t for t in texts]
    rows = [Row({"prompt": p, **columns}, f"rows.jsonl:{i + 1}") for i, p in enumerate(asked)]
    return load_prompts(rows, tokenizer or tiny_tokenizer(), None)[0]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


class Scripted:
    """An engine that says `replies`, a text a turn; those that end with an EOS are finished."""

    context = 128

    def __init__(self, *replies: str, tokenizer=None):
        self.replies, self.tokenizer = list(replies), tokenizer or tiny_tokenizer()
        self.calls: list[list[list[int]]] = []
        self.seeds: list[list[int]] = []

    def generate(self, prompts, n, sampling, seeds):
        assert n == 1 and len(seeds) == len(prompts)
        reply = self.replies[len(self.calls)]
        self.calls.append([p.tolist() for p in prompts])
        self.seeds.append(list(seeds))
        tokens = np.array(self.tokenizer(reply, add_special_tokens=False).input_ids)
        finished = int(tokens[-1]) in sampling.eos_token_ids
        logp = np.full(len(tokens), -0.5, dtype=np.float32)
        return [[Completion(tokens, logp, finished)] for _ in prompts]


class Counts:
    """Says w1, w2, ... and rewards the turn's number; done after `turns`."""

    def __init__(self, turns=3):
        self.turns, self.turn = turns, 0

    def step(self, messages):
        self.turn += 1
        assert messages[-1]["role"] == "assistant"
        messages.clear()  # its own copy
        return f"w{self.turn}", self.turn, self.turn == self.turns


def rollout(engine, prompts, make: Any = Counts, n: Any = 1, **options: Any):
    given: dict[str, Any] = dict(max_turns=5, seeds=range(len(prompts)), sampling=SAMPLING)
    given |= dict(tokenizer=tiny_tokenizer(), make_environment=make, n=n)
    return rollout_turns(engine, prompts=prompts, **given | options)


def test_tokens_are_as_sampled_and_only_the_policys_are_its_own():
    """The second reply is cut before its EOS, so the template's stands there as context."""
    engine = Scripted("w5 w6 </s>", "w7", "w8 </s>")
    ((episode,),) = rollout(engine, prompts_of("w0"))
    parts = [
        ("user : w0 assistant :", False),
        ("w5 w6 </s>", True),
        ("user : w1 assistant :", False),
        ("w7", True),
        ("</s> user : w2 assistant :", False),
        ("w8 </s>", True),
    ]
    assert episode.tokens.tolist() == [t for text, _ in parts for t in ids(text)]
    assert episode.own.tolist() == [own for text, own in parts for _ in ids(text)]
    np.testing.assert_array_equal(episode.logp, np.where(episode.own, -0.5, np.nan))
    assert episode.ends.tolist() == [8, 14, 22] and episode.rewards.tolist() == [1, 2, 3]
    assert episode.finish_reason == "done" and episode.reward == 6 and not episode.failure
    said = [(m["role"], m["content"]) for m in episode.messages]
    replies = [("assistant", "w5 w6"), ("assistant", "w7"), ("assistant", "w8")]
    assert said[::2] == replies and said[1::2] == [("user", f"w{i}") for i in (1, 2, 3)]
    assert engine.calls == [[episode.tokens[:end].tolist()] for end in (5, 13, 20)]
    completion = episode.completion()
    assert completion.tokens.tolist() == ids("w5 w6 </s> w7 w8 </s>") and completion.finished
    assert completion.episode is episode


def test_tokens_are_those_of_a_real_template(data_dir):
    """Qwen's: its newline after <|im_end|> is not sampled; here replies are cut or not."""
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampling = Sampling(max_new_tokens=8, eos_token_ids=(end, tokenizer.pad_token_id))
    replies = ("It is 7.<|im_end|>", " Let me", "Then\n\n8?<|im_end|>")
    prompts = prompts_of("What is 3 + 4?", tokenizer=tokenizer)
    engine = Scripted(*replies, tokenizer=tokenizer)

    class Tools(Counts):
        def step(self, messages):
            text, *rest = super().step(messages)
            return ([{"role": "tool", "content": text}, {"role": "user", "content": "?"}], *rest)

    ((episode,),) = rollout(engine, prompts, Tools, tokenizer=tokenizer, sampling=sampling)
    whole = tokenizer.apply_chat_template(
        prompts[0].prompt + episode.messages[:-2], tokenize=True, return_dict=True
    )["input_ids"]
    assert episode.tokens.tolist() == whole[:-1]  # less the newline after the last
    assert tokenizer.decode(episode.tokens[episode.own]) == "".join(replies)
    # <|endoftext|> ends a reply too, but the template does not know of it
    ((episode,),) = rollout(
        Scripted("7<|endoftext|>", "8<|im_end|>", tokenizer=tokenizer),
        prompts,
        lambda: Counts(2),
        tokenizer=tokenizer,
        sampling=sampling,
    )
    assert "7<|endoftext|><|im_end|>\n<|im_start|>user\nw1" in tokenizer.decode(episode.tokens)


def test_every_turn_of_every_sample_has_a_seed_of_its_own():
    engine, alone = (Scripted("w5 </s>", "w6 </s>", "w7 </s>") for _ in range(2))
    rollout(engine, prompts_of("w0", "w0"), n=3, seeds=[7, 8])
    assert len({seed for turn in engine.seeds for seed in turn}) == 2 * 3 * 3
    rollout(alone, prompts_of("w0"), n=2, seeds=[8])
    assert alone.seeds == [turn[3:5] for turn in engine.seeds]


def test_text_goes_on_as_text():
    prompts = prompts_of("w0 w1", chat=False)
    tokenizer = tiny_tokenizer(chat_template=None)
    ((episode,),) = rollout(Scripted("w5 </s>", "w6"), prompts, max_turns=2, tokenizer=tokenizer)
    assert episode.tokens.tolist() == ids("w0 w1 w5 </s> w1 w6")
    assert episode.finish_reason == "max_turns" and episode.ends.tolist() == [4, 6]
    assert [m["role"] for m in episode.messages] == ["assistant", "user"] * 2


class Room(Counts):
    """Opens with the row's word; `async`, as TRL's may be."""

    async def reset(self, row):
        row["prompt"][0]["content"] = "changed"  # its own copy
        return [{"role": "user", "content": row["word"]}] if row["word"] else None

    async def step(self, messages):
        await asyncio.sleep(0)
        return super().step(messages)


@pytest.mark.parametrize("word, opening", [("w9", "w9"), ("", "w0")])
def test_a_reset_may_open_the_conversation(word, opening):
    prompts = prompts_of("w0", word=word)
    ((episode,),) = rollout(Scripted("w5 </s>"), prompts, lambda: Room(1))
    assert episode.tokens.tolist() == ids(f"user : {opening} assistant : w5 </s>")
    assert [m["content"] for m in episode.messages] == ["w5", "w1"]
    assert prompts[0].prompt == [{"role": "user", "content": "w0"}]


class Judges:
    """Its answer, reward and end depend on what the policy said."""

    def step(self, messages):
        said = messages[-1]["content"].split()
        return " ".join(said[:2][::-1]), len(said), "w3" in said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_gives_the_same_episodes_whatever_the_batch(engine):
    texts, seeds = ("w0", "w1 w2 w3", "w4 w5"), [5, 2**63 + 1, -3]
    prompts, model = prompts_of(*texts), policy()

    def run(rows, n, name):
        sampler = make_engine(name, model, tiny_tokenizer())
        given = [seeds[i] for i in rows]
        return rollout(sampler, [prompts[i] for i in rows], Judges, n, seeds=given, max_turns=3)

    wanted = run([0, 1, 2], 4, "generate")
    kinds = [e.finish_reason for group in wanted for e in group]
    assert {"done", "max_turns"} <= set(kinds) and len({len(e.ends) for e in sum(wanted, [])}) > 2
    assert len({tuple(e.tokens) for group in wanted for e in group}) == 12
    for rows, n in (([2, 0, 1], 2), ([1], 4)):
        for i, group in zip(rows, run(rows, n, engine), strict=True):
            for got, one in zip(group, wanted[i], strict=False):
                assert got.tokens.tolist() == one.tokens.tolist()
                assert (
                    got.own.tolist() == one.own.tolist() and got.ends.tolist() == one.ends.tolist()
                )
                assert got.messages == one.messages and got.reward == one.reward


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_are_those_of_the_trainer(engine):
    """Of every own token after all that stood before it, and nothing else is scored."""
    model = policy()
    sampler = make_engine(engine, model, tiny_tokenizer())
    groups = rollout(sampler, prompts_of("w0", "w1 w2 w3"), Judges, 3)
    examples = [
        Example(i, tuple(Sequence(e.tokens, e.own) for e in group))
        for i, group in enumerate(groups)
    ]
    with torch.no_grad():
        wanted = scorer_of(model)(pack(examples)).logp
    logp = np.concatenate([e.completion().logp for group in groups for e in group])
    assert len(wanted) == sum(e.own.sum() for group in groups for e in group)
    assert_close(torch.from_numpy(logp), wanted, rtol=0, atol=1e-5)


def test_an_episode_ends_where_another_turn_does_not_fit():
    model = policy(max_position_embeddings=40)
    sampler = make_engine("generate", model, tiny_tokenizer())
    run = lambda **more: rollout(  # noqa: E731
        sampler, prompts_of("w0", "w1 w2"), lambda: Counts(99), 2, max_turns=50, **more
    )
    longer = [e for group in run() for e in group]
    assert all(e.finish_reason == "max_tokens" for e in longer)
    assert all(len(e.tokens) <= 40 and e.own[-1] and len(e.ends) > 1 for e in longer)
    # another turn's context is 5 tokens, or 6 where the reply was cut before its EOS
    assert all(len(e.tokens) + 6 + 6 > 40 for e in longer)
    assert all(e.messages[-1]["role"] == "user" for e in longer)  # which the tokens lack
    shorter = [e for group in run(max_tokens=25) for e in group]
    for one, other in zip(shorter, longer, strict=True):
        assert len(one.tokens) <= 25
        np.testing.assert_array_equal(one.tokens, other.tokens[: len(one.tokens)])
    with pytest.raises(UserError, match="at most the model's context of 40; got 41"):
        run(max_tokens=41)
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: 6 tokens and 6 new ones, where 11 fit; lower"
    ):
        run(max_tokens=11)


def failing(how):
    """Environments of which those on w1 fail in their second turn."""

    class Fails(Counts):
        def step(self, messages):
            on_w1 = messages[0]["content"] == "w1"
            result = super().step(messages)
            if not on_w1 or self.turn != 2:
                return result
            if isinstance(how, BaseException):
                raise how
            return how() if callable(how) else how

    return Fails


BAD = [
    (ValueError("no"), "raised ValueError: no"),
    (SystemExit(3), "raised SystemExit: 3"),
    (lambda: threading.Event().wait(), "timed out after 0.3 s"),
    (None, "returned 'None' (NoneType), not (observation, reward, done),"),
    (("w1", 1.0), "not (observation, reward, done),"),
    (("w1", "1.0", False), "returned the reward '1.0' (str), not a number,"),
    (("w1", None, False), "returned the reward 'None' (NoneType), not a number,"),
    (("w1", [1.0, 2.0], False), "not a number,"),
    (("w1", math.nan, False), "returned the reward nan"),
    (("w1", 1.0, "no"), "returned 'no' (str), not whether it is done,"),
    ((None, 1.0, False), "returned 'None' (NoneType) from step, not text or a list of messages,"),
    ((["w1"], 1.0, False), "not text or a list of messages,"),
    (([{"role": "user"}], 1.0, False), "returned messages that the chat template refuses"),
]
STRICT = (
    "{% for m in messages %}{% if m.content is not defined %}"
    "{{ raise_exception('no content') }}{% endif %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize("how, words", BAD)
@pytest.mark.parametrize("on_failure", ["stop", "skip", "zero"])
def test_failures_are_told_with_their_row_and_follow_the_policy(how, words, on_failure):
    prompts, tokenizer = prompts_of("w0", "w1", "w2"), tiny_tokenizer(chat_template=STRICT)
    engine, started = Scripted("w5 </s>", "w6 </s>", "w7 </s>"), time.monotonic()
    options = dict(on_failure=on_failure, timeout=0.3, tokenizer=tokenizer)
    if on_failure == "stop":
        wanted = rf"the environment .*{re.escape(words)}.* on rows.jsonl:2, turn 2\..*_failure skip"
        with pytest.raises(UserError, match=wanted):
            rollout(engine, prompts, failing(how), **options)
    else:
        (one,), (failed,), (other,) = rollout(engine, prompts, failing(how), **options)
        assert words in failed.failure and "rows.jsonl:2, turn 2" in failed.failure
        assert failed.finish_reason == "failed" and len(failed.ends) == 2
        instead = 0.0 if on_failure == "zero" else math.nan
        np.testing.assert_array_equal(failed.rewards, [1.0, instead])
        assert len(failed.tokens) == failed.ends[-1] and failed.own[-1]
        assert one.rewards.tolist() == other.rewards.tolist() == [1, 2, 3]
        assert [len(prompts) for prompts in engine.calls] == [3, 3, 2]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("where", ["make", "reset"])
def test_an_environment_that_never_begins_is_a_failure_of_its_first_turn(where):
    made = []

    class Broken(Counts):
        def __init__(self):
            super().__init__()
            made.append(self)
            if where == "make" and len(made) == 2:
                raise OSError("none left")

        def reset(self, row):
            if where == "reset" and self is made[1]:
                raise OSError("none left")

    options = dict(on_failure="skip", max_concurrency=1)
    engine = Scripted("w5 </s>", "w5 </s>", "w5 </s>")
    (one,), (failed,) = rollout(engine, prompts_of("w0", "w1"), Broken, **options)
    assert "none left on rows.jsonl:2, turn 1" in failed.failure and math.isnan(failed.reward)
    assert failed.ends.tolist() == [5] and not failed.own.any()
    assert one.rewards.tolist() == [1, 2, 3] and len(failed.completion().tokens) == 0


def test_those_that_hang_do_not_starve_the_others():
    """Ten of twenty hang, four are called at once: each four cost one time-out."""

    class Hangs(Counts):
        def step(self, messages):
            if messages[0]["content"] == "w1":
                threading.Event().wait()
            return super().step(messages)

    engine, started = Scripted("w5 </s>", "w5 </s>"), time.monotonic()
    options = dict(on_failure="zero", timeout=0.2, max_concurrency=4, max_turns=2)
    hung, well = rollout(engine, prompts_of("w1", "w0"), Hangs, 10, **options)
    assert time.monotonic() - started < 3 * 0.2 + 1.0
    assert all(e.rewards.tolist() == [0] for e in hung)
    assert all(e.rewards.tolist() == [1, 2] for e in well)


THINKS = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('w9')[-1] }}{% else %}{{ m.content }}{% endif %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
VANISHES = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : w9 {% endif %}"
)
HIDES = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'user' %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize(
    "template, message",
    [
        (THINKS, "rewrites what stood before .*'w8 w9 w7 </s> ' becomes ' w7 </s> user : w1"),
        (VANISHES, "rewrites what stood before .*'9 ' becomes '8 w9 w7 </s> '"),
        (HIDES, "does not show an assistant's content"),
    ],
)
def test_a_template_that_rewrites_history_is_refused(template, message):
    tokenizer = tiny_tokenizer(chat_template=template)
    prompts = prompts_of("w0", tokenizer=tokenizer)
    with pytest.raises(UserError, match=message):
        rollout(Scripted("w8 w9 w7 </s>"), prompts, tokenizer=tokenizer)
    ((episode,),) = rollout(Scripted("w8 w9 w7 </s>"), prompts, max_turns=1, tokenizer=tokenizer)
    assert episode.finish_reason == "max_turns"  # one turn needs no template in between


def test_turns_are_what_estimators_take():
    """Rewards at a turn's last own token; GAE whose actions are turns, worked by hand."""
    engine = Scripted("w5 w6 </s>", "w7", "w8 </s>")
    ((first,), (second,)) = rollout(engine, prompts_of("w0", "w1 w2"))
    rewards, cu_turns = turn_rewards([first, second])
    assert rewards.tolist() == [1, 2, 3] * 2 and cu_turns.tolist() == [0, 3, 4, 6, 9, 10, 12]
    steps, cu_seqlens = torch.from_numpy(cu_turns), torch.tensor([0, 6, 12], dtype=torch.int32)
    tokens = at_ends(torch.from_numpy(rewards).float(), steps, 12)
    assert tokens[:6].tolist() == [0, 0, 1, 2, 0, 3]
    advantages, _ = gae(tokens, torch.zeros(12), cu_seqlens, gamma=0.5, lam=1.0, steps=steps)
    last, middle = 3.0, 2.0 + 0.5 * 3.0
    wanted = [1.0 + 0.5 * middle] * 3 + [middle] + [last] * 2
    assert_close(advantages, torch.tensor(wanted * 2))
    assert turn_rewards([])[1].tolist() == [0]


class TwoWords:
    """Wants w7 in the first turn and w8 in the second."""

    turn = 0

    def step(self, messages):
        wanted = ("w7", "w8")[self.turn]
        self.turn += 1
        return "w1", messages[-1]["content"].split().count(wanted) / 4, self.turn == 2


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turn_rewards_teach_each_turn_its_own_word(seed):
    """REINFORCE, a turn's reward against the group's same turn; the best is 1 in both."""
    model, sampling = policy(seed=3), Sampling(max_new_tokens=4)
    scorer, sampler = scorer_of(model), make_engine("generate", model, tiny_tokenizer())
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(30):
        options = dict(seeds=[100 * seed + step], sampling=sampling)
        (group,) = rollout(sampler, prompts_of("w0"), TwoWords, 64, **options)
        rewards, cu_turns = turn_rewards(group)
        by_turn = torch.from_numpy(rewards).float().view(-1, 2)
        seen.append(by_turn.mean(0))
        better = (by_turn - by_turn.mean(0)) / (by_turn.std(0) + 1e-4)
        sequences = tuple(Sequence(e.tokens, e.own) for e in group)
        logp = scorer(pack([Example(0, sequences)])).logp
        advantages = over_spans(better.flatten(), torch.from_numpy(cu_turns), len(logp))
        optimizer.zero_grad()
        (-(advantages * logp).mean()).backward()
        optimizer.step()
        sampler.update_weights(model)
    assert seen[0].max() < 0.1 and seen[-1].min() >= 0.95


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Maze:
    size: int = 3
    def step(self, messages):
        return "", float(self.size), True

def make(size):
    return Maze(size)
"""


def test_environments_are_found_as_rewards_are(tmp_path, monkeypatch):
    file = tmp_path / "mazes_17.py"
    file.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for spec, size in (
        (f"{file}:Maze", 3),
        ("mazes_17.Maze?size=5", 5),
        (f"{file}:make?size=7", 7),
    ):
        make = load_environment(spec)
        assert make() is not make()
        ((episode,),) = rollout(Scripted("w5 </s>"), prompts_of("w0"), make)
        assert episode.reward == size
    no_step: Any = dict
    for spec, message in (
        ("maze", "wanted package.module.name or file.py:name"),
        ("nowhere.py:Maze", "no file nowhere.py"),
        (f"{file}:Mase", "did you mean Maze"),
        (f"{file}:make", "missing a required argument: 'size'"),
        (f"{file}:Maze?sise=3", "unexpected keyword argument 'sise'"),
        ("math.pi", "a class with step"),
        (no_step, "a class with step"),
    ):
        with pytest.raises(UserError, match=message):
            load_environment(spec)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_turns": 0}, "wanted 1 or more"),
        ({"n": 0}, "wanted 1 or more"),
        ({"seeds": [1, 2]}, "wanted one for each of 1 prompts; got 2"),
        ({"on_failure": "ignore"}, "wanted stop, skip or zero"),
        ({"timeout": 0.0}, "timeout"),
        ({"make": object}, "wanted an object with step"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UserError, match=message):
        rollout(Scripted("w5 </s>"), prompts_of("w0"), **options)
