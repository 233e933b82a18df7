"""The engines whose weights live elsewhere: a stand-in server, `transformers serve`, a stand-in
for vLLM."""

import importlib.util
import json
import socket
import sys
import threading
import time
import types
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from test_rollout import policy, prompts_of
from tiny import python, tiny_tokenizer, write_model
from transformers import AutoModelForCausalLM

from prefuse.trainer.errors import UserError
from prefuse.trainer.rollout import Sampling, make_engine

SAMPLING = Sampling(max_new_tokens=5, eos_token_ids=(1,))


@contextmanager
def server(answer):
    """answer(body) -> (status, object); yields its address, the bodies it saw, and how many it
    answered at once at most."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                seen["now"] += 1
                seen["most"] = max(seen["most"], seen["now"])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen["bodies"].append(body | {"key": self.headers.get("Authorization")})
            status, found = answer(body)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            with lock:
                seen["now"] -= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client timed out
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    lock, seen = threading.Lock(), {"now": 0, "most": 0, "bodies": []}
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def engine(url: str, **options):
    return make_engine(
        "openai",
        policy(),
        tiny_tokenizer(),
        **{"base_url": url, "served_model": "m", "backoff": 0.01, "warn": lambda text: None}
        | options,
    )


def with_ids(body: dict):
    """The prompt's first token, counted up, as n choices out of order."""
    first = body["prompt"][0]
    choices = [
        {
            "index": k,
            "token_ids": [first, k, 1],
            "finish_reason": "stop" if k else "length",
            "logprobs": {"token_logprobs": [-0.5, -1.0 * k, None]},
        }
        for k in reversed(range(body["n"]))
    ]
    return 200, {"choices": choices}


def test_token_ids_and_log_probs_come_as_the_server_gives_them():
    prompts = prompts_of(*range(2, 14))
    sampling = Sampling(max_new_tokens=5, top_p=0.9, top_k=7, min_p=0.1, eos_token_ids=(1, 4))
    with server(with_ids) as (url, seen):
        asked = engine(url, api_key="secret", max_concurrency=3)
        got = asked.generate(prompts, 2, sampling, range(12))
        asked.close()
    for prompt, group in zip(prompts, got, strict=True):
        assert [c.tokens.tolist() for c in group] == [[prompt[0], k, 1] for k in range(2)]
        assert [c.finished for c in group] == [False, True]
        np.testing.assert_array_equal(group[1].logp, np.float32([-0.5, -1.0, np.nan]))
    assert 1 <= seen["most"] <= 3 and len(seen["bodies"]) == 12
    body = next(b for b in seen["bodies"] if b["prompt"] == prompts[3].tolist())
    wanted = dict(model="m", n=2, seed=3, max_tokens=5, temperature=1.0, top_p=0.9, top_k=7)
    wanted |= dict(min_p=0.1, stop_token_ids=[1, 4], key="Bearer secret", return_token_ids=True)
    assert wanted.items() <= body.items()


@pytest.mark.parametrize(
    "sampling, logprobs, known",
    [
        ({"temperature": 0.7}, "raw", False),
        ({"temperature": 0.7}, "processed", True),
        ({"temperature": 0.7, "top_k": 3}, "processed", False),
        ({"temperature": 1.0, "top_k": 3}, "raw", True),
    ],
)
def test_log_probs_of_other_distributions_are_unknown_and_counted(sampling, logprobs, known):
    notes: list[str] = []
    with server(with_ids) as (url, _):
        asked = engine(url, logprobs=logprobs, warn=notes.append)
        for _ in range(2):
            (group,) = asked.generate(prompts_of(3), 1, Sampling(5, **sampling), [0])
    assert group[0].logp[:2].tolist() == [-0.5, 0.0] if known else np.isnan(group[0].logp).all()
    assert asked.counts["without_logp"] == 2  # its last is null whatever the temperature
    assert len(notes) == 1


