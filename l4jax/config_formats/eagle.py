"""DrafterConfig from the ``config.json`` of published EAGLE heads.

A head's file does not name its model and, mostly, does not say everything that its outputs depend on. What it leaves open is its
format's documented default, or is asked for. Formats number auxiliary layers in two ways; here they are the layers whose *input* is
read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from l4jax.config import ConfigError, DrafterConfig, Eagle1Config, Eagle3Config, ModelConfig, usual_aux_layers
from l4jax.config_formats.fields import convert, presence, shorten
from l4jax.config_formats.hf import config_from_hf

HeadFormat = Literal["eagle", "speculators", "llama4"]
"""Whose conventions a head follows: SafeAILab's code (SpecForge, SGLang and ModelOpt write it too), speculators, or Meta's heads."""

_LLAMA4 = "EagleLlama4ForCausalLM"
_IDS = "eagle_aux_hidden_state_layer_ids"
_EAGLE1_ONLY = ("fuse_bias", "first_layer_normed", "final_normed")
_EAGLE3_ONLY = ("aux_layers", "norm_before_residual", "norm_before_fuse", "norm_each_aux", "norm_fed_back", "target_head")


@dataclasses.dataclass(frozen=True)
class HeadAnswers:
    """The user's answers to what a head's files leave open; None: as the files say.

    ``trained_length``: tokens of the longest text it was trained on. ``aux_layers``: layers whose input is read.
    ``norm_before_residual``, ``norm_fed_back``: as in :class:`Eagle3Config`.
    """

    trained_length: int | None = None
    aux_layers: tuple[int, ...] | None = None
    norm_before_residual: bool | None = None
    norm_fed_back: bool | None = None


NO_ANSWERS = HeadAnswers()


def says_head(values: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has a field that only heads have. Many heads have none, and names of architectures say too little."""
    return any(key in values for key in ("speculators_config", "speculators_model_type", "eagle_config"))


def head_format(values: Mapping[str, Any]) -> HeadFormat:
    """Return the format of a head's ``config.json``."""
    if "speculators_config" in values or "speculators_model_type" in values:
        return "speculators"
    architectures = values.get("architectures") or ()
    # Engines put "Eagle" before a head's architecture themselves, so some heads have their target's.
    of_llama4 = _LLAMA4 in architectures or "Llama4ForCausalLM" in architectures or values.get("model_type") == "llama4_text"
    return "llama4" if of_llama4 else "eagle"


def drafter_config_from_eagle(
    values: Mapping[str, Any],
    tensors: Collection[str],
    target: ModelConfig,
    target_tokenizer: str | None,
    answers: HeadAnswers,
) -> DrafterConfig:
    """Read a head's ``config.json``; ``tensors`` are the names in its weight files, which say what its layers have.

    Raises :class:`ConfigError` for what the drafters do not compute, and where the files leave open what the user has not said.
    """
    form = head_format(values)
    said = _Said(values, form)
    version = _version(said, tensors)
    layer = values.get("transformer_layer_config", {}) if form == "speculators" else values
    if not isinstance(layer, Mapping):
        raise ConfigError(f"config.json: transformer_layer_config is {shorten(layer)}; expected an object")
    decoder = _decoder(layer, version, said)
    length = _trained_length(layer, said, target.max_position_embeddings, decoder.max_position_embeddings, answers.trained_length)
    decoder = dataclasses.replace(decoder, max_position_embeddings=length)
    own_embedding = "embed_tokens.weight" in tensors
    common: dict[str, Any] = {
        "decoder": decoder,
        "target_layers": said.derive("target_layers", target.num_layers, "the target"),
        "target_tokenizer": said.derive("target_tokenizer", target_tokenizer, "the target"),
        "own_embedding": said.derive("own_embedding", own_embedding, presence("embed_tokens.weight", there=own_embedding)),
    }
    of_version = f"derived from the version, {'EAGLE-1' if version == 'eagle1' else 'EAGLE-3'}"
    if version == "eagle1":
        _refuse_answers(answers)
        if said.flag("layernorms"):
            raise ConfigError("config.json: layernorms is true, the norms of HASS heads, which is not supported; expected false")
        bias = said.flag("fusion_bias" if form == "speculators" else "bias")
        bias_key = "fusion_fc.bias" if form == "speculators" else "fc.bias"
        has_bias = bias_key in tensors
        if bias is not None and bias != has_bias:
            has = "has" if has_bias else "lacks"
            raise ConfigError(
                f"config.json says {'a' if bias else 'no'} bias, and the head {has} tensor {bias_key}: they do not belong together"
            )
        norms = form == "llama4"
        said.sources |= {"draft_vocab_size": "derived from decoder.vocab_size", "target_hidden_size": "derived from decoder.hidden_size"}
        said.sources |= dict.fromkeys(_EAGLE3_ONLY, of_version)
        return Eagle1Config(
            **common,
            fuse_bias=said.derive("fuse_bias", has_bias, presence(bias_key, there=has_bias)),
            first_layer_normed=said.derive("first_layer_normed", norms, f"the head's format, {form}"),
            final_normed=said.derive("final_normed", norms, f"the head's format, {form}"),
            sources=tuple(said.sources.items()),
        )
    if said.flag("use_aux_hidden_state") is False:
        raise ConfigError("config.json: use_aux_hidden_state is false, a head that reads one state, which is not supported; expected true")
    before_fuse, each_aux = bool(said.flag("norm_before_fc", "norm_before_fuse")), bool(said.flag("fc_norm", "norm_each_aux"))
    for key, stated in (("input_norm.weight", before_fuse), ("fc_norm.0.weight", each_aux)):
        if stated != (key in tensors):
            raise ConfigError(
                f"config.json and the tensors disagree on {key}: the file says {str(stated).lower()}; they do not belong together"
            )
    said.sources |= dict.fromkeys(_EAGLE1_ONLY, of_version)
    return Eagle3Config(
        **common,
        draft_vocab_size=said.integer("draft_vocab_size", decoder.vocab_size),
        target_hidden_size=said.integer("target_hidden_size", decoder.hidden_size),
        aux_layers=_aux_layers(said, target.num_layers, answers.aux_layers),
        norm_before_residual=_norm_before_residual(said, answers.norm_before_residual),
        norm_before_fuse=before_fuse,
        norm_each_aux=each_aux,
        norm_fed_back=_norm_fed_back(said, answers.norm_fed_back),
        target_head=bool(said.flag("target_head", "target_head")),
        sources=tuple(said.sources.items()),
    )


