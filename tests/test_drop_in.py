"""docs/drop_in.md, run as it stands: each block against the trainer it changes, stock and fused on
the same batches in float32, gradients before every optimizer step and every logged metric alike.

SGD, because Adam's first step takes the sign of a gradient and so doubles the rounding of a zero.
"""

import functools
import re
from pathlib import Path

import conftest  # noqa: F401  (a clone that is not installed, and `ranks` without pytest)
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import (
    each_rank,
    finish,
    gradients,
    pair_rows,
    python,
    relative_error,
    tiny_model,
    tiny_tokenizer,
    write_model,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "drop_in.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
NAMES = ("fuse_head", "FusedDPOTrainer", "PairLossTrainer", "FusedGRPOTrainer")
NAMES += ("PolicyLossTrainer",)
NAMES += ("fuse_loss", "compute_loss_func", "Scored")
TIMES = ("runtime", "per_second", "step_time", "total_flos")


def snippets(*names: str) -> dict:
    """What the blocks that define `names` define."""
    namespace: dict = {}
    for name in names:
        (block,) = (b for b in BLOCKS if re.search(rf"^(?:def|class) {name}\b", b, re.MULTILINE))
        exec(compile(block, f"{DOCUMENT.name}: {name}", "exec"), namespace)
    return namespace


def test_every_block_of_the_document_is_tested():
    assert len(BLOCKS) == len(NAMES)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trl():
    pytest.importorskip("accelerate")
    module = pytest.importorskip("trl", reason="the peers are not installed")
    if not module.__version__.startswith("1.16"):
        pytest.skip(f"the blocks are for TRL 1.16; got {module.__version__}")
    return module


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="the peers are not installed")


class Recorder(transformers.TrainerCallback):
    """The gradient of every optimizer step."""

    def __init__(self):
        self.steps: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append(gradients(model))


def run(trainer_class, *, config, **others) -> tuple[list[dict], list[dict]]:
    """Trains; the gradients and the logged numbers of every step, clocks apart."""
    recorder = Recorder()
    trainer = trainer_class(args=config, callbacks=[recorder], **others)
    trainer.train()
    logs = [
        {k: v for k, v in line.items() if not any(t in k for t in TIMES)}
        for line in trainer.state.log_history
    ]
    return recorder.steps, logs


def settings(folder, **more) -> dict:
    return (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=1e9,
            gradient_checkpointing=False,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=3,
        )
        | more
    )


