"""`prefuse kto`: completions of other prompts, the same gradients however rows are laid out, split
or spread over ranks, resume, and TRL's own losses."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    assert_same_gradients,
    each_rank,
    finish,
    gradients,
    in_float64,
    pair_rows,
    python,
    scorer_of,
    sft_rows,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)
from torch.testing import assert_close

from prefuse.kernels.preference import UNPAIRED_LOSSES, unpaired_loss
from prefuse.trainer import kto, loop, objectives
from prefuse.trainer.cli import main
from prefuse.trainer.config import KTOConfig
from prefuse.trainer.data import Example
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.errors import UserError
from prefuse.trainer.kto_data import kto_examples, mismatched, partners, prompt_of
from prefuse.trainer.report import Meter
from prefuse.trainer.reward_data import reward_examples
from prefuse.trainer.rows import Row
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.sharding import shard

ALONE = Ranks(0, 1, torch.device("cpu"))
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
OPTIONS = {"kto": WEIGHTS, "bco": {}, "apo_zero_unpaired": WEIGHTS, "a2po": {}}


def labelled_rows(n: int = 9, seed: int = 0) -> list[dict]:
    """Rows very different in length; one prompt has three of them."""
    rng = np.random.default_rng(seed)
    rows = sft_rows(n, seed)
    for k, row in enumerate(rows):
        row |= {"label": bool(rng.integers(2)), "reward": float(k % 3), "value": 0.5}
        if k in (2, 4):
            row["prompt"] = rows[1]["prompt"]
    return rows


def examples_of(loss_type: str, n: int = 9) -> list[Example]:
    rows = [Row(r, f"row {i}") for i, r in enumerate(labelled_rows(n))]
    return kto_examples(rows, tiny_tokenizer(), None, kto.judged_columns(loss_type))[0]


def config_of(**changes) -> KTOConfig:
    names = dict(model_name_or_path="tiny", dataset_name="rows", output_dir="unused")
    return KTOConfig(**names, bf16=False, shuffle_dataset=False, **changes)


def models(layout: str, ranks: Ranks):
    """The policy and another model as the reference, in float64."""
    scorers = [scorer_of(in_float64(tiny_model(seed=s)), layout) for s in (0, 1)]
    return [shard(s, ranks, frozen=k == 1) for k, s in enumerate(scorers)]


def two_steps(loss_type: str, layout: str = "shared", ranks: Ranks = ALONE, **split):
    """The losses of two optimizer steps over all rows, and the second's gradient: by then BCO's
    averages have moved."""
    examples = examples_of(loss_type)
    scorer, frozen = models(layout, ranks)
    reference = objectives.live_reference(frozen.requires_grad_(False))
    method = kto.method(reference, examples, loss_type, OPTIONS[loss_type], ranks)
    config = config_of(layout=layout, **split)
    rows, losses = Schedule(examples, config, ranks).step(0), []
    for done in (1, 2):
        scorer.zero_grad()
        meter = Meter(ranks)
        loop.backward(config, method, scorer, rows, ranks, meter)
        method.after_step(done)
        losses.append(meter.read()["loss"])
    return losses, gradients(scorer)


def oracle(loss_type: str):
    """The same by each sequence alone through the models' own logits."""
    policy, reference = (in_float64(tiny_model(seed=s)) for s in (0, 1))
    examples = examples_of(loss_type)
    columns = dict(zip(kto.judged_columns(loss_type),
        torch.tensor([e.judged for e in examples]).double().unbind(1), strict=True))  # fmt: skip

    def logp(model, example: Example) -> torch.Tensor:
        (sequence,) = example.sequences
        tokens = torch.from_numpy(sequence.tokens)
        logits = model(input_ids=tokens[None]).logits[0]
        found = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
        return found[torch.from_numpy(sequence.scored)[1:]].sum()

    found = torch.stack([logp(policy, e) for e in examples])
    with torch.no_grad():
        ref = torch.stack([logp(reference, e) for e in examples])
        pairs = zip(examples, partners([prompt_of(e).tobytes() for e in examples]), strict=True)
        mixed = [mismatched(e, examples[k], None) for e, k in pairs if k is not None]
        kl = torch.stack([logp(policy, e) - logp(reference, e) for e in mixed]).mean()
    reward, good = 0.1 * (found - ref).detach(), columns.get("label", ref) > 0
    moved = (reward[good].mean() + reward[~good].mean()) / 2
    if "label" in columns:
        columns["label"] = good
    losses = []
    for shift in {"kto": (kl, kl), "bco": (0 * moved, moved)}.get(loss_type, (None, None)):
        more = {} if shift is None else {"shift": shift}
        given = columns | more | OPTIONS[loss_type]
        losses.append(unpaired_loss(found, loss_type=loss_type, ref_logp=ref, **given).mean())
    losses[-1].backward()
    return [float(x.detach()) for x in losses], gradients(policy)


