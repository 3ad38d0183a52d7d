"""Kernels: a folder for each op, with the public op, its implementations and a plain reference for tests."""