def same(ours, theirs, steps: int, tolerance: float = 2e-6) -> None:
    (our_steps, our_logs), (their_steps, their_logs) = ours, theirs
    assert len(our_steps) == len(their_steps) == steps
    for got, wanted in zip(our_steps, their_steps, strict=True):
        assert max(float(g.abs().max()) for g in wanted.values()) > 1e-4
        assert relative_error(got, wanted) < tolerance
    assert len(our_logs) == len(their_logs) > steps
    for got, wanted in zip(our_logs, their_logs, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "family, outputs",
    [
        ("Llama", ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")),
        ("Gemma2", ("entropy",)),  # softcap
        ("Granite", ("mean_logits",)),  # divides its logits
        ("Qwen3", ()),
    ],
)
def test_the_head_that_trl_asks_for(family, outputs, trl):
    """Every field and the gradient, one row with nothing to score; then a batch with nothing."""
    fused, stock = (tiny_model(family, head_dim=8, tie=True) for _ in range(2))
    snippets("fuse_head")["fuse_head"](fused, 0.7, outputs=outputs)
    trl.trainer.utils.add_fused_lm_head(stock, 0.7, outputs=outputs)
    ids = torch.randint(2, 40, (4, 11))
    attention = torch.arange(11) < torch.tensor([[11], [8], [11], [5]])
    labels = ids.masked_fill(~attention, -100)
    labels[:, :4] = -100
    labels[2] = -100
    found = []
    for model in (fused, stock):
        out = model(ids, attention_mask=attention.long(), labels=labels, fused_lm_head=True)
        loss = out.loss if "entropy" not in outputs else out.loss - 0.1 * out.entropy.sum()
        loss.backward()
        found.append((out, gradients(model)))
    (out, grads), (wanted, wanted_grads) = found
    assert set(out.keys()) == set(wanted.keys())
    for name, value in wanted.items():
        torch.testing.assert_close(out[name], value, rtol=1e-5, atol=5e-6, msg=name)
    assert relative_error(grads, wanted_grads) < 2e-6

    fused.zero_grad(set_to_none=True)
    fused(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss.backward()
    assert all(float(g.abs().max()) == 0 for g in gradients(fused).values())
    torch.testing.assert_close(fused(ids).logits, stock(ids).logits, rtol=0, atol=0)
    short = dict(max_new_tokens=2, do_sample=False)
    assert fused.generate(ids, **short).tolist() == stock.generate(ids, **short).tolist()


def dpo(trainer_class, trl, folder, config: dict, **others):
    """Two steps on tiny models and pairs, unless `others` has real ones."""
    from datasets import Dataset

    batch = dict(per_device_train_batch_size=3, max_steps=2)
    defaults = dict(
        model=tiny_model(seed=0),
        ref_model=tiny_model(seed=1),
        train_dataset=Dataset.from_list(pair_rows(24)),
        processing_class=tiny_tokenizer(),
    )
    config = trl.DPOConfig(**settings(folder, **batch) | config)
    return run(trainer_class, config=config, **defaults | others)


@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5], "precompute_ref_log_probs": True},
        {"loss_type": "sigmoid", "use_weighting": True, "ld_alpha": 0.5},
    ],
)
def test_dpo_trainer(config, trl, tmp_path):
    fused = snippets("fuse_head", "FusedDPOTrainer")["FusedDPOTrainer"]
    same(dpo(fused, trl, tmp_path, config), dpo(trl.DPOTrainer, trl, tmp_path, config), 2)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(
    "config, pair_loss",
    [
        ({"loss_type": "sigmoid", "beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ({"loss_type": "ipo"}, {"loss_type": "ipo", "beta": 0.1}),
    ],
)
def test_dpo_trainer_with_a_pair_loss(config, pair_loss, precompute, trl, tmp_path):
    config = {**config, "precompute_ref_log_probs": precompute}
    ours = snippets("fuse_head", "FusedDPOTrainer", "PairLossTrainer")["PairLossTrainer"]
    got = dpo(ours, trl, tmp_path, config, pair_loss=pair_loss)
    wanted = dpo(trl.DPOTrainer, trl, tmp_path, config)
    if config["loss_type"] == "ipo":  # TRL logs beta rho, we the reward that the loss compares
        rewards = [name for line in wanted[1] for name in line if name.startswith("rewards/")]
        for logs in (got[1], wanted[1]):
            for line in logs:
                for name in rewards:
                    line.pop(name, None)
    same(got, wanted, 2)


@pytest.mark.parametrize("name", ["FusedDPOTrainer", "PairLossTrainer"])
def test_dpo_trainer_with_adapters(name, trl, tmp_path):
    """The reference is the model with its adapters off."""
    peft = pytest.importorskip("peft")
    ours = snippets("fuse_head", "FusedDPOTrainer", "PairLossTrainer")[name]
    more = {"pair_loss": {"loss_type": "sigmoid"}} if name == "PairLossTrainer" else {}
    found = []
    for trainer_class in (functools.partial(ours, **more), trl.DPOTrainer):
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        others = dict(ref_model=None, peft_config=adapters)
        config = dict(loss_type="sigmoid", learning_rate=0.5)
        found.append(dpo(trainer_class, trl, tmp_path, config, **others))
    for _, logs in found:
        for line in logs:  # at the first step all are ties, which TRL counts as wrong
            line.pop("rewards/accuracies", None)
    same(*found, 2)


def test_a_pair_loss_that_trl_lacks(trl, tmp_path):
    ours = snippets("fuse_head", "FusedDPOTrainer", "PairLossTrainer")["PairLossTrainer"]
    simpo = {"loss_type": "simpo", "beta": 2.0}
    _, logs = dpo(ours, trl, tmp_path, {"max_steps": 30, "logging_steps": 15}, pair_loss=simpo)
    assert logs[1]["loss"] < logs[0]["loss"] - 0.01
    assert logs[1]["rewards/margins"] > logs[0]["rewards/margins"]


def test_dpo_trainer_on_real_pairs(trl, data_dir, tmp_path):
    from datasets import Dataset

    from prefuse.trainer.rows import load_rows

    fused = snippets("fuse_head", "FusedDPOTrainer")["FusedDPOTrainer"]
    folder = str(data_dir / "models" / "stories260k")
    rows = load_rows(str(data_dir / "prefs" / "hh_rlhf_train.jsonl"))[:12]
    pairs = [{c: r.columns[c] for c in ("chosen", "rejected")} for r in rows]
    found = []
    for trainer_class in (fused, trl.DPOTrainer):
        models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
        real = dict(
            model=models[0],
            ref_model=models[1],
            train_dataset=Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
        config = dict(max_length=256, learning_rate=1e-3)
        found.append(dpo(trainer_class, trl, tmp_path, config, **real))
    same(*found, 2, tolerance=1e-5)  # either is 3e-6 from float64 here


@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "dapo", "beta": 0.05, "temperature": 0.7},
        {"loss_type": "grpo", "num_iterations": 2, "entropy_coef": 0.01},
    ],
)
def test_grpo_trainer(config, trl, tmp_path):
    """With generation: the same seed samples the same completions."""
    from datasets import Dataset

    fused = snippets("fuse_head", "FusedGRPOTrainer")["FusedGRPOTrainer"]

    def reward(completion_ids, **_):
        return [float(np.mean(np.array(ids) % 5)) for ids in completion_ids]

    folder = write_model(tmp_path / "model")  # where TRL loads the reference model from
    found = []
    for trainer_class in (fused, trl.GRPOTrainer):
        options = settings(tmp_path, per_device_train_batch_size=4, num_generations=4, max_steps=3)
        options |= dict(max_completion_length=7, **config)
        found.append(
            run(
                trainer_class,
                config=trl.GRPOConfig(**options),
                model=transformers.AutoModelForCausalLM.from_pretrained(folder),
                reward_funcs=reward,
                train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in pair_rows(8)]),
                processing_class=tiny_tokenizer(),
            )
        )
    same(*found, 3)


