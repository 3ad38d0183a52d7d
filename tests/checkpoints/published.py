"""EAGLE heads as their authors publish them, and a small target that they are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoints.store import StoredWeight, checksum, save_group, write_manifest
from l4jax.config import ModelConfig
from tests import tiny
from tests.checkpoints import heads
from tests.checkpoints.heads import BASE, TARGET_LAYERS, D, F, H, K, Reading, V, h


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


def without(head: Head, key: str) -> Head:
    return dataclasses.replace(head, tensors={k: v for k, v in head.tensors.items() if k != key})


def with_tensor(head: Head, **tensors: np.ndarray) -> Head:
    return dataclasses.replace(head, tensors={**head.tensors, **tensors})
