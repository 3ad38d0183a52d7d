"""Load for servers with OpenAI's API, ours and others, and what it measures: ``l4jax bench``.

Nothing here imports JAX: the client shall be light beside the server that it measures.
"""
