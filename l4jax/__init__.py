"""l4jax: a compiled inference system for Llama 4 and Llama 3 in JAX."""
