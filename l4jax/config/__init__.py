"""Configurations: frozen descriptions of everything that changes the mathematics of a model or a drafter."""

from __future__ import annotations

from l4jax.config.checks import ConfigError
from l4jax.config.drafter import DrafterConfig, Eagle1Config, Eagle3Config, check_fits, decoder_of, usual_aux_layers
from l4jax.config.json import config_from_json, config_to_json, drafter_config_from_json, flat_fields, stored_fields
from l4jax.config.model import Architecture, ModelConfig, MoEConfig, RopeScaling
from l4jax.config.vision import VisionConfig

__all__ = [
    "Architecture",
    "ConfigError",
    "DrafterConfig",
    "Eagle1Config",
    "Eagle3Config",
    "MoEConfig",
    "ModelConfig",
    "RopeScaling",
    "VisionConfig",
    "check_fits",
    "config_from_json",
    "config_to_json",
    "decoder_of",
    "drafter_config_from_json",
    "flat_fields",
    "stored_fields",
    "usual_aux_layers",
]
