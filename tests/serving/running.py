"""A real server on a tiny model, and the simplest of clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from tests import tiny
from tests.text import small

SLOTS = 3
CONTEXT = 1024
OPTIONS = ("--slots", str(SLOTS), "--deterministic", "--port", "0", "--served-model-name", "tiny")


def save_checkpoint(directory: Path) -> Path:
    """A tiny Llama 3 with a tokenizer and ChatML's template."""
    tokenizer = small.backend()
    ids = {"bos_token_id": tokenizer.token_to_id(small.SPECIAL[0]), "eos_token_ids": (tokenizer.token_to_id(small.SPECIAL[1]),)}
    config = tiny.llama3_like(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=CONTEXT, **ids)
    return tiny.save(directory, tiny.shallow(config), {"tokenizer.json": tokenizer.to_str()})


@dataclasses.dataclass
class Server:
    """A running server. ``answer`` makes one request."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPConnection:
        """Make a request, whose answer the caller reads. A body that is not bytes is sent as JSON."""
        connection = HTTPConnection(self.host, self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, headers or {})
        return connection

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[HTTPConnection, HTTPResponse]:
        """Make a request and wait for the beginning of its answer."""
        connection = self.send(method, path, body, headers)
        return connection, connection.getresponse()

    def answer(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        connection, response = self.open("GET" if body is None else "POST", path, body, headers)
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream; the last is "[DONE]", or an error."""
        connection, response = self.open("POST", path, {**body, "stream": True})
        with contextlib.closing(connection):
            assert response.status == 200, response.read()
            return events(response.read().decode())

    @property
    def engine_pid(self) -> int:
        """The engine's process id."""
        (child,) = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "engine_process"], capture_output=True, text=True, check=True
        ).stdout.split()
        return int(child)


def events(text: str) -> list[Any]:
    """The events in a stream's text."""
    found = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in found]


def start(checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    """``l4jax serve``, which compiles as little as it can."""
    program = "import sys; from l4jax.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", program, "serve", str(checkpoint), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def running(checkpoint: Path, *options: str) -> Iterator[Server]:
    """A server that is ready. It is killed at the end, if it has not ended by then."""
    process = start(checkpoint, *OPTIONS, *options)
    try:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)/v1", first)
        assert found, f"{first!r}, {process.stderr.read()}"
        process.stdout.readline()
        yield Server(process, found[1], int(found[2]))
    finally:
        process.kill()
        process.communicate()


def call(app, path, *, method="GET", headers=(), parts=(b"",), delay=0.0, sent=None):
    """The status, headers and JSON of an answer, or its bytes if it is no JSON. The body comes in parts, each after a delay."""

    async def run():
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
        scope |= {"headers": list(headers), "scheme": "http", "server": ("x", 1), "client": ("y", 2), "http_version": "1.1"}
        coming, answered, messages = list(parts), sent, []

        async def receive():
            await asyncio.sleep(delay)
            part = coming.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(coming)}

        async def send(message):
            messages.append(message)

        await app(scope, receive, send if answered is None else answered)
        body, found = b"".join(message.get("body", b"") for message in messages), dict(messages[0]["headers"])
        return messages[0]["status"], found, json.loads(body) if found[b"content-type"] == b"application/json" else body

    return asyncio.run(run())
