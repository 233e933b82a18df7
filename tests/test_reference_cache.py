"""Reference log-probs on disk: the reference is not loaded again, and another's are refused."""

import json
from pathlib import Path

import pytest
from tiny import (
    CHAT,
    command,
    each_rank,
    finish,
    pair_rows,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)

from prefuse.trainer import offline, reference_cache
from prefuse.trainer.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("models")
    found = {
        "policy": write_model(top / "policy"),
        "reference": write_model(top / "reference", tiny_model(seed=5)),
        "other": write_model(top / "other", tiny_model(seed=6)),
        "template": write_model(top / "template", tiny_model(seed=5)),
    }
    tiny_tokenizer(chat_template=CHAT + " ").save_pretrained(found["template"])
    return found


@pytest.fixture
def run(models, tmp_path):
    def run(name: str, rows: list[dict], *more: str, reference: str = "reference"):
        argv = ["dpo", "--model_name_or_path", models["policy"], "--output_dir"]
        argv += [str(tmp_path / name), "--ref_model_name_or_path", models[reference]]
        argv += ["--dataset_name", write_rows(tmp_path / f"{name}.jsonl", rows), "--max_steps", "3"]
        argv += ["--ref_log_probs_cache", str(tmp_path / "cache"), "--logging_steps", "1"]
        argv += ["--bf16", "false", "--disable_tqdm", "--learning_rate", "3e-3"]
        main([*argv, "--per_device_eval_batch_size", "4", *more])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]

    return run


@pytest.fixture
def loads(monkeypatch) -> list[int]:
    """How many rows there were whenever a reference was loaded."""
    seen, load = [], offline._frozen

    def counted(config, name, tokenizer, examples, ranks):
        seen.append(len(examples))
        return load(config, name, tokenizer, examples, ranks)

    monkeypatch.setattr(offline, "_frozen", counted)
    return seen


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: x[k] for k in ("loss", "rewards/chosen", "rewards/margins")} for x in lines]


def test_the_second_run_needs_no_reference(run, loads, models, tmp_path):
    rows = pair_rows(24)
    first = run("first", rows)
    second = run("second", rows, "--per_device_eval_batch_size", "3")
    assert len(loads) == 1 and timeless(second) == timeless(first)
    plain = run("plain", rows, "--ref_log_probs_cache", str(tmp_path / "elsewhere"))
    assert len(loads) == 2 and timeless(plain) == timeless(first)


def test_only_new_rows_are_scored(run, loads, tmp_path):
    run("first", pair_rows(16))
    before = sizes(tmp_path / "cache")
    run("second", pair_rows(24))
    run("third", pair_rows(24), "--precompute_ref_log_probs")
    assert len(loads) == 2
    after = sizes(tmp_path / "cache")
    assert before == [32] and sorted(after) == [16, 32]


def sizes(folder: Path) -> list[int]:
    parts = sorted(folder.glob("part-*.safetensors"))
    return [len(reference_cache.load_file(part)["lengths"]) for part in parts]


def test_an_interruption_costs_a_part(run, loads, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "PART", 16)
    add, added = reference_cache.ReferenceCache.add, []

    def dies(self, sequence, logp):
        add(self, sequence, logp)
        added.append(len(sequence.tokens))
        if len(added) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(reference_cache.ReferenceCache, "add", dies)
    with pytest.raises(SystemExit):
        run("first", pair_rows(24))
    assert sizes(tmp_path / "cache") == [16, 16]
    run("second", pair_rows(24))
    assert len(added) == 40 + 48 - 32 and sum(sizes(tmp_path / "cache")) == 48


@pytest.mark.parametrize(
    "reference, more, wanted",
    [
        ("other", (), "it was made with another weights"),
        ("template", (), "it was made with another template"),
        ("reference", ("--dtype", "bfloat16"), "it was made with another compute"),
    ],
)
def test_another_reference_is_refused(run, capsys, reference, more, wanted):
    run("first", pair_rows(8))
    with pytest.raises(SystemExit) as exit:
        run("second", pair_rows(8), *more, reference=reference)
    assert exit.value.code == 2 and wanted in capsys.readouterr().err


def test_a_spoilt_part_is_told(run, capsys, tmp_path):
    run("first", pair_rows(8))
    (part,) = (tmp_path / "cache").glob("part-*")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SystemExit):
        run("second", pair_rows(8))
    assert f"{part}: no part of a cache; remove it" in capsys.readouterr().err


def test_a_folder_of_other_files_is_refused(run, capsys, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run("first", pair_rows(8))
    assert "got one with other files" in capsys.readouterr().err


def test_kto_asks_about_completions_that_no_cache_has(capsys):
    argv = ["kto", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        main([*argv, "--ref_log_probs_cache", "c"])
    assert "--ref_log_probs_cache: --loss_type kto asks the reference" in capsys.readouterr().err


@pytest.mark.full
def test_ranks_share_a_cache(models, tmp_path):
    """Two ranks score half each; what they leave is whole for two, and for one."""
    argv = ["dpo", "--model_name_or_path", models["policy"], "--bf16", "false", "--disable_tqdm"]
    argv += ["--dataset_name", write_rows(tmp_path / "rows.jsonl", pair_rows(24))]
    argv += ["--ref_log_probs_cache", str(tmp_path / "cache"), "--logging_steps", "1"]
    argv += ["--max_steps", "3", "--learning_rate", "1e-3", "--output_dir"]
    losses = []
    for world, name in ((2, "first"), (2, "second"), (1, "alone")):
        size = ["--per_device_train_batch_size", str(8 // world)]
        started = [
            command(*argv, str(tmp_path / name), *size, env=env if world > 1 else None)
            for env in each_rank(world)
        ]
        assert finish(started) == [0] * world
        assert sum(sizes(tmp_path / "cache")) == 48
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_ranks_that_read_other_caches(models, tmp_path):
    """Of their own nodes: one knows 9 of 24 rows, and the other none."""
    argv = ["dpo", "--model_name_or_path", models["policy"], "--bf16", "false", "--disable_tqdm"]
    argv += ["--logging_steps", "1", "--max_steps", "3", "--learning_rate", "1e-3"]
    argv += ["--per_device_eval_batch_size", "2", "--ddp_timeout", "30"]

    def run(name: str, n: int, caches: list[str]):
        rows = write_rows(tmp_path / f"{name}.jsonl", pair_rows(24)[:n])
        given = ["--dataset_name", rows, "--output_dir", str(tmp_path / name)]
        given += ["--per_device_train_batch_size", str(8 // len(caches))]
        envs = each_rank(len(caches)) if len(caches) > 1 else [None]
        places = [["--ref_log_probs_cache", str(tmp_path / cache)] for cache in caches]
        started = [command(*argv, *given, *p, env=e) for p, e in zip(places, envs, strict=True)]
        assert finish(started) == [0] * len(caches)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    run("some", 9, ["known"])
    wanted = run("alone", 24, ["one"])
    assert run("ranks", 24, ["new", "known"]) == pytest.approx(wanted, rel=1e-6)
