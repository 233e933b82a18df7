"""`prefuse ppo`'s step against PPO written out in plain PyTorch, in float64."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from online_runs import online_config
from tiny import (
    WORDS,
    in_float64,
    ragged_pairs,
    scorer_of,
    tiny_model,
    tiny_tokenizer,
    write_model,
)
from torch.testing import assert_close
from transformers import LlamaForSequenceClassification

from prefuse.trainer import loop
from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.batch import pack
from prefuse.trainer.critic import ActorCritic, Critic, load_critic
from prefuse.trainer.dist import Ranks
from prefuse.trainer.errors import UserError
from prefuse.trainer.experience import Window
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.ppo import ppo, ppo_method
from prefuse.trainer.online_config import PPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.report import Meter
from prefuse.trainer.rollout import Completion

ALONE = Ranks(0, 1, torch.device("cpu"))
BETA, GAMMA, LAM, EPSILON, CLIP_VALUE, VF = 0.3, 0.97, 0.9, 0.2, 0.1, 0.7


def plain(model, critic, prompt, completion):
    """Log-probs of a completion's tokens and the values before them, by the models' own forward."""
    ids, start = torch.tensor([[*prompt, *completion]]), len(prompt)
    logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
    logp = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)[start - 1 :]
    hidden = critic.model(ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    return logp, critic.score(hidden)[0, start - 1 : -1, 0]


def reference(actor, critic, old, ref, rows, rewards):
    """The loss of PPO: GAE by its recursion, whitening by its definition."""
    advantages, returns, olds = [], [], []
    with torch.no_grad():
        for (prompt, completion), reward in zip(rows, rewards, strict=True):
            logp, values = plain(*old, prompt, completion)
            penalty = BETA * (logp - plain(*ref, prompt, completion)[0])
            carried, found = 0.0, []
            for t in reversed(range(len(completion))):
                last = t == len(completion) - 1
                following = 0.0 if last else values[t + 1]
                paid = (reward if last else 0.0) - penalty[t]
                delta = paid + GAMMA * following - values[t]
                carried = delta + GAMMA * LAM * carried
                found.insert(0, carried)
            advantages.append(torch.stack(found))
            returns.append(advantages[-1] + values)
            olds.append((logp, values))
    every = torch.cat(advantages)
    total, count = 0.0, len(every)
    for (prompt, completion), advantage, target, (old_logp, old_values) in zip(
        rows, advantages, returns, olds, strict=True
    ):
        advantage = (advantage - every.mean()) / (every.var() + 1e-8).sqrt()
        logp, values = plain(actor, critic, prompt, completion)
        ratio = (logp - old_logp).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        policy = -torch.minimum(ratio * advantage, clipped * advantage)
        held = old_values + (values - old_values).clamp(-CLIP_VALUE, CLIP_VALUE)
        value = torch.maximum((values - target) ** 2, (held - target) ** 2) / 2
        total = total + (policy + VF * value).sum()
    return total / count


def critic_model(seed: int):
    config = tiny_model(pad_token_id=0).config
    config.num_labels = 1
    torch.manual_seed(seed)
    return in_float64(LlamaForSequenceClassification(config))


def test_a_step_in_float64():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, 40, 4), rng.integers(3, 40, n)) for n in (5, 1, 7, 3)]
    rewards = [1.0, 0.25, -0.5, 0.0]
    models = {name: in_float64(tiny_model(seed=k)) for k, name in enumerate(("old", "new", "ref"))}
    critics = {name: critic_model(k) for k, name in enumerate(("old", "new"))}
    old, ref = (models["old"], critics["old"]), (models["ref"], critics["old"])
    wanted = reference(models["new"], critics["new"], old, ref, rows, rewards)
    wanted.backward()
    parameters = [p for m in (models["new"], critics["new"].model) for p in m.parameters()]
    expected = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None

    config = PPOConfig(
        "m", "d", "o", reward_funcs=["x"], bf16=False, beta=BETA, gamma=GAMMA, lam=LAM,
        vf_coef=VF, cliprange_value=CLIP_VALUE,
    )  # fmt: skip
    config.hyperparameters.update(epsilon=EPSILON)
    window = Window(
        [Prompt(i, prompt, "", {}, "") for i, (prompt, _) in enumerate(rows)],
        [Completion(tokens, np.zeros(len(tokens)), True) for _, tokens in rows],
        each=1,
        micro_rows=3,
    )
    for name, part in (("old_logp", 0), ("values", 1)):
        window.set(name, torch.cat([plain(*old, *row)[part] for row in rows]))
    window.set("ref_logp", torch.cat([plain(*ref, *row)[0] for row in rows]))
    scores = torch.tensor(rewards, dtype=torch.float64)
    window.rewards, window.parts = scores, scores[:, None]
    controls = Controls(config.beta)
    learner = ppo(config, ppo_method(config, controls), controls, lambda x: x)
    batches = learner.batches(window, 0)
    critics["new"].set_attn_implementation(ATTENTION)
    both = ActorCritic(scorer_of(models["new"]), Critic(critics["new"], "shared"))
    losses = loop.backward(config, learner.method, both, batches, ALONE, Meter(ALONE))
    assert_close(torch.stack(losses).sum() / sum(len(c) for _, c in rows), wanted.detach())
    got = [p.grad for p in parameters if p.grad is not None]
    for grad, exact in zip(got, expected, strict=True):
        assert_close(grad, exact, rtol=1e-9, atol=1e-12)


def test_critics_are_loaded_without_dropout(tmp_path):
    """A fresh head says 0; a saved one what it said, in training too; others are refused."""
    model, batch = tiny_model(attention_dropout=0.5), pack(ragged_pairs(), share=False)
    fresh, theirs = tmp_path / "fresh", tmp_path / "saved"
    write_model(fresh, model)
    two = LlamaForSequenceClassification(deepcopy(model.config))
    model.config.num_labels = 1
    saved = LlamaForSequenceClassification(model.config)
    saved.model.load_state_dict(model.model.state_dict())
    write_model(theirs, saved)
    config = online_config(PPOConfig, layout="padded")
    critics = {
        folder: load_critic(
            replace(config, critic_model_name_or_path=str(folder)), tiny_tokenizer(), ALONE
        ).train()
        for folder in (fresh, theirs)
    }
    assert not critics[fresh](batch).any()
    saved.set_attn_implementation("sdpa")
    values, known = critics[theirs](batch), []
    for example in ragged_pairs():
        for sequence in example.sequences:
            hidden = saved.eval().model(torch.from_numpy(sequence.tokens)[None])[0]
            known.append(saved.score(hidden)[0, :-1, 0][torch.from_numpy(sequence.scored)[1:]])
    assert_close(values, torch.cat(known), rtol=1e-4, atol=1e-5)
    write_model(tmp_path / "two", two)
    more = dict(critic_model_name_or_path=str(tmp_path / "two"))
    with pytest.raises(UserError, match="wanted a head of 1 numbers"):
        load_critic(replace(config, **more), tiny_tokenizer(), ALONE)
    with pytest.raises(UserError, match="wanted the policy's tokenizer"):
        other = replace(config, critic_model_name_or_path=str(fresh))
        load_critic(other, tiny_tokenizer(words=WORDS[:-1]), ALONE)
