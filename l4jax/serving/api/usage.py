"""Token counts as the APIs' clients expect them."""

from __future__ import annotations

from typing import Any

from l4jax.serving.generation import Usage


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The counts as OpenAI's clients expect them."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def response_usage_fields(usage: Usage) -> dict[str, Any]:
    """The counts as the Responses API has them. What is written to the prefix cache is not counted: nothing is paid for it."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.output,
    }


def message_usage_fields(usage: Usage) -> dict[str, Any]:
    """The counts as Anthropic's clients expect them. What is computed is kept without being asked for, and not counted as written."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }
