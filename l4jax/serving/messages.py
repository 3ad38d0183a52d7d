"""What the front and the engine process tell each other, as msgpack over a private pair of sockets. Nothing is pickled."""

from __future__ import annotations

import socket
from typing import Any, Literal

import msgspec

from l4jax.decoding.params import SamplingParams
from l4jax.engine.meter import EngineState
from l4jax.request import TokenLogprob


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """One message; the name of its kind is sent with it."""


class Load(Message, frozen=True):
    """To the engine, first: load a checkpoint with these arguments of ``l4jax.load``, for requests of up to ``max_model_len`` tokens."""

    checkpoint: str
    arguments: dict[str, Any]
    max_model_len: int | None


class Add(Message, frozen=True):
    """To the engine: begin a request. ``number`` names it from now on. ``scope``: as in :class:`l4jax.request.Request`."""

    number: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: list[int]
    scope: bytes


class Score(Message, frozen=True):
    """To the engine: begin to compute the log-probabilities of a prompt's tokens, each beside those of the ``top`` likeliest."""

    number: int
    token_ids: list[int]
    top: int


class Cancel(Message, frozen=True):
    """To the engine: end a request, unless it has ended."""

    number: int


class Progress(Message, frozen=True):
    """From the engine: ``ready`` of ``programs`` programs are ready."""

    ready: int
    programs: int


class Ready(Message, frozen=True):
    """From the engine: all programs are ready. A request may have ``max_model_len`` tokens; ``slots`` requests are computed at a time."""

    max_model_len: int
    slots: int


class LoadFailed(Message, frozen=True):
    """From the engine, last: it cannot load what it was asked to; one line says why."""

    why: str


ErrorKind = Literal["bad_request", "guide", "not_finite", "closing", "failed"]
"""Why a request has no answer: it cannot be computed, its guide cannot be followed to an end, the model's logits were not finite, the
server ends, or anything else."""


class News(msgspec.Struct, array_like=True, frozen=True):
    """What a request got from a step. ``cached``: tokens of its prompt that the prefix cache had;
    ``queue_seconds``: how long it waited for its first step.

    ``over``: it has ended, by an error if there is one.
    """

    number: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    cached: int = 0
    queue_seconds: float = 0.0
    over: bool = False
    error: str | None = None
    error_kind: ErrorKind | None = None


class Step(Message, frozen=True):
    """From the engine, after each step: what requests got from it, and its state; ``compiled``: programs since it was ready."""

    news: list[News]
    state: EngineState
    compiled: int


ToEngine = Load | Add | Score | Cancel
FromEngine = Progress | Ready | LoadFailed | Step

LENGTH_BYTES = 4
"""A frame is the message's length, in this many bytes (big-endian), and then the message."""


def frame(message: Message) -> bytes:
    """The frame of a message."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


_ENCODER = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def receive(channel: socket.socket) -> ToEngine | None:
    """The engine's next message from the front; None if the front has gone."""
    length = _read(channel, LENGTH_BYTES)
    body = None if length is None else _read(channel, int.from_bytes(length, "big"))
    return None if body is None else decode_to_engine(body)


def _read(channel: socket.socket, size: int) -> bytearray | None:
    buffer, filled = bytearray(size), 0
    while filled < size:
        try:
            count = channel.recv_into(memoryview(buffer)[filled:])
        except ConnectionError:
            return None
        if count == 0:
            return None
        filled += count
    return buffer
