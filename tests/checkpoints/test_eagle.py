"""Published EAGLE heads: read, they compute what the published equations say, and they go back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import l4jax
from l4jax import LLM, cli
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.export import export
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import load_verified, open_drafter
from l4jax.config import ModelConfig, flat_fields
from l4jax.config_formats.eagle import NO_ANSWERS, drafter_config_from_eagle
from l4jax.decoding.plan import UNMEASURED
from l4jax.model.drafter import build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel, random_weights
from l4jax.training.batches import Rows
from l4jax.training.drafters import Version, new_drafter
from l4jax.training.losses import unroll
from l4jax.training.output import save_drafter
from tests import tiny
from tests.checkpoints import heads
from tests.checkpoints.heads import D, Reading, Reference, V
from tests.checkpoints.meta_folder import write_torch_file
from tests.checkpoints.published import (
    HEADS,
    Head,
    eagle1_head,
    eagle3_head,
    llama4_head,
    nvidia_head,
    save_target,
    speculators_head,
    target_config,
    target_of,
    without,
)

PASSES = 3


def drafted(drafter_path: Path, target_config: ModelConfig, tokens: list[int], feature_Tf: np.ndarray) -> list[np.ndarray]:
    """What the converted drafter makes of the same, as logits over its vocabulary."""
    opened = open_drafter(drafter_path)
    arrays = load_verified(drafter_path / "weights" / "00000", opened.weights)
    drafter = BoundModel(build_drafter(opened.config))
    model = BoundModel(Llama(target_config))
    token_BT = jnp.asarray([tokens], jnp.int32)
    rows = Rows(token_BT, jnp.zeros_like(token_BT), jnp.ones_like(token_BT, bool), jnp.zeros(1, jnp.int32))

    @jax.jit
    def run(weights: Mapping[str, jax.Array], targets: Mapping[str, jax.Array], feature_BTf: jax.Array) -> list[jax.Array]:
        bound, llama = drafter.bind(drafter.leaves(weights)), model.bind(model.leaves(targets))
        outs = unroll(bound, llama, rows, bound.read(feature_BTf), PASSES)
        return [bound.logits(llama, out_BTD[0, len(tokens) - 2]) for out_BTD in outs]

    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    return [np.asarray(z) for z in run(weights, tiny.weights(target_config), jnp.asarray(feature_Tf[None]))]


def compared(head: Head, drafter_path: Path, config: ModelConfig, *readings: Reading) -> list[float]:
    """The largest difference of the logits from each reading's reference, of the largest logit."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, V, 7).tolist()
    width = D * (3 if head.reading.version == "eagle3" else 1)
    feature_Tf = rng.normal(0, 2, (7, width)).astype(np.float32)
    weights = tiny.weights(config)
    embed, output = np.asarray(weights["embed"]), np.asarray(weights["head"])
    tensors = {key.removeprefix("model."): value for key, value in head.tensors.items()}
    found = drafted(drafter_path, config, tokens, feature_Tf)
    differences = []
    for reading in readings:
        expected = Reference(tensors, reading, embed, output).drafted(tokens, feature_Tf, PASSES)
        differences.append(max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)))
    return differences


TRAPS: dict[str, list[dict[str, Any]]] = {
    "eagle3": [
        {"embedding_first": False},
        {"residual_normed": True},
        {"fed_back_normed": True},
        {"theta": 500000.0},
        {"interleaved": True},
        {"final_normed": False},
    ],
    "nvidia": [{"theta": 10000.0}],
    "speculators": [{"residual_normed": False}, {"embed": False}],
    "speculators, one norm": [{"aux_norms": "none"}],
    "speculators, EAGLE-3.1": [{"aux_norms": "none"}, {"fed_back_normed": False}],
    "eagle1": [{"bias": False}, {"embedding_first": False}, {"embed": False}],
    "speculators eagle1": [{"interleaved": True}],
    "llama4": [{"final_normed": False}, {"first_layer_normed": False}, {"interleaved": False}],
}


