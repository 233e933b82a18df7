"""Judges behind an endpoint, which may refuse, be slow, talk nonsense or limit its rate."""

import itertools
import json
import math
import socket
import threading
import time

import numpy as np
import pytest
from judge_server import KEY, longer, responses

from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback.judge import _read_score, _read_verdict
from prefuse.trainer.rewards import Feedback

PROMPTS = ["1+1", "1+1", "1+1", "2+2", "2+2"]
COMPLETIONS = ["it is 2, of course", "2", "it is 3", "4", "five"]
INDICES = ["rows.jsonl:1"] * 3 + ["rows.jsonl:2"] * 2


def judged(url, options="", columns=None, on_failure="stop", timeout=10.0):
    spec = f"judge?base_url={url}&model=m&{options}"
    feedback = Feedback([spec], on_failure=on_failure, timeout=timeout)
    return feedback(PROMPTS, COMPLETIONS, [[1]] * 5, columns or {}, INDICES)


def test_scores_are_shares_of_their_range_and_requests_are_the_protocols(serve):
    server = serve(lambda q, n: f"Long, so <b>Score: {min(10, len(responses(q)[0]))}</b>/10.")
    scores = judged(server.url + "/", "rubric=Is it {long}?&temperature=0.5&max_tokens=7")
    np.testing.assert_allclose(scores.rewards[:, 0], [1, 0, 6 / 9, 0, 3 / 9])
    assert scores.metrics == {"judge/requests": 5, "judge/retries": 0, "judge/cached": 0}
    body, path, headers = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 7)
    assert "Is it {long}?" in body["messages"][0]["content"]
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    given = ([conversation], [said], [[1]], {}, ["here"])
    Feedback([f"judge?base_url={server.url}&model=m&temperature=null"])(*given)
    body = server.seen[-1][0]
    question = body["messages"][0]["content"]
    assert "system: Be kind.\n\nuser: Hi" in question and responses(question) == ["Hello"]
    assert "temperature" not in body


def test_win_rates_average_both_orders(serve):
    server = serve(longer)
    scores = judged(server.url, "ask=pairs")
    np.testing.assert_array_equal(scores.rewards[:, 0], [1, 0, 0.5, 0, 1])
    assert len(server.seen) == 2 * (3 + 1) and scores.metrics["judge/order_matters"] == 0
    always_first = serve(lambda q, n: "Verdict: A")
    scores = judged(always_first.url, "ask=pairs")
    np.testing.assert_array_equal(scores.rewards[:, 0], [0.5] * 5)
    assert scores.metrics["judge/order_matters"] == 1
    feedback = Feedback([f"judge?base_url={server.url}&model=m&ask=pairs"])
    asked = len(server.seen)
    same = feedback(["p"] * 3, ["a", "a", "bb"], [[1]] * 3, {}, ["x"] * 3)
    np.testing.assert_array_equal(same.rewards[:, 0], [0.25, 0.25, 1])
    assert len(server.seen) == asked + 2  # of two equal pairs, one is asked for
    with pytest.raises(UserError, match="num_generations"):
        feedback(["p", "q"], ["a", "b"], [[1]] * 2, {}, ["x"] * 2)


def test_a_constitution_draws_a_principle_for_a_pair(serve, tmp_path):
    server = serve(longer)
    rules = [f"Which is calmer, says rule {i}?" for i in range(4)]
    (tmp_path / "rules.txt").write_text("\n".join(rules) + "\n\n")
    scores = judged(server.url, f"ask=constitution&principles={tmp_path}/rules.txt")
    np.testing.assert_array_equal(scores.rewards[:, 0], [1, 0, 0.5, 0, 1])
    drawn = {}
    for body, _, _ in server.seen:
        question = body["messages"][0]["content"]
        (rule,) = [r for r in rules if r in question]
        drawn.setdefault(frozenset(responses(question)), set()).add(rule)
    assert all(len(both_orders) == 1 for both_orders in drawn.values())
    assert len(set.union(*drawn.values())) > 1
    judged(server.url, 'ask=constitution&principles=["Which is calmer, says rule 0?"]')


def test_checklists_are_weighted_means_of_their_items(serve):
    def short(question, nth):
        fits = "is short" in question and len(responses(question)[0]) < 5
        return f"Score: {100 if fits else 20}"

    server = serve(short)
    lists = [["is short"], [{"item": "is short", "weight": 3}, "is kind"], None, [], "is short"]
    scores = judged(server.url, "ask=checklist", {"checklist": lists})
    np.testing.assert_allclose(scores.rewards[:, 0], [0.2, 0.8, math.nan, math.nan, 1.0])
    assert scores.failures == {} and len(server.seen) == 4


