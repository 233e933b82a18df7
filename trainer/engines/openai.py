"""Completions of a server that speaks OpenAI's protocol: POST BASE_URL/completions.

The server holds weights of its own, so this engine is for policies that do not change between
rollouts; `update_weights` refuses.
"""

from __future__ import annotations

import concurrent.futures as futures
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..rollout import Completion, Sampling, check_request, context_of
from .noise import stream

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may pass by themselves


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


OPENER = urllib.request.build_opener(NoRedirect)


class OpenAIEngine:
    """Asks for token ids (`return_token_ids`, as vLLM 0.10.2 and later give them) and log-probs.

    base_url: up to and including /v1. served_model: the name the server gives the model.
    retokenize: take text from servers that give no token ids, and tokenize it; such tokens may
    differ from those sampled, and have no log-probs. logprobs: what the server's log-probs are of,
    the "raw" logits (vLLM's default) or those "processed" by temperature and the cuts; where these
    are not the trainer's, they are NaN. `counts` tells what was retried, retokenized or unknown.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        base_url: str,
        served_model: str,
        api_key: str | None = None,
        retokenize: bool = False,
        logprobs: Literal["raw", "processed"] = "raw",
        max_concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        warn: Callable[[str], None] = warnings.warn,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url: wanted http://HOST:PORT/v1; got {base_url}")
        if max_concurrency < 1:
            raise UserError(f"max_concurrency: wanted 1 or more; got {max_concurrency}")
        self.url = base_url.rstrip("/") + "/completions"
        self.served_model, self.tokenizer = served_model, tokenizer
        self.api_key = api_key or os.environ.get("OPENAI_API_KEY")
        self.retokenize, self.logprobs = retokenize, logprobs
        self.timeout, self.max_retries, self.backoff = timeout, max_retries, backoff
        self.context, self.warn = context_of(model), warn
        self.max_concurrency = max_concurrency
        self.counts: Counter[str] = Counter()

    def generate(
        self, prompts: Sequence[np.ndarray], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        check_request(prompts, n, sampling, seeds, self.context)
        before = +self.counts
        if self.retokenize:
            found = self._texts(prompts, n, sampling, seeds)
        else:
            found = self._tokens(prompts, n, sampling, seeds)
        unknown = sum(bool(np.isnan(c.logp).any()) for group in found for c in group)
        self.counts["without_logp"] += unknown
        if unknown and not before["without_logp"]:
            self.warn(
                f"{self.url}: {unknown} of {len(prompts) * n} completions have no log-probs at "
                "the trainer's temperature, so their gap to the trainer cannot be measured"
            )
        return found

    def _tokens(self, prompts, n, sampling: Sampling, seeds) -> list[list[Completion]]:
        """A request a prompt, with its token ids, for n choices."""
        bodies = [
            {
                **self._body(sampling),
                "prompt": prompt.tolist(),
                "n": n,
                "seed": seed % 2**63,
                "logprobs": 0,
                "top_k": sampling.top_k or -1,
                "min_p": sampling.min_p,
                "stop_token_ids": list(sampling.eos_token_ids),
                "return_token_ids": True,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [
            [self._with_ids(choice, sampling) for choice in self._choices(answer, n)]
            for answer in self._ask(bodies)
        ]

    def _texts(self, prompts, n, sampling: Sampling, seeds) -> list[list[Completion]]:
        """A request a completion, in the words of the protocol's first version."""
        if sampling.top_k or sampling.min_p:
            raise UserError(
                "openai with retokenize: top_k and min_p are not in OpenAI's protocol; leave them "
                "at 0, or use a server that returns token ids"
            )
        bodies = [
            {
                **self._body(sampling),
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=False),
                "seed": stream(seed, k) % 2**31,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
            for k in range(n)
        ]
        answers = self._ask(bodies)
        for index, answer in enumerate(answers):
            read = (answer.get("usage") or {}).get("prompt_tokens")
            self.counts["prompts_read_differently"] += read not in (None, len(prompts[index // n]))
        found = [self._from_text(self._choices(a, 1)[0], sampling) for a in answers]
        return [found[i : i + n] for i in range(0, len(found), n)]

    def _body(self, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self.served_model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }

    def _with_ids(self, choice: dict, sampling: Sampling) -> Completion:
        ids = choice.get("token_ids")
        if not ids or not all(isinstance(i, int) for i in ids):
            raise UserError(
                f"{self.url}: wanted token ids of its completions (return_token_ids); got "
                f"{ids!r}. Use a server that returns them, such as vllm serve, or pass "
                "retokenize=True to tokenize its text anew, without log-probs"
            )
        given = (choice.get("logprobs") or {}).get("token_logprobs")
        if given is None or len(given) != len(ids) or not self._same_logits(sampling):
            given = [None] * len(ids)
        logp = np.array([np.nan if x is None else x for x in given], dtype=np.float32)
        return Completion(np.array(ids, np.int64), logp, choice.get("finish_reason") == "stop")

    def _same_logits(self, sampling: Sampling) -> bool:
        """Whether the server's log-probs are of the softmax that the trainer computes."""
        if self.logprobs == "raw":
            return sampling.temperature in (0, 1)
        uncut = sampling.top_p == 1 and not sampling.top_k and not sampling.min_p
        return uncut and sampling.temperature > 0

    def _from_text(self, choice: dict, sampling: Sampling) -> Completion:
        if not isinstance(choice.get("text"), str):
            raise UserError(f"{self.url}: wanted choices with a text; got {_short(choice)}")
        ids = self.tokenizer(choice["text"], add_special_tokens=False).input_ids
        finished = choice.get("finish_reason") == "stop"
        if finished and sampling.eos_token_ids and ids[-1:] != [sampling.eos_token_ids[0]]:
            ids = [*ids, sampling.eos_token_ids[0]]  # text does not show it
        self.counts["retokenized"] += 1
        return Completion(np.array(ids, np.int64), np.full(len(ids), np.nan, np.float32), finished)

    def _choices(self, answer: dict, n: int) -> list[dict]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            raise UserError(f"{self.url}: wanted {n} choices; got {_short(answer)}")
        return sorted(choices, key=lambda c: c.get("index", 0))

    def _ask(self, bodies: list[dict]) -> list[dict]:
        """Answers in order. The first failure is told at once: what has not begun is not asked,
        what has is left behind in its daemon thread, which keeps no program from ending."""
        answers: list[futures.Future] = [futures.Future() for _ in bodies]
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for job in zip(answers, bodies, strict=True):
            todo.put(job)
        for _ in range(min(self.max_concurrency, len(bodies))):
            threading.Thread(target=self._work, args=(todo,), daemon=True).start()
        try:
            futures.wait(answers, return_when=futures.FIRST_EXCEPTION)
            failed = [a for a in answers if a.done() and a.exception() is not None]
            return [answer.result() for answer in failed or answers]
        finally:
            for answer in answers:
                answer.cancel()

    def _work(self, todo: queue.SimpleQueue) -> None:
        while not todo.empty():
            try:
                answer, body = todo.get_nowait()
            except queue.Empty:
                return
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(self._post(body))
            except BaseException as error:
                while not todo.empty():  # nobody waits for the rest
                    with suppress(queue.Empty):
                        todo.get_nowait()
                answer.set_exception(error)

    def _post(self, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.max_retries + 1):
            wait = self.backoff * 2**attempt
            try:
                with OPENER.open(request, timeout=self.timeout) as answer:
                    found = json.load(answer)
                if isinstance(found, dict):
                    return found
                problem = f"its answer is no JSON object: {_short(found)}"
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_short(_read(error))}"
                if error.code not in AGAIN:
                    raise UserError(f"{self.url} refuses: {problem}") from error
                after = error.headers.get("Retry-After", "")
                wait = min(float(after), 60.0) if after.isdigit() else wait
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.max_retries:
                self.counts["retries"] += 1
                time.sleep(wait)
        raise UserError(
            f"{self.url}: no answer in {self.max_retries + 1} attempts of up to {self.timeout:g} s "
            f"({problem}); is the server running?"
        )

    def update_weights(self, model: nn.Module) -> None:
        raise UserError(
            f"engine openai: the weights of {self.url} cannot be changed from here, so a policy in "
            "training would be sampled as it was before; use the engine 'transformers' or 'vllm'"
        )

    def close(self) -> None:
        pass


def _read(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "..."