def test_the_others_have_their_own_tests():
    assert OPTIONS.keys() == UNPAIRED_LOSSES.keys() - {kto.CRITIC}  # tests/test_dro.py


@pytest.mark.parametrize("loss_type", OPTIONS)
def test_no_layout_or_split_changes_the_gradient(loss_type):
    """9 rows: in one batch by three layouts; in micro-batches of 2, and as many tokens as fit."""
    wanted, wanted_gradients = oracle(loss_type)
    cases = [
        dict(layout=layout, per_device_train_batch_size=9)
        for layout in ("shared", "packed", "padded")
    ]
    cases += [dict(per_device_train_batch_size=2, gradient_accumulation_steps=5)]
    cases += [dict(per_device_train_batch_size=9, max_tokens_per_micro_batch=30)]
    for case in cases:
        losses, found = two_steps(loss_type, **case)
        assert_close(losses, wanted, rtol=1e-12, atol=0)
        found = {name.removeprefix("model."): g for name, g in found.items()}
        assert_same_gradients(found, wanted_gradients, 1e-11)


def test_held_out_rows_have_one_z0():
    """However many of them fit a batch, of which one alone would have no partner."""
    (wanted, _), _ = oracle("kto")
    scorer, frozen = models("shared", ALONE)
    reference = objectives.live_reference(frozen.requires_grad_(False))
    method = kto.method(reference, examples_of("kto"), "kto", OPTIONS["kto"], ALONE)
    for size in (9, 2, 1):
        config = config_of(per_device_eval_batch_size=size)
        found = loop.evaluate(config, method, scorer, examples_of("kto"), ALONE)
        assert_close(found["eval_loss"], wanted, rtol=1e-12, atol=0)
        assert found["eval_mismatched"] == 1


@pytest.mark.parametrize(
    "prompts, wanted",
    [
        ("abcd", [3, 0, 1, 2]),  # TRL's turn by one
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aab", [None, 2, 0]),  # more than half are of one prompt
        ("aa", [None, None]),
        ("", []),
    ],
)
def test_partners_are_of_other_prompts(prompts, wanted):
    assert partners(list(prompts)) == wanted


def test_every_completion_is_a_partner_once():
    rng = np.random.default_rng(0)
    for n in range(2, 40):
        prompts = rng.integers(0, n, n).tolist()
        if 2 * max(map(prompts.count, prompts)) <= n:
            found = [k for k in partners(prompts) if k is not None]
            assert sorted(found) == list(range(n))
            assert all(prompts[k] != p for k, p in zip(found, prompts, strict=True))


@pytest.mark.parametrize("label, wanted", [("True", 1), ("false", 0), ("1", 1), ("0", 0)])
def test_labels_of_a_csv_file_are_text(label, wanted):
    row = Row({"prompt": "w1", "completion": " w2", "label": label}, "here:2")
    (example,), _ = kto_examples([row], tiny_tokenizer(), None, ("label",))
    assert example.judged == (wanted,)
    (example,), _ = reward_examples([row], tiny_tokenizer(), None, "binary")
    assert example.columns["label"].tolist() == [wanted]
    flags = {"is_chosen_safe": label, "is_rejected_safe": label}
    row = Row({"prompt": "w1", "chosen": " w2", "rejected": " w3", **flags}, "here:3")
    (example,), _ = reward_examples([row], tiny_tokenizer(), None, "cost")
    assert example.columns["unsafe"].tolist() == [1 - wanted] * 2


