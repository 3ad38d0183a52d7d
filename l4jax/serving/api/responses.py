"""``/v1/responses``: OpenAI's Responses API. Nothing is stored: each request has the whole conversation."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from l4jax.decoding.guide import Guide
from l4jax.serving.api.conversation import check_length, conversation_prompt, guide_of
from l4jax.serving.api.response_input import messages_of, tools_of
from l4jax.serving.api.response_output import Output
from l4jax.serving.api.served import Sampling, Served, chat_logprobs, checked_logprobs, made_guide, new_id
from l4jax.serving.api.tools import ToolChoice, Tools
from l4jax.serving.api.usage import response_usage_fields
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Generation, Piece
from l4jax.text.chat import ChatOptions

_LOGPROBS = "message.output_text.logprobs"


class TextFormat(msgspec.Struct):
    """What an answer must look like. A schema is always enforced; ``name``, ``strict`` and ``description`` have no effect."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None

    @property
    def guide(self) -> Guide | None:
        """As the engine knows it."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Guide.json()
        for name in ("name", "schema"):
            if getattr(self, name) is None:
                where = f"text.format.{name}"
                raise ApiError(f"{where} is missing; it is required", param=where, code="missing_required_parameter")
        return made_guide(Guide.json, self.schema, "text.format")


class TextOptions(msgspec.Struct):
    """How the text of an answer is."""

    format: TextFormat | None = None


class ResponsesBody(Sampling, dict=True):
    """The parameters that are honoured."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @functools.cached_property
    def checked_tools(self) -> Tools:
        """The tools, checked."""
        return tools_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def guide_for(self, served: Served) -> tuple[Guide, str] | None:
        """As in :class:`Sampling`."""
        of_format = None if self.text is None or self.text.format is None else self.text.format.guide
        return guide_of(served, self.checked_tools, self.structured_outputs, of_format, "text.format")

    def alternatives(self, tools: Tools) -> int | None:
        """How many alternatives are reported beside each token's log-probability; None if nothing is."""
        for value in self.include or ():
            if value != _LOGPROBS:
                raise ApiError(
                    f"include has {value[:60]!r}, which no answer has here; expected {_LOGPROBS}; leave it out",
                    param="include",
                    code="unsupported_parameter",
                )
        if not self.include:
            if self.top_logprobs:
                raise ApiError(f"top_logprobs is given without {_LOGPROBS} in include; leave it out, or add that", param="top_logprobs")
            return None
        if tools.given:
            raise ApiError(f"include has {_LOGPROBS}, and tools are given, whose calls are no text; leave one out", param="include")
        return checked_logprobs("top_logprobs", self.top_logprobs or 0)


class Responses:
    """A request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    answers = 1

    def __init__(self, served: Served, body: ResponsesBody, *, key: str | None, request_id: str) -> None:
        served.check_model(body.model)
        self._served, self._body = served, body
        tools = body.checked_tools
        self.streams = body.streams
        limit = "max_output_tokens"
        self.guided = body.guide_for(served)
        params = served.settings(body, self.guided, body.alternatives(tools), body.max_output_tokens, limit)
        if not isinstance(body.input, str):
            check_length("input", len(body.input), "items")
        options: ChatOptions = {"chat_template_kwargs": body.chat_template_kwargs}
        prompt = conversation_prompt(served, messages_of(body.instructions, body.input), tools, options, "input")
        requests = served.requests(prompt, body, params, key, limit=None if body.max_output_tokens is None else limit)
        self.generation = Generation(served.client, served.metrics, served.tokenizer, requests, n=1, request_id=request_id)
        self._output = Output(tools)
        self._id, self._created = new_id("resp_"), int(time.time())
        self._events = 0

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        finish_reason = None
        async for pieces in self.generation.pieces():
            for piece in pieces:
                self._push(piece)
                finish_reason = piece.finish_reason
        return self._ended(finish_reason)

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as events. An error after the first of them is told by the last."""
        finish_reason, begun = None, False
        try:
            async for pieces in self.generation.pieces():
                events = []
                if not begun:
                    begun = True
                    events = [self._event(kind, self._response("in_progress")) for kind in ("created", "in_progress")]
                for piece in pieces:
                    events += map(self._numbered, self._push(piece))
                    finish_reason = piece.finish_reason
                if events:
                    yield events
        except ApiError as error:
            if not begun:
                raise
            events = list(map(self._numbered, self._output.close("incomplete")))
            yield [*events, self._event("failed", self._response("failed", error=_error_fields(error)))]
            return
        response = self._ended(finish_reason)
        yield [self._event(response["status"], response)]

    def _push(self, piece: Piece) -> list[dict[str, Any]]:
        logprobs = [] if piece.logprobs is None else chat_logprobs(self._served, piece.token_ids, piece.logprobs)
        return self._output.push(piece.text, logprobs, piece.finish_reason)

    def _event(self, kind: str, response: dict[str, Any]) -> dict[str, Any]:
        return self._numbered({"type": f"response.{kind}", "response": response})

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        event["sequence_number"] = self._events
        self._events += 1
        return event

    def _ended(self, finish_reason: str | None) -> dict[str, Any]:
        """The response when its answer has ended. The model's context is a limit like the one that the client may set."""
        if finish_reason == "length":
            return self._response("incomplete", incomplete_details={"reason": "max_output_tokens"})
        return self._response("completed", completed_at=int(time.time()))

    def _response(self, status: str, **ends: Any) -> dict[str, Any]:
        over = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self._settings,
            "output": self._output.items if over else [],
            "usage": response_usage_fields(self.generation.usage) if over else None,
            **ends,
        }

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        """What was asked for, with the defaults of what was left out."""
        body, request = self._body, self.generation.requests[0]
        form = None if body.text is None else body.text.format
        given = {} if form is None else {name: value for name, value in msgspec.structs.asdict(form).items() if value is not None}
        return {
            "model": self._served.name,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens,
            "temperature": request.params.temperature,
            "top_p": request.params.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "seed": request.seed,
            "text": {"format": given or {"type": "text"}},
            "tools": [{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "background": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
        }


def _error_fields(error: ApiError) -> dict[str, Any]:
    """An error with one of the Responses API's codes, of which few have a meaning here."""
    code = "invalid_prompt" if error.status < 500 else "server_error"
    return {"code": code, "message": error.message, "param": error.param, "type": error.kind}
