"""Servers for tests of what asks endpoints: a small one of our own, and `transformers serve`. (PYTEST_DONT_REWRITE)"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest


MISSING = [name for name in ("openai", "fastapi", "uvicorn", "pydantic") if find_spec(name) is None]
needs_openai = pytest.mark.skipif("openai" in MISSING, reason="needs pip install 'trl_perce[judge]'")


def user(text):
    return [{"role": "user", "content": text}]


class EchoServer(ThreadingHTTPServer):
    """
    Answers "echo: <text>" after 50 ms, or what a test sets as `reply`, a function of the request; "busy" once with 503 before, "bad"
    always with 400, "key" always with 401 and the key in the message. Parameters in `refused` get 400 with the value, the message; an
    answer to what begins with "cut" is cut off, without content as a model's that thinks, one to "limit" with it.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.running, self.most, self.texts, self.bodies, self.keys = threading.Lock(), 0, 0, [], [], set()
        self.refused = {}
        self.reply = lambda body: f"echo: {body['messages'][-1]['content']}"


class EchoHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
            server.keys.add(self.headers["Authorization"])
            server.bodies.append(body)
            server.texts.append(text)
        time.sleep(0.05)
        with server.lock:
            server.running -= 1
        status = {"bad": 400, "key": 401}.get(text, 503 if text == "busy" and server.texts.count("busy") == 1 else 200)
        refused = f"no to {self.headers['Authorization'] if text == 'key' else text}"
        for name in {*server.refused} & {*body}:
            status, refused = 400, server.refused[name]
        is_cut = text.startswith("cut")
        message = {"role": "assistant", "content": None if is_cut or text == "nothing" else server.reply(body)}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply |= {
            "choices": [
                {"index": 0, "finish_reason": "length" if is_cut or text == "limit" else "stop", "message": message}
            ]
        }
        data = json.dumps(reply if status == 200 else {"error": {"message": refused}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving(server):
    """Around what asks a server: it runs in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(EchoServer()) as server:
        yield server


@pytest.fixture(scope="session")
def server(smollm2, tmp_path_factory):
    """`transformers serve` on a free port: its address and its log."""
    if MISSING:
        pytest.skip(f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [program, "serve", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        process.wait(timeout=30)


def requests_of(log: Path) -> int:
    return log.read_text().count("POST /v1/chat/completions")
