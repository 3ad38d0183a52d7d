"""Published EAGLE heads: read, they compute what the published equations say; and what is not clear is refused in one line."""

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
from l4jax.checkpoints.store import StoredWeight, checksum, load_verified, open_drafter, save_group, write_manifest
from l4jax.config import ModelConfig, flat_fields
from l4jax.config_formats.eagle import NO_ANSWERS, drafter_config_from_eagle
from l4jax.decoding.plan import UNMEASURED
from l4jax.files import FileError
from l4jax.model.drafter import build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel, random_weights
from l4jax.training.batches import Rows
from l4jax.training.drafters import Version, new_drafter
from l4jax.training.losses import unroll
from l4jax.training.output import save_drafter
from tests import tiny
from tests.checkpoints import heads
from tests.checkpoints.folders import GOLDEN, config_of, tensors_of
from tests.checkpoints.gguf_file import write_gguf
from tests.checkpoints.heads import BASE, TARGET_LAYERS, D, F, H, K, Reading, Reference, V, h
from tests.checkpoints.meta_folder import write_torch_file

PASSES = 3


def target_config(**changes: Any) -> ModelConfig:
    sizes = {"num_layers": TARGET_LAYERS, "rope_layers": (True,) * TARGET_LAYERS, "num_heads": H, "num_kv_heads": K, "head_dim": h}
    sizes |= {"vocab_size": V, "hidden_size": D, "rope_theta": 500000.0, "tie_word_embeddings": False}
    return tiny.llama3_like(**(sizes | changes))


def save_target(folder: Path, config: ModelConfig, tokenizer: str | None = "{}", weights_seed: int = 0) -> Path:
    arrays = {name: np.asarray(weight) for name, weight in tiny.weights(config, weights_seed).items()}
    save_group(folder / "weights" / "00000", arrays)
    stored = {name: StoredWeight("00000", a.shape, a.dtype.name, checksum(a)) for name, a in arrays.items()}
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    write_manifest(
        folder, source_format="hf", config=config, weights=stored, text_files=["tokenizer.json"] if tokenizer is not None else []
    )
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), target_config())


@dataclasses.dataclass
class Head:
    config: dict[str, Any]
    tensors: heads.Tensors
    reading: Reading
    aux_layers: tuple[int, ...] = (2, 6, 9)


EAGLE3 = Reading("eagle3")
SPECULATORS = {"speculators_model_type": "eagle3", "speculators_config": {"algorithm": "eagle3"}, "draft_vocab_size": heads.DRAFT}


def eagle3_head(seed: int = 0, **config: Any) -> Head:
    """As SafeAILab and SpecForge write them."""
    return Head({**BASE, "draft_vocab_size": heads.DRAFT, **config}, heads.eagle3_tensors(seed), EAGLE3)


def nvidia_head() -> Head:
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True, "use_last_layernorm": True}
    head = eagle3_head(1, architectures=["LlamaForCausalLMEagle3"], eagle_config=ids, rope_theta=20000.0, norm_before_residual=False)
    head.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": None}
    del head.tensors["t2d"]
    return dataclasses.replace(head, reading=dataclasses.replace(EAGLE3, theta=20000.0))


def speculators_head(*, norms: str, **config: Any) -> Head:
    tensors = heads.eagle3_tensors(2, "layers.0.")
    rng = np.random.default_rng(3)
    if norms == "one":
        tensors["input_norm.weight"] = heads.norm_scale(rng, 3 * D)
    if norms == "each":
        tensors |= {f"fc_norm.{i}.weight": heads.norm_scale(rng) for i in range(3)}
    tensors["embed_tokens.weight"] = heads.random(rng, V, D)
    values = {**SPECULATORS, "transformer_layer_config": dict(BASE), "norm_before_residual": True, **config}
    values |= {"norm_before_fc": norms == "one", "fc_norm": norms == "each", "norm_output": norms == "each"}
    values["eagle_aux_hidden_state_layer_ids"] = [2, 5, 10]
    reading = Reading("eagle3", ("layers.0.",), residual_normed=True, aux_norms=norms, fed_back_normed=norms == "each")
    return Head(values, tensors, reading, aux_layers=(2, 5, 10))


def eagle1_head() -> Head:
    rng = np.random.default_rng(4)
    tensors = {**heads.layer_tensors(rng, "layers.0.", D), "fc.weight": heads.random(rng, D, 2 * D), "fc.bias": heads.norm_scale(rng)}
    tensors["embed_tokens.weight"] = heads.random(rng, V, D)
    return Head({**BASE, "bias": True, "architectures": ["LlamaForCausalLM"]}, tensors, Reading("eagle1", ("layers.0.",)), ())


