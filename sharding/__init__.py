"""Meshes, sharding rules, sequence layouts and ring attention. Imports nothing from l4jax."""
