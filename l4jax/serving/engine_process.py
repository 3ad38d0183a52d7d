"""The engine process: owns JAX and the devices, and computes what the front asks for."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import jax

from l4jax.decoding.params import SamplingParams
from l4jax.engine.engine import Engine
from l4jax.engine.guided import GuideError
from l4jax.engine.relay import RelayHandle
from l4jax.engine.scores import ScoresHandle
from l4jax.loading import load
from l4jax.request import Request, RequestMaker
from l4jax.serving.messages import (
    Add,
    Cancel,
    ErrorKind,
    Load,
    LoadFailed,
    Message,
    News,
    Progress,
    Ready,
    Score,
    Step,
    ToEngine,
    frame,
    receive,
)
from l4jax.text.guiding import CompiledGuide


def main() -> None:
    """Compute for the front until it has gone. The only argument is the file descriptor of the socket to it."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    calls: queue.SimpleQueue[ToEngine | _Compiled] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, calls), name="front", daemon=True).start()
    first = calls.get()
    assert isinstance(first, Load)
    try:
        engine, maker, max_model_len = _prepared(first, channel)
    except (ValueError, OSError) as error:
        channel.sendall(frame(LoadFailed(" ".join(str(error).split()))))
        return
    channel.sendall(frame(Ready(max_model_len, engine.options.slots * engine.options.data_ranks)))
    _Relay(engine, maker, channel, calls).run()


def _receive(channel: socket.socket, calls: queue.SimpleQueue[ToEngine | _Compiled]) -> None:
    try:
        while (message := receive(channel)) is not None:
            calls.put(message)
    finally:
        # The front has gone, or speaks another language: nobody wants what is being compiled or computed.
        os._exit(1)


def _prepared(asked: Load, channel: socket.socket) -> tuple[Engine, RequestMaker, int]:
    """The engine with all its programs, what compiles guides for it, and the most tokens that a request may have."""
    llm = load(asked.checkpoint, **asked.arguments)
    engine, context = llm.engine, llm.config.max_position_embeddings
    max_model_len = min(context, engine.kv_tokens) if asked.max_model_len is None else asked.max_model_len
    if max_model_len > engine.kv_tokens:
        raise ValueError(
            f"--max-model-len is {max_model_len}, and the KV cache holds {engine.kv_tokens} tokens of one request; lower --max-model-len "
            "or raise --kv-tokens"
        )
    if llm.tokenizer is not None:
        llm.requests.prepare_guides(llm.tokenizer)  # later it would stop all streams
    for ready, programs in engine.warm_up(max_model_len):
        channel.sendall(frame(Progress(ready, programs)))
    return engine, llm.requests, max_model_len


class Compilations:
    """Counts the programs that JAX compiles from now on. There should be none: they stop all requests for seconds."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A request whose guide has been compiled, or why it could not be."""

    add: Add
    guide: CompiledGuide | Exception | None


_COMPILING_THREADS = 2
_MAX_FAILURES = 3
"""After this many failed steps in a row the process ends: a server that fails always should not look healthy."""
_FAILED = "the engine failed while it computed this request; make it again"


class _Relay:
    """Runs the engine for the front: takes its calls between steps, and sends it what each step gave."""

    def __init__(self, engine: Engine, maker: RequestMaker, channel: socket.socket, calls: queue.SimpleQueue[ToEngine | _Compiled]) -> None:
        self._engine = engine
        self._maker = maker
        self._compiling: set[int] = set()
        self._threads = ThreadPoolExecutor(_COMPILING_THREADS)
        self._channel = channel
        self._calls = calls
        self._handles: dict[int, RelayHandle | ScoresHandle] = {}
        self._news: list[News] = []
        self._compilations = Compilations()

    def run(self) -> None:
        """Compute until the process ends."""
        idle, failures = False, 0
        while True:
            self._take_calls(wait=idle)
            try:
                idle = not self._engine.step()
                failures = failures if idle else 0  # an idle step uses no device
            except Exception:
                # All requests under way have ended with an error, and the next one begins with an empty cache.
                traceback.print_exc()
                idle, failures = False, failures + 1
                if failures == _MAX_FAILURES:
                    os._exit(1)  # the device is lost, or the like
            self._gather()
            # Sent without news too, so that the front knows that the engine is not stuck.
            if self._news or not idle:
                self._send(Step(self._news, self._engine.state, self._compilations.count))
                self._news = []

    def _send(self, message: Message) -> None:
        try:
            self._channel.sendall(frame(message))
        except ConnectionError:
            os._exit(0)  # the front has gone

    def _take_calls(self, *, wait: bool) -> None:
        try:
            call = self._calls.get(block=wait)
            while True:
                self._take(call)
                call = self._calls.get_nowait()
        except queue.Empty:
            pass

    def _take(self, call: ToEngine | _Compiled) -> None:
        match call:
            case Cancel(number):
                if number in self._compiling:
                    self._compiling.remove(number)
                    self._news.append(News(number, over=True))
                elif (handle := self._handles.get(number)) is not None:
                    handle.cancel()
            case Score():
                self._begin(call.number, Request(call.token_ids, SamplingParams(logprobs=call.top), 0, ()), ScoresHandle)
            case Add() if call.params.guide is None:
                self._begin(call.number, _request(call, None), RelayHandle)
            case Add():
                # In a thread, because it may take a second, and others' answers go on.
                self._compiling.add(call.number)
                self._threads.submit(self._compile, call)
            case _Compiled() if call.add.number in self._compiling:  # otherwise it was cancelled meanwhile
                self._compiling.remove(call.add.number)
                if isinstance(call.guide, Exception):
                    self._refuse(call.add.number, call.guide)
                else:
                    self._begin(call.add.number, _request(call.add, call.guide), RelayHandle)

    def _begin(self, number: int, request: Request, kind: type[RelayHandle | ScoresHandle]) -> None:
        try:
            self._handles[number] = self._engine.add(request, kind)
        except Exception as error:
            self._refuse(number, error)

    def _refuse(self, number: int, error: Exception) -> None:
        if isinstance(error, ValueError):
            self._news.append(News(number, over=True, error=str(error), error_kind="bad_request"))
        else:
            traceback.print_exception(error)  # a fault of ours, which ends this request only
            self._news.append(News(number, over=True, error=_FAILED, error_kind="failed"))

    def _compile(self, add: Add) -> None:
        try:
            guide: CompiledGuide | Exception | None = self._maker.compiled(add.params.guide, add.stop_ids)
        except Exception as error:
            guide = error
        self._calls.put(_Compiled(add, guide))

    def _gather(self) -> None:
        """Collect what each request got."""
        for number, handle in list(self._handles.items()):
            if isinstance(handle, RelayHandle):
                tokens, logprobs, cached = handle.news()
            else:
                tokens, cached = [], 0
                logprobs = handle.logprobs if handle.over and handle.error is None else None
            if handle.over:
                del self._handles[number]
            if tokens or handle.over:
                queue_seconds = handle.queue_seconds if isinstance(handle, RelayHandle) else 0.0
                self._news.append(News(number, tokens, logprobs, cached, queue_seconds, handle.over, *_described(handle.error)))


def _request(add: Add, guide: CompiledGuide | None) -> Request:
    return Request(add.token_ids, add.params, add.seed, add.stop_ids, add.scope, guide)


def _described(error: Exception | None) -> tuple[str | None, ErrorKind | None]:
    if error is None:
        return None, None
    if isinstance(error, GuideError):
        return str(error), "guide"
    if isinstance(error, ValueError):
        return str(error), "not_finite"
    return _FAILED, "failed"  # the error's own words are for the log


if __name__ == "__main__":
    main()