def speculators_eagle1_head() -> Head:
    rng = np.random.default_rng(5)
    tensors = {**heads.layer_tensors(rng, "transformer.", D), "fusion_fc.weight": heads.random(rng, D, 2 * D)}
    config = {"speculators_model_type": "eagle", "fusion_bias": False, "layernorms": False, "transformer_layer_config": dict(BASE)}
    return Head(config, tensors, Reading("eagle1", ("transformer.",), fuse="fusion_fc"), ())


def llama4_head() -> Head:
    """Two dense layers with all their norms, under names that begin with the module's."""
    rng = np.random.default_rng(6)
    tensors = {"fc.weight": heads.random(rng, D, 2 * D), "norm.weight": heads.norm_scale(rng)}
    for i in range(2):
        tensors |= heads.layer_tensors(rng, f"layers.{i}.", D, "feed_forward")
        tensors[f"layers.{i}.input_layernorm.weight"] = heads.norm_scale(rng)
    config = {**BASE, "architectures": ["EagleLlama4ForCausalLM"], "model_type": "llama4_text", "num_hidden_layers": 2}
    config |= {"intermediate_size_mlp": F, "moe_layers": [], "no_rope_layers": [1, 1], "use_qk_norm": False, "rope_theta": 10000.0}
    config |= {"attn_temperature_tuning": False, "attention_chunk_size": 8}
    reading = Reading("eagle1", ("layers.0.", "layers.1."), "feed_forward", interleaved=True, first_layer_normed=True)
    return Head(config, {f"model.{key}": value for key, value in tensors.items()}, reading, ())


HEADS = {
    "eagle3": eagle3_head,
    "nvidia": nvidia_head,
    "speculators": lambda: speculators_head(norms="none"),
    "speculators, one norm": lambda: speculators_head(norms="one"),
    "speculators, EAGLE-3.1": lambda: speculators_head(norms="each"),
    "eagle1": eagle1_head,
    "speculators eagle1": speculators_eagle1_head,
    "llama4": llama4_head,
}


def target_of(name: str, target: Path, tmp_path: Path) -> Path:
    if name != "llama4":
        return target
    return save_target(tmp_path / "llama4", target_config(architecture="llama4", attention_chunk_size=8, rope_scaling=None))


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


def test_an_output_head_that_is_another_model_s_is_refused(target: Path, tmp_path: Path) -> None:
    head = eagle3_head(target_head=True)
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the output head of .*, as target_head .* says; give the model"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


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


def test_an_output_head_of_its_own_is_not_left_out(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "drafter"), str(tmp_path / "small"), "--to", "eagle", "--without-head"]) == 2
    assert "drafter is not a drafter with its target's output head (train-drafter --target-head makes those)" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_drafter_of_another_version_is_to_be_converted_again(target: Path, tmp_path: Path) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    manifest = json.loads((tmp_path / "drafter" / "checkpoint.json").read_text())
    del manifest["drafter"]["target_head"]
    (tmp_path / "drafter" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"or another version of l4jax made it .*target_head.*; make the checkpoint again"):
        open_drafter(tmp_path / "drafter")


def without(head: Head, key: str) -> Head:
    return dataclasses.replace(head, tensors={k: v for k, v in head.tensors.items() if k != key})


def with_tensor(head: Head, **tensors: np.ndarray) -> Head:
    return dataclasses.replace(head, tensors={**head.tensors, **tensors})