def test_pairs_are_split_in_two():
    """With the prompt in a column, or inside both texts as TRL's extract_prompt finds it."""
    rows = pair_rows(6)
    inside = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows]
    by_hand = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows for side in ("chosen", "rejected")
    ]  # fmt: skip
    made = []
    for given in (rows, inside, by_hand):
        given = [Row(r, f"row {i}") for i, r in enumerate(given)]
        made.append(kto_examples(given, tiny_tokenizer(), 12, ("label",)))
    for examples, ledger in made[:2]:
        assert replace(ledger, scored_tokens=0) == replace(made[2][1], scored_tokens=0)
        for mine, wanted in zip(examples, made[2][0], strict=True):
            assert mine.judged == wanted.judged
            assert np.array_equal(mine.sequences[0].tokens, wanted.sequences[0].tokens)
    assert made[0][1].desirable == made[0][1].undesirable > 3 and made[0][1].truncated > 0


BAD = [
    ("kto", {"prompt": "w1", "completion": " w2"}, "'label': wanted true"),
    ("kto", {"prompt": "w1", "completion": " w2", "label": "good"}, "got 'good'"),
    ("bco", {"prompt": "w1", "label": True}, "wanted a column 'completion'"),
    ("kto", {"prompt": "w1", "completion": "", "label": True}, "is an empty completion"),
    ("a2po", {"prompt": "w1", "completion": " w2", "value": 1.0}, "'reward': wanted a number"),
    ("kto", {"prompt": "w1", "chosen": " w2", "rejected": None}, "wanted a column 'rejected'"),
]


@pytest.mark.parametrize("loss_type, row, message", BAD)
def test_bad_rows_are_named(loss_type, row, message):
    with pytest.raises(UserError, match="here:1") as told:
        kto_examples([Row(row, "here:1")], tiny_tokenizer(), 64, kto.judged_columns(loss_type))
    assert message in str(told.value)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", labelled_rows(32))
    return folder


def run_command(top, out, *options) -> list[dict]:
    argv = ["--model_name_or_path", str(top / "model"), "--dataset_name", str(top / "rows.jsonl")]
    argv += ["--output_dir", str(out), "--logging_steps", "1", "--disable_tqdm"]
    main(["kto", *argv, "--learning_rate", "1e-2", *options])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_resume_is_straight_through(top, tmp_path, loss_type):
    options = ("--loss_type", loss_type, "--lr_scheduler_type", "constant", "--sync_ref_model")
    options += ("--per_device_train_batch_size", "4", "--ref_model_sync_steps", "2")
    straight = run_command(top, tmp_path / "b", *options, "--max_steps", "6")
    run_command(top, tmp_path / "c", *options, "--max_steps", "3", "--save_steps", "3")
    more = ("--max_steps", "6", "--resume_from_checkpoint", "true")
    resumed = run_command(top, tmp_path / "c", *options, *more)
    number = {"kto": "kl", "bco": "reward_shift"}[loss_type]
    for name in ("loss", "grad_norm", "rewards/chosen", number):
        assert [x[name] for x in resumed] == [x[name] for x in straight]
    assert straight[-1][number] != straight[1][number]
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in "bc"]
    assert both[0] == both[1]


def test_it_learns_which_are_desirable(top, tmp_path):
    """Rewards of the two part; evaluation and precomputed reference scores work besides."""
    for loss_type, more in (("kto", []), ("bco", ["--precompute_ref_log_probs"])):
        held_out = ["--eval_fraction", "0.25", "--eval_strategy", "epoch", "--max_steps", "8"]
        held_out += ["--per_device_train_batch_size", "24"]
        out = tmp_path / loss_type
        metrics = run_command(top, out, "--loss_type", loss_type, *held_out, *more)
        seen = [x for x in metrics if "loss" in x]
        gaps = [x["rewards/chosen"] - x["rewards/rejected"] for x in seen]
        assert gaps[0] == 0 and gaps[-1] > 0.1
        assert all(np.isfinite(x["eval_loss"]) for x in metrics if "eval_loss" in x)
        counts = json.loads((out / "ledger.json").read_text())["data"]
        assert counts["desirable"] + counts["undesirable"] == counts["kept"] == 24


