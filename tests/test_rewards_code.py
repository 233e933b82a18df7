"""Programs run against tests, and what they may not do."""

import socket
import time

import pytest

from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback import programs
from prefuse.trainer.feedback.programs import code, program, run

ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
ECHO = "```\nn = int(input())\nprint(sum(int(input()) for _ in range(n)))\n```"
PAIRS = [{"input": "2\n3\n4\n", "output": "7"}, {"input": "1\n5", "output": "6\n"}]


@pytest.mark.parametrize(
    "completion, tests, wanted",
    [
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], 0.5),
        (ADD, "def check(f):\n    assert f(2, 2) == 4\ncheck(add)", 1.0),
        (ADD, '["assert add(1, 2) == 3"]', 1.0),
        (ADD, None, None),
        (ADD, [], None),
        (ECHO, PAIRS, 0.5),
        (ECHO, {"inputs": ["1\n5"], "outputs": ["5"]}, 1.0),
        ("no code", ["assert True"], 0.0),
        ("```python\ndef add(:\n```", ["assert True"], 0.0),
        ("```python\nraise ValueError\n```", ["assert True"], 0.0),
        ("```python\nx = 1\n```\n```py\nx = 2\n```", ["assert x == 2"], 1.0),
        ("```python\nx = 3", ["assert x == 3"], 1.0),
        ([{"role": "assistant", "content": ADD}], ["assert add(1, 2) == 3"], 1.0),
    ],
)
def test_the_share_of_tests_passed(completion, tests, wanted):
    assert code([completion], [tests]) == [wanted]


def test_the_column_answer_serves_too_and_a_missing_one_is_named():
    assert code([ADD], answer=["assert add(0, 1) == 1"]) == [1.0]
    with pytest.raises(UserError, match="wanted a column 'tests'"):
        code([ADD])
    with pytest.raises(UserError, match="'input', 'output'"):
        code([ADD], [[{"in": "1"}]])