class _Said:
    """A head's own fields, at the top or in ``eagle_config``, and a record of where each value of the configuration was found."""

    def __init__(self, values: Mapping[str, Any], form: HeadFormat) -> None:
        nested = values.get("eagle_config") or {}
        if not isinstance(nested, Mapping):
            raise ConfigError(f"config.json: eagle_config is {shorten(nested)}; expected an object")
        self.form = form
        self.nested_ids, self.top_ids = nested.get(_IDS), values.get(_IDS)
        self.sources: dict[str, str] = {}
        self._top, self._nested = values, {key: value for key, value in nested.items() if value is not None}

    def find(self, key: str, field: str | None = None) -> Any:
        """The value of ``key``, None where it is absent; it becomes the source of the configuration's ``field``."""
        value = self._nested.get(key, self._top.get(key))
        if field is not None:
            place = f"config.json: {'eagle_config.' if key in self._nested else ''}{key}"
            self.sources[field] = f"absent from {place}" if value is None else place
        return value

    def flag(self, key: str, field: str | None = None) -> bool | None:
        """True or false, or None where it is absent."""
        value = self.find(key, field)
        return None if value is None else bool(convert(value, bool, f"config.json: {key}"))

    def integer(self, key: str, default: int) -> int:
        """The number, or ``default`` where it is absent; the configuration's field has the same name."""
        value = self.find(key, key)
        return default if value is None else int(convert(value, int, f"config.json: {key}"))

    def derive[T](self, field: str, value: T, how: str) -> T:
        """Return ``value``, which no single field of the file holds, and record ``how`` it was derived."""
        self.sources[field] = f"derived from {how}"
        return value


def _version(said: _Said, tensors: Collection[str]) -> Literal["eagle1", "eagle3"]:
    if said.form == "speculators":
        kind = said.find("speculators_model_type", "version")
        if kind not in ("eagle", "eagle3"):
            raise ConfigError(
                f'config.json: speculators_model_type is {shorten(kind)}, which is not supported; expected "eagle" or "eagle3"'
            )
        return "eagle1" if kind == "eagle" else "eagle3"
    is_eagle3 = any(key in ("d2t", "t2d") or key.startswith("midlayer.") for key in tensors)
    return said.derive("version", "eagle3" if is_eagle3 else "eagle1", "the names of the tensors")


