"""`prefuse reward`: the same gradients however the rows are laid out, split or spread; models that
transformers loads, and theirs that we load."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from tiny import (
    assert_same_gradients,
    each_rank,
    finish,
    gradients,
    in_float64,
    pair_rows,
    python,
    ragged_pairs,
    tiny_model,
    tiny_tokenizer,
    words,
    write_model,
    write_rows,
)
from torch.testing import assert_close

from prefuse.kernels import reward as losses
from prefuse.trainer import loop, reward
from prefuse.trainer.attention import ATTENTION
from prefuse.trainer.batch import pack
from prefuse.trainer.cli import main
from prefuse.trainer.config import RewardConfig
from prefuse.trainer.data import Example
from prefuse.trainer.dist import Ranks, start
from prefuse.trainer.errors import UserError
from prefuse.trainer.model import load_tokenizer
from prefuse.trainer.report import Meter
from prefuse.trainer.reward_data import FORMATS, read_at_end, reward_examples
from prefuse.trainer.reward_model import RewardModel, RewardScorer, fresh_head, load_scores
from prefuse.trainer.rows import Row, load_rows
from prefuse.trainer.schedule import Schedule
from prefuse.trainer.sharding import shard

ALONE = Ranks(0, 1, torch.device("cpu"))
LAYOUTS = ("shared", "packed", "padded")


def rows_of(kind: str, n: int = 9, seed: int = 0) -> list[dict]:
    """Rows of a format, very different in length."""
    rng = np.random.default_rng(seed)
    if kind in ("pairs", "costs"):
        flags = lambda: bool(rng.integers(2))  # noqa: E731
        more = {"margin": 0.5, "preference": 0.75} if kind == "pairs" else {}
        return [
            {**row, **more, "is_chosen_safe": flags(), "is_rejected_safe": flags()}
            for row in pair_rows(n, seed)
        ]
    made = []
    for _ in range(n):
        prompt = words(rng, 1, 9)
        texts = [" " + words(rng, 1, 14) for _ in range(rng.integers(2, 5))]
        numbers = [int(x) for x in rng.integers(1, 4, len(texts))]
        bools = [x > 1 for x in numbers]
        made.append(
            {
                "lists": {"prompt": prompt, "completions": texts, "ranks": numbers},
                "steps": {"prompt": prompt, "completions": texts, "labels": bools},
                "labels": {"prompt": prompt, "completion": texts[0], "label": numbers[0] > 1},
                "ratings": {
                    "prompt": prompt,
                    "completion": texts[0],
                    "target": [float(numbers[0]), None if numbers[1] > 2 else 0.5],
                },
            }[kind]
        )
    return made


def examples_of(loss_type: str) -> list[Example]:
    rows = [Row(r, f"row {i}") for i, r in enumerate(rows_of(FORMATS[loss_type]))]
    return reward_examples(rows, tiny_tokenizer(), None, loss_type, " w3")[0]


def scores_model(num_labels: int = 1, seed: int = 0, family: str = "Llama"):
    """A random model with a head of scores, whose body is the tiny causal one's."""
    causal = tiny_model(family, seed=seed)
    causal.config.num_labels = num_labels
    model = getattr(transformers, f"{family}ForSequenceClassification")(causal.config)
    model.model.load_state_dict(causal.model.state_dict())
    fresh_head(model.score, seed)
    return model


def scorer_of(loss_type: str, layout: str, dtype=torch.float64) -> RewardScorer:
    model = scores_model(2 if loss_type == "regression" else 1)
    second = None
    if loss_type == "odin":
        second = fresh_head(torch.nn.Linear(32, 1, bias=False), 1).to(dtype)
    model = in_float64(model) if dtype == torch.float64 else model
    model.set_attn_implementation("sdpa" if layout == "padded" else ATTENTION)
    return RewardScorer(model, layout, second)


def config_of(folder, **changes) -> RewardConfig:
    names = dict(model_name_or_path="tiny", dataset_name="rows", output_dir=str(folder))
    return RewardConfig(**names, bf16=False, shuffle_dataset=False, **changes)


def step_gradient(loss_type: str, layout: str, ranks: Ranks = ALONE, **split):
    """The loss and the gradient of one optimizer step over all rows."""
    examples = examples_of(loss_type)
    widest = max(len(e.sequences) for e in examples)
    method = reward.method(loss_type, {}, ranks, widest)
    scorer = shard(scorer_of(loss_type, layout), ranks)
    config = config_of("unused", layout=layout, **split)
    meter = Meter(ranks)
    loop.backward(config, method, scorer, Schedule(examples, config, ranks).step(0), ranks, meter)
    return meter.read()["loss"], gradients(scorer)


