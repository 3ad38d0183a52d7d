"""New drafters: where each value of their configuration comes from is what decides it."""

from __future__ import annotations

from typing import Any

import pytest

from l4jax.config import DrafterConfig, flat_fields
from l4jax.training.drafters import Version, new_drafter
from tests import tiny

TARGET = tiny.llama3_like()
OTHER_TARGET = tiny.scout_like(vocab_size=96, hidden_size=64, num_layers=8, rope_layers=(True,) * 8, moe=None)


def changed(one: DrafterConfig, other: DrafterConfig) -> set[str]:
    values = flat_fields(other)
    return {name for name, value in flat_fields(one).items() if value != values[name]}


def labelled(config: DrafterConfig, source: str) -> set[str]:
    return {name for name, label in config.sources if label == source}


@pytest.mark.parametrize(
    ("version", "setting", "value"),
    [
        ("eagle1", "layers", 2),
        ("eagle1", "length", 50),
        ("eagle1", "intermediate_size", 40),
        ("eagle3", "length", 50),
        ("eagle3", "intermediate_size", 40),
        ("eagle3", "draft_vocab", 8),
        ("eagle3", "target_head", True),
    ],
)
def test_what_a_setting_changes_names_the_setting(version: Version, setting: str, value: Any) -> None:
    settings: dict[str, Any] = {"layers": 1, "draft_vocab": TARGET.vocab_size, "length": 30, "target_tokenizer": "digest"}
    before, after = new_drafter(TARGET, version, **settings), new_drafter(TARGET, version, **settings | {setting: value})
    label = "training: the longest text" if setting == "length" else f"training: {setting}"
    assert changed(before, after) == labelled(after, label) != set()


@pytest.mark.parametrize("version", ["eagle1", "eagle3"])
def test_what_is_the_same_in_every_drafter_and_what_is_its_target_s(version: Version) -> None:
    one, other = (
        new_drafter(
            target, version, layers=1, draft_vocab=target.vocab_size if version == "eagle1" else 8, length=30, target_tokenizer=name
        )
        for target, name in ((TARGET, "one"), (OTHER_TARGET, "other"))
    )
    assert dict(one.sources).keys() == flat_fields(one).keys()
    of_target, same = labelled(one, "derived from the target"), labelled(one, f"the same in every new EAGLE-{version[-1]} drafter")
    assert changed(one, other) <= of_target
    # What l4jax decides by the target, beside what it copies.
    decided = {"aux_layers"} if version == "eagle3" else {"decoder.architecture", "draft_vocab_size", "first_layer_normed", "final_normed"}
    assert decided <= changed(one, other) and decided <= of_target
    assert {"aux_layers", "decoder.architecture", "first_layer_normed", "final_normed"} - decided <= same