def flaky(times: int, status: int = 503):
    left = [times]

    def answer(body):
        left[0] -= 1
        return (status, {"error": "busy"}) if left[0] >= 0 else with_ids(body)

    return answer


def test_a_busy_server_is_asked_again():
    with server(flaky(2)) as (url, seen):
        asked = engine(url)
        asked.generate(prompts_of(3), 1, SAMPLING, [0])
    assert asked.counts["retries"] == 2 and len(seen["bodies"]) == 3


@pytest.mark.parametrize(
    "answer, options, message",
    [
        (flaky(99), {"max_retries": 1}, r"no answer in 2 attempts .*status 503: .*busy"),
        (flaky(99, 401), {}, "refuses: status 401"),
        (lambda b: (200, b"<html>"), {"max_retries": 1}, "no answer in 2 attempts .*JSONDecode"),
        (lambda b: (200, {"choices": []}), {}, "wanted 1 choices; got"),
        (lambda b: (200, {"choices": [{"text": "w1"}]}), {}, "wanted token ids .*retokenize=True"),
        (lambda b: (time.sleep(1), (200, {}))[1], {"timeout": 0.1, "max_retries": 0}, "timed out"),
    ],
)
def test_a_server_that_does_not_serve_is_told(answer, options, message):
    with server(answer) as (url, _), pytest.raises(UserError, match=message):
        engine(url, **options).generate(prompts_of(3), 1, SAMPLING, [0])


def test_no_server_at_all_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="is the server running"):
        engine(url, max_retries=1).generate(prompts_of(3), 1, SAMPLING, [0])
    with pytest.raises(UserError, match="wanted http://"):
        engine("localhost:8000")


def test_a_refusal_is_told_while_another_request_hangs():
    over = threading.Event()

    def answer(body):
        if body["prompt"][0] == 2:
            over.wait(30)
            return 503, {}
        return 401, {"error": "no such key"}

    before = {thread.name for thread in threading.enumerate()}
    with server(answer) as (url, seen):
        started = time.monotonic()
        with pytest.raises(UserError, match="status 401"):
            engine(url, max_concurrency=2).generate(prompts_of(2, 3, 4, 5), 1, SAMPLING, range(4))
        assert time.monotonic() - started < 10
        mine = [t for t in threading.enumerate() if t.name not in before and "_work" in t.name]
        assert all(thread.daemon for thread in mine)
        over.set()
    assert len(seen["bodies"]) <= 2


def test_a_redirect_is_not_followed_with_the_key():
    with server(with_ids) as (elsewhere, seen):
        with server(lambda body: (302, {})) as (url, _), pytest.MonkeyPatch.context() as patch:
            send = BaseHTTPRequestHandler.end_headers

            def end_headers(handler):
                if handler.server.server_port == int(url.split(":")[2].split("/")[0]):
                    handler.send_header("Location", elsewhere + "/completions")
                send(handler)

            patch.setattr(BaseHTTPRequestHandler, "end_headers", end_headers)
            with pytest.raises(UserError, match="refuses: status 302"):
                engine(url, api_key="secret").generate(prompts_of(2), 1, SAMPLING, [0])
    assert seen["bodies"] == []


