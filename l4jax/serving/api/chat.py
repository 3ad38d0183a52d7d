"""``/v1/chat/completions``: OpenAI's chat completions."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from l4jax.decoding.guide import Guide
from l4jax.serving.api.conversation import check_length, conversation_prompt, guide_of
from l4jax.serving.api.served import CompletionSampling, Served, chat_logprobs, checked_logprobs, made_guide, new_id
from l4jax.serving.api.tools import ToolAnswer, ToolChoice, Tools
from l4jax.serving.api.usage import usage_fields
from l4jax.serving.errors import ApiError
from l4jax.serving.generation import Generation, Piece
from l4jax.text.chat import ChatOptions


class JsonSchema(msgspec.Struct):
    """A schema in OpenAI's form. It is always enforced, so ``strict`` has no effect; the name and the description have none either."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def guide(self, name: str) -> Guide | None:
        """As the engine knows it; ``name``: of the parameter."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Guide.json()
        if self.json_schema is None:
            raise ApiError(
                "response_format.json_schema is missing; give the schema there",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )
        return made_guide(Guide.json, self.json_schema.schema, name)


class ChatBody(CompletionSampling, dict=True):
    """The parameters that are honoured."""

    format_name: ClassVar[str] = "response_format"

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @functools.cached_property
    def checked_tools(self) -> Tools:
        """The tools, checked."""
        check_length("messages", len(self.messages), "messages")
        return Tools.of(self.tools, self.tool_choice, self.parallel_tool_calls, self.messages)

    def guide_for(self, served: Served) -> tuple[Guide, str] | None:
        """As in :class:`Sampling`."""
        of_format = None if self.response_format is None else self.response_format.guide(self.format_name)
        return guide_of(served, self.checked_tools, self.structured_outputs, of_format, self.format_name)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are reported beside each token's log-probability; None if nothing is."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs is given without logprobs; leave it out, or set logprobs", param="top_logprobs")
        return checked_logprobs("top_logprobs", self.top_logprobs or 0) if self.logprobs else None


class Chat:
    """A request: checked when it is made, computed by :meth:`whole` or :meth:`stream`."""

    def __init__(self, served: Served, body: ChatBody, *, key: str | None, request_id: str) -> None:
        self._served, self._body = served, body
        tools = body.checked_tools
        self.streams = body.streams
        self.guided = body.guide_for(served)
        self.generation = generation_of(served, body, self.guided, key=key, request_id=request_id)
        self.answers = len(self.generation.requests)
        self._tool_answers = [ToolAnswer(tools) for _ in self.generation.requests]
        self._id, self._created = new_id("chatcmpl-"), int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._choice(index) for index in range(self.answers)]
        async for pieces in self.generation.pieces():
            for piece in pieces:
                choice, answer = choices[piece.index], self._tool_answers[piece.index]
                answer.push(piece.text, done=piece.finish_reason is not None)
                if piece.logprobs is not None:
                    choice["logprobs"]["content"] += chat_logprobs(self._served, piece.token_ids, piece.logprobs)
                if self._body.return_token_ids:
                    choice["token_ids"] += piece.token_ids
                if piece.finish_reason is not None:
                    choice["finish_reason"] = answer.finish_reason(piece.finish_reason)
        for choice, answer in zip(choices, self._tool_answers, strict=True):
            choice["message"] = answer.message
        fields = {**self._fields("chat.completion"), "choices": choices, "usage": usage_fields(self.generation.usage)}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = self.generation.requests[0].token_ids
        return fields

    async def stream(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks."""
        at_end, always = self._body.usage_at_end, self._body.usage_always
        begun: set[int] = set()

        def chunk(choices: Sequence[dict[str, Any]], *, last: bool = False) -> dict[str, Any]:
            fields = {**self._fields("chat.completion.chunk"), "choices": choices}
            if at_end or always:
                fields["usage"] = usage_fields(self.generation.usage) if last or always else None
            return fields

        async for pieces in self.generation.pieces():
            chunks = []
            for piece in pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    first = chunk([self._first(piece.index)])
                    if self._body.return_token_ids:
                        first["prompt_token_ids"] = self.generation.requests[piece.index].token_ids
                    chunks.append(first)
                chunks += [chunk([choice]) for choice in self._deltas(piece)]
            if chunks:
                yield chunks
        if at_end:
            yield [chunk([], last=True)]

    def _fields(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._served.name}

    def _choice(self, index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "seed": self.generation.requests[index].seed}
        if self._body.logprobs:
            choice["logprobs"] = {"content": [], "refusal": None}
        if self._body.return_token_ids:
            choice["token_ids"] = []
        return choice

    def _first(self, index: int) -> dict[str, Any]:
        seed = self.generation.requests[index].seed
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None, "seed": seed}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks' choices for a piece: its text, if it has any to show, its fragments of calls, and the end."""
        choices: list[dict[str, Any]] = []
        answer = self._tool_answers[piece.index]
        text, fragments = answer.push(piece.text, done=piece.finish_reason is not None)
        if text or piece.logprobs or (self._body.return_token_ids and piece.token_ids):
            choice: dict[str, Any] = {"index": piece.index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            if piece.logprobs is not None:
                choice["logprobs"] = {"content": chat_logprobs(self._served, piece.token_ids, piece.logprobs), "refusal": None}
            if self._body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            choices.append(choice)
        choices += [
            {"index": piece.index, "delta": {"tool_calls": [fragment]}, "logprobs": None, "finish_reason": None} for fragment in fragments
        ]
        if piece.finish_reason is not None:
            reason = answer.finish_reason(piece.finish_reason)
            choices.append({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return choices


def generation_of(served: Served, body: ChatBody, guided: tuple[Guide, str] | None, *, key: str | None, request_id: str) -> Generation:
    """What computes the answers. ``guided``: as the body says. Raises ApiError for a request that the model cannot answer."""
    served.check_model(body.model)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, limit)
    params = served.settings(body, guided, body.alternatives, max_tokens, limit)
    prompt = prompt_of(served, body, body.checked_tools)
    requests = served.requests(prompt, body, params, key, limit=None if max_tokens is None else limit)
    return Generation(served.client, served.metrics, served.tokenizer, requests, n=len(requests), request_id=request_id)


def prompt_of(served: Served, body: ChatBody, tools: Tools) -> list[int]:
    """The prompt's tokens. Raises ApiError for a conversation that the chat template cannot format."""
    continues = bool(body.continue_final_message)
    if body.add_generation_prompt is not None and body.add_generation_prompt == continues:
        both = "true" if continues else "false"
        raise ApiError(
            f"add_generation_prompt and continue_final_message are both {both}; expected one of them to be true; leave one out",
            param="add_generation_prompt",
        )
    options: ChatOptions = {"chat_template_kwargs": body.chat_template_kwargs, "continue_final_message": continues}
    # OpenAI's newer name for it, which templates do not know.
    messages = [{**message, "role": "system"} if message.get("role") == "developer" else message for message in body.messages]
    return conversation_prompt(served, messages, tools, options, "messages")
