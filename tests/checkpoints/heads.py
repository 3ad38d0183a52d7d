"""Random EAGLE heads in the published formats, and what they compute, written out from the published equations with numpy alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

D, F, H, K, h, V, DRAFT = 32, 48, 4, 2, 8, 40, 12
TARGET_LAYERS = 12

Array = np.ndarray
Tensors = dict[str, Array]
BASE: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": H,
    "num_key_value_heads": K,
    "head_dim": h,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def norm_scale(rng: np.random.Generator, size: int = D) -> Array:
    return rng.uniform(0.5, 1.5, size).astype(np.float32)


def layer_tensors(rng: np.random.Generator, prefix: str, width: int, feed_forward: str = "mlp") -> Tensors:
    shapes = {"q": (H * h, width), "k": (K * h, width), "v": (K * h, width), "o": (D, H * h)}
    tensors = {f"{prefix}self_attn.{x}_proj.weight": random(rng, *shape) for x, shape in shapes.items()}
    tensors |= {f"{prefix}{feed_forward}.{x}_proj.weight": random(rng, F, D) for x in ("gate", "up")}
    tensors[f"{prefix}{feed_forward}.down_proj.weight"] = random(rng, D, F)
    tensors[f"{prefix}post_attention_layernorm.weight"] = norm_scale(rng)
    return tensors


def eagle3_tensors(seed: int, prefix: str = "midlayer.", aux: int = 3) -> Tensors:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(V, DRAFT, replace=False))
    return {
        **layer_tensors(rng, prefix, 2 * D),
        f"{prefix}input_layernorm.weight": norm_scale(rng),
        f"{prefix}hidden_norm.weight": norm_scale(rng),
        "fc.weight": random(rng, D, aux * D),
        "norm.weight": norm_scale(rng),
        "lm_head.weight": random(rng, DRAFT, D),
        "d2t": ids - np.arange(DRAFT),
        "t2d": np.isin(np.arange(V), ids),
    }


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a head is to be read; the wrong values are the mistakes that engines have made."""

    version: Literal["eagle1", "eagle3"]
    layers: tuple[str, ...] = ("midlayer.",)
    feed_forward: str = "mlp"
    fuse: str = "fc"
    theta: float = 10000.0
    interleaved: bool = False
    embedding_first: bool = True
    residual_normed: bool = False
    fed_back_normed: bool = False
    aux_norms: Literal["none", "one", "each"] = "none"
    first_layer_normed: bool = False
    final_normed: bool = True
    bias: bool = True
    embed: bool = True


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt(np.mean(x * x) + 1e-5) * scale