@pytest.mark.parametrize(
    "config, policy",
    [
        ({"loss_type": "dapo", "beta": 0.05}, dict(loss_type="ppo")),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
            dict(loss_type="gspo", epsilon=0.2, epsilon_high=0.2),
        ),
    ],
)
def test_grpo_trainer_with_a_policy_loss(config, policy, trl, tmp_path):
    """The gradients and what both log; TRL logs more about its clips."""
    from datasets import Dataset

    names = ("fuse_head", "FusedGRPOTrainer", "PolicyLossTrainer")
    ours = functools.partial(snippets(*names)["PolicyLossTrainer"], policy=policy)

    def reward(completion_ids, **_):
        return [float(np.mean(np.array(ids) % 5)) for ids in completion_ids]

    folder = write_model(tmp_path / "model")
    found = []
    for trainer_class in (ours, trl.GRPOTrainer):
        options = settings(tmp_path, per_device_train_batch_size=4, num_generations=4, max_steps=3)
        found.append(
            run(
                trainer_class,
                config=trl.GRPOConfig(**options, max_completion_length=7, **config),
                model=transformers.AutoModelForCausalLM.from_pretrained(folder),
                reward_funcs=reward,
                train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in pair_rows(8)]),
                processing_class=tiny_tokenizer(),
            )
        )
    steps, logs = zip(*found, strict=True)
    ours_alone = {"policy/approx_kl"} | (set() if config.get("beta") else {"kl"})
    kept = [
        [
            {k: v for k, v in x.items() if "clip_ratio" not in k and k not in ours_alone}
            for x in side
        ]
        for side in logs
    ]
    same((steps[0], kept[0]), (steps[1], kept[1]), 3)


