"""New drafters: their shape, which follows the target's, and the weights that training starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from l4jax.config import DrafterConfig, Eagle1Config, Eagle3Config, ModelConfig, flat_fields, usual_aux_layers
from l4jax.model.drafter import build_drafter
from l4jax.model.weights import random_weights
from l4jax.parallel.arrays import to_host
from l4jax.training.seeds import key_of

Version = Literal["eagle1", "eagle3"]

_LONGEST = "training: the longest text"
_GIVEN: dict[Version, dict[str, str]] = {
    "eagle1": {"decoder.num_layers": "training: layers", "decoder.rope_layers": "training: layers"},
    "eagle3": {"draft_vocab_size": "training: draft_vocab", "target_head": "training: target_head"},
}
"""Fields that follow from one setting of the training, and its name."""
_SAME: dict[Version, str] = {"eagle1": "the same in every new EAGLE-1 drafter", "eagle3": "the same in every new EAGLE-3 drafter"}
_GIVEN_ALWAYS = {"version": "training: version", "decoder.max_position_embeddings": _LONGEST}
_OF_TARGET: dict[Version, tuple[str, ...]] = {
    "eagle1": ("decoder.architecture", "draft_vocab_size", "first_layer_normed", "final_normed"),
    "eagle3": ("aux_layers",),
}
"""Fields that follow from the target, beside those of its decoder that are copied."""
_OF_TARGET_ALWAYS = ("decoder.intermediate_size", "target_layers", "target_hidden_size", "target_tokenizer")


def new_drafter(
    target: ModelConfig,
    version: Version,
    *,
    layers: int,
    draft_vocab: int,
    length: int,
    intermediate_size: int = 0,
    target_head: bool = False,
    target_tokenizer: str | None = None,
) -> DrafterConfig:
    """A drafter for this model, with dense layers of the model's shape and plain RoPE; ``length``: tokens of the longest training text.

    ``intermediate_size``: 0 for the target's. ``target_head``: as in :class:`Eagle3Config`. ``target_tokenizer``: the digest of the
    target's tokenizer, if it has one.

    EAGLE-1 has the norms of published drafters for the model's architecture. EAGLE-3 reads, as published ones do, the states that enter
    an early layer, the middle one and a late one.
    """
    normed = version == "eagle1" and target.architecture == "llama4"
    changes: dict[str, Any] = {
        "architecture": "llama4" if normed else "llama",  # in published formats the architecture decides which norms a head has
        "num_layers": layers,
        "intermediate_size": intermediate_size or target.intermediate_size,
        "rope_layers": (True,) * layers,
        "rope_scaling": None,
        "attention_chunk_size": None,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": False,
        "moe": None,
        "vision": None,
        "max_position_embeddings": length,
        "sources": (),
    }
    decoder = dataclasses.replace(target, **changes)
    count = target.num_layers
    shared: dict[str, Any] = {"decoder": decoder, "target_layers": count, "target_tokenizer": target_tokenizer}
    config: DrafterConfig
    if version == "eagle1":
        config = Eagle1Config(**shared, first_layer_normed=normed, final_normed=normed)
    else:
        config = Eagle3Config(
            **shared,
            draft_vocab_size=draft_vocab,
            target_hidden_size=target.hidden_size,
            aux_layers=usual_aux_layers(count) if count >= 8 else (count // 3, 2 * count // 3, count),
            target_head=target_head,
        )
    copied = [f"decoder.{field}" for field in vars(decoder) if field not in changes]
    sources = dict.fromkeys(flat_fields(config), _SAME[version])
    sources |= dict.fromkeys((*copied, *_OF_TARGET_ALWAYS, *_OF_TARGET[version]), "derived from the target")
    sources |= _GIVEN_ALWAYS | _GIVEN[version]
    if intermediate_size:
        sources["decoder.intermediate_size"] = "training: intermediate_size"
    return dataclasses.replace(config, sources=tuple(sources.items()))


def trained_at(config: DrafterConfig, length: int) -> DrafterConfig:
    """The drafter's configuration after training at this length too."""
    if length <= config.decoder.max_position_embeddings:
        return config
    sources = {**dict(config.sources), "decoder.max_position_embeddings": _LONGEST}
    return dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, max_position_embeddings=length), sources=tuple(sources.items())
    )


def weights_from_target(
    config: DrafterConfig, target: ModelConfig, weights: Mapping[str, Array], token_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """The weights of a new drafter that are not random, float32: the draft vocabulary and, with ``target_head``, the head and its norm.

    ``weights``: the target's. The draft vocabulary and the head are not trained. The norm is trained; it starts as the target's, scaled
    down so that the logits of a random state have a spread of 1, like those of a new head. Unscaled, the first guesses would be wrong with
    great confidence.
    """
    part = {"token_ids": token_ids}
    if config.target_head:
        head_VD = to_host(weights[target.output_weight])[token_ids].astype(np.float32)
        scale_D = to_host(weights["norm.scale"]).astype(np.float32)
        # A part that all rows share adds the same to every logit.
        spread = np.sqrt(np.mean(np.sum((scale_D * (head_VD - np.mean(head_VD, axis=0))) ** 2, axis=-1)))
        part |= {"head": head_VD, "norm.scale": scale_D / spread}
    return part


def first_weights(config: DrafterConfig, given: Mapping[str, Any], feature_Mf: np.ndarray, seed: int) -> dict[str, Any]:
    """Weights to start from: random, float32, except those ``given`` of an EAGLE-3 drafter.

    ``feature_Mf``: a sample of what the drafter will read. An EAGLE-3 drafter starts with all three residual streams scaled to the same
    root mean square: the stream grows with depth (from 3 to 23 in SmolLM2), and the last would drown out the others.
    """
    weights = random_weights(build_drafter(config), key_of(seed), jnp.dtype(jnp.float32))
    if isinstance(config, Eagle1Config):
        return dict(weights)
    feature_MaD = feature_Mf.astype(np.float32).reshape(-1, len(config.aux_layers), config.target_hidden_size)
    # The median over tokens: the first token of a sequence has states a hundred times as large as the others'.
    rms_a = np.sqrt(np.median(np.mean(feature_MaD**2, axis=-1), axis=0))
    fuse_Df = weights["fuse"] / jnp.asarray(np.repeat(rms_a, config.target_hidden_size))[None]
    return {**weights, "fuse": fuse_Df, **given}