def test_mistakes_of_the_command_line(top, tmp_path, capsys):
    bad = [
        (["--loss_type", "sigmoid"], "wanted one of kto, bco"),
        (["--loss_type", "bco", "--desirable_weight", "2"], "has no such hyperparameter"),
        (["--beta", "0"], "beta: wanted a positive number"),
        (["--precompute_ref_log_probs"], "completions of other prompts"),
        (["--per_device_train_batch_size", "1"], "wanted 2 rows or more"),
    ]
    for options, message in bad:
        with pytest.raises(SystemExit):
            run_command(top, tmp_path / "x", *options)
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_two_ranks_change_nothing(tmp_path):
    """9 rows over 2 ranks of 2 rows and 3 micro-batches: one rank has an empty one."""
    started = [python(__file__, str(tmp_path), env=env) for env in each_rank(2)]
    assert finish(started) == [0, 0]
    found = torch.load(tmp_path / "found.pt")
    for loss_type in ("kto", "bco"):
        losses, wanted = two_steps(loss_type, per_device_train_batch_size=9)
        assert_close(found[loss_type][0], losses, rtol=1e-12, atol=0)
        assert_same_gradients(found[loss_type][1], wanted, 1e-11)


def trl_losses(model: str, rows: list[dict], folder, rows_per_step: int, micro: int, **config):
    """TRL's KTOTrainer on the rows in order, on a CPU in float32: its loss of every step."""
    trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: list[float] = []

    class Recording(trl.KTOTrainer):
        def training_step(self, *args, **kwargs):
            found.append(float(super().training_step(*args, **kwargs)))
            return torch.tensor(found[-1])

    args = trl.KTOConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, gradient_checkpointing=False,
        max_length=384, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows_per_step // micro,
        **config,
    )  # fmt: skip
    Recording(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    ).train()
    return np.array(found).reshape(-1, rows_per_step // micro).sum(1)


@pytest.mark.full
@pytest.mark.parametrize("loss_type, micro", [("kto", 8), ("apo_zero_unpaired", 4), ("kto", 4)])
def test_ten_steps_of_trl_s_trainer(loss_type, micro, data_dir, tmp_path):
    """8 HH rows a step. TRL turns the completions of a micro-batch among themselves and has a z0
    for each; ours are of the step: the two are the same where a step is one micro-batch."""
    from prefuse.trainer.rows import load_rows

    model, steps = str(data_dir / "models" / "stories260k"), 10
    found = load_rows(str(data_dir / "prefs" / "hh_rlhf_train.jsonl"))[:400]
    rows, prompts = [], set()
    for k, row in enumerate(found):
        side = ("chosen", "rejected")[k % 2]
        prompt, answer, completion = row.columns[side].rpartition("\n\nAssistant:")
        row = {"prompt": prompt + answer, "completion": completion, "label": side == "chosen"}
        if len(completion) > 1 and len(prompt + completion) < 400 and prompt not in prompts:
            rows.append(row)  # nothing is truncated, even with another's completion
            prompts.add(prompt)
    rows = rows[: 8 * steps]
    settings = dict(learning_rate=3e-5, max_steps=steps, **WEIGHTS)
    expected = trl_losses(
        model, rows, tmp_path / "trl", 8, micro, loss_type=loss_type, beta=0.5, **settings
    )
    file = write_rows(tmp_path / "rows.jsonl", rows)
    flags = [f"--{k}={v}" for k, v in settings.items()]
    main(
        [
            *("kto", "--model_name_or_path", model, "--dataset_name", file, "--output_dir"),
            *(str(tmp_path / "ours"), "--loss_type", loss_type, "--beta", "0.5", *flags),
            *("--max_length", "384", "--per_device_train_batch_size", str(micro)),
            *("--gradient_accumulation_steps", str(8 // micro), "--logging_steps", "1"),
            *("--shuffle_dataset", "false", "--disable_tqdm"),
        ]
    )
    lines = (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()
    actual = np.array([json.loads(line)["loss"] for line in lines])
    assert np.abs(expected - expected[0]).max() > 1e-2  # they move, so agreeing means something
    if loss_type == "kto" and micro < 8:
        assert 1e-5 < np.abs(actual - expected).max() < 0.05
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = start()
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    found = {name: two_steps(name, "shared", ranks, **split) for name in ("kto", "bco")}
    if ranks.is_main:
        torch.save(found, Path(sys.argv[1]) / "found.pt")
