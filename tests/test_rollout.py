"""The engines of transformers: exact samples, the model's own log-probs, whatever the batch."""

import json
import math
import subprocess
import threading
import time
import warnings

import numpy as np
import pytest
import rollout_worker
import torch
from tiny import (
    ATTENTION,
    each_rank,
    finish,
    needs,
    python,
    scorer_of,
    sequence,
    tiny_model,
    tiny_tokenizer,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefuse.trainer.batch import pack
from prefuse.trainer.data import Example
from prefuse.trainer.engines import continuous
from prefuse.trainer.engines.generate import GenerateEngine
from prefuse.trainer.engines.noise import choose, gumbel, row_keys, stream
from prefuse.trainer.errors import UserError
from prefuse.trainer.rollout import Sampling, engine_for, make_engine

needs_psutil = needs("psutil", "dev")  # continuous batching does, on a CPU
ENGINES = (pytest.param("transformers", marks=needs_psutil), "generate")
EOS = (1,)


def prompts_of(*lengths: int, vocab: int = 48) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(2, vocab, n) for n in lengths]


def policy(family: str = "Llama", **changes):
    model = tiny_model(family, **changes)
    model.set_attn_implementation(ATTENTION)
    return model


def tokens_of(groups) -> list[list[list[int]]]:
    return [[c.tokens.tolist() for c in group] for group in groups]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no test falls back unseen
        yield


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_equals_generate(engine, family):
    model, prompts = policy(family), prompts_of(3, 40, 1, 17)
    sampling = Sampling(max_new_tokens=24, temperature=0.0, eos_token_ids=EOS)
    got = make_engine(engine, model, tiny_tokenizer()).generate(prompts, 1, sampling, [0] * 4)
    model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    for prompt, (completion,) in zip(prompts, got, strict=True):
        wanted = model.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=24, eos_token_id=1
        )[0, len(prompt) :]
        assert completion.tokens.tolist() == wanted.tolist()
        assert completion.finished == (wanted[-1] == 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_equals_generate_on_a_trained_model(engine, data_dir):
    folder = data_dir / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), _tokenizer(folder)
    prompts = [np.array(tokenizer(t).input_ids) for t in ("Once upon a time", "Lily and Tom went")]
    sampling = Sampling(max_new_tokens=40, temperature=0.0, eos_token_ids=(2,))
    got = make_engine(engine, model, tokenizer).generate(prompts, 1, sampling, [0, 0])
    for prompt, (completion,) in zip(prompts, got, strict=True):
        wanted = model.generate(torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=40)
        assert completion.tokens.tolist() == wanted[0, len(prompt) :].tolist()


def _tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_are_those_of_the_trainer(engine, temperature):
    model, prompts = policy(tie=True), prompts_of(3, 40, 1, 17)
    cut = dict(top_p=0.9, top_k=20, min_p=0.01)  # these must not move them
    sampling = Sampling(max_new_tokens=24, temperature=temperature, eos_token_ids=EOS, **cut)
    got = make_engine(engine, model, tiny_tokenizer()).generate(prompts, 3, sampling, range(4))
    scorer = scorer_of(model)
    scorer.temperature = temperature
    examples = [
        Example(i, tuple(sequence(np.concatenate([p, c.tokens]), len(p)) for c in group))
        for i, (p, group) in enumerate(zip(prompts, got, strict=True))
    ]
    with torch.no_grad():
        wanted = scorer(pack(examples, True)).logp
    logp = np.concatenate([c.logp for group in got for c in group])
    assert_close(torch.from_numpy(logp), wanted, rtol=0, atol=1e-5)


@needs_psutil
def test_a_seed_gives_the_same_completions_whatever_the_batch_order_or_engine():
    model, prompts, seeds = policy(), prompts_of(3, 40, 1, 17, 9), [11, 2**63 + 4, -5, 0, 7]
    sampling = Sampling(max_new_tokens=20, eos_token_ids=EOS, top_p=0.95)
    plain = make_engine("generate", model, tiny_tokenizer(), max_rows=3)
    wanted = tokens_of(plain.generate(prompts, 4, sampling, seeds))
    assert len({tuple(t) for group in wanted for t in group}) > 15
    for engine in ("transformers", "generate"):
        other = make_engine(engine, model, tiny_tokenizer())
        assert tokens_of(other.generate(prompts, 4, sampling, seeds)) == wanted
        turned = other.generate(prompts[::-1], 2, sampling, seeds[::-1])
        assert tokens_of(turned) == [group[:2] for group in wanted[::-1]]
        alone = other.generate(prompts[1:2], 4, sampling, seeds[1:2])
        assert tokens_of(alone) == wanted[1:2]


