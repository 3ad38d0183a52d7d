"""``/v1/messages``: Anthropic's API, whose answers are blocks of text and calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from l4jax.serving.api.chat import generation_of, prompt_of
from l4jax.serving.api.message_bodies import MessagesChat
from l4jax.serving.api.served import Served, new_id
from l4jax.serving.api.tools import AnswerEvents
from l4jax.serving.api.usage import message_usage_fields
from l4jax.serving.generation import Piece
from l4jax.text.tool_calls import ArgumentsPiece, CallStart, Event, TextPiece


class Messages:
    """A request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    answers = 1

    def __init__(self, served: Served, body: MessagesChat, *, key: str | None, request_id: str) -> None:
        tools = body.checked_tools
        self.streams = body.streams
        self.guided = body.guide_for(served)
        self.generation = generation_of(served, body, self.guided, key=key, request_id=request_id)
        self._events = AnswerEvents(tools)
        self._blocks = _Blocks(self._events)
        self._id, self._model = new_id("msg_"), served.name
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        async for _ in self.stream():
            pass
        return self._message(self._blocks.content)

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as events."""
        begun = False
        async for pieces in self.generation.pieces():
            events = [] if begun else [{"type": "message_start", "message": self._message([])}]
            begun = True
            for piece in pieces:
                events += self._taken(piece)
            if events:
                yield events

    def _taken(self, piece: Piece) -> list[dict[str, Any]]:
        """The events for a piece."""
        done = piece.finish_reason is not None
        events = [fields for event in self._events.push(piece.text, done=done) for fields in self._blocks.push(event)]
        if done:
            reason = self._stop_reason(piece)
            self._end = {"stop_reason": reason, "stop_sequence": piece.stopped_by if reason == "stop_sequence" else None}
            usage = message_usage_fields(self.generation.usage)
            events += [*self._blocks.ended(), {"type": "message_delta", "delta": self._end, "usage": usage}, {"type": "message_stop"}]
        return events

    def _stop_reason(self, piece: Piece) -> str:
        if piece.finish_reason == "length":
            return "max_tokens"
        if self._events.has_called:
            return "tool_use"
        return "end_turn" if piece.stopped_by is None else "stop_sequence"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        fields = {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return {**fields, **self._end, "usage": message_usage_fields(self.generation.usage)}


class _Blocks:
    """An answer's content as it grows, and a stream's events about it."""

    def __init__(self, answer: AnswerEvents) -> None:
        self._answer = answer
        self._call = -1  # the index of the last
        self.content: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the last block's text or input
        self._open: str | None = None  # the type of the last block, if it may grow

    def push(self, event: Event) -> list[dict[str, Any]]:
        """Add what is new; return the stream's events."""
        match event:
            case TextPiece(text):
                opened = [] if self._open == "text" else self._opened({"type": "text", "text": ""})
                return [*opened, self._delta({"type": "text_delta", "text": text}, text)]
            case CallStart(index, name):
                before, self._call = self.ended(), index
                return before + self._opened({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}})
            case ArgumentsPiece(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text}, text)]

    def ended(self) -> list[dict[str, Any]]:
        """The last block is complete, if there is one."""
        if self._open is None:
            return []
        block, text = self.content[-1], "".join(self._pieces)
        if self._open == "text":
            block["text"] = text
        elif self._answer.is_whole(self._call):
            block["input"] = msgspec.Raw(text.encode())  # as it was written: numbers stay as they are
        self._pieces, self._open = [], None
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _opened(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        before = self.ended()
        self._open = block["type"]
        self.content.append({**block})
        return [*before, {"type": "content_block_start", "index": len(self.content) - 1, "content_block": block}]

    def _delta(self, delta: dict[str, Any], text: str) -> dict[str, Any]:
        self._pieces.append(text)
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def count_tokens(served: Served, body: MessagesChat) -> dict[str, Any]:
    """How many tokens the prompt of a request has."""
    served.check_model(body.model)
    return {"input_tokens": len(prompt_of(served, body, body.checked_tools))}
