"""The front process: listens, starts the engine process, and ends with it. Imports no JAX."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from l4jax.bar import bar_if
from l4jax.checkpoints.manifest import model_config, read_manifest
from l4jax.config import ModelConfig
from l4jax.decoding.params import SamplingParams
from l4jax.files import read_json_if_there
from l4jax.serving.api.served import Defaults, Served
from l4jax.serving.app import build_app
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.log import RequestLog
from l4jax.serving.messages import Load
from l4jax.serving.metrics import Metrics
from l4jax.serving.protocol import LimitedProtocol
from l4jax.text.load import Text, load_text

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE_SECONDS = 75
_CLOSE_SECONDS = 5
"""How long clients have to read the error that ends their requests."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How to serve. ``arguments``: those of ``l4jax.load``; ``max_model_len``: the most tokens of prompt and answer; None for what fits."""

    checkpoint: str
    arguments: Mapping[str, Any]
    host: str
    port: int
    name: str | None
    keys: Sequence[str]
    max_model_len: int | None
    max_waiting: int
    stalled_seconds: float
    drain_seconds: int
    ignore_unknown: bool
    use_generation_config: bool
    """Whether the checkpoint's ``generation_config.json`` gives the default temperature and top_p."""
    page: bool
    """Whether there is a page to chat with."""
    log: str | None
    log_texts: bool
    """``log``: the file for :class:`l4jax.serving.log.RequestLog`; ``log_texts``: whether it is to have prompts and answers."""


def serve(options: ServeOptions) -> int:
    """Serve until a signal or the engine's end; returns the exit status.

    Raises ValueError or OSError if the checkpoint cannot be served, options contradict each other, or the address is in use; nearly always
    before any weight is read.
    """
    directory = Path(options.checkpoint)
    config = model_config(directory, read_manifest(directory))
    text = load_text(directory, config)
    if text.tokenizer is None:
        raise ValueError(f"{text.no_tokenizer}, and a server's requests are text; convert the model with its tokenizer")
    _check_max_model_len(options, config)
    listening = _listen(options.host, options.port)
    try:
        log = None if options.log is None else RequestLog(options.log, texts=options.log_texts)
    except OSError as error:
        listening.close()
        raise ValueError(f"--log is {options.log}, which cannot be written ({error.strerror}); choose another file") from error
    front_end, engine_end = socket.socketpair()
    program = [sys.executable, "-P", "-m", "l4jax.serving.engine_process", str(engine_end.fileno())]
    # A terminal, or Slurm, sends its signals to both processes. The engine's inherits that it ignores them, and ends with this one.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    child = subprocess.Popen(program, pass_fds=[engine_end.fileno()])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    with listening, front_end, child:
        engine_end.close()
        try:
            status = uvloop.run(_Front(options, config, text, front_end, log).run(listening))
        finally:
            front_end.close()  # which ends the engine process
            if log is not None:
                log.close()
            try:
                child.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
    return status


def _check_max_model_len(options: ServeOptions, config: ModelConfig) -> None:
    max_model_len, context, held = options.max_model_len, config.max_position_embeddings, options.arguments.get("kv_tokens")
    if max_model_len is not None and not 2 <= max_model_len <= context:
        raise ValueError(f"--max-model-len is {max_model_len}; expected 2 to {context}, the model's context")
    if max_model_len is not None and held is not None and held < max_model_len:
        raise ValueError(
            f"--kv-tokens is {held} and --max-model-len is {max_model_len}: the cache cannot hold one request of that length; raise "
            "--kv-tokens or lower --max-model-len"
        )


def _defaults(path: Path) -> Defaults:
    """The settings in a checkpoint's ``generation_config.json``, if it has one."""
    given = read_json_if_there(path)
    settings = {field.name: given[field.name] for field in dataclasses.fields(Defaults) if given.get(field.name) is not None}
    try:
        params = SamplingParams(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct the file, or start with --generation-config none") from error
    return Defaults(params.temperature, params.top_p)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise ValueError(f"--host is {host}, which is no address of this machine ({error.strerror}); choose another --host") from error
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port") from error


class _Front:
    """One run of the server."""

    def __init__(self, options: ServeOptions, config: ModelConfig, text: Text, channel: socket.socket, log: RequestLog | None) -> None:
        self._options = options
        self._log = log
        self._client = EngineClient(channel, max_waiting=options.max_waiting, stalled_seconds=options.stalled_seconds)
        directory = Path(options.checkpoint)
        defaults = _defaults(directory / "generation_config.json") if options.use_generation_config else Defaults()
        name = options.name or directory.resolve().name
        assert text.tokenizer is not None
        longest_token = max(len(text.tokenizer.token_bytes(token)) for token in range(text.tokenizer.vocab_size))
        self._served = Served(
            name=name,
            config=config,
            text=text,
            defaults=defaults,
            client=self._client,
            metrics=Metrics(self._client, name),
            created=int(time.time()),
            ignore_unknown=options.ignore_unknown,
            directory=str(directory),
            longest_token=longest_token,
        )

    async def run(self, listening: socket.socket) -> int:
        """Serve; returns the exit status."""
        options, client = self._options, self._client
        server = _Server(
            uvicorn.Config(
                build_app(self._served, options.keys, self._log, page=options.page),
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=options.drain_seconds + _CLOSE_SECONDS,
            )
        )
        # What is there now stays: looking for garbage in it would stop all streams for a moment.
        gc.freeze()
        address = listening.getsockname()[:2]
        with contextlib.ExitStack() as loading:
            show = loading.enter_context(bar_if(sys.stderr.isatty()))

            def on_progress() -> None:
                if client.ready is None:
                    show("programs", client.progress.ready, client.progress.programs)
                else:
                    loading.close()  # the bar breaks lines that are printed beside it
                    self._print_address(*address)

            load = Load(options.checkpoint, dict(options.arguments), options.max_model_len)
            engine = asyncio.create_task(client.run(load, on_progress))
            serving = asyncio.create_task(server.serve([listening]))
            stopping = asyncio.create_task(server.stopping.wait())
            await asyncio.wait({engine, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            client.closing = "the server is being stopped; make the request again, to another server or later"
            await asyncio.wait({engine, serving}, timeout=options.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            client.end_all()
            await serving
            if server.server_state.tasks:  # after a second signal: clients are told before the loop ends
                await asyncio.wait(server.server_state.tasks, timeout=1)
            return 0
        stopping.cancel()
        await engine
        if client.load_error is not None:
            server.force_exit = True
        else:
            print(
                "l4jax: error: the engine process has ended; its own messages are above; start the server again",
                file=sys.stderr,
                flush=True,
            )
        server.config.timeout_graceful_shutdown = _CLOSE_SECONDS
        server.should_exit = True
        await serving
        if client.load_error is not None:
            raise ValueError(client.load_error)
        return 1

    def _print_address(self, host: str, port: int) -> None:
        """Say where the server is, and how to try it."""
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
        key = " -H 'Authorization: Bearer KEY'" if self._options.keys else ""
        page = f"Chat at {address} or try" if self._options.page else "Try"
        print(f"{self._served.name} at {address}/v1, up to {self._served.max_model_len:,} tokens a request. {page}:", flush=True)
        print(f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)


class _Server(uvicorn.Server):
    """Handles signals itself: uvicorn raises them again after draining, and the exit status would be the signal's."""

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
        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
