"""Rewards for programs: the fenced code of a completion against the row's tests, in a sandbox."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import UserError
from .text import texts

SANDBOX = Path(__file__).with_name("sandbox.py")
FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)

PYTHON = ("", "python", "python3", "py")


def code(
    completions, tests=None, answer=None, *, timeout: float = 5.0, memory_mb: int = 1024, **_
) -> list[float | None]:
    """The share of `tests` that the last fenced block of Python passes, run without a network.

    Tests are Python, a text or a list of texts, run after the program; or inputs and outputs of a
    program that reads and prints: a list of {"input", "output"} or {"inputs": [], "outputs": []}.
    """
    tests = answer if tests is None else tests
    if tests is None:
        raise UserError("code: wanted a column 'tests': Python, or inputs and outputs; got none")
    _without_network()
    run = functools.partial(_score, timeout=timeout, memory=memory_mb << 20)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, texts(completions), map(_tests, tests)))


def program(text: str) -> str | None:
    """The last fenced block of Python, or of no language."""
    blocks = [block for name, block in FENCE.findall(text) if name.lower() in PYTHON]
    return blocks[-1] if blocks else None


def _tests(given: Any) -> list | None:
    """A row's tests as a list; a JSON text is read first."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            pass  # Python that begins with a bracket
    if isinstance(given, dict) and {"inputs", "outputs"} <= given.keys():
        _reads_and_prints(given)
        pairs = zip(given["inputs"], given["outputs"], strict=True)
        given = [{"input": i, "output": o} for i, o in pairs]
    if isinstance(given, dict):
        given = [given]
    if isinstance(given, str):
        return [given]
    if given is None or not len(given):
        return None
    return [test if isinstance(test, str) else _of_text(test) for test in given]


def _of_text(test: dict) -> dict[str, str]:
    """An input and an output, which may be lists of lines."""
    if not {"input", "output"} <= set(test):
        raise UserError(
            f"code: wanted tests of Python text or {{'input', 'output'}}; got {str(test)[:60]!r}"
        )
    _reads_and_prints(test)
    told = {}
    for name in ("input", "output"):
        lines = test[name] if isinstance(test[name], (list, tuple)) else [test[name]]
        if not all(isinstance(line, (str, int, float)) for line in lines):
            raise UserError(f"code: wanted {name} as text or lines; got {str(test[name])[:60]!r}")
        told[name] = "\n".join(map(str, lines))
    return told


def _reads_and_prints(test: dict) -> None:
    """APPS and LiveCodeBench have tests of a function too, whose input is its arguments."""
    if test.get("fn_name") or test.get("testtype") == "functional":
        raise UserError(
            "code: wanted tests of a program that reads and prints; got arguments of a function "
            f"({str(test.get('fn_name') or 'testtype functional')[:60]}). Write them as Python, "
            "as in assert f(1) == 2"
        )


def _score(text: str, tests: list | None, *, timeout: float, memory: int) -> float | None:
    if tests is None:
        return None
    source = program(text)
    return 0.0 if source is None else sum(run(source, tests, timeout, memory)) / len(tests)


def run(source: str, tests: list, timeout: float = 5.0, memory: int = 1 << 30) -> list[bool]:
    """Which tests pass. Those that the program does not come to, or is stopped in, do not."""
    nonce = secrets.token_hex(16)
    job = {"code": source, "tests": tests, "nonce": nonce, "memory": memory}
    job["seconds"] = math.ceil(timeout)
    passed = [False] * len(tests)
    make_folder = tempfile.TemporaryDirectory(prefix="prefuse-", ignore_cleanup_errors=True)
    with make_folder as folder, tempfile.TemporaryFile() as report:  # a file cannot outgrow a limit
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-I", "-S", str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": os.defpath},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job).encode() + b"\n", timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
        report.seek(0)
        output = report.read()
    for line in output.splitlines():
        try:
            found, number, result = json.loads(line)
        except ValueError:
            continue
        if found == nonce:  # what the program itself prints is no verdict
            passed[number] = result is True
    return passed


def _kill(process: subprocess.Popen) -> None:
    """The whole group, whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


@functools.cache
def _without_network() -> tuple[str, ...]:
    """A prefix that gives a command an empty network, where the system lets us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    prefix = (unshare, "--map-root-user", "--net", "--")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    works = subprocess.run([*prefix, "true"], **quiet, check=False).returncode == 0
    return prefix if works else ()
