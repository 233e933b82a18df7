"""GRPO on fixed rollouts: advantages, loss and gradients are those of TRL 1.16's GRPOTrainer."""

import numpy as np
import pytest
import torch
import transformers
from tiny import gradients, pair_rows, scorer_of, tiny_tokenizer, write_model
from torch.testing import assert_close

from prefuse.trainer import loop
from prefuse.trainer.dist import Ranks
from prefuse.trainer.experience import Window
from prefuse.trainer.learners.controls import Controls
from prefuse.trainer.learners.policy import policy
from prefuse.trainer.online_config import GRPOConfig
from prefuse.trainer.prompts import Prompt
from prefuse.trainer.report import Meter
from prefuse.trainer.rollout import Completion

trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}", allow_module_level=True)

ALONE = Ranks(0, 1, torch.device("cpu"))
EACH, LONGEST, TEMPERATURE = 4, 7, 0.9
CLIP = dict(epsilon=0.2, epsilon_high=0.2)
# TRL's settings -> ours, and the estimator
CASES = {
    "grpo": (dict(loss_type="grpo"), dict(loss_type="grpo"), CLIP),
    "dr_grpo": (
        dict(loss_type="dr_grpo", scale_rewards="none"),
        dict(loss_type="dr_grpo", advantage="dr_grpo"),
        CLIP,
    ),
    "dapo": (dict(loss_type="dapo", epsilon_high=0.28), dict(loss_type="dapo"), {}),
    "bnpo": (dict(loss_type="bnpo"), dict(loss_type="ppo"), CLIP),
    "cispo": (
        dict(loss_type="cispo", epsilon_high=5.0),
        dict(loss_type="cispo"),
        dict(epsilon_high=5.0),
    ),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence"),
        dict(loss_type="gspo"),
        CLIP,
    ),
    "kl": (
        dict(loss_type="grpo", beta=0.3, use_bias_correction_kl=False),
        dict(loss_type="grpo", beta=0.3),
        CLIP,
    ),
}


def reward(completion_ids, **_):
    return [float(np.mean(np.array(ids) % 5)) for ids in completion_ids]


def theirs(folder: str, tmp_path, settings: dict):
    """What a step of TRL's trainer was given and what it made of it."""
    from datasets import Dataset

    seen = {}

    class Recording(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen["inputs"] = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
            seen["loss"] = super()._compute_loss(model, inputs)
            return seen["loss"]

        def training_step(self, model, *args, **kwargs):
            result = super().training_step(model, *args, **kwargs)
            unwrapped = self.accelerator.unwrap_model(model)
            seen["gradients"] = {n: p.grad.clone() for n, p in unwrapped.named_parameters()}
            return result

    options = dict(per_device_train_batch_size=2 * EACH, num_generations=EACH, max_steps=1)
    options |= dict(max_completion_length=LONGEST, temperature=TEMPERATURE, learning_rate=1e-3)
    options |= dict(output_dir=str(tmp_path / "trl"), report_to="none", save_strategy="no")
    options |= dict(disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False)
    trainer = Recording(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=trl.GRPOConfig(**options | settings),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in pair_rows(8)]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_trls(case, tmp_path):
    settings, ours, hyperparameters = CASES[case]
    folder = write_model(tmp_path / "model")  # where TRL loads the reference from
    found = theirs(folder, tmp_path, settings)
    given = found["inputs"]
    cut = lambda side, i: given[f"{side}_ids"][i][given[f"{side}_mask"][i].bool()]  # noqa: E731
    # TRL shuffles its rows: prompt by prompt again
    order = sorted(range(2 * EACH), key=lambda i: cut("prompt", i).tolist())
    given = {k: v[order] if v.dim() and len(v) == 2 * EACH else v for k, v in given.items()}
    prompts = [cut("prompt", i).numpy() for i in (0, EACH)]
    tokens = [cut("completion", i).numpy() for i in range(2 * EACH)]
    window = Window(
        [Prompt(i, ids, "", {}, "") for i, ids in enumerate(prompts)],
        [Completion(ids, np.zeros(len(ids), np.float32), True) for ids in tokens],
        EACH,
        micro_rows=3,  # groups are split over micro-batches
    )
    config = GRPOConfig(
        "m", "d", "o", reward_funcs=["x"], per_device_train_batch_size=2 * EACH,
        num_generations=EACH, max_completion_length=LONGEST, temperature=TEMPERATURE, bf16=False,
        **ours,
    )  # fmt: skip
    config.hyperparameters.update(hyperparameters)
    scores = torch.tensor(reward(tokens), dtype=torch.float64)
    window.rewards, window.parts = scores, scores[:, None]
    controls = Controls(config.beta)
    learner = policy(config, controls, lambda x: x)
    batches = learner.batches(window, 0)
    starts = window.cu_seqlens[:-1].long()
    assert_close(torch.tensor(window.columns["advantages"])[starts], given["advantages"])
    if config.beta:
        kept = given["completion_mask"].bool()
        window.columns["ref_logp"] = given["ref_per_token_logps"][kept].numpy()
        batches = window.micro_batches()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    scorer = scorer_of(model)
    scorer.temperature = TEMPERATURE
    losses = loop.backward(config, learner.method, scorer, batches, ALONE, Meter(ALONE))
    units = sum(len(t) for t in tokens) if learner.method.unit == "token" else 2 * EACH
    assert_close(sum(losses) / units, found["loss"].detach(), rtol=1e-5, atol=1e-6)
    for name, grad in gradients(model).items():
        assert_close(grad, found["gradients"][name].to(grad), rtol=1e-5, atol=1e-5, msg=name)