def oracle(loss_type: str):
    """The loss of all rows at once, each sequence alone through the model's own forward."""
    scorer = scorer_of(loss_type, "padded")
    examples = examples_of(loss_type)
    values, length = [], []
    for sequence in (s for e in examples for s in e.sequences):
        hidden = scorer.model.model(torch.from_numpy(sequence.tokens)[None]).last_hidden_state[0]
        read = hidden[torch.from_numpy(sequence.scored)]
        values.append(scorer.model.score(read).squeeze(1))
        if scorer.length_head is not None:
            length.append(scorer.length_head(read).squeeze(1))
    column = {
        k: torch.from_numpy(np.concatenate([e.columns[k] for e in examples])).double()
        for k in examples[0].columns
    }
    v = torch.cat(values)
    if loss_type == "bradley_terry":
        found = losses.bradley_terry(
            v[::2], v[1::2], column["margin"][::2], column["preference"][::2]
        )
    elif loss_type == "bradley_terry_returns":
        sums = torch.stack([x.sum() for x in values])
        z = sums[::2] - sums[1::2]
        surprise = lambda z: -(0.9 * z.sigmoid() + 0.05).log()  # noqa: E731
        found = (0.75 * surprise(z) + 0.25 * surprise(-z)).mean()
    elif loss_type == "odin":
        n, w = torch.cat(length), (scorer.model.score.weight, scorer.length_head.weight)
        lengths = column["length"]
        found = losses.odin(v[::2], v[1::2], n[::2], n[1::2], lengths[::2], lengths[1::2], *w)
    elif loss_type == "cost":
        unsafe = column["unsafe"] > 0
        found = losses.cost(v[1::2], v[::2], unsafe[1::2], unsafe[::2])
    elif loss_type in ("k_wise", "all_pairs"):
        parts, place = [], 0
        for e in examples:
            k = slice(place, place + len(e.sequences))
            parts.append(losses.LOSSES[loss_type](v[None, k], column["quality"][None, k]).loss)
            place = k.stop
        found = torch.cat(parts).mean()
    elif loss_type in ("prm", "binary"):
        y = column["label"]
        found = torch.nn.functional.binary_cross_entropy_with_logits(v, y)
    else:
        error = torch.where(column["target"].isnan(), torch.nan, v - column["target"])
        found = error.square().nanmean(1).mean()
    found = found if isinstance(found, torch.Tensor) else found.mean()
    found.backward()
    return float(found.detach()), gradients(scorer)


@pytest.mark.parametrize("loss_type", FORMATS)
def test_no_layout_or_split_changes_the_gradient(loss_type):
    """9 rows: in one batch by three layouts; in micro-batches of 2, the last with one row."""
    wanted, wanted_gradients = oracle(loss_type)
    cases = [dict(layout=layout, per_device_train_batch_size=9) for layout in LAYOUTS]
    cases += [dict(layout="shared", per_device_train_batch_size=2, gradient_accumulation_steps=5)]
    for case in cases:
        loss, found = step_gradient(loss_type, **case)
        if loss_type != "odin" or case["per_device_train_batch_size"] == 9:
            assert_close(loss, wanted, rtol=1e-12, atol=0)
        assert_same_gradients(found, wanted_gradients, 1e-11)


def test_held_out_pairs_are_correlated_together():
    """As ODIN's loss of them all, however many fit a batch."""
    method = reward.method("odin", {}, ALONE, 2)
    wanted, _ = oracle("odin")
    for size in (9, 2):
        config = config_of("unused", per_device_eval_batch_size=size)
        scorer = scorer_of("odin", "shared")
        found = loop.evaluate(config, method, scorer, examples_of("odin"), ALONE)
        assert_close(found["eval_loss"], wanted, rtol=1e-12, atol=0)