def rotated(x_nh: Array, position: int, reading: Reading) -> Array:
    angle = position * reading.theta ** (-2 * np.arange(h // 2) / h)
    cos, sin, out = np.cos(angle), np.sin(angle), np.empty_like(x_nh)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if reading.interleaved else (slice(0, h // 2), slice(h // 2, None))
    a, b = x_nh[:, first], x_nh[:, second]
    out[:, first], out[:, second] = a * cos - b * sin, a * sin + b * cos
    return out


class Reference:
    """A head's logits: entry by entry, a chain of drafts after each."""

    def __init__(self, tensors: Tensors, reading: Reading, embed_VD: Array, head_VD: Array) -> None:
        self.w = {key: value.astype(np.float64) for key, value in tensors.items()}
        self.reading = reading
        own = self.w.get("embed_tokens.weight")
        self.embed_VD = own if own is not None and reading.embed else embed_VD.astype(np.float64)
        self.head_VD = head_VD.astype(np.float64) if reading.version == "eagle1" else self.w["lm_head.weight"]

    def read(self, feature_f: Array) -> Array:
        if self.reading.version == "eagle1":
            return feature_f
        if self.reading.aux_norms == "one":
            feature_f = rms(feature_f, self.w["input_norm.weight"])
        if self.reading.aux_norms == "each":
            parts = np.split(feature_f, 3)
            feature_f = np.concatenate([rms(part, self.w[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)])
        return self.w["fc.weight"] @ feature_f

    def entry(self, token: int, state_D: Array, position: int, before: list) -> tuple[Array, list]:
        """The output, and the keys and values of each layer."""
        embedding_D = self.embed_VD[token]
        if self.reading.version == "eagle3":
            prefix = self.reading.layers[0]
            normed_D = rms(state_D, self.w[f"{prefix}hidden_norm.weight"])
            pair = [rms(embedding_D, self.w[f"{prefix}input_layernorm.weight"]), normed_D]
            residual_D = normed_D if self.reading.residual_normed else state_D
            out_D, kv = self._layer(
                prefix, np.concatenate(pair[:: 1 if self.reading.embedding_first else -1]), residual_D, position, before, 0
            )
            return out_D, [kv]
        pair = [embedding_D, state_D][:: 1 if self.reading.embedding_first else -1]
        x_D = self.w[f"{self.reading.fuse}.weight"] @ np.concatenate(pair)
        if f"{self.reading.fuse}.bias" in self.w and self.reading.bias:
            x_D = x_D + self.w[f"{self.reading.fuse}.bias"]
        kvs = []
        for i, prefix in enumerate(self.reading.layers):
            normed = i > 0 or self.reading.first_layer_normed
            into_D = rms(x_D, self.w[f"{prefix}input_layernorm.weight"]) if normed else x_D
            x_D, kv = self._layer(prefix, into_D, x_D, position, before, i)
            kvs.append(kv)
        return rms(x_D, self.w["norm.weight"]) if "norm.weight" in self.w and self.reading.final_normed else x_D, kvs

    def _layer(self, prefix: str, into: Array, residual_D: Array, position: int, before: list, layer: int) -> tuple[Array, tuple]:
        q, k, v = ((self.w[f"{prefix}self_attn.{x}_proj.weight"] @ into).reshape(-1, h) for x in "qkv")
        q, k = rotated(q, position, self.reading), rotated(k, position, self.reading)
        kv = [*(entry[layer] for entry in before), (k, v)]
        heads = []
        for head in range(H):
            group = head // (H // K)
            scores = np.array([q[head] @ keys[group] for keys, _ in kv]) / np.sqrt(h)
            weights = np.exp(scores - scores.max())
            heads.append(sum(weight * values[group] for weight, (_, values) in zip(weights / weights.sum(), kv, strict=True)))
        x_D = residual_D + self.w[f"{prefix}self_attn.o_proj.weight"] @ np.concatenate(heads)
        normed_D = rms(x_D, self.w[f"{prefix}post_attention_layernorm.weight"])
        gate, up = (self.w[f"{prefix}{self.reading.feed_forward}.{x}_proj.weight"] @ normed_D for x in ("gate", "up"))
        return x_D + self.w[f"{prefix}{self.reading.feed_forward}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up), (k, v)

    def logits(self, out_D: Array) -> Array:
        if self.reading.version == "eagle3" and self.reading.final_normed:
            out_D = rms(out_D, self.w["norm.weight"])
        return self.head_VD @ out_D

    def drafted(self, tokens: list[int], feature_Tf: Array, passes: int) -> list[Array]:
        """Logits at the last token of a chain of 1, 2, ... drafts that ends there: ``tokens[t + 1]`` follows the feature at t."""
        outs, entries, last = [], [], len(tokens) - 2
        for t in range(last + 1):
            out_D, kv = self.entry(tokens[t + 1], self.read(feature_Tf[t].astype(np.float64)), t, entries)
            outs.append(out_D)
            entries.append(kv)
        found = [self.logits(outs[last])]
        for length in range(1, passes):
            begin = last - length
            out_D, chain = outs[begin], entries[: begin + 1]
            for t in range(begin + 1, last + 1):
                state_D = out_D
                if self.reading.version == "eagle3" and self.reading.fed_back_normed:
                    state_D = rms(out_D, self.w["norm.weight"])
                out_D, kv = self.entry(tokens[t + 1], state_D, t, chain)
                chain = [*chain, kv]
            found.append(self.logits(out_D))
        return found
