"""Kernels: a folder for each op, with the public op, its implementations and (merge aside) a plain JAX reference for tests."""