def test_the_score_is_read_at_the_last_real_token():
    """At the last token that is no padding, where transformers looks for it, and never later."""
    tokens = np.array([5, 7, 0, 9, 0, 0])
    assert np.flatnonzero(read_at_end(tokens, 1, 0).scored).tolist() == [3]
    assert np.flatnonzero(read_at_end(tokens, 1, None).scored).tolist() == [5]
    for share in (True, False):
        batch = pack(ragged_pairs(), share)
        assert torch.equal(batch.tokens[batch.token_rows], batch.targets)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained by the command from a causal one, on rows of different lengths."""
    top = tmp_path_factory.mktemp("reward")
    model = write_model(top / "model")
    rows = write_rows(top / "rows.jsonl", pair_rows(32))
    run_command(model, rows, top / "out", "--max_steps", "3")
    return top


def run_command(model, rows, out, *options) -> list[dict]:
    argv = ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir"]
    argv += [str(out), "--logging_steps", "1", "--disable_tqdm", "--learning_rate", "1e-2"]
    main(["reward", *argv, *options])
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]


def right_padded(folder, texts: list[str]) -> torch.Tensor:
    """What transformers alone says of a batch of texts."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def test_transformers_loads_what_was_trained(trained):
    rows = pair_rows(8, seed=3)
    prompts = [r["prompt"] for r in rows for _ in range(2)]
    answers = [r[side] for r in rows for side in ("chosen", "rejected")]
    texts = [p + a + " </s>" for p, a in zip(prompts, answers, strict=True)]
    found = RewardModel(str(trained / "out"), batch_size=5)(prompts, answers)
    assert_close(torch.tensor(found), right_padded(trained / "out", texts), rtol=0, atol=1e-5)
    assert np.std(found) > 1e-2


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_ours_loads_what_transformers_saved(tmp_path, family, pad):
    """Also where EOS is the padding token, which transformers then takes for padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    model = scores_model(family=family)
    model.config.pad_token_id = tokenizer.pad_token_id
    folder = write_model(tmp_path / "theirs", model, tokenizer)
    rows = pair_rows(6)
    texts = [r["prompt"] + r["chosen"] + " </s>" for r in rows]
    found = RewardModel(folder)([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    assert_close(torch.tensor(found), right_padded(folder, texts), rtol=0, atol=1e-5)
    trained = run_command(
        folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "o", "--max_steps=1"
    )
    model = RewardModel(folder)
    gaps = [a - b for a, b in zip(found, model([r["prompt"] for r in rows],
            [r["rejected"] for r in rows]), strict=True)]  # fmt: skip
    wanted = -torch.nn.functional.logsigmoid(torch.tensor(gaps)).mean()
    assert_close(trained[0]["loss"], float(wanted), rtol=0, atol=1e-5)


def test_odin_exports_the_quality_head_alone(trained, tmp_path):
    model, rows = trained / "model", trained / "rows.jsonl"
    metrics = run_command(model, rows, tmp_path / "out", "--loss_type", "odin", "--max_steps", "2")
    assert "correlations/length" in metrics[-1]
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert saved.score.weight.shape[0] == 1
    assert not (tmp_path / "out" / "model.safetensors").read_bytes().count(b"length_head")


@pytest.mark.parametrize("loss_type", ["bradley_terry", "odin"])
def test_resume_is_straight_through(trained, tmp_path, loss_type):
    args = (trained / "model", trained / "rows.jsonl")
    options = ("--loss_type", loss_type, "--per_device_train_batch_size", "4")
    constant = ("--lr_scheduler_type", "constant")
    straight = run_command(*args, tmp_path / "b", *options, *constant, "--max_steps", "6")
    run_command(*args, tmp_path / "c", *options, *constant, "--max_steps", "3", "--save_steps", "3")
    more = ("--max_steps", "6", "--resume_from_checkpoint", "true")
    resumed = run_command(*args, tmp_path / "c", *options, *constant, *more)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [x[name] for x in resumed] == [x[name] for x in straight]
    assert (tmp_path / "b/model.safetensors").read_bytes() == (
        tmp_path / "c/model.safetensors"
    ).read_bytes()


def test_a_step_model_scores_steps_and_tokens(trained, tmp_path):
    model, rows = trained / "model", write_rows(tmp_path / "steps.jsonl", rows_of("steps"))
    run_command(
        model, rows, tmp_path / "out", "--loss_type=prm", "--step_separator= w3", "--max_steps=2"
    )
    judge = RewardModel(str(tmp_path / "out"), step_separator=" w3")
    prompts, steps = ["w1 w2", "w9"], [["w4 w5", "w6"], ["w7"]]
    found = judge.steps(prompts, steps)
    assert [len(x) for x in found] == [2, 1]
    every = judge.tokens(prompts, [" w4 w5 w3 w6 w3", " w7 w3"])
    assert_close(found[0], every[0][[2, 4]].sigmoid())
    assert_close(found[1], every[1][[1]].sigmoid())


def test_shared_prompts_change_no_score(trained):
    model = RewardModel(str(trained / "out"), batch_size=8)
    answers = [" w4 w5", " w4 w6 w7", " w8"]
    together = model(["w1 w2 w3"] * 3, answers)
    assert_close(together, [model(["w1 w2 w3"], [a])[0] for a in answers], rtol=0, atol=1e-6)


BAD = [
    ("k_wise", {"prompt": "w1", "completions": [" w2"], "ranks": [1]}, "wanted two or more"),
    ("k_wise", {"prompt": "w1", "completions": [" w2", " w3"], "ranks": [1]}, "wanted 2, one for"),
    ("all_pairs", {"prompt": "w1", "completions": [" w2", " w3"]}, "wanted a column 'scores'"),
    ("prm", {"prompt": "w1", "completions": ["w2"], "labels": [3]}, "a probability; got 3"),
    ("cost", {"prompt": "w1", "chosen": " w2", "rejected": " w3"}, "'is_chosen_safe'"),
    ("binary", {"prompt": "w1", "completion": " w2", "label": "yes"}, "got 'yes'"),
    ("regression", {"prompt": "w1", "completion": " w2", "target": [None]}, "wanted a number"),
    ("bradley_terry", {"prompt": "w1", "chosen": " w2"}, "wanted a column 'rejected'"),
]


@pytest.mark.parametrize("loss_type, row, message", BAD)
def test_bad_rows_are_named(loss_type, row, message):
    with pytest.raises(UserError, match="here:1") as told:
        reward_examples([Row(row, "here:1")], tiny_tokenizer(), None, loss_type)
    assert message in str(told.value)


def test_a_margin_that_only_later_rows_have():
    pair = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    rows = [Row(pair, "here:1"), Row(pair | {"margin": 2.0}, "here:2")]
    with pytest.raises(UserError, match="here:1: 'margin': wanted a number"):
        reward_examples(rows, tiny_tokenizer(), None, "bradley_terry")


@pytest.mark.parametrize("loss_type", FORMATS)
def test_a_file_without_rows(loss_type):
    with pytest.raises(UserError, match="no row is left to train on"):
        reward_examples([], tiny_tokenizer(), None, loss_type)


def test_rows_that_are_too_long_are_counted_and_never_cut():
    rows = [Row(r, str(i)) for i, r in enumerate(pair_rows(20))]
    every, _ = reward_examples(rows, tiny_tokenizer(), None, "bradley_terry")
    kept, ledger = reward_examples(rows, tiny_tokenizer(), 14, "bradley_terry")
    short = [e for e in every if max(len(s.tokens) for s in e.sequences) <= 14]
    assert 0 < len(kept) == len(short) == 20 - ledger.too_long < 20
    for mine, theirs in zip(kept, short, strict=True):
        for a, b in zip(mine.sequences, theirs.sequences, strict=True):
            assert np.array_equal(a.tokens, b.tokens)


def test_trl_s_name_of_the_centering(trained, tmp_path):
    args = (trained / "model", trained / "rows.jsonl")
    ours, theirs = (
        run_command(*args, tmp_path / name, f"--{name}", "0.5", "--max_steps", "1")
        for name in ("centering", "center_rewards_coefficient")
    )
    assert ours[0]["loss"] == theirs[0]["loss"]


def test_mistakes_of_the_command_line(trained, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", rows_of("ratings"))
    bad = [
        (["--loss_type", "sigmoid"], "wanted one of"),
        (["--length_coef", "1"], "has no such hyperparameter"),
        (["--centering", "-1"], "centering: wanted a number from 0"),
    ]
    for options, message in bad:
        with pytest.raises(SystemExit):
            run_command(trained / "model", trained / "rows.jsonl", tmp_path / "x", *options)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # two ratings, a head of one number
        run_command(trained / "out", rows, tmp_path / "x", "--loss_type", "regression")


def test_a_reward_model_s_folder_rewards_an_online_run(trained, tmp_path, capsys):
    """Beside another reward; what it said of the samples is what it says of them alone."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w9 :"} for i in range(8)])
    argv = ["grpo", "--model_name_or_path", str(trained / "model"), "--dataset_name", prompts]
    argv += ["--output_dir", str(tmp_path / "o"), "--max_steps", "2", "--logging_steps", "1"]
    argv += ["--per_device_train_batch_size", "8", "--max_completion_length", "6", "--bf16=false"]
    judge = f"{trained / 'out'}?batch_size=3"
    main([*argv, "--disable_tqdm", "--reward_funcs", judge, "length"])
    samples = [json.loads(line) for line in (tmp_path / "o" / "samples.jsonl").open()]
    assert {row["step"] for row in samples} == {1, 2}
    texts = [[row[k] for row in samples] for k in ("prompt", "completion")]
    found = [row["rewards"]["out"] for row in samples]
    assert_close(found, RewardModel(str(trained / "out"))(*texts), rtol=0, atol=1e-5)
    assert np.std(found) > 0
    for wrong in (f"{trained / 'out'}?batch=3", str(trained / "model/nothing")):
        with pytest.raises(SystemExit):
            main([*argv, "--overwrite_output_dir", "--reward_funcs", wrong])
        assert "no such" in capsys.readouterr().err or "does not import" in capsys.readouterr().err


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("reward*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(trained, tmp_path, recipe):
    """Its settings are those of the run, and a few rows teach something after the warm-up's first
    step, whose rate is 0."""
    wanted = yaml.safe_load(recipe.read_text())
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(FORMATS[wanted["loss_type"]]))
    argv = ["train", str(recipe), "--model_name_or_path", str(trained / "model")]
    argv += ["--dataset_name", rows, "--output_dir", str(tmp_path / "out"), "--disable_tqdm"]
    main([*argv, "--max_steps", "3", "--logging_steps", "1", "--lr_scheduler_type", "constant"])
    used = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    free = ("max_steps", "lr_scheduler_type")
    assert {k: used[k] for k in wanted if k not in free} == {
        k: v for k, v in wanted.items() if k not in free
    }
    losses = [json.loads(x)["loss"] for x in (tmp_path / "out/metrics.jsonl").open()]
    assert losses[-1] < losses[0]


