"""Grouped matrix multiplication: consecutive groups of rows, each times its own matrix."""

from pallas_kernels.grouped_matmul.xla import grouped_matmul

__all__ = ["grouped_matmul"]
