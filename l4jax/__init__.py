"""l4jax: a compiled inference system for Llama 4 and Llama 3 in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4jax.checkpoints.source import CheckpointError
    from l4jax.compiled import ProgramInfo
    from l4jax.config import ConfigError, ModelConfig
    from l4jax.decoding.guide import Guide
    from l4jax.decoding.params import SamplingParams
    from l4jax.engine.handle import Handle
    from l4jax.files import FileError
    from l4jax.llm import LLM
    from l4jax.loading import load
    from l4jax.request import Completion, TokenLogprob
    from l4jax.stream import Stream
    from l4jax.text.template import ChatError, TemplateRefusal
    from sharding.hosts import join
    from sharding.mesh import MeshSpec

__all__ = [
    "LLM",
    "ChatError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "FileError",
    "Guide",
    "Handle",
    "MeshSpec",
    "ModelConfig",
    "ProgramInfo",
    "SamplingParams",
    "Stream",
    "TemplateRefusal",
    "TokenLogprob",
    "join",
    "load",
]

# Imported on first use, so that the command line answers --help without loading JAX.
_HOMES = {
    "LLM": "l4jax.llm",
    "ChatError": "l4jax.text.template",
    "CheckpointError": "l4jax.checkpoints.source",
    "Completion": "l4jax.request",
    "ConfigError": "l4jax.config",
    "FileError": "l4jax.files",
    "Guide": "l4jax.decoding.guide",
    "Handle": "l4jax.engine.handle",
    "MeshSpec": "sharding.mesh",
    "ModelConfig": "l4jax.config",
    "ProgramInfo": "l4jax.compiled",
    "SamplingParams": "l4jax.decoding.params",
    "Stream": "l4jax.stream",
    "TemplateRefusal": "l4jax.text.template",
    "TokenLogprob": "l4jax.request",
    "join": "sharding.hosts",
    "load": "l4jax.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
