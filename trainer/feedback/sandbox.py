"""Runs a program against tests; started by programs.py in a process of its own, never imported.

The kernel limits time, memory, files and processes. An audit hook, which Python cannot take off,
refuses sockets, processes, foreign code and writing outside the folder it starts in. That stops
accidents and the tricks a policy finds; against people, run the trainer in a container.
"""

import atexit
import builtins
import json
import os
import resource
import sys
import threading
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
AF_UNIX = 1  # of asyncio's pair of sockets, which reaches nobody: to connect or bind is refused


def limit(seconds, memory):
    """What the kernel enforces. Root is not held to RLIMIT_NPROC: the hook refuses its forks.

    It counts threads too, those of the user's other processes where there is no user namespace.
    """
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
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
        if event == "socket.__new__" and args[1] == AF_UNIX:
            return
        again = event == "import" and args[0] == "_posixsubprocess"  # past the stub in main
        if event.startswith(REFUSED) or event in REFUSED_TOO or again:
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


def own_module(name):
    """The names of a module for the program to stand in, where dataclasses and pickle look."""
    module = sys.modules[name] = types.ModuleType(name)
    return vars(module)


def unnamed_file():
    """The descriptor of a file that no path leads to."""
    descriptor = os.open("file", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink("file")
    return descriptor


def run_program(code, stdin, files, exec=exec):
    """What the program prints, given its input: by true files, for programs that use descriptors.

    exec: Python's own, though a program before may have put another in its place.
    """
    for number, (descriptor, text) in enumerate(zip(files, (stdin, ""), strict=True)):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.dup2(descriptor, number)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    out = sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    try:
        exec(code, own_module("__main__"))
    except SystemExit:
        pass
    end_program()
    for file in (sys.stdout, out):
        if not file.closed:
            file.flush()
    return os.pread(files[1], os.fstat(files[1]).st_size, 0).decode()


def end_program():
    """What the interpreter does when a program has come to its end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


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
    builtins.exit = builtins.quit = sys.exit  # -S leaves them out
    files = unnamed_file(), unnamed_file()
    sys.addaudithook(make_hook(os.getcwd()))
    code = compile(job["code"], "completion.py", "exec")
    tests = [compiled(number, test) for number, test in enumerate(job["tests"])]
    nonce, write, dumps, run = job["nonce"], os.write, json.dumps, exec
    namespace = None
    for number, test in enumerate(tests):
        try:
            if isinstance(test, dict):
                passed = same_output(test["output"], run_program(code, test["input"], files))
            else:
                if namespace is None:
                    namespace = own_module("completion")
                    run(code, namespace)
                run(test, namespace)
                passed = True
        except Exception:
            passed = False
        write(report, (dumps([nonce, number, passed]) + "\n").encode())


def compiled(number, test):
    """A test of Python as code, before the program can touch what compiles."""
    if isinstance(test, dict):
        return test
    try:
        return compile(test, f"test_{number}.py", "exec")
    except (SyntaxError, ValueError):
        return compile("raise SyntaxError", "", "exec")


if __name__ == "__main__":
    main()
