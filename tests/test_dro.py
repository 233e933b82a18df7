"""`prefuse kto --loss_type dro_v`: the policy and a critic of prompts, by one squared error."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    assert_same_gradients,
    each_rank,
    finish,
    gradients,
    in_float64,
    python,
    scorer_of,
    sft_rows,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

from prefuse.trainer import kto, loop, objectives
from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.cli import main
from prefuse.trainer.config import KTOConfig
from prefuse.trainer.critic import ActorCritic, Critic
from prefuse.trainer.data import Example
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.kto_data import kto_examples, prompt_of
from prefuse.trainer.report import Meter
from prefuse.trainer.rows import Row
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.sharding import shard

ALONE = Ranks(0, 1, torch.device("cpu"))
TAU = 0.3


def judged_rows(n: int = 9) -> list[dict]:
    """Two prompts have several completions."""
    rows = [{**row, "reward": float(k % 3) - 0.5} for k, row in enumerate(sft_rows(n))]
    for k in (2, 4):
        rows[k]["prompt"] = rows[1]["prompt"]
    return rows


def examples_of() -> list[Example]:
    rows = [Row(r, f"row {i}") for i, r in enumerate(judged_rows())]
    return kto_examples(rows, tiny_tokenizer(), None, kto.judged_columns("dro_v"))[0]


def models():
    """The policy, the reference and a critic of another body, in float64."""
    policy, reference, body = (tiny_model(seed=s) for s in (0, 1, 2))
    body.config.num_labels = 1
    torch.manual_seed(0)
    critic = LlamaForSequenceClassification(body.config)
    critic.model.load_state_dict(body.model.state_dict())
    return [in_float64(m) for m in (policy, reference, critic)]


def step(layout: str = "shared", ranks: Ranks = ALONE, **split):
    """The loss of an optimizer step over all rows, and its gradients."""
    policy, reference, critic = models()
    critic.set_attn_implementation("sdpa" if layout == "padded" else ATTENTION)
    kept = [scorer_of(policy, layout), Critic(critic, layout)]
    both = ActorCritic(*(shard(m, ranks) for m in kept))
    frozen = shard(scorer_of(reference, layout).requires_grad_(False), ranks, frozen=True)
    examples = examples_of()
    method = kto.dro(objectives.live_reference(frozen), examples, {"tau": TAU})
    names = dict(model_name_or_path="tiny", dataset_name="rows", output_dir="unused")
    config = KTOConfig(**names, bf16=False, shuffle_dataset=False, layout=layout, **split)
    meter = Meter(ranks)
    rows = Schedule(examples, config, ranks).step(0)
    loop.backward(config, method, both, rows, ranks, meter)
    return meter.read(), gradients(both)


def by_hand():
    """Each sequence alone, and the gradients as the paper writes them."""
    policy, reference, critic = models()
    parts = []
    for example in examples_of():
        tokens = torch.from_numpy(example.sequences[0].tokens)[None]
        scored = torch.from_numpy(example.sequences[0].scored)[1:]
        logp, ref = (
            m(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[scored].sum()
            for m in (policy, reference)
        )
        prompt = torch.from_numpy(prompt_of(example))[None]
        value = critic.score(critic.model(prompt)[0])[0, -1, 0]
        parts.append(torch.stack([logp, ref.detach(), value]))
    logp, ref, value = torch.stack(parts).unbind(1)
    reward = torch.tensor([e.judged[0] for e in examples_of()], dtype=torch.float64)
    rho = logp - ref
    of_policy = -(reward - value.detach()) * logp + TAU / 2 * rho.square()
    of_critic = (reward - value - TAU * rho.detach()).square() / 2
    (of_policy.mean() + of_critic.mean()).backward()
    named = {"actor.model": policy, "critic.model": critic}
    found = {f"{top}.{k}": g for top, m in named.items() for k, g in gradients(m).items()}
    return {"loss": of_critic.mean(), "values": value.mean(), "rewards": TAU * rho.mean()}, found


CASES = [
    *(dict(layout=name, per_device_train_batch_size=9) for name in ("shared", "packed", "padded")),
    dict(per_device_train_batch_size=2, gradient_accumulation_steps=5),
    dict(per_device_train_batch_size=9, max_tokens_per_micro_batch=30),
]


def test_a_step_in_float64():
    wanted, wanted_gradients = by_hand()
    for case in CASES:
        told, found = step(**case)
        for name, value in wanted.items():
            assert_close(told[name], float(value.detach()), rtol=1e-12, atol=0)
        assert_same_gradients(found, wanted_gradients, 1e-11)


@pytest.mark.full
def test_two_ranks_change_nothing(tmp_path):
    started = [python(__file__, str(tmp_path), env=env) for env in each_rank(2)]
    assert finish(started) == [0, 0]
    told, found = torch.load(tmp_path / "found.pt")
    wanted, wanted_gradients = step(per_device_train_batch_size=9)
    assert_close(told["loss"], wanted["loss"], rtol=1e-12, atol=0)
    assert_same_gradients(found, wanted_gradients, 1e-11)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Two prompts; a completion of w7 earns 1 more than one of w8, and the second prompt 2 more."""
    folder = tmp_path_factory.mktemp("dro")
    write_model(folder / "model")
    rows = [
        {"prompt": f"w{10 + p} :", "completion": f" w{7 + k}", "reward": 2.0 * p + 1.0 - k}
        for p in (0, 1)
        for k in (0, 1)
    ]
    write_rows(folder / "rows.jsonl", 8 * rows)
    return folder