def test_samples_are_averaged(serve):
    turns = itertools.count()
    server = serve(lambda q, n: f"Score: {1 + 9 * (next(turns) % 2)}")
    rewards = judged(server.url, "samples=2&temperature=1&max_concurrency=1").rewards
    np.testing.assert_array_equal(rewards[:, 0], [0.5] * 5)
    assert sorted(body["seed"] for body, _, _ in server.seen) == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    "text, value",
    [
        ("Score: 8", 8),
        ("**Score:** 8/10", 8),
        ('{"score": 8.5, "why": "..."}', 8.5),
        ("Score (1-10): 8", 8),
        ("A score of 3 seems harsh.\n\nScore: [[8]]", 8),
        ("the score is 8.", 8),
        ("Score: 11", None),
        ("Score: -8", None),
        ("Score: eight", None),
        ("8", None),
        ("", None),
    ],
)
def test_scores_are_read(text, value):
    found = _read_score(text, 0.0, 10.0)
    assert found == (None if value is None else value / 10)


@pytest.mark.parametrize(
    "text, value",
    [
        ("Verdict: A", 1),
        ("It says `Verdict: A`.\n**Verdict:** [[B]]", 0),
        ("verdict is Response B", 0),
        ("Verdict: Tie.", 0.5),
        ("Verdict: a tie", 0.5),
        ("Verdict: Apples", None),
        ("A", None),
    ],
)
def test_verdicts_are_read(text, value):
    assert _read_verdict(text) == value


def after_one(reply):
    """The reply at first; a score at the second asking of the same question."""
    return lambda q, n: reply if n == 0 else "Score: 10"


GOOD = json.dumps({"choices": [{"message": {"content": "Score: 1"}}]})


@pytest.mark.parametrize(
    "reply",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (429, {"Retry-After": "soon"}, ""),
        (503, {}, "loading"),
        (200, {}, "<html>not json</html>"),
        (200, {}, "[" * 100_000),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"message": {"content": null}}]}'),
        (200, {"Content-Length": "9999"}, GOOD[:20]),
        "I would rather not say.",
    ],
)
def test_what_may_pass_is_asked_again(reply, serve):
    scores = judged(serve(after_one(reply)).url)
    np.testing.assert_array_equal(scores.rewards[:, 0], [1.0] * 5)
    assert scores.metrics["judge/retries"] == 5 and scores.metrics["judge/requests"] == 10


def only_bad_for(text, reply):
    return lambda q, n: reply if text in responses(q) else "Score: 10"


