"""``config.json`` of EAGLE heads: fields that writers put in one of two places."""

from __future__ import annotations

from typing import Any

import pytest

from l4jax.config_formats.eagle import NO_ANSWERS, drafter_config_from_eagle
from tests.tiny import llama3_like

TARGET = llama3_like()
LAYER = {
    "model_type": "llama",
    "vocab_size": TARGET.vocab_size,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
AUX = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}


def read(values: dict[str, Any]) -> Any:
    return drafter_config_from_eagle(LAYER | values, {"d2t", "embed_tokens.weight"}, TARGET, None, NO_ANSWERS)


@pytest.mark.parametrize("nested", [False, True])
def test_sizes_are_at_the_top_or_in_eagle_config(nested: bool) -> None:
    sizes = {"draft_vocab_size": 16, "target_hidden_size": 32}
    config = read({"eagle_config": AUX | sizes} if nested else {"eagle_config": AUX, **sizes})
    assert (config.draft_vocab_size, config.target_hidden_size) == (16, 32)


@pytest.mark.parametrize(
    ("values", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4}, 5e5),
    ],
)
def test_theta_is_at_the_top_or_in_rope_parameters(values: dict[str, Any], theta: float) -> None:
    assert read({"eagle_config": AUX, "target_hidden_size": TARGET.hidden_size, **values}).decoder.rope_theta == theta