def test_lines_and_numbers_are_text_and_arguments_of_functions_are_refused():
    assert code([ECHO], [{"inputs": [["2", "3", "4"], 0], "outputs": [7, ["0"]]}]) == [1.0]
    for tests in (
        {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"},
        [{"input": "1\n2", "output": "3", "testtype": "functional"}],
    ):
        with pytest.raises(UserError, match="got arguments of a function"):
            code([ADD], [tests])
    with pytest.raises(UserError, match="wanted input as text or lines"):
        code([ADD], [[{"input": {"a": 1}, "output": "3"}]])


SUM = [{"input": "3 4\n", "output": "7"}, {"input": "1 1", "output": "2"}]
PROGRAMS = {
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "a descriptor": "import os\nn = sum(map(int, os.read(0, 99).split()))\nos.write(1, b'%d' % n)",
    "fileno": "import sys, os\nprint(sum(map(int, os.read(sys.stdin.fileno(), 99).split())))",
    "buffers": "import sys\nn = sum(map(int, sys.stdin.buffer.read().split()))\n"
    "sys.stdout.buffer.write(b'%d' % n)",
    "exit": "print(sum(map(int, input().split())))\nexit()\nprint(1)",
    "closed": "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()\n"
    "sys.stdin.close()",
    "a thread left running": "import threading, time\ndef main():\n time.sleep(0.1)\n"
    " print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
    "atexit": "import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))",
    "asyncio": "import asyncio\nasync def main(): print(sum(map(int, input().split())))\n"
    "asyncio.run(main())",
    "a class that is looked up": "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n"
    "print(sum(map(int, input().split())))",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_may_read_and_print_and_end_as_programs_do(name):
    assert run(PROGRAMS[name], SUM) == [True, True]


def test_annotations_that_are_text_find_their_module():
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 7"
    )
    assert run(source, ["assert A().x == 7"]) == [True]


@pytest.mark.parametrize(
    "trick",
    [
        "import builtins; builtins.exec = lambda *given: None",
        "import builtins; empty = compile('0', '', 'exec'); builtins.compile = lambda *_: empty",
        "import builtins; builtins.str = type('S', (str,), {'__eq__': lambda *_: True})",
        "import __main__; __main__.same_output = lambda *_: True",
    ],
)
def test_a_program_cannot_pass_by_replacing_what_judges_it(trick):
    assert run(trick, ["assert False", "assert False"]) == [False, False]
    assert run(trick, SUM) == [False, False]


FORGERIES = """
import sys, os
for f in (1, 2, 3, 4, 5):
    try: os.write(f, b'["", 0, true]\\n')
    except OSError: pass
"""


@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit()", "raise SystemExit", "1/0"])
def test_a_program_cannot_pass_by_leaving_or_printing_a_verdict(ending):
    assert run(FORGERIES + ending, ["assert False"]) == [False]


HOSTILE = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "memory": "x = bytearray(10**12)",
    "memory, little by little": "x = []\nwhile True: x.append(bytearray(10**7))",
    "forks": "import os\nfor _ in range(50): os.fork()",
    "processes": "import subprocess; subprocess.run(['true'])",
    "a shell": "import os; assert os.system('true') == 0",
    "threads of processes": "import multiprocessing as m; p = m.Process(target=print); p.start()",
    "processes by another door": "import sys\ndel sys.modules['_posixsubprocess']\n"
    "import _posixsubprocess",
    "a socket": "import socket; socket.socket()",
    "a name": "import socket; socket.getaddrinfo('localhost', 80)",
    "ctypes": "import ctypes; ctypes.CDLL(None).fork()",
    "its parent": "import os; os.kill(os.getppid(), 9)",
    "recursion": "def f(): f()\nf()",
    "a big file": "open('x', 'wb').write(bytes(10**8))",
    "leaving": "import os; os.chdir('/')",
    "a flood": "import os\nwhile True:\n for f in range(3, 9):\n  try: os.write(f, bytes(9**6))\n"
    "  except OSError: pass",
    "deep text": "x = eval('(' * 10**6)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained_within_seconds(name):
    started = time.monotonic()
    assert run(HOSTILE[name], ["assert True"], timeout=1.5, memory=512 << 20) == [False]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w').write('x')",
        "import os; os.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))",
        "import os; os.rename('here', {path!r})",
        "import os; os.mkdir({path!r})",
        "import os; os.symlink({folder!r}, 'out'); open('out/mark', 'w')",
        "import os; d = os.open({folder!r}, 0); os.open('mark', os.O_CREAT | 1, dir_fd=d)",
        "import pathlib; pathlib.Path({path!r}).touch()",
    ],
)
def test_writing_is_kept_to_its_own_folder(attempt, tmp_path):
    path = tmp_path / "mark"
    source = "open('here', 'w').write('fine')\n" + attempt.format(
        path=str(path), folder=str(tmp_path)
    )
    assert run(source, ["assert True"]) == [False]
    assert not path.exists()
    assert run("open('here', 'w').write('fine')", ["assert open('here').read() == 'fine'"]) == [
        True
    ]


def test_tests_before_an_endless_one_count():
    tests = ["assert f(1) == 1", "f(-1)", "assert f(1) == 1"]
    source = "def f(n):\n    while n < 0: pass\n    return n"
    assert run(source, tests, timeout=1.0) == [True, False, False]


@pytest.mark.parametrize("network", [True, False])
def test_no_connection_leaves_with_or_without_a_network_namespace(network, monkeypatch):
    if not network:
        monkeypatch.setattr(programs, "_without_network", lambda: ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        source = f"import socket; socket.create_connection({address!r}, 1)"
        assert run(source, ["assert True"]) == [False]
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_last_block_is_the_program():
    assert program("```js\nx\n```\n```python\ny\n```") == "y\n"
    assert program("plain") is None