@needs_psutil
def test_a_small_cache_changes_nothing():
    model, prompts = policy(), prompts_of(60, 50, 40, 33)
    sampling = Sampling(max_new_tokens=40, eos_token_ids=EOS)
    wanted = make_engine("generate", model, tiny_tokenizer()).generate(
        prompts, 3, sampling, range(4)
    )
    small = make_engine("transformers", model, tiny_tokenizer(), cache_bytes=1 << 16)
    assert tokens_of(small.generate(prompts, 3, sampling, range(4))) == tokens_of(wanted)


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_samples_follow_the_softmax(cut):
    """Chi-square over 40,000 samples of 8 tokens, at the 99.9 % quantile of its distribution."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    sampling = Sampling(temperature=0.8, **cut)
    n = 40_000
    streams = np.array([stream(3, k) for k in range(200)], dtype=np.uint64).repeat(200)
    keys = torch.from_numpy(row_keys(streams, np.tile(np.arange(200), 200)))
    tokens, logp = choose(logits.expand(n, -1), keys, sampling)
    p = (logits / 0.8).softmax(-1)
    kept = p
    if "top_k" in cut:
        kept = torch.where(p >= p[3], p, 0.0)
    if "top_p" in cut:
        kept = torch.where(p.cumsum(0) - p < 0.7, p, 0.0)
    if "min_p" in cut:
        kept = torch.where(p >= 0.2 * p.max(), p, 0.0)
    expected = kept / kept.sum() * n
    seen = torch.bincount(tokens, minlength=8).float()
    assert seen[kept == 0].sum() == 0
    alive = kept > 0
    chi = float(((seen - expected)[alive] ** 2 / expected[alive]).sum())
    limit = {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5, 8: 24.3}[int(alive.sum())]
    assert chi < limit
    assert_close(logp, p.log()[tokens])


def test_an_engine_samples_from_the_model():
    """Chi-square over 6,000 first tokens of one prompt, at the 99.9 % quantile for 48 tokens."""
    model, (prompt,) = policy(), prompts_of(7)
    (group,) = make_engine("generate", model, tiny_tokenizer(), max_rows=2000).generate(
        [prompt], 6000, Sampling(max_new_tokens=1, temperature=0.7), [3]
    )
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        p = (model(torch.from_numpy(prompt)[None]).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor([int(c.tokens[0]) for c in group]), minlength=48)
    assert float(((seen - 6000 * p) ** 2 / (6000 * p)).sum()) < 82.7
    assert seen.min() > 0


def test_the_noise_is_gumbel_and_rows_do_not_repeat_each_other():
    streams = np.array([stream(seed, 0) for seed in range(64)], dtype=np.uint64)
    noise = gumbel(torch.from_numpy(row_keys(streams, np.zeros(64, np.int64))), 4096)
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - np.euler_gamma) < 0.01  # 4 standard errors of 262,144
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 5 / 4096**0.5
    below = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert abs(float(below)) < 4 / noise.numel() ** 0.5
    assert len(noise.unique()) > 0.99 * noise.numel()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_follows_the_policy_and_leaves_it_alone(engine):
    model, other, prompts = policy(tie=True), policy(tie=True, seed=5), prompts_of(5, 9)
    settings = (model.config._attn_implementation, model.config.use_cache, model.training)
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    sampler = make_engine(engine, model, tiny_tokenizer())
    before = sampler.generate(prompts, 1, sampling, [0, 0])
    state = torch.get_rng_state()
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    sampler.update_weights(model)
    after = sampler.generate(prompts, 1, sampling, [0, 0])
    wanted = make_engine("generate", other, tiny_tokenizer()).generate(prompts, 1, sampling, [0, 0])
    assert tokens_of(after) == tokens_of(wanted) != tokens_of(before)
    assert settings == (model.config._attn_implementation, model.config.use_cache, model.training)
    assert torch.equal(state, torch.get_rng_state())
    twin = sampler.twin.model
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    sampler.update_weights(other)  # another object altogether
    assert tokens_of(sampler.generate(prompts, 1, sampling, [0, 0])) == tokens_of(wanted)


def test_sharded_weights_are_gathered(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    prompts, sampling = prompts_of(5, 9), Sampling(max_new_tokens=12)
    plain, sharded = policy(tie=True), policy(tie=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        state = torch.get_rng_state()
        sampler = make_engine("generate", sharded, tiny_tokenizer())
        assert torch.equal(state, torch.get_rng_state())
        with torch.no_grad():
            for model in (plain, sharded):
                for p in model.parameters():
                    p.mul_(1.5)
        stale = sampler.generate(prompts, 2, sampling, [0, 1])
        sampler.update_weights(sharded)
        got = sampler.generate(prompts, 2, sampling, [0, 1])
    finally:
        dist.destroy_process_group()
    wanted = make_engine("generate", plain, tiny_tokenizer()).generate(prompts, 2, sampling, [0, 1])
    assert tokens_of(got) == tokens_of(wanted) != tokens_of(stale)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_twin_of_another_dtype_is_a_copy_that_follows(engine):
    model, prompts, sampling = policy(), prompts_of(5, 40), Sampling(max_new_tokens=12)
    sampler = make_engine(engine, model, tiny_tokenizer(), dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    sampler.update_weights(model)
    assert sampler.twin.model.dtype == torch.bfloat16 and model.dtype == torch.float32
    got = sampler.generate(prompts, 2, sampling, [0, 1])
    for prompt, group in zip(prompts, got, strict=True):
        for completion in group:
            tokens = torch.from_numpy(np.concatenate([prompt, completion.tokens]))
            model.set_attn_implementation("sdpa")
            with torch.no_grad():
                logp = model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = logp.gather(1, torch.from_numpy(completion.tokens)[:, None]).squeeze(1)
            gap = (own - torch.from_numpy(completion.logp)).abs().max()
            assert 1e-5 < gap < 0.05  # bfloat16's rounding, no more


@needs_psutil
def test_a_failure_while_sampling_raises_and_leaves_nothing_running(monkeypatch):
    sampler = make_engine("transformers", policy(), tiny_tokenizer())
    prompts, sampling = prompts_of(5, 9, 20), Sampling(max_new_tokens=12)
    wanted = tokens_of(sampler.generate(prompts, 2, sampling, [0, 1, 2]))
    threads = threading.active_count()

    def fails(*args):
        raise ValueError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(continuous, "choose", fails)
        with pytest.raises(RuntimeError, match="continuous batching failed: no more"):
            sampler.generate(prompts, 2, sampling, [0, 1, 2])
    assert threading.active_count() == threads
    assert tokens_of(sampler.generate(prompts, 2, sampling, [0, 1, 2])) == wanted


@needs_psutil
def test_an_interruption_does_not_wait_for_the_rest(monkeypatch):
    sampler = make_engine("transformers", policy(), tiny_tokenizer(), max_rows=2)
    prompts, sampling = prompts_of(5, 9), Sampling(max_new_tokens=100)
    sampler.generate(prompts, 1, sampling, [0, 1])

    def interrupted(manager, count):
        manager.get_result(timeout=0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(continuous, "collect", interrupted)
    started, threads = time.monotonic(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(prompts, 100, sampling, [0, 1])  # 10,000 steps, most of a minute
    assert time.monotonic() - started < 10 and threading.active_count() == threads


def test_the_engine_by_default():
    """On a GPU continuous batching, which cannot mix; else generate."""
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert [engine_for(cuda), engine_for(cuda, mixed=True), engine_for(cpu)] == [
        "transformers",
        "generate",
        "generate",
    ]
    for more in ({}, {"mixture": (policy(seed=5), 0.5)}):
        assert isinstance(make_engine("auto", policy(), tiny_tokenizer(), **more), GenerateEngine)


@pytest.mark.full
@needs_psutil
def test_two_ranks_sample_from_their_shards_as_one_does():
    code = "import conftest, rollout_worker; rollout_worker.main()"
    processes = [python("-c", code, env=env, stdout=subprocess.PIPE) for env in each_rank(2)]
    assert finish(processes) == [0, 0]
    outputs = [p.communicate()[0] for p in processes]
    plain = policy(tie=True)
    sampler = make_engine("generate", plain, tiny_tokenizer())
    wanted = [rollout_worker.sampled(sampler, 3)]
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    wanted.append(rollout_worker.sampled(sampler, 3))
    assert json.loads(outputs[0].splitlines()[-1]) == wanted
    assert json.loads(outputs[1].splitlines()[-1]) == [found[:1] for found in wanted]


@pytest.mark.parametrize("weight", [0.3, -0.5, 0.5])
def test_mixtures_sample_from_both_models(weight):
    """Greedy, so that the mixed logits can be followed token by token."""
    model, other, prompts = policy(), policy(seed=5), prompts_of(3, 11)
    sampling = Sampling(max_new_tokens=10, temperature=0.0)
    sampler = make_engine("generate", model, tiny_tokenizer(), mixture=(other, weight))
    got = sampler.generate(prompts, 1, sampling, [0, 0])
    for m in (model, other):
        m.set_attn_implementation("sdpa")
    for prompt, (completion,) in zip(prompts, got, strict=True):
        tokens = torch.from_numpy(np.concatenate([prompt, completion.tokens]))
        with torch.no_grad():
            z, y = (m(tokens[None]).logits[0, len(prompt) - 1 : -1] for m in (model, other))
        assert completion.tokens.tolist() == ((1 - weight) * z + weight * y).argmax(-1).tolist()
        own = z.log_softmax(-1).gather(1, torch.from_numpy(completion.tokens)[:, None]).squeeze(1)
        assert_close(torch.from_numpy(completion.logp), own, rtol=0, atol=1e-5)
    assert tokens_of(got) != tokens_of(
        make_engine("generate", model, tiny_tokenizer()).generate(prompts, 1, sampling, [0, 0])
    )


@needs_psutil
@pytest.mark.parametrize(
    "family, why",
    [("GPTNeoX", "RuntimeError: continuous batching failed"), ("Bloom", "log-probs are off")],
)
def test_a_model_unfit_for_continuous_batching_is_sampled_plainly(family, why):
    """GPT-NeoX cannot be run by it; Bloom could, to wrong log-probs: its ALiBi goes amiss."""
    model = tiny_model(family)
    notes: list[str] = []
    sampler = make_engine("transformers", model, tiny_tokenizer(), warn=notes.append)
    prompts, sampling = prompts_of(5, 40), Sampling(max_new_tokens=8)
    wanted = make_engine("generate", model, tiny_tokenizer()).generate(prompts, 2, sampling, [0, 1])
    for _ in range(2):
        assert tokens_of(sampler.generate(prompts, 2, sampling, [0, 1])) == tokens_of(wanted)
    assert len(notes) == 1 and why in notes[0] and "plain generate" in notes[0]


@needs_psutil
@pytest.mark.parametrize("family", ["Gemma2", "Mistral"])
def test_sliding_windows_are_sampled_alike(family):
    model = tiny_model(family, head_dim=8, sliding_window=16)
    prompts, sampling = prompts_of(5, 40), Sampling(max_new_tokens=8)
    one, other = (
        make_engine(e, model, tiny_tokenizer()).generate(prompts, 2, sampling, [0, 1])
        for e in ("transformers", "generate")
    )
    assert tokens_of(one) == tokens_of(other)


@pytest.mark.parametrize(
    "name, options, more, message",
    [
        ("sglang", {}, {}, "wanted one of auto, transformers, generate, vllm, openai; got sglang"),
        ("transformers", {"mixture": (None, 0.5)}, {}, "cannot sample from a mixture"),
        ("generate", {}, {"prompts": [3, 120]}, "prompt 1: its 120 tokens and 24 new ones"),
        ("transformers", {}, {"prompts": [120]}, "prompt 0: its 120 .* context of 128"),
        ("generate", {}, {"prompts": [3, 0]}, "prompt 1: wanted at least one token"),
        ("generate", {}, {"seeds": [1, 2, 3]}, "wanted one for each of 2 prompts; got 3"),
        ("generate", {}, {"n": 0}, "wanted 1 or more completions"),
    ],
)
def test_mistakes_are_told(name, options, more, message):
    given = {"prompts": [3, 4], "n": 1, "seeds": None} | more
    prompts = prompts_of(*given["prompts"])
    with pytest.raises(UserError, match=message):
        engine = make_engine(name, policy(), tiny_tokenizer(), **options)
        sampling = Sampling(max_new_tokens=24)
        engine.generate(prompts, given["n"], sampling, given["seeds"] or [0] * len(prompts))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_prompts_give_no_completions(engine):
    assert make_engine(engine, policy(), tiny_tokenizer()).generate([], 2, Sampling(), []) == []


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"min_p": 2.0}]
)
def test_sampling_is_checked(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: wanted"):
        Sampling(**wrong)


def test_models_of_two_vocabularies_do_not_mix():
    with pytest.raises(UserError, match="one vocabulary; got 48 and 60"):
        make_engine("generate", policy(), tiny_tokenizer(), mixture=(policy(vocab_size=60), 0.5))
