"""The ``config.json`` of a published EAGLE head from a DrafterConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from l4jax.config import ConfigError, DrafterConfig, Eagle1Config, ModelConfig
from l4jax.config_formats.hf_write import config_to_hf


def config_to_eagle(config: DrafterConfig, dtype: str, to: Literal["hf", "eagle", "speculators"]) -> dict[str, Any]:
    """Return the ``config.json`` that ``drafter_config_from_eagle`` reads back as an equal configuration, in the format ``to``.

    Raises :class:`ConfigError` for a drafter that the format cannot describe.
    """
    decoder = config.decoder
    layer = config_to_hf(decoder, dtype)
    # Readers before transformers 5 look for them under these names.
    layer["rope_theta"], layer["torch_dtype"] = decoder.rope_theta, dtype
    if decoder.rope_scaling is not None:
        layer["rope_scaling"] = {key: value for key, value in layer["rope_parameters"].items() if key != "rope_theta"}
    if isinstance(config, Eagle1Config):
        if decoder.architecture == "llama" and (config.first_layer_normed or config.final_normed):
            raise ConfigError(
                "the drafter is an EAGLE-1 drafter with Llama 4's norms around plain Llama layers, which no format can describe"
            )
        if to == "speculators":
            return _speculators("eagle", decoder, layer, dtype) | {"fusion_bias": config.fuse_bias, "layernorms": False}
        return layer | ({"bias": config.fuse_bias} if decoder.architecture == "llama" else {"architectures": ["EagleLlama4ForCausalLM"]})
    norms = {
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fuse,
        "fc_norm": config.norm_each_aux,
        "norm_output": config.norm_fed_back,
    }
    head: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size}
    if config.target_head:
        head["target_head"] = True
    if to == "speculators" or config.target_hidden_size != decoder.hidden_size:
        # SafeAILab's code takes a head with this field to have an embedding of its own.
        head["target_hidden_size"] = config.target_hidden_size
    if to == "speculators":
        aux = {"eagle_aux_hidden_state_layer_ids": list(config.aux_layers)}
        return _speculators("eagle3", decoder, layer, dtype) | {**head, **norms, **aux}
    if config.norm_fed_back or 0 in config.aux_layers:
        what = "feeds its normed state back" if config.norm_fed_back else "reads the embedding"
        raise ConfigError(f"the drafter {what}, which this format cannot say; export it --to speculators")
    if any(norms.values()):
        flags = ", ".join(name for name, value in norms.items() if value)
        raise ConfigError(f"the drafter has {flags}, which readers of this format do not know; export it --to speculators")
    eagle = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.aux_layers], "use_aux_hidden_state": True}
    return layer | {"architectures": ["LlamaForCausalLMEagle3"], **head, "eagle_config": eagle}


def _speculators(kind: Literal["eagle", "eagle3"], decoder: ModelConfig, layer: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The fields that heads of both versions have in speculators' format."""
    if decoder.architecture != "llama" or decoder.num_layers != 1:
        raise ConfigError("the drafter has layers of Llama 4, or several, which speculators cannot describe; export it --to eagle")
    return {
        "architectures": ["Eagle3Speculator" if kind == "eagle3" else "EagleSpeculator"],
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": None, "architectures": []},
        },
        "transformer_layer_config": layer,
        "torch_dtype": dtype,
    }
