"""One step of DPO with adapters, beside TRL 1.16's own DPOTrainer with the same peft settings."""

import json

import pytest
import torch
from tiny import relative_error

from prefuse.trainer import lora, objectives
from prefuse.trainer.batch import pack
from prefuse.trainer.config import DPOConfig
from prefuse.trainer.data import pair_examples
from prefuse.trainer.model import load_model, load_tokenizer
from prefuse.trainer.rows import load_rows
from prefuse.trainer.scores import Scorer, Unadapted

trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'prefuse[peft]'")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}", allow_module_level=True)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def drawn(model) -> None:
    """Adapters that do something, the same ones in both models."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0, 0.1, generator=generator)


def theirs(model: str, rows: list[dict], folder):
    """TRL's loss of the rows and the gradient of its adapters."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = trl.DPOConfig(
        str(folder), bf16=False, use_cpu=True, gradient_checkpointing=False, max_length=384,
        report_to="none", per_device_train_batch_size=len(rows), beta=0.1,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=12, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    drawn(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), {n.removeprefix("base_model.model."): g for n, g in grads.items()}


@pytest.mark.full
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_dpo_with_adapters(layout, data_dir, tmp_path):
    name = str(data_dir / "models" / "stories260k")
    tokenizer = load_tokenizer(name)
    rows = load_rows(str(data_dir / "prefs" / "hh_rlhf_train.jsonl"))[:60]
    kept = {e.where for e in pair_examples(rows, tokenizer, 384)[0]}
    texts = [{c: r.columns[c] for c in ("chosen", "rejected")} for r in rows if r.where in kept][:8]
    wanted_loss, wanted = theirs(name, texts, tmp_path)

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    examples, _ = pair_examples(load_rows(str(tmp_path / "rows.jsonl")), tokenizer, 384)
    model = load_model(name, dtype=torch.float32, layout=layout)
    flags = dict(use_peft=True, lora_r=4, lora_alpha=12, lora_target_modules=TARGETS)
    lora.attach(DPOConfig(name, "rows", "out", **flags), model)
    drawn(model)
    scorer = Scorer(model, layout)
    reference = objectives.live_reference(Unadapted(scorer))
    method = objectives.dpo(reference, "sigmoid", {"beta": 0.1})
    loss = method.objective(scorer, pack(examples, layout == "shared")).loss.mean()
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert abs(wanted_loss - 0.6931) > 1e-3 and abs(float(loss) - wanted_loss) < 1e-5
    assert got.keys() == wanted.keys() and len(got) == 2 * 3 * model.config.num_hidden_layers
    assert relative_error(got, wanted) <= 1e-5
