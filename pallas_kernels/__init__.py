"""Kernels: one folder an op, each with a plain JAX reference that is its oracle and its CPU path."""