@pytest.mark.parametrize(
    "reply, words, requests",
    [
        ((500, {}, "oh no"), "status 500: oh no", 3),
        ((400, {}, "too long"), "status 400: too long", 1),
        ((429, {}, ""), "status 429", 3),
        ("no idea", "no verdict in 'no idea'", 3),
        ((200, {}, "{}"), "choices", 3),
        (None, "no answer within 0.3 s", 3),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip", "zero"])
def test_one_completions_failure_is_told_with_its_row(reply, words, requests, policy, serve):
    server = serve(only_bad_for("five", reply))
    patience = 0.3 if reply is None else 20  # a busy machine answers late
    started, options = time.monotonic(), f"timeout={patience}&max_retries=2"
    if policy == "stop":
        with pytest.raises(UserError, match=rf"raised NoAnswer: .*{words}.* on rows.jsonl:2\b"):
            judged(server.url, options)
    else:
        scores = judged(server.url, options, on_failure=policy)
        instead = math.nan if policy == "skip" else 0.0
        np.testing.assert_array_equal(scores.rewards[:, 0], [1, 1, 1, 1, instead])
        assert scores.failures == {"raised": 1} and words in scores.notes[0]
    asked = [body["messages"][0]["content"] for body, _, _ in server.seen]
    assert sum("five" in responses(question) for question in asked) == requests
    assert time.monotonic() - started < 10


def test_a_failed_comparison_fails_both(serve):
    server = serve(lambda q, n: "hm" if set(responses(q)) == {"2", "it is 3"} else longer(q, n))
    scores = judged(server.url, "ask=pairs&max_retries=0", on_failure="skip")
    np.testing.assert_array_equal(scores.rewards[:, 0], [1, math.nan, math.nan, 0, 1])
    assert scores.failures == {"raised": 2}


def test_an_endpoint_that_refuses_is_one_message(serve, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match="ConnectionRefusedError|Connection refused"):
        judged(f"http://127.0.0.1:{port}/v1", "max_retries=1")
    for status, text in ((401, f"bad key {KEY}"), (404, "no model m"), (302, "")):
        server = serve(lambda q, n, s=status, t=text: (s, {"Location": "http://[::1]:1/"}, t))
        with pytest.raises(UserError, match=f"refuses: status {status}") as told:
            judged(server.url, on_failure="skip")
        assert KEY not in str(told.value) and "OPENAI_API_KEY, which is set" in str(told.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="MY_KEY, which is not set"):
        judged(server.url, "api_key_env=MY_KEY")
    assert "Authorization" not in server.seen[-1][2]
    monkeypatch.setenv("MY_KEY", "sk-two\r\nX: y")
    with pytest.raises(UserError) as told:
        judged(server.url, "api_key_env=MY_KEY&max_retries=0")
    assert "sk-two" not in str(told.value)


@pytest.mark.parametrize("drips", [False, True])
def test_a_judge_that_never_ends_does_not_hang_the_run(drips, serve):
    """One says nothing; the other sends a byte now and then, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def drip():
            while not over.is_set():
                client, _ = server.accept()
                threading.Thread(target=feed, args=(client,), daemon=True).start()

        def feed(client):
            try:
                client.sendall(b"HTTP/1.1 200 OK\r\n")
                while drips and not over.wait(0.05):
                    client.sendall(b"X: y\r\n")
                over.wait()
            except OSError:
                pass

        threading.Thread(target=drip, daemon=True).start()
        url, started = f"http://127.0.0.1:{server.getsockname()[1]}/v1", time.monotonic()
        scores = judged(url, "timeout=0.2&max_retries=1", on_failure="skip")
        assert scores.failures == {"raised": 5} and "no answer within 0.2 s" in scores.notes[0]
        scores = judged(url, "timeout=60", on_failure="zero", timeout=0.3)
        assert scores.failures == {"timed out": 5}
        assert time.monotonic() - started < 3
        over.set()


def test_no_more_requests_at_once_than_asked_for(serve):
    def slow(question, nth):
        time.sleep(0.05)
        return longer(question, nth)

    server = serve(slow)
    judged(server.url, "ask=pairs&max_concurrency=3")
    assert server.most == 3


def test_a_cache_spares_requests_and_holds_no_key(serve, tmp_path):
    turns = itertools.count()
    server = serve(lambda q, n: "no" if next(turns) == 0 else "Score: 7")
    options = f"cache={tmp_path}/judge.sqlite&max_retries=0"
    first = judged(server.url, options, on_failure="skip")
    assert first.failures == {"raised": 1} and len(server.seen) == 5
    again = judged(server.url, options)  # what could not be read is asked again
    np.testing.assert_allclose(again.rewards[:, 0], [6 / 9] * 5)
    assert len(server.seen) == 6 and again.metrics["judge/cached"] == 4
    judged(server.url, options)
    assert len(server.seen) == 6
    judged(server.url, options + "&rubric=Is it calm?")
    assert len(server.seen) == 11
    assert KEY.encode() not in (tmp_path / "judge.sqlite").read_bytes()


def test_comparisons_are_not_remembered_one_by_one(serve, tmp_path):
    server = serve(longer)
    spec = f"judge?base_url={server.url}&model=m&ask=pairs"
    feedback = Feedback([spec], cache=tmp_path / "cache.sqlite")
    for others, wanted in ((["x", "yy"], 0.5), (["xxx", "yyyy"], 0.0)):
        scores = feedback(["p"] * 3, ["zz", *others], [[1]] * 3, {}, ["x"] * 3)
        assert scores.rewards[0, 0] == (0.75 if wanted else 0.0)


@pytest.mark.parametrize(
    "options, words",
    [
        ("api_key=sk-1", "did you mean api_key_env"),
        ("ask=pair", "did you mean pairs"),
        ("ask=checklist", "column 'checklist'"),
        ("ask=constitution", "wanted principles"),
        ("ask=constitution&principles=none.txt", "no file none.txt"),
        ("samples=0", "samples of 1 or more"),
        ("max_concurrency=0", "max_concurrency of 1 or more"),
        ("base_url=ftp://x", "base_url=http"),
        ("model=", "model=NAME"),
    ],
)
def test_wrong_options_are_one_message(options, words):
    with pytest.raises(UserError, match=words):
        judged("http://127.0.0.1:1/v1", options, on_failure="skip")


def test_a_wrong_checklist_is_told():
    lists = [[{"item": "x", "weight": 0}]] * 5
    with pytest.raises(UserError, match='"weight": number above 0'):
        judged("http://127.0.0.1:1/v1", "ask=checklist", {"checklist": lists})


def test_a_column_named_as_an_option_does_not_reach_it(serve):
    server = serve(lambda q, n: "Score: 1")
    judged(server.url, columns={"rubric": ["?"] * 5, "samples": [0] * 5, "timeout": [0] * 5})
    (message,) = server.seen[0][0]["messages"]
    assert "A good response is helpful" in message["content"]