@pytest.mark.full
@pytest.mark.parametrize("margins", [False, True])
def test_ten_steps_of_trl_s_reward_trainer(data_dir, tmp_path, margins):
    """The same head and HH pairs in the same order; with margins and centred rewards, too."""
    trl = pytest.importorskip("trl", reason="parity needs the `peers` extra")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"parity is with TRL 1.16; got {trl.__version__}")
    from datasets import Dataset

    source = str(data_dir / "models" / "stories260k")
    tokenizer = load_tokenizer(source)
    pad = tokenizer.pad_token_id
    model = load_scores(
        source, num_labels=1, dtype=torch.float32, layout="packed", pad_token_id=pad
    )
    folder = write_model(tmp_path / "model", model, tokenizer)
    read = load_rows(str(data_dir / "prefs" / "hh_rlhf_train.jsonl"))[:400]
    kept = {e.where for e in reward_examples(read, tokenizer, 384, "bradley_terry")[0]}
    rows = [{k: r.columns[k] for k in ("chosen", "rejected")} for r in read if r.where in kept][:80]
    if margins:
        rows = [{**row, "margin": 0.1 * (k % 5)} for k, row in enumerate(rows)]
    settings = dict(learning_rate=1e-3, max_steps=10, max_length=384, per_device_train_batch_size=8)
    settings |= {"center_rewards_coefficient": 0.01} if margins else {}
    found: list[float] = []

    class Recording(trl.RewardTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            found.append(float(loss))
            return loss

    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    data = Dataset.from_list(rows)
    Recording(model=theirs, args=args, train_dataset=data, processing_class=tokenizer).train()

    file = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["--model_name_or_path", folder, "--dataset_name", file, "--logging_steps", "1"]
    argv += ["--output_dir", str(tmp_path / "ours"), "--shuffle_dataset=false", "--disable_tqdm"]
    main(["reward", *argv, *(f"--{k}={v}" for k, v in settings.items())])
    ours = [json.loads(x)["loss"] for x in (tmp_path / "ours" / "metrics.jsonl").open()]
    assert max(found) - min(found) > 1e-2  # they move, so agreeing means something
    np.testing.assert_allclose(ours, found, rtol=0, atol=1e-5)


LOSSES_OF_RANKS = ("bradley_terry", "odin", "k_wise", "prm")


@pytest.mark.full
def test_two_ranks_change_nothing(tmp_path):
    """9 rows over 2 ranks of 2 rows and 3 micro-batches: one rank has an empty one."""
    started = [python(__file__, str(tmp_path), env=env) for env in each_rank(2)]
    assert finish(started) == [0, 0]
    found = torch.load(tmp_path / "found.pt")
    for loss_type in LOSSES_OF_RANKS:
        loss, wanted = step_gradient(loss_type, "shared", per_device_train_batch_size=9)
        if loss_type != "odin":
            assert_close(found[loss_type][0], loss, rtol=1e-12, atol=0)
        assert_same_gradients(found[loss_type][1], wanted, 1e-11)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = start()
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    found = {name: step_gradient(name, "shared", ranks, **split) for name in LOSSES_OF_RANKS}
    if ranks.is_main:
        torch.save(found, Path(sys.argv[1]) / "found.pt")
