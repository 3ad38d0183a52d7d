"""The front process: listens, starts the engine process, and ends with it. Imports no JAX."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from l4jax.bar import bar_if
from l4jax.checkpoints.manifest import model_config, read_manifest
from l4jax.config import ModelConfig
from l4jax.files import read_json_if_there
from l4jax.serving.api.served import Defaults, Served
from l4jax.serving.app import build_app
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.messages import Load
from l4jax.text.load import Text, load_text

_KEEP_ALIVE_SECONDS = 75
_LAST_WORDS_SECONDS = 5
"""How long clients have to read the error that ends their requests."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How to serve. ``arguments``: those of ``l4jax.load``; ``longest``: the most tokens of prompt and answer; None for what fits."""

    checkpoint: str
    arguments: Mapping[str, Any]
    host: str
    port: int
    name: str | None
    keys: Sequence[str]
    longest: int | None
    most_waiting: int
    stalled_seconds: float
    drain_seconds: int
    ignore_unknown: bool
    own_sampling: bool
    """Whether the checkpoint's ``generation_config.json`` gives the default temperature and top_p."""


def serve(options: ServeOptions) -> int:
    """Serve until a signal or the engine's end; returns the exit status.

    Raises ValueError or OSError, before any weight is read, for a checkpoint without a tokenizer, options that contradict each other, or
    an address that is in use.
    """
    directory = Path(options.checkpoint)
    config = model_config(directory, read_manifest(directory))
    text = load_text(directory, config)
    if text.tokenizer is None:
        raise ValueError(f"{text.no_tokenizer}, and a server's requests are text; convert the model with its tokenizer")
    _check_longest(options, config)
    listening = _listen(options.host, options.port)
    own, engines = socket.socketpair()
    program = [sys.executable, "-m", "l4jax.serving.engine_process", str(engines.fileno())]
    with listening, own, subprocess.Popen(program, pass_fds=[engines.fileno()]) as child:
        engines.close()
        try:
            status = uvloop.run(_Front(options, config, text, own).run(listening))
        finally:
            own.close()  # which ends the engine process
            try:
                child.wait(_LAST_WORDS_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
    return status


def _check_longest(options: ServeOptions, config: ModelConfig) -> None:
    longest, context, held = options.longest, config.max_position_embeddings, options.arguments.get("kv_tokens")
    if longest is not None and not 2 <= longest <= context:
        raise ValueError(f"--max-model-len is {longest}; expected 2 to {context}, the model's context")
    if longest is not None and held is not None and held < longest:
        raise ValueError(
            f"--kv-tokens is {held} and --max-model-len is {longest}: the cache cannot hold one request of that length; raise --kv-tokens "
            "or lower --max-model-len"
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port") from error


class _Front:
    """One run of the server."""

    def __init__(self, options: ServeOptions, config: ModelConfig, text: Text, channel: socket.socket) -> None:
        self._options = options
        self._client = EngineClient(channel, most_waiting=options.most_waiting, stalled_seconds=options.stalled_seconds)
        directory = Path(options.checkpoint)
        found = read_json_if_there(directory / "generation_config.json") if options.own_sampling else {}
        defaults = Defaults(**{field.name: float(found.get(field.name, 1.0)) for field in dataclasses.fields(Defaults)})
        name = options.name or directory.resolve().name
        self._served = Served(name, config, text, defaults, self._client, int(time.time()), options.ignore_unknown)

    async def run(self, listening: socket.socket) -> int:
        """Serve; returns the exit status."""
        options, client = self._options, self._client
        server = _Server(
            uvicorn.Config(
                build_app(self._served, options.keys),
                http="httptools",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=options.drain_seconds + _LAST_WORDS_SECONDS,
            )
        )
        # What is there now stays: looking for garbage in it would stop all streams for a moment.
        gc.freeze()
        with bar_if(sys.stderr.isatty()) as show:
            load = Load(options.checkpoint, dict(options.arguments), options.longest)
            engine = asyncio.create_task(client.run(load, lambda: self._show(listening, show)))
            serving = asyncio.create_task(server.serve([listening]))
            stopping = asyncio.create_task(server.stopping.wait())
            await asyncio.wait({engine, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            await asyncio.wait({engine, serving}, timeout=options.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            client.end_all("the server is being stopped; make the request again, to another server or later")
            await serving
            return 0
        stopping.cancel()
        await engine
        if client.refusal is not None:
            server.force_exit = True
        else:
            print("l4jax: error: the engine process has ended; its own messages are above", file=sys.stderr, flush=True)
        server.config.timeout_graceful_shutdown = _LAST_WORDS_SECONDS
        server.should_exit = True
        await serving
        if client.refusal is not None:
            raise ValueError(client.refusal)
        return 1

    def _show(self, listening: socket.socket, show: Callable[[str, int, int], None]) -> None:
        """Show how far the engine is, and where the server is once it is ready."""
        if self._client.ready is None:
            show("programs", self._client.progress.ready, self._client.progress.programs)
            return
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
        key = " -H 'Authorization: Bearer KEY'" if self._options.keys else ""
        print(f"{self._served.name} at {address}/v1, up to {self._served.longest:,} tokens a request. Try:", flush=True)
        print(f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)


class _Server(uvicorn.Server):
    """Ends with the status that we return: uvicorn's own would raise the signal again after it has drained."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first SIGTERM or Ctrl-C, and stop at once at the second."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
            self.should_exit = True
            loop.call_soon_threadsafe(self.stopping.set)

        loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
