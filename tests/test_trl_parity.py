"""Against TRL 1.16's own DPOTrainer: the same tokens, and the same losses step by step.

Two conventions differ and are kept out of the comparison: TRL trains on identical pairs, which
have no gradient and which prefuse skips; and TRL ignores label_smoothing for these losses, which in
prefuse makes them their cDPO forms.
"""

import json

import numpy as np
import pytest
import torch

from prefuse.trainer.cli import main
from prefuse.trainer.data import pair_examples
from prefuse.trainer.model import load_tokenizer
from prefuse.trainer.rows import load_rows

trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}", allow_module_level=True)

MAX_LENGTH = 384


@pytest.fixture(scope="module")
def pairs(data_dir):
    """HH rows that both trainers keep: different completions, a prompt shorter than MAX_LENGTH."""
    tokenizer = load_tokenizer(str(data_dir / "models" / "stories260k"))
    rows = load_rows(str(data_dir / "prefs" / "hh_rlhf_train.jsonl"))[:400]
    kept = {e.where for e in pair_examples(rows, tokenizer, MAX_LENGTH)[0]}
    columns = ("chosen", "rejected")
    return [{c: row.columns[c] for c in columns} for row in rows if row.where in kept]


def trl_trainer(model, rows, folder, **config):
    """TRL's trainer on the rows in order, on a CPU in float32, its losses recorded."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Recording(trl.DPOTrainer):
        losses: list[float] = []

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    Recording.losses = []
    args = trl.DPOConfig(
        output_dir=str(folder),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=MAX_LENGTH,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **config,
    )
    return Recording(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


@pytest.mark.full
@pytest.mark.parametrize(  # with larger steps a loss of 25, IPO's, drifts 1e-5 by rounding alone
    "loss_type, learning_rate", [("sigmoid", 1e-4), ("ipo", 1e-4), ("hinge", 3e-5)]
)
def test_ten_steps_of_dpo(loss_type, learning_rate, data_dir, pairs, tmp_path):
    model = str(data_dir / "models" / "stories260k")
    rows, accumulate, steps = pairs[:80], 2, 10
    theirs = trl_trainer(
        model,
        rows,
        tmp_path / "trl",
        loss_type=loss_type,
        beta=0.1,
        learning_rate=learning_rate,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
    )
    theirs.train()
    expected = np.array(theirs.losses).reshape(steps, accumulate).sum(1)

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            *("dpo", "--model_name_or_path", model, "--dataset_name", str(file)),
            *("--output_dir", str(tmp_path / "ours"), "--loss_type", loss_type, "--beta", "0.1"),
            *("--learning_rate", str(learning_rate), "--max_length", str(MAX_LENGTH)),
            *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
            *("--max_steps", str(steps), "--logging_steps", "1", "--shuffle_dataset", "false"),
        ]
    )
    lines = (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()
    actual = np.array([json.loads(line)["loss"] for line in lines])
    assert np.abs(expected - expected[0]).max() > 1e-2  # they move, so agreeing means something
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["models/stories260k", "tokenizers/gpt2"])
def test_the_same_tokens_of_transcripts(name, data_dir, pairs, tmp_path):
    same_tokens(load_tokenizer(str(data_dir / name)), pairs[:200], tmp_path, data_dir)


@pytest.mark.full
def test_the_same_tokens_of_conversations(data_dir, tmp_path):
    file = data_dir / "prefs" / "tulu3_pref_sample.jsonl"
    rows = [row.columns for row in load_rows(str(file))]
    rows = [{c: row[c] for c in ("chosen", "rejected")} for row in rows]
    same_tokens(load_tokenizer(str(data_dir / "tokenizers/qwen2")), rows, tmp_path, data_dir)


def same_tokens(tokenizer, rows, tmp_path, data_dir):
    """TRL's dataset preparation and ours cut prompts and completions at the same tokens."""
    from datasets import Dataset

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, ledger = pair_examples(load_rows(str(file)), tokenizer, None)
    shell = trl_trainer(
        str(data_dir / "models/stories260k"),
        rows[:2]
        if isinstance(rows[0]["chosen"], str)
        else [{"prompt": "a", "chosen": " b", "rejected": " c"}],
        tmp_path,
    )
    shell._tokenizer = tokenizer
    shell.args.max_length = None
    prepared = shell._prepare_dataset(Dataset.from_list(rows), tokenizer, shell.args, "train")
    theirs = [r for r in prepared if r["chosen_ids"] != r["rejected_ids"]]
    assert len(ours) == len(theirs) == len(rows) - ledger.identical
    for example, row in zip(ours, theirs, strict=True):
        for sequence, side in zip(example.sequences, ("chosen_ids", "rejected_ids"), strict=True):
            assert sequence.tokens.tolist() == row["prompt_ids"] + row[side]
            assert sequence.scored.sum() == len(row[side])
