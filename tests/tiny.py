"""Tiny random models that have every feature of the real ones, for tests that need a model but no reference."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import LLM
from l4jax.cache import LayerCache
from l4jax.checkpoints.store import StoredWeight, checksum, save_group, write_manifest
from l4jax.config import DrafterConfig, Eagle1Config, Eagle3Config, ModelConfig, MoEConfig, RopeScaling
from l4jax.decoding.plan import SpeculationTable
from l4jax.engine.engine import Engine
from l4jax.model.drafter import build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import random_weights
from l4jax.speculator import LoadedDrafter
from sharding.mesh import ONE_DEVICE


def scout_like(**changes: Any) -> ModelConfig:
    """Every layer MoE, QK-norm, frequency scaling, chunks of 8, NoPE every fourth layer."""
    config = ModelConfig(
        architecture="llama4",
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=64),
        rope_layers=(True, True, True, False),
        attention_chunk_size=8,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.1,
        tie_word_embeddings=False,
        moe=MoEConfig(num_experts=4, intermediate_size=48, moe_layers=(True,) * 4),
        vision=None,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )
    return dataclasses.replace(config, **changes)


def maverick_like(**changes: Any) -> ModelConfig:
    """MoE every second layer, no QK-norm, no frequency scaling."""
    moe = MoEConfig(num_experts=8, intermediate_size=48, moe_layers=(False, True, False, True))
    return dataclasses.replace(scout_like(moe=moe, use_qk_norm=False, rope_scaling=None), **changes)


def llama3_like(**changes: Any) -> ModelConfig:
    """Dense, rotary everywhere, plain causal attention, tied embeddings."""
    return dataclasses.replace(
        scout_like(
            architecture="llama",
            rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
            rope_layers=(True,) * 4,
            attention_chunk_size=None,
            use_qk_norm=False,
            attn_temperature_tuning=False,
            tie_word_embeddings=True,
            moe=None,
        ),
        **changes,
    )


def shallow(config: ModelConfig) -> ModelConfig:
    """The last two layers of a tiny model: they have all that the four have, and compile in half the time."""
    moe = config.moe and dataclasses.replace(config.moe, moe_layers=config.moe.moe_layers[2:])
    return dataclasses.replace(config, num_layers=2, rope_layers=config.rope_layers[2:], moe=moe)


def few_tokens(make: Callable[..., ModelConfig]) -> ModelConfig:
    """A shallow model with 8 tokens, so that a drafter that knows nothing often guesses right."""
    return shallow(make(vocab_size=8, tie_word_embeddings=False))


def weights(config: ModelConfig, seed: int = 0, dtype: jnp.dtype | None = None) -> dict[str, jax.Array]:
    """Random weights for a tiny model, float32 unless said otherwise."""
    return random_weights(Llama(config), jax.random.key(seed), dtype or jnp.dtype(jnp.float32))


def save(directory: Path, config: ModelConfig, text_files: Mapping[str, str] | None = None) -> Path:
    """A checkpoint of random weights, with these files of text."""
    arrays = {name: np.asarray(weight) for name, weight in weights(config).items()}
    save_group(directory / "weights" / "00000", arrays)
    stored = {name: StoredWeight("00000", array.shape, array.dtype.name, checksum(array)) for name, array in arrays.items()}
    for name, text in (text_files or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    write_manifest(directory, source_format="hf", config=config, weights=stored, text_files=list(text_files or {}))
    return directory


def drafter(config: ModelConfig, version: Literal["eagle1", "eagle3"] = "eagle3", **changes: Any) -> DrafterConfig:
    """The configuration of a one-layer drafter for this model, trained at 64 positions. EAGLE-3 reads the inputs of layers 1, 2 and 3."""
    decoder = llama3_like(num_layers=1, rope_layers=(True,), rope_scaling=None, max_position_embeddings=64, tie_word_embeddings=False)
    decoder = dataclasses.replace(decoder, vocab_size=config.vocab_size, hidden_size=config.hidden_size)
    if version == "eagle1":
        return Eagle1Config(**{"decoder": decoder, "target_layers": config.num_layers, **changes})
    values: dict[str, Any] = {
        "decoder": decoder,
        "draft_vocab_size": config.vocab_size,
        "target_layers": config.num_layers,
        "target_hidden_size": config.hidden_size,
        "aux_layers": (1, 2, 3),
    }
    return Eagle3Config(**values | changes)


def loaded_drafter(config: DrafterConfig, seed: int = 1, dtype: jnp.dtype | None = None) -> LoadedDrafter:
    """A drafter with random weights, float32 unless said otherwise, and with a table that says not to speculate."""
    weights = random_weights(build_drafter(config), jax.random.key(seed), dtype or jnp.dtype(jnp.float32))
    return LoadedDrafter(config, weights, SpeculationTable.always(None))


def prompts(config: ModelConfig, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]


def empty_cache(shape, config, sharding=None, spec=ONE_DEVICE):
    """A float32 cache of zeros."""
    pools = [jnp.zeros(pool, jnp.float32, device=sharding or jax.local_devices()[0]) for pool in shape.layer_shapes(config, spec)]
    return tuple(LayerCache(pool, pool) for pool in pools)


def with_options(llm: LLM, **changes: Any) -> LLM:
    """The same model and programs with other options of the scheduler."""
    other, engine = copy.copy(llm), llm.engine
    options = dataclasses.replace(engine.options, **changes)
    other.engine = Engine(engine.runner, engine._memory, engine.shape, options, engine._tokenizer)
    return other
