"""Calls of rewards that can be given up on, so that one that hangs does not hang the run.

A call that is given up on goes on in its daemon thread until it ends or the program does. One in a
loop of C code that keeps the interpreter's lock cannot be given up on: such code wants a process of
its own, as programs.py gives it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures as futures
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import UserError


class Failure(Exception):
    """What went wrong with a reward: a kind, which is counted, and the story."""

    def __init__(self, kind: str, story: str):
        super().__init__(story)
        self.kind, self.story = kind, story


class Caller:
    """Starts calls: functions in threads, coroutine functions together on one event loop.

    At most max_concurrency of either are under way at once, those given up on included.
    """

    def __init__(self, timeout: float, max_concurrency: int):
        self.timeout = timeout
        self.free = threading.Semaphore(max_concurrency)
        self.max_concurrency = max_concurrency
        self.loop: asyncio.AbstractEventLoop | None = None
        self.turns = asyncio.Semaphore(max_concurrency)

    def start(self, function: Callable, arguments: dict[str, Any], is_async: bool) -> Call:
        """Begins a call, whose time runs from now on."""
        deadline = time.monotonic() + self.timeout
        if is_async:
            return Call(self._on_the_loop(function, arguments), deadline, self)
        future: futures.Future = futures.Future()
        future.set_running_or_notify_cancel()  # so that a result that comes too late may be set
        if self.free.acquire(timeout=self.timeout):
            run = threading.Thread(
                target=self._run, args=(future, function, arguments), daemon=True
            )
            run.start()
        return Call(future, deadline, self)

    def _run(self, future: futures.Future, function: Callable, arguments: dict[str, Any]) -> None:
        try:
            result = function(**arguments)
            if inspect.isawaitable(result):  # of a lambda or object around a coroutine function
                result = asyncio.run(_awaited(result))
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
        finally:
            self.free.release()

    def _on_the_loop(self, function: Callable, arguments: dict[str, Any]) -> futures.Future:
        if self.loop is None:
            self.loop, self.turns = (
                asyncio.new_event_loop(),
                asyncio.Semaphore(self.max_concurrency),
            )
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        turns = self.turns

        async def in_turn():
            async with turns:
                return await function(**arguments)

        return asyncio.run_coroutine_threadsafe(in_turn(), self.loop)

    def give_up(self, future: futures.Future) -> None:
        """Cancels a coroutine; a loop that one of them blocks is left behind."""
        if not future.cancel() or self.loop is None:
            return
        alive = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        if futures.wait([alive], 1.0).not_done:
            self.loop = None


class Call:
    """One call under way."""

    def __init__(self, future: futures.Future, deadline: float, caller: Caller):
        self.future, self.deadline, self.caller = future, deadline, caller

    def result(self) -> Any:
        """What the function returned; a Failure if it raised, or did not return in time."""
        futures.wait([self.future], max(0.0, self.deadline - time.monotonic()))
        if not self.future.done():
            self.caller.give_up(self.future)
            raise Failure("timed out", f"timed out after {self.caller.timeout:g} s")
        try:
            return self.future.result()
        except (UserError, Failure, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too, and a coroutine that cancels itself
            raise Failure("raised", f"raised {type(error).__name__}: {error}") from error


async def _awaited(result: Any) -> Any:
    return await result
