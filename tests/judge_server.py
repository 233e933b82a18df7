"""A server of chat completions for tests, which answers as it is told."""

import http.server
import json
import threading

import pytest

from prefuse.trainer.feedback import endpoint

KEY = "sk-not-to-be-told"


class Server(http.server.ThreadingHTTPServer):
    """Answers POSTs by `reply(question, nth)`: a message's text, (status, headers, body), or
    seconds to wait for ever after."""

    request_queue_size = 64

    def __init__(self, reply):
        self.reply, self.seen, self.lock = reply, [], threading.Lock()
        self.over, self.busy, self.most = threading.Event(), 0, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no error."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            seen = [b["messages"][0]["content"] for b, _, _ in self.server.seen]
            self.server.seen.append((body, self.path, dict(self.headers)))
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        found = self.server.reply(question, seen.count(question))
        if found is None:
            self.server.over.wait(30)
        if isinstance(found, str):
            found = 200, {}, json.dumps({"choices": [{"message": {"content": found}}]})
        with self.server.lock:
            self.server.busy -= 1
        status, headers, text = found
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(reply) -> Server:
        server = Server(reply)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.over.set()
        server.shutdown()
        server.server_close()


def responses(question):
    """The response, or responses, that a question is about."""
    tags = ("response",) if "<response>" in question else ("response_A", "response_B")
    return [question.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0] for tag in tags]


def longer(question, nth):
    first, second = (len(r) for r in responses(question))
    return "Verdict: " + ("A" if first > second else "B" if second > first else "tie")
