"""Questions to a chat model of an OpenAI-compatible server: POST BASE_URL/chat/completions.

A request runs in a daemon thread: one that hangs is left behind, and keeps no program from ending.
"""

from __future__ import annotations

import asyncio
import concurrent.futures as futures
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines.openai import AGAIN, OPENER
from ..errors import UserError
from .cache import Cache, key_of

BACKOFF = 0.5  # seconds before the second attempt, and twice as long before each after it
LONGEST_WAIT = 60.0  # seconds that a server may ask for in Retry-After
LARGEST = 16 << 20  # bytes of an answer
UNFIT = (400, 413, 422)  # statuses that speak of one question, as one that is too long


class NoAnswer(Exception):
    """The server gave none that can be read."""


class _Again(Exception):
    """What may pass by itself."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


class Chat:
    """At most max_concurrency questions at once, each asked up to 1 + max_retries times.

    The key is read from the environment, and is in no message and in no file. `cache` is an sqlite
    file of answers, by server, model, settings and question. `counts` tells of requests, retries
    and answers that the cache knew.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str | None,
        *,
        temperature: float | None,
        max_tokens: int,
        max_concurrency: int,
        timeout: float,
        max_retries: int,
        api_key_env: str,
        cache: str | Path | None,
    ):
        if not str(base_url).startswith(("http://", "https://")) or not model:
            raise UserError(
                "judge: wanted base_url and model, as in judge?base_url=http://HOST:8000/v1&"
                f"model=NAME; got base_url {base_url} and model {model}"
            )
        if max_concurrency < 1 or not timeout > 0 or max_retries < 0:
            raise UserError(
                "judge: wanted max_concurrency of 1 or more, a timeout above 0 and max_retries of "
                f"0 or more; got {max_concurrency}, {timeout} and {max_retries}"
            )
        self.url = f"{base_url}".rstrip("/") + "/chat/completions"
        settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.turns = asyncio.Semaphore(max_concurrency)
        self.timeout, self.max_retries = timeout, max_retries
        self.key_name, self.key = api_key_env, os.environ.get(api_key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"judge: the key in the environment's {api_key_env} is not plain text")
        self.cache = None if cache is None else Cache(Path(cache))
        self.counts: Counter[str] = Counter(requests=0, retries=0, cached=0)

    async def ask(
        self, question: str, read: Callable[[str], float | None], seed: int | None = None
    ) -> float:
        """What `read` finds in the model's answer, which is asked for again where it finds none."""
        body = {**self.settings, "messages": [{"role": "user", "content": question}]}
        body |= {} if seed is None else {"seed": seed}
        key = key_of(self.url, body)
        for text in self.cache.get(key) if self.cache else ():
            value = read(text)
            if value is not None:
                self.counts["cached"] += 1
                return value
        problem, wait = "", 0.0
        for attempt in range(self.max_retries + 1):
            self.counts["retries"] += attempt > 0
            await asyncio.sleep(wait)
            wait = BACKOFF * 2**attempt
            try:
                async with self.turns:
                    self.counts["requests"] += 1
                    text = await asyncio.wait_for(_in_thread(self._post, body), self.timeout)
            except asyncio.TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except _Again as error:
                problem, wait = str(error), error.wait or wait
            else:
                value = read(text)
                if value is None:
                    problem, wait = f"no verdict in {self._shown(text)!r}", 0.0
                    continue
                if self.cache:
                    self.cache.put({key: text})
                return value
        raise NoAnswer(f"{self.url}: {problem}, at the last of {self.max_retries + 1} attempts")

    def _post(self, body: dict[str, Any]) -> str:
        """The text of the model's message."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=self.timeout + 1) as answer:  # ask gives up first
                found = answer.read(LARGEST).decode(errors="replace")
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)  # of a URLError
            raise _Again(self._shown(f"{type(cause).__name__}: {cause}")) from None
        try:
            text = json.loads(found)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise _Again(f"wanted choices[0].message.content; got {self._shown(found)!r}")
        return text

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        try:
            story = error.read(4096).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            story = ""
        problem = f"status {error.code}: {self._shown(story)}"
        if error.code in AGAIN:
            after = error.headers.get("Retry-After", "")
            return _Again(problem, min(float(after), LONGEST_WAIT) if after.isdecimal() else 0.0)
        if error.code in UNFIT:
            return NoAnswer(f"{self.url}: {problem}")
        state = "set" if self.key else "not set"
        return UserError(
            f"judge: {self.url} refuses: {problem}. Its key is read from the environment's "
            f"{self.key_name}, which is {state}"
        )

    def _shown(self, text: str) -> str:
        """The start of a text that may have the key in it."""
        text = text.replace(self.key, "***") if self.key else text
        return text if len(text) <= 200 else text[:200] + "..."


async def _in_thread(function: Callable, *arguments: Any) -> Any:
    future: futures.Future = futures.Future()
    future.set_running_or_notify_cancel()  # so that its result may come when nobody waits for it

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