def run_command(top, out, *options) -> list[dict]:
    argv = ["--model_name_or_path", str(top / "model"), "--dataset_name", str(top / "rows.jsonl")]
    argv += ["--output_dir", str(out), "--logging_steps", "1", "--disable_tqdm", "--bf16", "false"]
    argv += ["--loss_type", "dro_v", "--tau", "0.5", "--lr_scheduler_type", "constant"]
    main(["kto", *argv, "--learning_rate", "3e-3", *options])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


def test_it_learns_rewards_and_values(top, tmp_path):
    """At the optimum r = V + tau rho: a prompt's answers differ by rho alone, prompts by V too."""
    out = tmp_path / "out"
    options = ("--per_device_train_batch_size", "8", "--critic_learning_rate", "1e-2")
    lines = run_command(top, out, *options, "--max_steps", "40", "--eval_fraction", "0.25",
                        "--eval_strategy", "steps", "--eval_steps", "40",
                        "--precompute_ref_log_probs")  # fmt: skip
    assert lines[0]["loss"] > 1 and lines[-1]["eval_loss"] < 0.01

    def logp(folder: Path, prompt: int, answer: int) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = tiny_tokenizer()(f"w{10 + prompt} : w{7 + answer}")["input_ids"]
        with torch.no_grad():
            found = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return float(found[-2, tokens[-1]] + found[-1, 1])

    critic = AutoModelForSequenceClassification.from_pretrained(out / "critic")
    for prompt in (0, 1):
        tokens = torch.tensor([tiny_tokenizer()(f"w{10 + prompt} :")["input_ids"]])
        value = float(critic(tokens).logits.detach())
        for answer in (0, 1):
            rho = logp(out, prompt, answer) - logp(top / "model", prompt, answer)
            assert_close(value + 0.5 * rho, 2.0 * prompt + 1.0 - answer, rtol=0, atol=0.2)


def test_resume_is_straight_through(top, tmp_path):
    options = ("--per_device_train_batch_size", "8", "--critic_learning_rate", "1e-2")
    straight = run_command(top, tmp_path / "b", *options, "--max_steps", "6")
    run_command(top, tmp_path / "c", *options, "--max_steps", "3", "--save_steps", "3")
    more = ("--max_steps", "6", "--resume_from_checkpoint", "true")
    resumed = run_command(top, tmp_path / "c", *options, *more)
    for name in ("loss", "grad_norm", "values"):
        assert [x[name] for x in resumed] == [x[name] for x in straight]
    for file in ("model.safetensors", "critic/model.safetensors"):
        wanted, got = (load_file(tmp_path / name / file) for name in "bc")
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_learning_rates_are_two(top, tmp_path):
    """With none for the policy the critic learns alone, and the other way round."""
    for rate, critic_rate in (("0", "1e-2"), ("1e-2", "0")):
        out = tmp_path / rate
        options = ("--learning_rate", rate, "--critic_learning_rate", critic_rate)
        lines = run_command(top, out, *options, "--max_steps", "3")
        values = [x["values"] for x in lines]
        moved = any(np.abs(values[1:]) > 1e-6), lines[-1]["rewards"] != 0
        assert moved == (critic_rate != "0", rate != "0")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--loss_type", "bco", "--critic_learning_rate", "1"], "--critic_learning_rate: wanted"),
        (["--loss_type", "kto", "--critic_model_name_or_path", "x"], "which has a critic; got kto"),
        (["--critic_learning_rate", "-1"], "--critic_learning_rate: wanted a number from 0"),
        (["--tau", "0"], "--tau: wanted a positive number"),
        (["--dataset_name", "BARE"], "'reward': wanted a number"),
    ],
)
def test_mistakes_are_told(top, tmp_path, capsys, options, message):
    bare = write_rows(tmp_path / "bare.jsonl", sft_rows(4))
    with pytest.raises(SystemExit):
        run_command(top, tmp_path / "x", *[bare if x == "BARE" else x for x in options])
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = start()
    found = step("shared", ranks, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    if ranks.is_main:
        torch.save(found, Path(sys.argv[1]) / "found.pt")
