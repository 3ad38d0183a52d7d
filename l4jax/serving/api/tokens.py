"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec

from l4jax.serving.api.chat import ChatBody, prompt_of
from l4jax.serving.api.served import Served
from l4jax.serving.errors import ApiError


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


def tokenize(served: Served, body: TokenizeBody) -> dict[str, Any]:
    """The tokens of a text or a conversation. ``add_special_tokens``: with the token that begins a text, if the model has one."""
    served.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        given = "neither" if body.prompt is None else "both"
        raise ApiError(f"{given} of prompt and messages is given; expected one of them")
    if body.messages is not None:
        chat = ChatBody(messages=body.messages)
        tokens = prompt_of(served, chat, chat.checked_tools)
    else:
        assert body.prompt is not None
        served.check_characters(len(body.prompt), "prompt")
        try:
            tokens = served.tokenizer.encode(body.prompt, add_bos=body.add_special_tokens is not False)
        except ValueError as error:
            raise served.error(error, "prompt") from error
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": served.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        found["token_strs"] = [served.token_text(token) for token in tokens]
    return found


def detokenize(served: Served, body: DetokenizeBody) -> dict[str, Any]:
    """The text of tokens."""
    served.check_model(body.model)
    if len(body.tokens) > served.max_model_len:
        raise ApiError(
            f"tokens has {len(body.tokens)} tokens; expected at most {served.max_model_len}; send fewer",
            param="tokens",
            code="invalid_value",
        )
    size = served.config.vocab_size
    wrong = next((token for token in body.tokens if not 0 <= token < size), None)
    if wrong is not None:
        raise ApiError(f"tokens has {wrong}; expected 0 to {size - 1}", param="tokens", code="invalid_value")
    return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}
