"""However the rows of a step are split over ranks and micro-batches, the gradient is the same.

Gloo ranks run tests/ranks_worker.py, FSDP2 and all; one rank runs it here.
"""

import json
from types import SimpleNamespace

import pytest
import ranks_worker as worker
import torch
from tiny import (
    assert_same_gradients,
    finish,
    gradients,
    launch,
    pair_rows,
    relative_error,
    tiny_model,
    told,
    write_model,
    write_rows,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from prefuse.trainer.batch import pack
from prefuse.trainer.dist import Ranks
from prefuse.trainer.schedule import Schedule

WORLDS = (1, 2, 4)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each world found; 2 and 4 ranks run at the same time."""
    top = tmp_path_factory.mktemp("ranks")
    write_model(top / "model", tiny_model(tie=True))
    write_rows(top / "rows.jsonl", pair_rows(40))
    processes = []
    for world in WORLDS[1:]:
        (top / str(world)).mkdir()
        processes += launch(world, "ranks_worker.py", top / str(world))
    try:
        results = {1: alone(top / "1")}
        statuses = finish(processes)
    finally:
        for p in processes:
            p.kill()
    assert not any(statuses), told(top)
    for world in WORLDS[1:]:
        results[world] = torch.load(top / str(world) / "found.pt", weights_only=True)
    return SimpleNamespace(results=results, folder=top)


def alone(folder) -> dict:
    """One rank, in this process."""
    folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = worker.every_case(folder, ALONE)
        worker.commands(folder, world=1)
    finally:
        torch.set_num_threads(threads)
    return results


def oracle(method: str) -> dict:
    """The same in float64 by hand: one batch a step, one process, no loop."""
    scorer, objective = worker.models_of(method, torch.float64, ALONE)
    config = worker.config_of("unused", **worker.splits(1)["8x1"])
    schedule = Schedule(worker.examples_of(method), config, ALONE)

    def step(number: int) -> float:
        (rows,) = schedule.step(number)
        loss = objective.objective(scorer, pack(rows, share=False)).loss.mean()
        loss.backward()
        return float(loss.detach())

    step(1)
    wanted = {"gradients": gradients(scorer), "losses": []}
    for number in range(worker.STEPS):
        scorer.zero_grad()
        wanted["losses"].append(step(number))
        with torch.no_grad():
            for p in scorer.parameters():
                p -= config.learning_rate * p.grad
    wanted["parameters"] = worker.parameters(scorer)
    return wanted


CASES = [(w, name) for w in WORLDS for name in (*worker.splits(w), *worker.shardings(w))]


@pytest.mark.parametrize("world, split", CASES)
@pytest.mark.parametrize("method", worker.METHODS)
def test_ranks_and_accumulation_change_nothing(found, method, world, split):
    """To 1e-6 in float32 and to 1e-12 in float64."""
    wanted = oracle(method)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        got = found.results[world][split, method, dtype]
        assert relative_error(got["gradients"], wanted["gradients"]) <= tolerance
        for name, p in wanted["parameters"].items():
            assert_close(got["parameters"][name], p, rtol=0, atol=tolerance * float(p.abs().max()))
        assert_close(got["losses"], wanted["losses"], rtol=tolerance, atol=0)
    exact = found.results[world][split, method, "float64"]
    assert_same_gradients(exact["gradients"], wanted["gradients"], 1e-12)


def test_the_cases_are_what_they_say(found):
    """4 ranks: the last has nothing in the uneven step; repacking makes more micro-batches."""
    sizes = {s: found.results[1][s, "dpo", "float32"]["micro_batches"] for s in worker.splits(1)}
    assert sizes["8x1"] == [5] and sizes["4x2"] == [4, 1] and sizes["2x4"] == [2, 2, 1]
    assert len(sizes["repacked"]) > 1
    schedules = [
        Schedule(
            worker.PAIRS,
            worker.config_of("unused", **worker.splits(4)["2x1"]),
            Ranks(rank, 4, torch.device("cpu")),
        )
        for rank in range(4)
    ]
    assert [[len(rows) for rows in s.step(1)] for s in schedules] == [[2], [2], [1], [0]]


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_is_close(found, world):
    exact = found.results[1]["evaluation"]["eval_loss"]
    for name, each in found.results[world]["bf16"].items():
        losses = torch.tensor(each)
        assert losses.isfinite().all()
        assert_close(losses, torch.tensor(found.results[1]["bf16"][name]), rtol=0.02, atol=0)
        assert_close(losses.mean().item(), exact, rtol=0.2, atol=0)


@pytest.mark.parametrize("world", WORLDS)
def test_evaluation_does_not_depend_on_ranks(found, world):
    wanted, got = (found.results[w]["evaluation"] for w in (1, world))
    assert got["eval_num_tokens"] == sum(e.n_tokens for e in worker.PAIRS)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world", WORLDS)
def test_reading_leaves_the_weights_as_they_are(found, world):
    """Not what they were gathered as, which an export would write."""
    before, *after = found.results[world]["read"]
    for name, p in before.items():
        assert all(torch.equal(read[name], p) for read in after), name


@pytest.mark.parametrize("world", WORLDS)
def test_resume_is_straight_through(found, world):
    (losses, weights), (resumed_losses, resumed_weights) = found.results[world]["resumed"]
    assert resumed_losses == losses
    for name, p in weights.items():
        assert torch.equal(resumed_weights[name], p), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method, tie", [("sft", True), ("dpo", False)])
def test_export_gathers_the_whole_model(found, world, method, tie):
    state, weights = found.results[world]["exported"][method]
    names = {k for k in state if not (tie and k == "lm_head.weight")}
    assert names == {k.removeprefix("model.") for k in weights}
    for name in names:
        assert torch.equal(state[name].double(), weights[f"model.{name}"]), name


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(found, world):
    message, unchanged = found.results[world]["not finite"]
    assert "step 3: loss is not finite" in message and unchanged
    assert f"Rows of rank {world - 1}: " in message


@pytest.mark.parametrize("world", WORLDS)
def test_an_interrupt_of_one_rank_stops_all_with_a_checkpoint(found, world):
    assert found.results[world]["interrupted"] == ["checkpoint-3"]


@pytest.mark.parametrize("world", WORLDS)
def test_rank_0_writes_only_when_all_have_looked(found, world):
    assert found.results[world]["claimed"]


@pytest.mark.parametrize("world", WORLDS)
def test_the_command_gives_the_same_run(found, world):
    """Sharded, checkpointed, with precomputed reference: same losses, and a model that loads."""
    wanted, got = (
        [json.loads(x) for x in (found.folder / str(w) / "command/metrics.jsonl").open()]
        for w in (1, world)
    )
    assert [x["step"] for x in got] == [1, 2, 2, 3] or [x["step"] for x in got] == [1, 2, 3]
    for mine, one in zip(got, wanted, strict=True):
        for name in one.keys() & {"loss", "eval_loss", "grad_norm", "num_tokens"}:
            assert_close(mine[name], one[name], rtol=1e-5, atol=0, msg=name)
    models = [
        AutoModelForCausalLM.from_pretrained(found.folder / str(w) / "command") for w in (1, world)
    ]
    tokens = torch.arange(2, 30)[None]
    assert_close(models[1](tokens).logits, models[0](tokens).logits, rtol=1e-4, atol=1e-5)