def sft_batch(n: int, seed: int) -> dict:
    """Rows padded on the right, their first three tokens not scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (n, 12), generator=generator)
    lengths = torch.randint(5, 13, (n, 1), generator=generator)
    attention = torch.arange(12) < lengths
    scored = attention & (torch.arange(12) >= 3)
    return {
        "input_ids": ids.masked_fill(~attention, 0),
        "attention_mask": attention.long(),
        "completion_mask": scored.long(),
    }


@pytest.mark.parametrize("way", ["fuse_loss", "compute_loss_func"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_transformers_trainer(way, family, accelerate, tmp_path):
    """Two micro-batches of different numbers of scored tokens make a step; then an evaluation."""
    batch = sft_batch(12, seed=0)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = [
        {"input_ids": i, "attention_mask": a, "labels": y}
        for i, a, y in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]
    options = settings(tmp_path, per_device_train_batch_size=3, max_steps=2)
    options |= dict(eval_strategy="steps", eval_steps=1)
    config = transformers.TrainingArguments(**options)
    found = []
    for changed in (True, False):
        model = tiny_model(family, head_dim=8)
        others = {}
        if changed:
            block = snippets(way)
            if way == "fuse_loss":
                block["fuse_loss"](model)
            else:
                others["compute_loss_func"] = block["compute_loss_func"]
        data = dict(train_dataset=rows, eval_dataset=rows[:5])
        found.append(run(transformers.Trainer, config=config, model=model, **data, **others))
    same(*found, 2)


def plain_logps(model, batch) -> torch.Tensor:
    """[B, T - 1] by the model's own logits, zero where nothing is scored."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask


def plain_sft(model, frozen, batch):
    return -plain_logps(model, batch).sum() / batch["completion_mask"][:, 1:].sum()


def plain_dpo(model, frozen, batch):
    chosen, rejected = plain_logps(model, batch).sum(1).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = plain_logps(frozen, batch).sum(1).chunk(2)
    return -F.logsigmoid(0.3 * (chosen - ref_chosen - rejected + ref_rejected)).mean()


class Recording(torch.optim.SGD):
    def __init__(self, module):
        super().__init__(module.parameters(), lr=0.05)
        self.module, self.steps = module, []

    def step(self, *args, **kwargs):
        self.steps.append(gradients(self.module))
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_loop_with_accelerate(method, accelerate):
    batches = [sft_batch(n, seed=n) for n in (4, 6, 2, 8)]
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    optimizer = Recording(model)
    plain = {"sft": plain_sft, "dpo": plain_dpo}[method]
    for index, batch in enumerate(batches):
        (plain(model, reference, batch) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()

    block = snippets("Scored")
    scored = block["Scored"](tiny_model(seed=0))
    ours = Recording(scored.model)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    if method == "sft":
        block["sft"](accelerator, scored, ours, loader)
    else:
        frozen = block["Scored"](reference)
        block["dpo"](accelerator, scored, frozen, ours, loader, loss_type="sigmoid", beta=0.3)
    assert len(ours.steps) == len(optimizer.steps) == 2
    for got, wanted in zip(ours.steps, optimizer.steps, strict=True):
        assert relative_error(got, wanted) < 2e-6
    for p, wanted in zip(scored.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-6)


def ranks() -> None:
    """On each of two ranks: halves of a batch under FSDP2, against the whole batch unsharded."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    block = snippets("Scored")
    whole = sft_batch(8, seed=0)
    half = {name: rows[4 * rank : 4 * rank + 4] for name, rows in whole.items()}
    for tie in (False, True):
        for token_loss in (None, lambda stats: stats.logp):
            full, sharded = (block["Scored"](tiny_model(tie=tie)) for _ in range(2))
            full(whole, token_loss).sum().div(2).backward()  # FSDP averages over ranks
            block["shard"](sharded)(half, token_loss).sum().backward()
            assert relative_error(gradients(sharded), gradients(full)) < 2e-6
    torch.distributed.destroy_process_group()


@pytest.mark.full
def test_fsdp2_with_the_head_in_forward():
    assert finish([python(__file__, env=env) for env in each_rank(2)]) == [0, 0]


if __name__ == "__main__":
    ranks()