def test_text_is_tokenized_anew_where_asked():
    def answer(body):
        assert body.keys() <= {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
        choice = {"text": body["prompt"] + " w9", "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 3}}

    with server(answer) as (url, seen):
        asked = engine(url, retokenize=True)
        prompts = [np.array([6, 7, 8]), np.array([9, 10])]
        got = asked.generate(prompts, 2, SAMPLING, [0, 1])
        with pytest.raises(UserError, match="top_k and min_p"):
            asked.generate(prompts, 2, Sampling(5, top_k=5), [0, 1])
    assert [c.tokens.tolist() for g in got for c in g] == [[6, 7, 8, 15, 1]] * 2 + [
        [9, 10, 15, 1]
    ] * 2
    assert all(np.isnan(c.logp).all() and c.finished for g in got for c in g)
    assert len({b["seed"] for b in seen["bodies"]}) == 4
    wanted = {"retokenized": 4, "without_logp": 4, "prompts_read_differently": 2}
    assert +asked.counts == wanted


def test_the_weights_of_a_server_stay_as_they_are():
    with pytest.raises(UserError, match="cannot be changed from here"):
        engine("http://127.0.0.1:9/v1").update_weights(policy())


@pytest.mark.full
@pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve is not installed: pip install transformers[serving]",
)
def test_transformers_serve_gives_the_models_own_text(tmp_path):
    folder = write_model(tmp_path / "model", policy())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["-m", "transformers.cli.transformers", "serve", folder, "--port", str(port)]
    process = python(*argv, "--host", "127.0.0.1", env={"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url + "/health", process)
        asked = engine(url + "/v1", served_model=folder, retokenize=True)
        prompts, greedy = prompts_of(4, 9), Sampling(max_new_tokens=6, temperature=0.0)
        got = asked.generate(prompts, 1, greedy, [0, 0])
        with pytest.raises(UserError, match="status 4.*"):
            engine(url + "/v1", served_model=folder).generate(prompts, 1, greedy, [0, 0])
    finally:
        process.terminate()
        process.wait()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, (completion,) in zip(prompts, got, strict=True):
        tokens = model.generate(torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=6)
        assert completion.tokens.tolist() == tokens[0, len(prompt) :].tolist()
    assert asked.counts["prompts_read_differently"] == 0


def wait_for(url: str, process) -> None:
    for _ in range(120):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} did not come up")


class FakeLLM:
    """What of vllm.LLM the engine uses."""

    def __init__(self, *, model, logprobs_mode, skip_tokenizer_init, **others):
        assert logprobs_mode == "processed_logprobs" and skip_tokenizer_init
        self.weights: dict[str, torch.Tensor] = {}
        self.resets = 0

    def generate(self, prompts, sampling_params, *, use_tqdm):
        return [
            self.output(p["prompt_token_ids"], s)
            for p, s in zip(prompts, sampling_params, strict=True)
        ]

    def output(self, ids: list[int], params):
        said = lambda token: {token: types.SimpleNamespace(logprob=-token / 10)}  # noqa: E731
        return types.SimpleNamespace(
            outputs=[
                types.SimpleNamespace(
                    token_ids=(ids[0], params.seed + k, 1),
                    logprobs=[said(ids[0]), said(params.seed + k), said(1)],
                    finish_reason="length" if k else "stop",
                )
                for k in range(params.n)
            ]
        )

    def apply_model(self, function):
        return [function(self)]

    def load_weights(self, weights):
        self.weights.update(weights)

    def reset_prefix_cache(self):
        self.resets += 1


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM = FakeLLM
    module.SamplingParams = lambda **given: types.SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_vllm_is_spoken_to_as_its_interface_says(fake_vllm):
    model, prompts = policy(tie=True), prompts_of(4, 9)
    notes: list[str] = []
    sampler = make_engine("vllm", model, tiny_tokenizer(), warn=notes.append)
    assert sampler.llm.weights.keys() == dict(model.named_parameters()).keys()
    got = sampler.generate(prompts, 2, SAMPLING, [20, 30])
    assert [c.tokens.tolist() for c in got[1]] == [[prompts[1][0], 30, 1], [prompts[1][0], 31, 1]]
    assert [c.finished for c in got[1]] == [True, False]
    np.testing.assert_allclose(got[1][1].logp, [-prompts[1][0] / 10, -3.1, -0.1], rtol=1e-6)
    cut = Sampling(max_new_tokens=5, top_k=3)
    assert np.isnan(sampler.generate(prompts, 1, cut, [0, 0])[0][0].logp).all()
    assert sampler.counts["without_logp"] == 2 and len(notes) == 1
    sampler.update_weights(model)
    assert sampler.llm.resets == 2


def test_a_missing_vllm_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError, match=r"pip install 'prefuse\[vllm\]'"):
        make_engine("vllm", policy(), tiny_tokenizer())
