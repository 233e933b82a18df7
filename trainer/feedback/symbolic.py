"""Whether two LaTeX answers are equal, by the math-verify package in a process of its own.

Sympy can be sent into hours of work or gigabytes of memory by a short answer, and math-verify's own
time-outs are signals, which threads do not get. The process can be killed, has a limit on memory,
and never executes text: sympy's parser of Python expressions is taken out of it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading

SECONDS = 5.0  # for a pair, before the process is killed
START_SECONDS = 60.0  # for it to import sympy on a busy machine
MEMORY = 4 << 30
NUMERAL = re.compile(r"[-+]?\d{1,400}(\.\d{0,400})?|[-+]?\.\d{1,400}")


def available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


@functools.lru_cache(maxsize=100_000)
def equal(gold: str, answer: str) -> bool:
    """Whether they are equal. No, if that is not known within 5 seconds."""
    return _worker().ask({"gold": gold, "answer": answer})


class Worker:
    """The process: a line of JSON in, a line out."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict) -> bool:
        """True or False; False where the process had to be killed or died."""
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                line = self._line(process, SECONDS)
            except BrokenPipeError:
                line = b""
            if not line:
                self._kill(process)
                return False
            return line == b"true\n"

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C is for the run
            )
            if self._line(self.process, START_SECONDS) != b"ready\n":
                self._kill(self.process)
                raise RuntimeError(
                    "math-verify does not start; try `python -c 'import math_verify'`"
                )
        return self.process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """A line of output; none at its end, or when the time is up."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate()
        self.process = None


_workers: dict[int, Worker] = {}


def _worker() -> Worker:
    """This process's own: a fork must not share its parent's pipe."""
    return _workers.setdefault(os.getpid(), Worker())


def main() -> None:
    """The worker's loop: it ends with its input."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    verdict = _make_verdict()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            question = json.loads(line)
            result = verdict(question["gold"], question["answer"])
        except Exception:
            result = False
        print(json.dumps(result), file=out, flush=True)


def _make_verdict():
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig, latex2sympy2
    from math_verify import LatexExtractionConfig, parse, parser, verify
    from sympy import Float, Integer
    from sympy.parsing import sympy_parser
    from sympy.physics import units  # noqa: F401  # simplify imports it, which parses names

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def read_number(text, *_, **__):
        """In the place of parse_expr, which evaluates its text as Python, numbers included."""
        if not NUMERAL.fullmatch(str(text).strip()):
            raise SyntaxError("text is not executed")
        return Float(text) if "." in text else Integer(text)

    def refuse(*_, **__):
        raise SyntaxError("text is not executed")

    sympy_parser.parse_expr = parser.parse_expr = latex2sympy2.parse_expr = read_number
    sympy_parser.eval_expr = refuse
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]
    read = functools.partial(parse, extraction_config=config, parsing_timeout=2)

    def verdict(gold: str, answer: str) -> bool:
        wanted, got = (read("\\boxed{" + text + "}") for text in (gold, answer))
        return bool(wanted and got and verify(wanted, got, timeout_seconds=2))

    return verdict


if __name__ == "__main__":
    main()
