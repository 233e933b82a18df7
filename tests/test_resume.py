"""A run that stops and goes on is the run that never stopped: bit by bit on as many ranks, and with
every row seen once on others."""

import json
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import resume_worker as worker
import torch
from online_runs import PROMPTS, REWARDS
from safetensors.torch import load_file
from tiny import HERE, each_rank, finish, pair_rows, python, sft_rows, write_model, write_rows
from tiny import command as cli
from torch.testing import assert_close

from prefuse.trainer import checkpoint, offline, online, resume, verify_resume
from prefuse.trainer.cli import main
from prefuse.trainer.verify_resume import differences, digests

FULL = pytest.mark.full
STEPS = 12
MOVING = ["--sync_ref_model", "--ref_model_sync_steps=2", "--ref_model_mixup_alpha=0.4"]
WINDOW = ["--num_mini_batches=2", "--num_iterations=2", "--num_generations=2"]
NOISY = ["--max_completion_length=6", f"--reward_funcs={REWARDS}:noisy"]
# steps of 8 of 20 rows, so that an epoch's last has 4; windows of 4 steps; averages that move
CASES = {
    "dpo": ["dpo", "--learning_rate=1e-3", *MOVING],
    "dropout": ["sft", "--learning_rate=1e-3"],
    "grpo": ["grpo", "--learning_rate=1e-2", "--beta=0.1", *WINDOW, *NOISY],
    "ppo": ["ppo", "--learning_rate=1e-2", *WINDOW, *NOISY],
    "bco": ["kto", "--learning_rate=1e-3", "--loss_type=bco"],
}
QUICK = [("dpo", 4), ("dropout", 7), ("grpo", 6), ("grpo", 3)]
EVERY = [(case, k) for case in CASES for k in range(1, STEPS)]


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("resume")
    write_model(top / "model")
    write_rows(top / "pairs.jsonl", pair_rows(20))
    write_rows(top / "singles.jsonl", sft_rows(20))
    write_rows(top / "prompts.jsonl", PROMPTS[:20])
    return top


def command(top: Path, case: str, name: str, *more: str, rows: int = 4) -> list[str]:
    data = {"dropout": "singles", "grpo": "prompts", "ppo": "prompts"}.get(case, "pairs")
    method, *options = CASES[case]
    argv = [method, f"--model_name_or_path={top}/model", f"--dataset_name={top}/{data}.jsonl"]
    argv += [*options, f"--output_dir={top}/{case}-{name}", f"--per_device_train_batch_size={rows}"]
    argv += ["--gradient_accumulation_steps=2", "--warmup_steps=2", "--lr_scheduler_type=cosine"]
    argv += [f"--max_steps={STEPS}", "--logging_steps=5", "--save_steps=1", "--bf16=false"]
    return [*argv, "--disable_tqdm", *more]


@pytest.fixture
def drops(monkeypatch):
    """Dropout in a model, which the trainer itself turns off."""
    load = offline.load_scorer

    def dropping(*args):
        config, scorer, note = load(*args)
        table = scorer.model.get_input_embeddings()
        table.register_forward_hook(
            lambda module, args, out: torch.nn.functional.dropout(out, 0.2, module.training)
        )
        return config, scorer, note

    for module in (offline, online):
        monkeypatch.setattr(module, "load_scorer", dropping)


@pytest.fixture(scope="module")
def straight(top):
    """A run that saved every step, by its case; the first to ask runs it."""
    done: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in done:
            main(command(top, case, "straight"))
            done[case] = top / f"{case}-straight"
        return done[case]

    return run


def metrics(folder: Path, after: int) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.endswith(verify_resume.TIMES)}
        for line in lines
        if line["step"] > after
    ]


@pytest.mark.parametrize(
    "case, k", [pytest.param(*c, marks=() if c in QUICK else FULL) for c in EVERY]
)
def test_resume_after_any_step_is_straight_through(top, straight, drops, case, k):
    """Parameters, optimizer, moving reference, random streams, and metrics between log lines."""
    wanted = straight(case)
    place = f"--resume_from_checkpoint={wanted}/checkpoint-{k}"
    main(command(top, case, f"from-{k}", place, "--save_steps=12"))
    got = top / f"{case}-from-{k}"
    ends = [digests(folder / f"checkpoint-{STEPS}") for folder in (wanted, got)]
    assert differences(*ends) == []
    assert any(name.startswith("model.") for name in ends[0])
    assert any(name.startswith("optimizer.") for name in ends[0])
    assert metrics(got, k) == metrics(wanted, k)


