"""The driver of compute-sanitizer: its cases are right, and no failure passes for a clean run."""

import sys
from pathlib import Path

import pytest
import sanitize
from sanitize import CASES

from prefuse.kernels.launch import _C, HAS_CUDA_EXTENSION

SOURCES = {path.stem for path in (Path(__file__).parents[1] / "csrc").glob("*.cu")}
ON_GPU = sanitize.torch.cuda.is_available() and HAS_CUDA_EXTENSION
STUB = f"""#!{sys.executable}
import os, sys
with open({{log!r}}, "a") as log:
    print(*sys.argv[1:], os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"], file=log)
print("what it found")
sys.exit({{statuses}}.get((sys.argv[2], sys.argv[-1]), 0))
"""


@pytest.mark.skipif(_C is None, reason="no C++ extension")
@pytest.mark.parametrize("name", CASES)
def test_the_cases_pass(name, device):
    CASES[name](device, "cuda" if ON_GPU else "cpu")


@pytest.mark.skipif(_C is None, reason="no C++ extension")
def test_a_wrong_result_fails(monkeypatch):
    honest = sanitize.advantage_scan.reference
    shifted = lambda p: tuple(x + 1e-3 for x in honest(p))  # noqa: E731
    monkeypatch.setattr(sanitize.advantage_scan, "reference", shifted)
    with pytest.raises(SystemExit, match="differs from the reference"):
        CASES["advantage"]("cpu", "cpu")


def test_every_source_has_a_case():
    assert set(CASES) == SOURCES


def run(monkeypatch, tmp_path, statuses, *arguments):
    """The driver with a sanitizer that ends with the given status per (tool, case)."""
    stub, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    stub.write_text(STUB.format(log=str(log), statuses=statuses))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "HAS_CUDA_EXTENSION", True)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", *arguments])
    return sanitize.main(), log.read_text().splitlines()


def test_each_tool_runs_each_case(monkeypatch, tmp_path, capsys):
    status, calls = run(monkeypatch, tmp_path, {})
    assert status == 0 and len(calls) == 2 * len(CASES)
    script = str(Path(sanitize.__file__))
    for call, (name, tool) in zip(
        calls, [(n, t) for n in CASES for t in ("memcheck", "racecheck")], strict=True
    ):
        wanted = f"--tool {tool} --error-exitcode 99 {sys.executable} {script} --run {name} 1"
        assert call == wanted
    assert "what it found" not in capsys.readouterr().out


@pytest.mark.parametrize("code, said", [(99, "errors"), (1, "failed with status 1")])
def test_one_failure_fails_all(code, said, monkeypatch, tmp_path, capsys):
    status, calls = run(monkeypatch, tmp_path, {("racecheck", "advantage"): code})
    out = capsys.readouterr().out
    assert status == 1 and len(calls) == 2 * len(CASES), "the others still run"
    assert f"  {said}\nwhat it found" in out and out.count("clean") == len(calls) - 1


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitize, "HAS_CUDA_EXTENSION", False)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 2
    out = capsys.readouterr().out
    assert all(word in out for word in ("a GPU", "nvcc on PATH", "compute-sanitizer"))
