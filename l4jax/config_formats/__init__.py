"""ModelConfig from the three formats that checkpoints come in: Hugging Face, Meta and GGUF.

A field that is absent gets the default that its format documents, never one of ours, and ``ModelConfig.sources`` records for
every field where its value was found. What the decoder does not compute (biases, other activations, other RoPE scalings,
quantised weights) is refused rather than ignored.
"""

from l4jax.config_formats.gguf import config_from_gguf
from l4jax.config_formats.hf import config_from_hf
from l4jax.config_formats.hf_write import config_to_hf
from l4jax.config_formats.meta import config_from_meta

__all__ = ["config_from_gguf", "config_from_hf", "config_from_meta", "config_to_hf"]