@pytest.mark.parametrize("case", ["dropout", pytest.param("grpo", marks=FULL)])
def test_saving_changes_nothing(top, straight, drops, case):
    main(command(top, case, "unsaved", "--save_steps=0"))
    folders = straight(case), top / f"{case}-unsaved"
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_written_beside_training_is_the_same(top, straight, drops):
    """Of copies: training goes on meanwhile."""
    main(command(top, "dropout", "beside", "--save_async", "--save_steps=3"))
    for k in (3, 6, 9, 12):
        found = [f / f"checkpoint-{k}" for f in (straight("dropout"), top / "dropout-beside")]
        assert differences(*map(digests, found)) == []


def test_streams_go_on_where_they_were():
    resume.seed(3)
    random.gauss(0, 1), np.random.randn()  # noqa: B018  each keeps a second number back
    kept = resume.streams()

    def draw():
        return random.gauss(0, 1), random.random(), *np.random.randn(3), *torch.randn(3).tolist()

    wanted = draw()
    assert draw() != wanted
    resume.restore_streams(kept)
    assert draw() == wanted


def launch(top: Path, world: int, jobs: list[dict], patience: float = 0):
    """Exit statuses and what was said, by rank; patience: seconds for the others when one fails."""
    file = top / "jobs.json"
    file.write_text(json.dumps(jobs))
    logs = [top / f"{rank}.log" for rank in range(world)]
    processes = [
        python(str(HERE / "resume_worker.py"), str(file), env=env, stdout=log.open("w"), stderr=-2)
        for env, log in zip(each_rank(world), logs, strict=True)
    ]
    deadline = time.monotonic() + 240
    while patience and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    deadline = time.monotonic() + patience
    while sum(p.poll() is None for p in processes[:-1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    statuses = finish(processes)
    return statuses, [log.read_text() for log in logs]


@FULL
@pytest.mark.parametrize("every", [False, True])
def test_two_ranks_resume_and_one_goes_on_alone(top, every):
    """All steps are those of two ranks straight through; on one rank to 2e-6, with the rows that
    two would have seen. Checkpoints written beside training are the same. At last a rank dies, and
    the other says which and where."""
    steps = {"dpo": 4, "grpo": 6}
    # Adam divides by the gradient itself: below epsilon rounding is no longer a whole step
    even = ["--adam_epsilon=1e-3", "--save_steps=1"]
    jobs = [dict(argv=command(top, c, f"two{every}", *even, rows=2)) for c in steps]
    tried = [(c, k) for c in steps for k in (range(1, STEPS) if every else [steps[c]])]
    for case, k in tried:
        place = f"--resume_from_checkpoint={top}/{case}-two{every}/checkpoint-{k}"
        argv = command(top, case, f"two{every}-{k}", *even, place, "--save_steps=12", rows=2)
        jobs.append(dict(argv=argv))
    jobs.append(dict(argv=command(top, "grpo", f"beside{every}", *even, "--save_async", rows=2)))
    jobs.append(dict(argv=command(top, "dpo", f"dies{every}", *even, rows=2), dies_in=3))
    statuses, said = launch(top, 2, jobs)
    assert statuses[1] == -9 and statuses[0] == 2, said[0][-3000:]
    assert "rank 0, step 3: rank 1 of 2 did not answer" in said[0]
    for case, k in tried:
        ends = [top / f"{case}-two{every}{n}" / f"checkpoint-{STEPS}" for n in ("", f"-{k}")]
        assert differences(*map(digests, ends)) == []
    for k in (5, STEPS):
        runs = [top / f"grpo-{name}{every}" / f"checkpoint-{k}" for name in ("two", "beside")]
        assert differences(*map(digests, runs)) == []
    for case, k in steps.items():
        moved(top, case, f"two{every}", k, 1, even, rows=2)


def moved(top: Path, case: str, name: str, k: int, world: int, even: list[str], rows: int) -> None:
    """Resumes on `world` ranks after step k, with as many `rows` on each: accumulation makes up."""
    straight, resumed = top / f"{case}-{name}", top / f"{case}-{name}-on-{world}"
    last = STEPS if case == "dpo" else 8  # then another window is sampled
    more = [*even, f"--resume_from_checkpoint={straight}/checkpoint-{k}", f"--max_steps={STEPS}"]
    argv = command(top, case, f"{name}-on-{world}", *more, rows=rows)
    if world == 1:
        worker.run(argv)
    else:
        statuses, said = launch(top, world, [dict(argv=argv)])
        assert not any(statuses), said
    assert worker.ledger(resumed)[: last - k] == worker.ledger(straight)[k:last]
    assert len(worker.ledger(resumed)) == STEPS - k
    wanted, got = (tensors(f / f"checkpoint-{last}") for f in (straight, resumed))
    for key, value in wanted.items():
        assert_close(got[key], value, rtol=0, atol=2e-6, msg=key)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and name.startswith("model."):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    checkpoint.read_alone(found, path)
    return found


@FULL
@pytest.mark.parametrize("before, after", [(2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("case, k", [("dpo", 4), ("grpo", 6)])
def test_other_ranks_go_on(top, case, k, before, after):
    even, name = ["--adam_epsilon=1e-3"], f"{before}-to-{after}"
    rows = 4 // before
    jobs = [dict(argv=command(top, case, name, *even, rows=rows))]
    statuses, said = launch(top, before, jobs)
    assert not any(statuses), said
    moved(top, case, name, k, after, even, rows)


@FULL
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_ends_the_others(top, by):
    """Those that wait for it end within 30 seconds of its end, or of the time that they wait."""
    argv = command(top, "dpo", f"gone-{by}", "--ddp_timeout=15", rows=1)
    statuses, said = launch(top, 4, [dict(argv=argv, dies_in=3, by=by)], patience=30)
    assert statuses == [2, 2, 2, -9], said
    for rank in range(3):
        assert re.search(rf"rank {rank}, step 3: rank (\d, )*3 of 4 did not answer", said[rank])
    assert [p.name for p in checkpoint.complete(top / f"dpo-gone-{by}")][-1] == "checkpoint-2"


@FULL
def test_a_rank_that_ends_before_the_steps_ends_the_others(top):
    """By a mistake on its node alone; the other tells who, in a message and not by a traceback."""
    given = command(top, "dropout", "ends", rows=2)
    started = [
        cli(*given, f"--dataset_name={top}/{data}.jsonl", env=env, stderr=-1)
        for data, env in zip(("singles", "nowhere"), each_rank(2), strict=True)
    ]
    told = [p.communicate(timeout=120)[1] for p in started]
    assert [p.returncode for p in started] == [2, 2], told
    assert "nowhere.jsonl: no such file" in told[1]
    assert "rank 0, before or after the steps: rank 1 of 2 did not answer" in told[0]
    assert "Traceback" not in told[0]


def test_a_verified_run_is_equal(top, monkeypatch, drops, capsys):
    monkeypatch.setattr(verify_resume, "_run", lambda argv, attempt, log: main(argv))
    argv = command(top, "dropout", "verified", "--save_steps=500")
    main(["verify-resume", *argv])
    said = capsys.readouterr().out
    assert "verify-resume: equal after 4 steps" in said
    assert not list(top.glob("*verify-resume*"))
    monkeypatch.setattr(resume, "restore_streams", lambda state: None)
    with pytest.raises(SystemExit):
        main(["verify-resume", *argv])
    said = capsys.readouterr().err
    assert "not equal after 4 steps" in said and "\n  model.model." in said


@FULL
def test_a_verified_run_in_processes_of_its_own(top, capsys):
    argv = command(top, "grpo", "apart", f"--output_dir={top}/no/such/folder/yet")
    main(["verify-resume", *argv])
    assert "verify-resume: equal after 12 steps" in capsys.readouterr().out
