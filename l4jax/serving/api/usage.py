"""Token counts as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from l4jax.serving.generation import Usage


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The counts as an object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
