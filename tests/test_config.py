"""ModelConfig: what is refused, and the JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from l4jax.config import (
    ConfigError,
    DrafterConfig,
    Eagle1Config,
    Eagle3Config,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    VisionConfig,
    config_from_json,
    config_to_json,
    drafter_config_from_json,
    flat_fields,
)
from tests.tiny import llama3_like, scout_like

SHARED: dict[str, Any] = {"decoder": llama3_like(num_layers=1, rope_layers=(True,), vocab_size=96, hidden_size=32), "target_layers": 4}
STORED = Path(__file__).parent / "golden" / "stored"

VISION = VisionConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    image_size=28,
    patch_size=14,
    num_channels=3,
    rope_theta=10000.0,
    norm_eps=1e-5,
    pixel_shuffle_ratio=0.5,
    projector_input_dim=24,
    projector_output_dim=24,
    vision_output_dim=24,
    image_token_id=1,
    begin_image_token_id=2,
    end_image_token_id=3,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected a number above 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": True}, "num_layers is True; expected a number above 0"),
        ({"num_layers": "4"}, "num_layers is '4'; expected a number above 0"),
        ({"rope_theta": None}, "rope_theta is None; expected a number above 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"floor_scale": 0}, "floor_scale is 0"),
        ({"attn_scale": math.nan}, "attn_scale is nan"),
        ({"num_kv_heads": 3}, "num_heads is 4; expected a multiple of num_kv_heads, which is 3"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"rope_layers": (True,) * 3}, "rope_layers describes 3 layers; expected num_layers, which is 4"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ({"attention_chunk_size": 2**31}, "attention_chunk_size is 2147483648; expected less than 2**31"),
        ({"moe": MoEConfig(num_experts=4, intermediate_size=48, moe_layers=(True,) * 5)}, "moe.moe_layers describes 5 layers"),
        ({"bos_token_id": 64}, "bos_token_id has token 64, which is outside the vocabulary of 64"),
        ({"eos_token_ids": (1, -1)}, "eos_token_ids has token -1"),
        ({"pad_token_id": 99}, "pad_token_id has token 99"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        scout_like(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("chunk", "exact"), [(None, 2**24), (8, 2**31)], ids=["whole", "chunked"])
def test_the_context_ends_where_positions_are_no_longer_exact(chunk: int | None, exact: int) -> None:
    assert scout_like(attention_chunk_size=chunk, max_position_embeddings=exact).max_position_embeddings == exact
    with pytest.raises(ConfigError, match=f"max_position_embeddings is {exact + 1}; expected at most {exact}"):
        scout_like(attention_chunk_size=chunk, max_position_embeddings=exact + 1)


def test_parts_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="num_experts is 0"):
        MoEConfig(num_experts=0, intermediate_size=1, moe_layers=())
    with pytest.raises(ConfigError, match=r"low_freq_factor 4\.0 above high_freq_factor 1\.0"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0, original_max_position_embeddings=8192)
    with pytest.raises(ConfigError, match="image_size is 28; expected a multiple of patch_size, which is 13"):
        dataclasses.replace(VISION, patch_size=13)


@pytest.mark.parametrize(
    "config",
    [
        scout_like(sources=(("vocab_size", "config.json: vocab_size"), ("rope_theta", "a default"))),
        scout_like(vision=VISION, bos_token_id=1, eos_token_ids=(2, 3), pad_token_id=0),
        llama3_like(rope_scaling=None),
    ],
)
def test_json_keeps_everything(config: ModelConfig) -> None:
    read = config_from_json(json.loads(json.dumps(config_to_json(config))))
    assert read == config
    assert read.sources == config.sources


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vocab_size",), None, "config.vocab_size is None; expected int"),
        (("vocab_size",), True, "config.vocab_size is True; expected int"),
        (("architecture",), "gpt2", "config.architecture is 'gpt2'; expected one of 'llama', 'llama4'"),
        (("rope_layers",), [1, 1, 1, 0], r"config.rope_layers\[0\] is 1; expected bool"),
        (("moe",), 3, "config.moe is 3; expected an object"),
        (("moe", "num_experts"), 2.5, "config.moe.num_experts is 2.5; expected int"),
        (("moe", "capacity"), 2, "config.moe has the unknown fields capacity"),
        (("sources",), [["a"]], r"config.sources\[0\] has 1 items; expected 2"),
        (("head_dim",), 7, "head_dim is 7; expected an even number"),
    ],
)
def test_json_that_is_no_configuration_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    values = config_to_json(scout_like())
    part = values
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config_from_json(values)


def test_json_that_lacks_a_field_is_refused() -> None:
    values = config_to_json(scout_like())
    del values["rope_theta"]
    with pytest.raises(ConfigError, match="config lacks the fields rope_theta"):
        config_from_json(values)


def test_flat_fields_have_dotted_names() -> None:
    fields = flat_fields(scout_like())
    assert fields["moe.num_experts"] == 4
    assert fields["rope_scaling.factor"] == 16.0
    assert fields["vision"] is None
    assert not {"moe", "rope_scaling", "sources"} & fields.keys()


def stored(name: str) -> Any:
    """The JSON of a configuration as checkpoints store it."""
    return json.loads((STORED / f"{name}.json").read_text())


def test_a_stored_model_is_read_and_written_as_it_was() -> None:
    config = config_from_json(stored("model"))
    assert (config.architecture, config.rope_layers, config.eos_token_ids) == ("llama4", (True, False), (2, 3))
    assert config.moe == MoEConfig(num_experts=4, intermediate_size=24, moe_layers=(True, False))
    assert config_to_json(config) == stored("model")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eagle1", Eagle1Config(**SHARED, own_embedding=True, fuse_bias=True, first_layer_normed=True, final_normed=True)),
        (
            "eagle3",
            Eagle3Config(
                **SHARED,
                draft_vocab_size=24,
                target_hidden_size=32,
                aux_layers=(1, 2, 4),
                norm_before_residual=True,
                norm_each_aux=True,
                norm_fed_back=True,
                target_head=True,
            ),
        ),
    ],
)
def test_a_stored_drafter_of_each_version_is_read_and_written_as_it_was(name: str, expected: DrafterConfig) -> None:
    config = drafter_config_from_json(stored(name))
    assert dataclasses.replace(config, decoder=expected.decoder, target_tokenizer=None) == expected
    assert config.decoder == config_from_json(stored(name)["decoder"])
    assert dict(config.sources)["version"] == "training: version"
    written = config_to_json(config)
    assert written == stored(name)
    assert list(written) == list(stored(name))
    assert set(flat_fields(config)) > set(stored(name)) - {"decoder", "sources"}


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("eagle1", "norm_fed_back", True, "norm_fed_back is true; expected false for eagle1"),
        ("eagle1", "target_head", True, "target_head is true; expected false for eagle1"),
        ("eagle1", "aux_layers", [1], "aux_layers is [1]; expected [] for eagle1"),
        ("eagle1", "draft_vocab_size", 24, "draft_vocab_size is 24; expected 96 for eagle1"),
        ("eagle1", "target_hidden_size", 64, "target_hidden_size is 64; expected 32 for eagle1"),
        ("eagle3", "fuse_bias", True, "fuse_bias is true; expected false for eagle3"),
        ("eagle3", "version", "eagle2", "drafter.version is 'eagle2'; expected one of 'eagle1', 'eagle3'"),
        ("eagle3", "norm_before_fuse", True, "norm_before_fuse and norm_each_aux are both true; expected at most one"),
        ("eagle3", "draft_vocab_size", 97, "draft_vocab_size is 97; expected at most the target's, 96"),
        ("eagle3", "aux_layers", [5], "aux_layers is (5,); expected layers of the target, 0 to 4"),
        ("eagle3", "width", 3, "drafter has the unknown fields width"),
    ],
)
def test_a_stored_drafter_that_cannot_be_is_refused_in_one_line(name: str, field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        drafter_config_from_json({**stored(name), field: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stored_drafter_without_a_field_is_refused() -> None:
    values = stored("eagle3")
    del values["fuse_bias"]
    with pytest.raises(ConfigError, match="drafter lacks the fields fuse_bias"):
        drafter_config_from_json(values)
