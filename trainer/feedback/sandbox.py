"""Runs a program against tests; started by programs.py in a process of its own, never imported.

The kernel limits time, memory, files and processes. An audit hook, which Python cannot take off,
refuses sockets, processes, foreign code and writing outside the folder it starts in. That stops
accidents and the tricks a policy finds; against people, run the trainer in a container.
"""

import io
import json
import os
import resource
import sys
import types

REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "pty.",
    "os.exec",
    "os.fork",
    "os.spawn",
    "os.posix_",
)
REFUSED_TOO = {
    "os.system",
    "os.kill",
    "os.killpg",
    "os.chdir",
    "os.fchdir",
    "os.symlink",
    "os.link",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = ("os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
PATHS_TOO = ("os.utime", "os.setxattr", "os.removexattr", "os.chflags", "os.mkfifo", "os.mknod")


def limit(seconds, memory):
    """What the kernel enforces. Root is not held to RLIMIT_NPROC: the hook refuses its forks."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):
            pass  # macOS has no RLIMIT_AS to set; the hook and the parent's clock remain


def make_hook(root):
    """The audit hook, with its own copies of what it calls."""
    realpath, isdir, fspath = os.path.realpath, os.path.isdir, os.fspath
    home = realpath(root) + os.sep
    paths = frozenset(PATHS + PATHS_TOO)

    def inside(path):
        path = os.fsdecode(fspath(path))
        return (realpath(path) + os.sep).startswith(home) or path == os.devnull

    def hook(event, args):
        if event.startswith(REFUSED) or event in REFUSED_TOO:
            raise PermissionError(f"{event} is refused here")
        if event == "open" and not isinstance(args[0], int) and args[0] is not None:
            if args[2] & WRITING and not inside(args[0]):
                raise PermissionError(f"writing to {args[0]} is refused here")
            if isdir(args[0]):  # a folder's descriptor would give paths another root
                raise PermissionError(f"opening the folder {args[0]} is refused here")
        if event in paths:
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)) and not inside(path):
                    raise PermissionError(f"{event} of {path} is refused here")

    return hook


def run_program(code, stdin):
    """What the program prints, given its input."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    sys.stdout = io.TextIOWrapper(io.BytesIO())
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        pass
    sys.stdout.flush()
    return sys.stdout.buffer.getvalue().decode()


def same_output(wanted, got):
    strip = lambda text: [line.rstrip() for line in text.rstrip().split("\n")]  # noqa: E731
    return strip(wanted) == strip(got)


def main():
    job = json.loads(sys.stdin.readline())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    stub = types.ModuleType("_posixsubprocess")  # the real one forks without telling the hook
    sys.modules["_posixsubprocess"] = stub
    vars(stub)["fork_exec"] = None
    limit(job["seconds"], job["memory"])
    sys.addaudithook(make_hook(os.getcwd()))
    code = compile(job["code"], "completion.py", "exec")
    tests, nonce, write, dumps = job["tests"], job["nonce"], os.write, json.dumps
    namespace = None
    for number, test in enumerate(tests):
        try:
            if isinstance(test, dict):
                passed = same_output(str(test["output"]), run_program(code, str(test["input"])))
            else:
                if namespace is None:
                    namespace = {"__name__": "completion"}
                    exec(code, namespace)
                exec(compile(test, f"test_{number}.py", "exec"), namespace)
                passed = True
        except Exception:
            passed = False
        write(report, (dumps([nonce, number, passed]) + "\n").encode())


if __name__ == "__main__":
    main()
