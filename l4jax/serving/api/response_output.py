"""The answer of the Responses API as it grows: its items, and the events that a stream has of them."""

from __future__ import annotations

from typing import Any

from l4jax.serving.api.served import new_id
from l4jax.serving.api.tools import AnswerEvents, Tools
from l4jax.text.tool_calls import ArgumentsPiece, CallStart, TextPiece

Event = dict[str, Any]


class Output:
    """The items of one answer. Text and calls are items in the order in which they came; at most the last is in progress."""

    def __init__(self, tools: Tools) -> None:
        self.items: list[dict[str, Any]] = []
        self._events = AnswerEvents(tools)
        self._call = -1  # the index of the last

    def push(self, text: str, logprobs: list[dict[str, Any]], finish_reason: str | None) -> list[Event]:
        """Add text; ``finish_reason``: it is the last, and why. Returns the events. Only answers without tools have log-probabilities."""
        events: list[Event] = []
        for event in self._events.push(text, done=finish_reason is not None) or ([TextPiece("")] if logprobs else []):
            match event:
                case TextPiece(piece):
                    events += self._text(piece, logprobs)
                case CallStart(index, name):
                    events += self.close()
                    self._call = index
                    call = {"type": "function_call", "call_id": new_id("call_"), "name": name, "arguments": ""}
                    events += self._add("fc_", call)
                case ArgumentsPiece(_, piece):
                    self.items[-1]["arguments"] += piece
                    events.append(self._event("response.function_call_arguments.delta", delta=piece))
        if finish_reason is not None:
            if not self.items:
                events += self._message()
            events += self.close("incomplete" if finish_reason == "length" else "completed")
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """End the item that is in progress, if there is one."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        if item["type"] == "message":
            (part,) = item["content"]
            events = [
                self._event("response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        else:
            events = [self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])]
            status = "completed" if self._events.is_whole(self._call) else "incomplete"
        item["status"] = status
        return [
            *events,
            {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item},
        ]  # which does not change any more

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        in_progress = self.items and self.items[-1]["type"] == "message" and self.items[-1]["status"] == "in_progress"
        events = [] if in_progress else [*self.close(), *self._message()]
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        return [*events, self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _message(self) -> list[Event]:
        events = self._add("msg_", {"type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        return [*events, self._event("response.content_part.added", content_index=0, part=_copied(part))]

    def _add(self, prefix: str, fields: dict[str, Any]) -> list[Event]:
        item = {"id": new_id(prefix), "status": "in_progress", **fields}
        self.items.append(item)
        return [{"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copied(item)}]

    def _event(self, kind: str, **fields: Any) -> Event:
        """An event of the last item."""
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _copied(value: Any) -> Any:
    """Lists and objects as they are now: an event is written after later ones are made."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