@pytest.mark.parametrize("name", HEADS)
def test_computes_what_the_equations_say_and_goes_back(name: str, target: Path, tmp_path: Path) -> None:
    head = HEADS[name]()
    source, its_target = heads.write(tmp_path / "head", head.config, head.tensors), target_of(name, target, tmp_path)
    config = target_config() if name != "llama4" else target_config(architecture="llama4", attention_chunk_size=8, rope_scaling=None)
    convert(source, tmp_path / "drafter", target=its_target)
    opened = open_drafter(tmp_path / "drafter")
    assert opened.config.aux_layers == head.aux_layers
    assert opened.config.target_tokenizer is not None and opened.config.decoder.max_position_embeddings == 64
    assert dict(opened.config.sources).keys() == flat_fields(opened.config).keys()
    misread = [dataclasses.replace(head.reading, **wrong) for wrong in TRAPS[name]]
    right, *wrong = compared(head, tmp_path / "drafter", config, head.reading, *misread)
    assert right < 1e-5
    assert min(wrong) > 1e-2, wrong
    if head.reading.version == "eagle3":
        arrays = load_verified(tmp_path / "drafter" / "weights" / "00000", opened.weights)
        np.testing.assert_array_equal(arrays["token_ids"], np.arange(heads.DRAFT) + head.tensors["d2t"])

    to = "speculators" if "speculators" in name else "eagle"
    export(tmp_path / "drafter", tmp_path / "exported", to=to)
    if to == "eagle":
        # In SafeAILab's code this field is a sign of a head with its own embedding: it would leave the target's unread.
        assert "target_hidden_size" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    convert(tmp_path / "exported", tmp_path / "again", target=its_target)
    again = open_drafter(tmp_path / "again")
    assert again.config == opened.config
    assert {n: w.crc32 for n, w in again.weights.items()} == {n: w.crc32 for n, w in opened.weights.items()}


def test_torch_files_are_read(target: Path, tmp_path: Path) -> None:
    head = eagle3_head()
    source = tmp_path / "head"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(head.config))
    write_torch_file(source / "pytorch_model.bin", head.tensors)
    convert(source, tmp_path / "drafter", target=target)
    (difference,) = compared(head, tmp_path / "drafter", target_config(), head.reading)
    assert difference < 1e-5


def test_the_default_layers_are_the_same_however_they_are_numbered(target: Path, tmp_path: Path) -> None:
    """NVIDIA's and SpecForge's ids name outputs, others' inputs: 1, 5, 8 of 12 layers are 2, 6, 9."""
    for name, config in {
        "none": {},
        "outputs": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}},
        "outputs, at the top": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]},
        "inputs": {"eagle_aux_hidden_state_layer_ids": [2, 6, 9]},
    }.items():
        head = eagle3_head(**config)
        convert(heads.write(tmp_path / name, head.config, head.tensors), tmp_path / f"{name} drafter", target=target)
        assert open_drafter(tmp_path / f"{name} drafter").config.aux_layers == (2, 6, 9), name
    for both in ([1, 5, 8], [2, 6, 9]):
        head = eagle3_head(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}, eagle_aux_hidden_state_layer_ids=both)
        convert(heads.write(tmp_path / f"{both}", head.config, head.tensors), tmp_path / f"{both} drafter", target=target)
        assert open_drafter(tmp_path / f"{both} drafter").config.aux_layers == (2, 6, 9)
    head = eagle3_head(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 11]})
    convert(heads.write(tmp_path / "own", head.config, head.tensors), tmp_path / "own drafter", target=target)
    assert open_drafter(tmp_path / "own drafter").config.aux_layers == (1, 4, 12)


def test_a_converted_head_speculates(target: Path, tmp_path: Path) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    options = {"max_batch": 1, "drafter": tmp_path / "drafter"}
    config = target_config()
    plain = LLM(config, tiny.weights(config)).generate([[1, 2, 3]], l4jax.SamplingParams(max_tokens=20, temperature=0.0))
    (tmp_path / "model").mkdir()
    model = save_target(tmp_path / "model" / "m", config, tokenizer=None)
    with pytest.raises(ValueError, match="is for a model with another tokenizer; give this model's own drafter"):
        l4jax.load(model, **options)
    convert(tmp_path / "head", tmp_path / "without tokenizer", target=model)
    llm = l4jax.load(model, max_batch=1, drafter=tmp_path / "without tokenizer", speculation="chain:2")
    (found,) = llm.generate([[1, 2, 3]], l4jax.SamplingParams(max_tokens=20, temperature=0.0))
    assert found.token_ids == plain[0].token_ids and found.stats.rounds > 0


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_head_that_is_the_target_s_can_be_left_out(tied: bool, tmp_path: Path) -> None:
    config = target_config(tie_word_embeddings=tied)
    target, head = save_target(tmp_path / "target", config), eagle3_head(target_head=True)
    ids = np.arange(heads.DRAFT) + head.tensors["d2t"]
    head.tensors["lm_head.weight"] = np.asarray(tiny.weights(config)["embed" if tied else "head"])[ids]
    convert(heads.write(tmp_path / "whole", head.config, head.tensors), tmp_path / "drafter", target=target)
    whole = open_drafter(tmp_path / "drafter")
    assert whole.config.target_head
    assert cli.main(["export", str(tmp_path / "drafter"), str(tmp_path / "small"), "--to", "eagle", "--without-head"]) == 0
    assert "lm_head.weight" not in load_file(tmp_path / "small" / "model.safetensors")
    convert(tmp_path / "small", tmp_path / "again", target=target)
    again = open_drafter(tmp_path / "again")
    assert again.config == whole.config
    assert {n: w.crc32 for n, w in again.weights.items()} == {n: w.crc32 for n, w in whole.weights.items()}
    export(tmp_path / "again", tmp_path / "for others", to="speculators")
    np.testing.assert_array_equal(
        load_file(tmp_path / "for others" / "model.safetensors")["lm_head.weight"], head.tensors["lm_head.weight"]
    )