REFUSED = {
    **{
        f"no {key}": (without(eagle3_head(), key), f"the checkpoint has no tensor {key}, which the configuration asks for")
        for key in heads.eagle3_tensors(0)
        if key != "t2d"
    },
    "another tensor": (with_tensor(eagle3_head(), extra=np.zeros(3, np.float32)), "source tensor extra would be used 0 times"),
    "absolute d2t": (
        with_tensor(eagle3_head(), d2t=eagle3_head().tensors["d2t"] + np.arange(heads.DRAFT)),
        "d2t does not lead to different tokens|d2t and t2d name different tokens",
    ),
    "other t2d": (with_tensor(eagle3_head(), t2d=np.arange(V) < heads.DRAFT), "tensors d2t and t2d name different tokens"),
    "vocabulary": (eagle3_head(vocab_size=50), "the drafter is for a model with a vocabulary of 50, not 40; give this model's own drafter"),
    "width": (eagle3_head(target_hidden_size=64), "hidden size of 64, not 32|width"),
    "numbering": (
        eagle3_head(eagle_aux_hidden_state_layer_ids=[1, 4, 7]),
        "does not say whether these .* --aux-layers 2,5,8 if they number outputs",
    ),
    "numbering twice": (
        eagle3_head(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}, eagle_aux_hidden_state_layer_ids=[3, 4, 5]),
        r"is \[1, 5, 8\] in eagle_config and \[3, 4, 5\] outside; give .* --aux-layers I,J,K",
    ),
    "speculators' numbering": (
        dataclasses.replace(
            speculators_head(norms="none"),
            config={**speculators_head(norms="none").config, "eagle_aux_hidden_state_layer_ids": [1, 5, 8]},
        ),
        "does not say whether these .* --aux-layers 2,6,9 if they number outputs",
    ),
    "the model's context": (
        eagle3_head(max_position_embeddings=256),
        "says max_position_embeddings 256, which is the model's context, and does not say what .* trained at; give --trained-length N",
    ),
    "no length": (
        dataclasses.replace(llama4_head(), config={k: v for k, v in llama4_head().config.items() if k != "max_position_embeddings"}),
        "has no max_position_embeddings, and does not say what .* trained at; give --trained-length N",
    ),
    "norm_output": (eagle3_head(norm_output=True), "norm_output is true, .*; give --norm-fed-back yes or no"),
    "single state": (
        eagle3_head(eagle_config={"use_aux_hidden_state": False}),
        "use_aux_hidden_state is false, a head that reads one state",
    ),
    "residual": (
        dataclasses.replace(
            speculators_head(norms="none"),
            config={k: v for k, v in speculators_head(norms="none").config.items() if k != "norm_before_residual"},
        ),
        "config.json has no norm_before_residual, .*; give --norm-before-residual yes or no",
    ),
    "no norm": (eagle3_head(norm_before_fc=True), "disagree on input_norm.weight"),
    "bias": (
        dataclasses.replace(eagle1_head(), config={**eagle1_head().config, "bias": False}),
        "says no bias, and the head has tensor fc.bias",
    ),
    "quantised": (eagle3_head(quantization_config={"quant_method": "fp8"}), "quantization_config is .*, which is not supported"),
    "experts": (
        dataclasses.replace(llama4_head(), config={**llama4_head().config, "moe_layers": [1]}),
        "moe_layers names layers with experts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_line_and_writes_nothing(name: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, message = REFUSED[name]
    heads.write(tmp_path / "head", head.config, head.tensors)
    assert cli.main(["convert", str(tmp_path / "head"), str(tmp_path / "drafter"), "--target", str(target)]) != 0
    (said,) = capsys.readouterr().err.splitlines()  # no bar
    assert re.search(message, said), said
    assert not (tmp_path / "drafter").exists()


def test_what_a_head_leaves_open_can_be_said(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = eagle3_head(eagle_aux_hidden_state_layer_ids=[1, 4, 7], norm_output=True, max_position_embeddings=1000)
    heads.write(tmp_path / "head", head.config, head.tensors)
    common = [str(tmp_path / "head"), str(tmp_path / "drafter"), "--aux-layers", "2,5,8", "--norm-fed-back", "no", "--trained-length", "48"]
    assert cli.main(["convert", *common]) != 0
    assert "are for EAGLE heads; give the head's model as --target" in capsys.readouterr().err
    assert cli.main(["convert", *common, "--target", str(target), "--dry-run"]) == 0
    assert "token_ids <- d2t [12] int64, t2d [40] bool: d2t: offsets" in capsys.readouterr().out
    assert cli.main(["convert", *common, "--target", str(target)]) == 0
    config = open_drafter(tmp_path / "drafter").config
    assert (config.aux_layers, config.norm_fed_back, config.decoder.max_position_embeddings) == ((2, 5, 8), False, 48)
    assert cli.main(["show", str(tmp_path / "drafter"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"aux_layers +2, 5, 8 +--aux-layers\n", shown) and "a model of 12 layers, width 32, 40 tokens" in shown
    for row in (
        r"version +eagle3 +derived from the names of the tensors",
        r"decoder\.vocab_size +40 +config\.json: vocab_size",
        r"decoder\.max_position_embeddings +48 +--trained-length",
        r"norm_fed_back +false +--norm-fed-back",
        r"norm_before_fuse +false +absent from config\.json: norm_before_fc",
        r"target_layers +12 +derived from the target",
    ):
        assert re.search(rf"^{row}$", shown, re.MULTILINE), row


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
    assert llama4["decoder.architecture"] == "derived from the head's format, llama4"
    assert llama4["decoder.moe"] == "config.json: moe_layers"
    assert sources(eagle3_head())["aux_layers"] == "default of EAGLE-3 heads: an early layer, the middle one and a late one"


def test_a_drafter_without_sources_is_shown_without_their_column(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As earlier versions wrote drafters."""
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    manifest = json.loads((tmp_path / "drafter" / "checkpoint.json").read_text())
    manifest["drafter"]["sources"] = manifest["drafter"]["decoder"]["sources"]
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
    assert (
        dict(made.sources)["decoder.vocab_size"] == "derived from the target"
        and dict(made.sources)["draft_vocab_size"] == "training: draft_vocab"
    )
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


def test_other_weights_beside_a_heads_torch_file_are_named(target: Path, tmp_path: Path) -> None:
    head = eagle3_head()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_torch_file(folder / "pytorch_model.bin", dict(head.tensors))
    said: list[str] = []
    convert(folder, tmp_path / "drafter", target=target, note=said.append)
    assert said == [f"{folder} holds other weights besides: pytorch_model.bin is read, model-00001-of-00002.safetensors is not"]


@pytest.mark.parametrize("tied", [False, True])
def test_an_eagle1_head_with_a_copy_of_an_output_head(tied: bool, tmp_path: Path) -> None:
    """An EAGLE-1 drafter uses its target's output head. An equal copy of it is ignored; any other head is refused."""
    config, head = target_config(tie_word_embeddings=tied), eagle1_head()
    target = save_target(tmp_path / "target", config)
    head.tensors["lm_head.weight"] = np.asarray(tiny.weights(config)["embed" if tied else "head"])
    convert(heads.write(tmp_path / "head", head.config, head.tensors), tmp_path / "drafter", target=target)
    assert "head" not in open_drafter(tmp_path / "drafter").weights
    head.tensors["lm_head.weight"] = head.tensors["lm_head.weight"] * np.float32(1.01)
    heads.write(tmp_path / "other", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the output head of .*, with which an EAGLE-1 drafter drafts; give"):
        convert(tmp_path / "other", tmp_path / "another", target=target)


def test_a_tensor_under_two_names_is_refused(target: Path, tmp_path: Path) -> None:
    head = llama4_head()
    head.tensors["norm.weight"] = head.tensors["model.norm.weight"] + 1
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"has tensor norm\.weight twice, once as model\.norm\.weight"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize("tensors", [{"d2t": np.zeros(heads.DRAFT, np.float32)}, {"t2d": np.ones(V, np.int64)}], ids=["offsets", "tokens"])
def test_tables_of_another_type_are_refused(tensors: heads.Tensors, target: Path, tmp_path: Path) -> None:
    head = with_tensor(eagle3_head(), **tensors)
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"tensors d2t and t2d are of the types .*; expected integers, and true or false"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text(""), "expected the folder of an EAGLE head"),
        (lambda path: path.mkdir(), "has no config.json; expected the folder of an EAGLE head"),
    ],
    ids=["nothing", "file", "empty"],
)
def test_what_is_not_a_head(make: Any, message: str, target: Path, tmp_path: Path) -> None:
    make(tmp_path / "head")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_its_target_is_named(name: str, torch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = HEADS[name]()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    if torch:
        (folder / "model.safetensors").unlink()
        write_torch_file(folder / "pytorch_model.bin", head.tensors)
    said = f"l4jax: error: {folder} is an EAGLE head, not a whole model; give its model to `l4jax convert` with --target\n"
    for command in (["convert", str(folder), str(tmp_path / "drafter")], ["show", str(folder)]):
        assert cli.main(command) == 2
        assert capsys.readouterr() == ("", said)


def test_a_model_is_not_a_head(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "m.gguf", config_of(GOLDEN / "llama3"), tensors_of(GOLDEN / "llama3"))
    for model in (GOLDEN / "llama3", GOLDEN / "llama3_tied", GOLDEN / "scout", GOLDEN / "multimodal", file):
        assert cli.main(["convert", str(model), str(tmp_path / "drafter"), "--target", str(target)]) == 2
        said = f"l4jax: error: {model} is a whole model, not an EAGLE head; leave --target out, or give the head\n"
        assert capsys.readouterr() == ("", said)


def test_a_head_has_no_tokenizer_to_leave_out(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors)
    for dry in ([], ["--dry-run"]):
        assert cli.main(["convert", str(folder), str(tmp_path / "d"), "--target", str(target), "--without-tokenizer", *dry]) == 2
        assert "has no tokenizer to convert it without; leave --without-tokenizer out" in capsys.readouterr().err


def test_a_converted_drafter_is_not_a_head(target: Path, tmp_path: Path) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    with pytest.raises(CheckpointError, match="drafter is converted already; load it"):
        convert(tmp_path / "drafter", tmp_path / "again", target=target)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_a_git_lfs_pointer_in_a_heads_folder(name: str, target: Path, tmp_path: Path) -> None:
    folder = heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FileError, match=f"{name} is a git-lfs pointer"):
        convert(folder, tmp_path / "drafter", target=target)
