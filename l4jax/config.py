"""Model configuration: one frozen description of everything that changes the mathematics."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

Architecture = Literal["llama", "llama4"]


class ConfigError(ValueError):
    """A configuration of a model that l4jax cannot compute; the message is one line."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        _check(number and value > 0 and math.isfinite(value), f"{name} is {value!r}; expected a number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are divided by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        low, high = self.low_freq_factor, self.high_freq_factor
        _check(low <= high, f"rope_scaling has low_freq_factor {low} above high_freq_factor {high}; expected at most that")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts of Llama 4: top-1 sigmoid routing beside one ungated shared expert of the same width.

    ``moe_layers[i]`` is True where layer ``i`` has experts; the other layers are dense.
    """

    num_experts: int
    intermediate_size: int
    moe_layers: tuple[bool, ...]

    def __post_init__(self) -> None:
        _check_positive(self, "num_experts", "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Llama 4's image encoder and adapter."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    rope_theta: float
    norm_eps: float
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int
    image_token_id: int
    begin_image_token_id: int
    end_image_token_id: int

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size", "num_channels", "rope_theta"),
            *("norm_eps", "pixel_shuffle_ratio", "projector_input_dim", "projector_output_dim", "vision_output_dim"),
        )
        for whole, part in (("hidden_size", "num_heads"), ("image_size", "patch_size")):
            a, b = getattr(self, whole), getattr(self, part)
            _check(a % b == 0, f"vision {whole} is {a}; expected a multiple of {part}, which is {b}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama 3 or Llama 4 decoder.

    ``rope_layers[i]`` is True if layer ``i`` rotates its queries and keys. If it is False (NoPE), the layer has no positional
    encoding, attends to everything before it and, with ``attn_temperature_tuning``, scales its queries by position.
    ``attention_chunk_size`` confines attention in the RoPE layers to keys with the same ``position // attention_chunk_size``.
    ``intermediate_size`` is the width of the dense feed-forward layers; the experts' width is in ``moe``.
    ``sources`` says, field by field, where each value was read; equality ignores it.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_layers: tuple[bool, ...]
    attention_chunk_size: int | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    tie_word_embeddings: bool
    moe: MoEConfig | None
    vision: VisionConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sources: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive(
            self,
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
            *("max_position_embeddings", "rms_norm_eps", "rope_theta", "floor_scale"),
        )
        heads, kv_heads = self.num_heads, self.num_kv_heads
        _check(heads % kv_heads == 0, f"num_heads is {heads}; expected a multiple of num_kv_heads, which is {kv_heads}")
        _check(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; expected an even number, because RoPE rotates pairs")
        per_layer = [("rope_layers", self.rope_layers)]
        if self.moe is not None:
            per_layer.append(("moe.moe_layers", self.moe.moe_layers))
        for name, layers in per_layer:
            _check(
                len(layers) == self.num_layers, f"{name} describes {len(layers)} layers; expected num_layers, which is {self.num_layers}"
            )
        chunk = self.attention_chunk_size
        _check(chunk is None or chunk > 0, f"attention_chunk_size is {chunk}; expected a number above 0, or null for unlimited attention")
        # float32 holds every position below 2**24 exactly. With chunks, rotation counts positions from the beginning of the chunk.
        exact = 2**31 if chunk is not None else 2**24
        context = self.max_position_embeddings
        _check(context <= exact, f"max_position_embeddings is {context}; expected at most {exact}, which positions are exact for")
        for name in ("attention_chunk_size", "floor_scale"):
            _check((getattr(self, name) or 1) < 2**31, f"{name} is {getattr(self, name)}; expected less than 2**31")
        _check(math.isfinite(self.attn_scale), f"attn_scale is {self.attn_scale}; expected a finite number")
        tokens = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        for name, token in tokens + [("eos_token_ids", token) for token in self.eos_token_ids]:
            inside = token is None or 0 <= token < self.vocab_size
            _check(inside, f"{name} has token {token}, which is outside the vocabulary of {self.vocab_size}; correct one of them")

    @property
    def output_weight(self) -> str:
        """Name of the output head's weight: the embedding's if they are tied."""
        return "embed" if self.tie_word_embeddings else "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """An EAGLE drafter: a small decoder that continues the target's hidden states, and which of the target's states it reads.

    ``version``: "eagle1" predicts the target's next final hidden state and uses the target's output head; "eagle3" reads the residual
    stream in three places and has an output head over ``draft_vocab_size`` of the target's tokens.
    ``decoder``: its layers, their RoPE and norms; its ``vocab_size`` is the target's, its ``max_position_embeddings`` the trained length.
    ``target_layers``, ``target_hidden_size``: of the target that it was trained for; ``target_tokenizer``: the digest of the target's
    tokenizer, if known.
    ``aux_layers`` ("eagle3"): the target's layers whose input is read; the number ``target_layers`` means the last layer's output.
    ``own_embedding``: True if it has an embedding table of its own; otherwise it uses the target's.

    For "eagle1": ``fuse_bias``, a bias where embedding and hidden state are joined; ``first_layer_normed``, a norm before the first
    layer's attention; ``final_normed``, a norm after the last layer (Llama 4's drafters have both).
    For "eagle3": ``norm_before_residual``, the layer's residual is the hidden state after its norm; ``norm_before_fuse``, one norm over
    the three states together; ``norm_each_aux``, one norm for each of them; ``norm_fed_back``, the next step gets the normed output;
    ``target_head``, the output head is the target's, cut to the draft vocabulary (FR-Spec, arXiv 2502.14856).
    """

    version: Literal["eagle1", "eagle3"]
    decoder: ModelConfig
    draft_vocab_size: int
    target_layers: int
    target_hidden_size: int
    target_tokenizer: str | None
    aux_layers: tuple[int, ...]
    own_embedding: bool
    fuse_bias: bool
    first_layer_normed: bool
    final_normed: bool
    norm_before_residual: bool
    norm_before_fuse: bool
    norm_each_aux: bool
    norm_fed_back: bool
    target_head: bool
    sources: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive(self, "draft_vocab_size", "target_layers", "target_hidden_size")
        width, vocab = self.decoder.hidden_size, self.decoder.vocab_size
        _check(self.draft_vocab_size <= vocab, f"draft_vocab_size is {self.draft_vocab_size}; expected at most the target's, {vocab}")
        fits = self.own_embedding or width == self.target_hidden_size
        _check(
            fits,
            f"the drafter's width is {width}; expected the target's, {self.target_hidden_size}, because it uses the target's embedding",
        )
        _check(self.decoder.moe is None, "a drafter with experts is not supported; expected dense layers")
        if self.version == "eagle1":
            _check(
                width == self.target_hidden_size, f"an EAGLE-1 drafter has width {width}; expected the target's, {self.target_hidden_size}"
            )
            _check(self.draft_vocab_size == vocab, f"an EAGLE-1 drafter has draft_vocab_size {self.draft_vocab_size}; expected {vocab}")
            _check(not self.aux_layers, f"an EAGLE-1 drafter has aux_layers {self.aux_layers}; expected none")
            unused: tuple[str, ...] = ("norm_before_residual", "norm_before_fuse", "norm_each_aux", "norm_fed_back", "target_head")
        else:
            _check(self.decoder.num_layers == 1, f"an EAGLE-3 drafter has {self.decoder.num_layers} layers; expected 1")
            inside = self.aux_layers and all(0 <= layer <= self.target_layers for layer in self.aux_layers)
            _check(bool(inside), f"aux_layers is {self.aux_layers}; expected layers of the target, 0 to {self.target_layers}")
            both = self.norm_before_fuse and self.norm_each_aux
            _check(not both, "norm_before_fuse and norm_each_aux are both true; expected at most one")
            fits = not self.target_head or width == self.target_hidden_size
            _check(
                fits,
                f"the drafter's width is {width}; expected the target's, {self.target_hidden_size}; it uses the target's output head",
            )
            unused = ("fuse_bias", "first_layer_normed", "final_normed")
        for name in unused:
            _check(not getattr(self, name), f"{name} is true; expected false for {self.version}")


def usual_aux_layers(layers: int) -> tuple[int, int, int]:
    """The layers whose input published EAGLE-3 drafters read, for a target with this number of layers."""
    return 2, layers // 2, layers - 3


def decoder_of(config: ModelConfig | DrafterConfig) -> ModelConfig:
    """The decoder of a model (itself) or of a drafter."""
    return config.decoder if isinstance(config, DrafterConfig) else config


def check_fits(drafter: DrafterConfig, target: ModelConfig) -> None:
    """Raise :class:`ConfigError`, naming the difference, if the drafter was made for another model."""
    for name, drafters, targets in (
        ("a vocabulary of", drafter.decoder.vocab_size, target.vocab_size),
        ("a hidden size of", drafter.target_hidden_size, target.hidden_size),
        ("a layer count of", drafter.target_layers, target.num_layers),
    ):
        _check(
            drafters == targets,
            f"the drafter is for a model with {name} {drafters}, not {targets}; give this model's own drafter",
        )
    chunk = drafter.decoder.attention_chunk_size
    fits = chunk in (None, target.attention_chunk_size)
    _check(
        fits, f"the drafter's attention_chunk_size is {chunk}, and the model's {target.attention_chunk_size}; expected the same, or null"
    )


def config_to_json(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Convert everything in ``config``, sources included, to values that JSON keeps exactly."""
    return typing.cast(dict[str, Any], _to_json(dataclasses.asdict(config)))


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of :func:`config_to_json`. Raises :class:`ConfigError` if a field is missing, unknown or of another type."""
    return typing.cast(ModelConfig, _from_json(ModelConfig, values, "config"))


def drafter_config_from_json(values: Mapping[str, Any]) -> DrafterConfig:
    """As :func:`config_from_json`, for a drafter."""
    return typing.cast(DrafterConfig, _from_json(DrafterConfig, values, "drafter"))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """Convert ``value`` to the annotation ``kind``: a dataclass, a tuple, an optional, a literal or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return None if value is None else _from_json(inner, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _check(isinstance(value, Mapping), f"{where} is {value!r}; expected an object")
        kinds = typing.get_type_hints(kind)
        unknown, missing = sorted(value.keys() - kinds), sorted(kinds - value.keys())
        _check(not unknown, f"{where} has the unknown fields {', '.join(unknown)}; expected {', '.join(kinds)}")
        _check(not missing, f"{where} lacks the fields {', '.join(missing)}")
        return kind(**{name: _from_json(kinds[name], item, f"{where}.{name}") for name, item in value.items()})
    if origin is tuple:
        _check(isinstance(value, list), f"{where} is {value!r}; expected a list")
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        _check(len(items) == len(value), f"{where} has {len(value)} items; expected {len(items)}")
        return tuple(_from_json(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if origin is Literal:
        _check(value in arguments, f"{where} is {value!r}; expected one of {', '.join(map(repr, arguments))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    _check(type(value) is kind, f"{where} is {value!r}; expected {kind.__name__}")
    return value


def flat_fields(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Every value by its dotted name (``moe.num_experts``), as ``sources`` names them; ``sources`` itself is left out."""

    def walk(part: Any, prefix: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                values |= walk(value, f"{prefix}{field.name}.")
            elif field.name != "sources":
                values[prefix + field.name] = value
        return values

    return walk(config, "")