def test_a_conversion_taken_up_again_is_for_the_same_target(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    head = without(eagle3_head(target_head=True), "lm_head.weight")
    heads.write(tmp_path / "head", head.config, head.tensors)
    with monkeypatch.context() as patched:
        patched.setattr("l4jax.checkpoints.convert.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "head", tmp_path / "drafter", target=target)
    other = save_target(tmp_path / "other", target_config(rope_theta=1.0), weights_seed=1)
    convert(tmp_path / "head", tmp_path / "drafter", target=other)
    convert(tmp_path / "head", tmp_path / "anew", target=other)
    found, expected = open_drafter(tmp_path / "drafter"), open_drafter(tmp_path / "anew")
    assert found.weights["head"].crc32 == expected.weights["head"].crc32


@pytest.mark.parametrize("version", ["eagle1", "eagle3"])
def test_what_is_trained_for_llama_4_is_exported(version: Version, tmp_path: Path) -> None:
    config = target_config(architecture="llama4", attention_chunk_size=8, use_qk_norm=True, attn_temperature_tuning=True, floor_scale=8192)
    target = save_target(tmp_path / "target", config)
    made = new_drafter(config, version, layers=1, draft_vocab=V if version == "eagle1" else heads.DRAFT, length=48)
    weights = random_weights(build_drafter(made), jax.random.key(0), jnp.dtype(jnp.float32))
    if version == "eagle3":
        weights["token_ids"] = jnp.arange(0, 2 * heads.DRAFT, 2, dtype=jnp.int32)
    arrays = {name: np.asarray(weight) for name, weight in weights.items()}
    assert dict(made.sources).keys() == flat_fields(made).keys()
    save_drafter(tmp_path / "drafter", made, arrays, speculation=UNMEASURED, licences=[])
    export(tmp_path / "drafter", tmp_path / "head", to="eagle")
    convert(tmp_path / "head", tmp_path / "again", target=target)
    again = open_drafter(tmp_path / "again")
    assert dataclasses.replace(again.config, target_tokenizer=None) == made
    for name, array in load_verified(tmp_path / "again" / "weights" / "00000", again.weights).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_features_are_what_enters_the_layers_named() -> None:
    """Features equal the outputs of models that are cut off at these layers, so an index that is off by one would be noticed."""
    config = target_config(num_layers=4, rope_layers=(True,) * 4)
    weights, token_BT = tiny.weights(config), jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)

    def run(layers: int, taps: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        model = BoundModel(Llama(dataclasses.replace(config, num_layers=layers, rope_layers=(True,) * layers), taps=taps))
        final_BTD, feature_BTf = model.bind(model.leaves(weights)).packed(token_BT, jnp.zeros_like(token_BT))
        return np.asarray(final_BTD), np.asarray(feature_BTf)

    embedded_BTD, *streams = np.split(run(4, (0, 1, 3, 4))[1], 4, axis=-1)
    np.testing.assert_array_equal(embedded_BTD, np.asarray(weights["embed"])[np.asarray(token_BT)])
    for layers, stream_BTD in zip((1, 3, 4), streams, strict=True):
        scale = np.asarray(weights["norm.scale"]) / np.sqrt(np.mean(stream_BTD**2, axis=-1, keepdims=True) + config.rms_norm_eps)
        np.testing.assert_allclose(stream_BTD * scale, run(layers, ())[0], rtol=1e-5, atol=1e-6)


def test_two_sets_of_weights_of_a_head_must_be_the_same(target: Path, tmp_path: Path) -> None:
    """SafeAILab's code reads ``pytorch_model.bin``, engines the safetensors."""
    head = eagle3_head()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    write_torch_file(folder / "pytorch_model.bin", dict(head.tensors))
    convert(folder, tmp_path / "drafter", target=target)
    assert compared(head, tmp_path / "drafter", target_config(), head.reading)[0] < 1e-5
    for key in ("norm.weight", "d2t"):
        write_torch_file(folder / "pytorch_model.bin", {**head.tensors, key: head.tensors[key] * 0 + 1})
        with pytest.raises(CheckpointError, match=r"has pytorch_model\.bin and safetensors, and they are not the same weights; remove"):
            convert(folder, tmp_path / "other", target=target)


def test_where_a_head_s_values_are_from() -> None:
    def sources(head: Head) -> dict[str, str]:
        config = drafter_config_from_eagle(
            head.config, {key.removeprefix("model.") for key in head.tensors}, target_config(), None, NO_ANSWERS
        )
        return dict(config.sources)

    nvidia, speculators, llama4 = sources(nvidia_head()), sources(speculators_head(norms="one")), sources(llama4_head())
    ids = "eagle_aux_hidden_state_layer_ids"
    assert nvidia["aux_layers"] == f"derived from config.json: eagle_config.{ids}, which numbers outputs"
    assert nvidia["norm_before_residual"] == "config.json: norm_before_residual"
    assert speculators["version"] == "config.json: speculators_model_type"
    assert speculators["aux_layers"] == f"config.json: {ids}"
    assert speculators["decoder.rms_norm_eps"] == "config.json: transformer_layer_config.rms_norm_eps"
    assert speculators["own_embedding"] == "derived from the presence of embed_tokens.weight"
    assert llama4["own_embedding"] == "derived from the absence of embed_tokens.weight"
    assert sources(eagle1_head())["fuse_bias"] == "derived from the presence of fc.bias"
    assert llama4["decoder.architecture"] == "derived from the head's format, llama4"
    assert llama4["decoder.moe"] == "config.json: moe_layers"
    assert sources(eagle3_head())["aux_layers"] == "default of EAGLE-3 heads: an early layer, the middle one and a late one"


def test_a_drafter_without_sources_is_shown_without_their_column(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As earlier versions wrote drafters."""
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    manifest = json.loads((tmp_path / "drafter" / "checkpoint.json").read_text())
    prefix = "decoder."
    of_decoder = [[name.removeprefix(prefix), source] for name, source in manifest["drafter"]["sources"] if name.startswith(prefix)]
    assert of_decoder and manifest["drafter"]["decoder"]["sources"] == []  # they are stored once
    manifest["drafter"]["sources"] = of_decoder
    (tmp_path / "drafter" / "checkpoint.json").write_text(json.dumps(manifest))
    assert cli.main(["show", str(tmp_path / "drafter")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^field +value$", shown, re.MULTILINE) and re.search(r"^decoder\.vocab_size +40$", shown, re.MULTILINE)


def test_a_head_says_its_target_s_architecture(target: Path, tmp_path: Path) -> None:
    """Some heads name their target's architecture, because the inference engines that load them put "Eagle" before the name."""
    head = llama4_head()
    head.config["architectures"] = ["Llama4ForCausalLM"]
    its_target = target_of("llama4", target, tmp_path)
    convert(heads.write(tmp_path / "head", head.config, head.tensors), tmp_path / "drafter", target=its_target)
    assert open_drafter(tmp_path / "drafter").config.final_normed


def test_a_length_that_is_left_out_is_the_code_s_default(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target", target_config(max_position_embeddings=4096))
    head = eagle3_head()
    del head.config["max_position_embeddings"]
    convert(heads.write(tmp_path / "head", head.config, head.tensors), tmp_path / "drafter", target=target)
    assert open_drafter(tmp_path / "drafter").config.decoder.max_position_embeddings == 2048


def test_other_weights_beside_a_heads_torch_file_are_named(target: Path, tmp_path: Path) -> None:
    head = eagle3_head()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_torch_file(folder / "pytorch_model.bin", dict(head.tensors))
    said: list[str] = []
    convert(folder, tmp_path / "drafter", target=target, note=said.append)
    assert said == [f"{folder} holds other weights besides: pytorch_model.bin is read, model-00001-of-00002.safetensors is not"]
