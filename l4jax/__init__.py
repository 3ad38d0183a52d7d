"""l4jax: a compiled inference system for Llama 4 and Llama 3 in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4jax.config import ModelConfig
    from l4jax.decoding.params import SamplingParams
    from l4jax.llm import LLM, Completion, load
    from sharding.hosts import join
    from sharding.mesh import MeshSpec

__all__ = ["LLM", "Completion", "MeshSpec", "ModelConfig", "SamplingParams", "join", "load"]

# Imported on first use, so that the command line answers --help without loading JAX.
_HOMES = {
    "LLM": "l4jax.llm",
    "Completion": "l4jax.llm",
    "MeshSpec": "sharding.mesh",
    "ModelConfig": "l4jax.config",
    "SamplingParams": "l4jax.decoding.params",
    "join": "sharding.hosts",
    "load": "l4jax.llm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