def _decoder(layer: Mapping[str, Any], version: str, said: _Said) -> ModelConfig:
    """Return the head's layers. An absent field has the default of transformers' configuration, as in the code that heads come from."""
    values = dict(layer)
    quantized = values.get("quantization_config") or {}
    if isinstance(quantized, Mapping) and quantized.get("quant_algo") is None and quantized.get("quant_method") in (None, "modelopt"):
        values.pop("quantization_config", None)  # ModelOpt writes one that says: not quantised
    values |= {"tie_word_embeddings": False}
    if said.form == "llama4":
        values |= {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
        config = config_from_hf({**values, "moe_layers": values.get("moe_layers", [])})
        if config.moe is not None and any(config.moe.moe_layers):
            raise ConfigError("config.json: moe_layers names layers with experts; expected a head of dense layers, moe_layers []")
        config = dataclasses.replace(config, moe=None)
    else:
        values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        config = config_from_hf({"num_hidden_layers": 1, **values})
    if version == "eagle3" and config.num_layers != 1:
        raise ConfigError(f"config.json: num_hidden_layers is {config.num_layers}; expected 1, which EAGLE-3 heads have")
    place = "config.json: transformer_layer_config." if said.form == "speculators" else "config.json: "
    said.sources |= {f"decoder.{field}": source.replace("config.json: ", place) for field, source in config.sources}
    of_format = f"derived from the head's format, {said.form}"
    said.sources |= {"decoder.architecture": of_format, "decoder.tie_word_embeddings": of_format}
    field, key, default = ("moe", "moe_layers", "none") if said.form == "llama4" else ("num_layers", "num_hidden_layers", "1")
    if key not in layer:
        said.sources[f"decoder.{field}"] = f"default of EAGLE heads: {default}"
    return dataclasses.replace(config, sources=())


def _trained_length(layer: Mapping[str, Any], said: _Said, context: int, read: int, answer: int | None) -> int:
    """Return the stated length, unless it is the target's: many writers copy that, and a drafter trained at 2048 fails at 16,000."""
    if answer is not None:
        said.sources["decoder.max_position_embeddings"] = "--trained-length"
        return answer
    stated = layer.get("max_position_embeddings")
    if (stated is None and said.form == "llama4") or (stated is not None and read >= context):
        says = (
            "has no max_position_embeddings" if stated is None else f"says max_position_embeddings {stated}, which is the model's context"
        )
        raise ConfigError(f"config.json {says}, and does not say what length the head was trained at; give --trained-length N")
    return read


def _aux_layers(said: _Said, layers: int, answer: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the layers whose input is read.

    ModelOpt and SpecForge number, in ``eagle_config``, the layers whose output is read. Speculators numbers, at the top, those whose
    input is read, but heads that were converted to it have kept numbers of outputs. Of other writers' numbers at the top, only the usual
    layers can be recognised, in either way of numbering.
    """
    usual = usual_aux_layers(layers)
    if answer is not None:
        said.sources["aux_layers"] = "--aux-layers"
        return answer
    ids = said.find(_IDS, "aux_layers")
    if ids is None:
        said.sources["aux_layers"] = "default of EAGLE-3 heads: an early layer, the middle one and a late one"
        return usual
    for given in (ids, said.top_ids or []):
        if not isinstance(given, list) or not all(type(i) is int for i in given):
            raise ConfigError(f"config.json: {_IDS} is {shorten(given)}; expected a list of layers")
    outputs_plus_one = tuple(i + 1 for i in ids)
    by_outputs = f"{said.sources['aux_layers']}, which numbers outputs"
    if said.nested_ids is not None:
        if said.top_ids not in (None, ids, list(outputs_plus_one)):
            raise ConfigError(
                f"config.json: {_IDS} is {ids} in eagle_config and {said.top_ids} outside; give the layers whose input is read, "
                "--aux-layers I,J,K"
            )
        return said.derive("aux_layers", outputs_plus_one, by_outputs)
    numbers_outputs = outputs_plus_one == usual
    if numbers_outputs and said.form != "speculators":
        return said.derive("aux_layers", outputs_plus_one, by_outputs)
    if tuple(ids) == usual or (said.form == "speculators" and not numbers_outputs):
        return tuple(ids)
    raise ConfigError(
        f"config.json: {_IDS} is {ids}, and does not say whether these layers' inputs or outputs are read; give the layers whose input "
        f"is read, --aux-layers {','.join(map(str, outputs_plus_one))} if they number outputs"
    )


def _norm_before_residual(said: _Said, answer: bool | None) -> bool:
    stated = said.flag("norm_before_residual", "norm_before_residual")
    if answer is not None:
        said.sources["norm_before_residual"] = "--norm-before-residual"
        return answer
    if stated is None and said.form == "speculators":
        raise ConfigError(
            "config.json has no norm_before_residual, and its default differs between versions of speculators; "
            "give --norm-before-residual yes or no"
        )
    return bool(stated)


def _norm_fed_back(said: _Said, answer: bool | None) -> bool:
    stated = said.flag("norm_output", "norm_fed_back")
    if answer is not None:
        said.sources["norm_fed_back"] = "--norm-fed-back"
        return answer
    if stated and said.form != "speculators":
        raise ConfigError(
            "config.json: norm_output is true, which in speculators feeds the normed state back and in SpecForge does not; "
            "give --norm-fed-back yes or no"
        )
    return bool(stated)


def _refuse_answers(answers: HeadAnswers) -> None:
    for name, value in vars(answers).items():
        if value is not None and name != "trained_length":
            raise ConfigError(f"--{name.replace('_', '-')} is given, which EAGLE-1 heads do not have; leave it out")
