"""The shipped model configurations: published parameter counts, and nothing left to a default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4jax.config import ModelConfig, RopeScaling
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs

PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "llama-4-scout-17b-16e": 107_769_861_120,
    "llama-4-scout-17b-16e-instruct": 107_769_861_120,
    "llama-4-maverick-17b-128e": 400_711_848_960,
    "llama-4-maverick-17b-128e-instruct": 400_711_848_960,
    "smollm2-135m-instruct": 134_515_008,
}


def read(name: str) -> ModelConfig:
    return config_from_hf(json.loads((configs_path() / "models" / f"{name}.json").read_text()))


def test_every_file_is_listed() -> None:
    assert {path.stem for path in (configs_path() / "models").glob("*.json")} == PARAMETERS.keys()
    readme = Path(configs_path() / "models" / "README.md").read_text()
    assert all(f"| `{name}.json` | {count:,} |" in readme for name, count in PARAMETERS.items())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert sum(spec.size for spec in weight_specs(Llama(read(name))).values()) == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_nothing_is_left_to_a_default(name: str) -> None:
    assert [source for _, source in read(name).sources if "default" in source] == []


def test_scout_and_maverick_differ_as_they_should() -> None:
    scout, maverick = read("llama-4-scout-17b-16e-instruct"), read("llama-4-maverick-17b-128e-instruct")
    assert scout.rope_scaling == RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192)
    assert maverick.rope_scaling is None
    assert (scout.use_qk_norm, maverick.use_qk_norm) == (True, False)
    assert (scout.max_position_embeddings, maverick.max_position_embeddings) == (10_485_760, 1_048_576)
    assert scout.moe is not None
    assert maverick.moe is not None
    assert (sum(scout.moe.moe_layers), sum(maverick.moe.moe_layers)) == (48, 24)
    assert not maverick.moe.moe_layers[0]
    assert [i for i, rope in enumerate(maverick.rope_layers) if not rope] == list(range(3, 48, 4))
    assert scout.vision == maverick.vision
