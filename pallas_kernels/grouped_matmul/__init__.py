"""Grouped matrix multiplication: consecutive groups of rows, each times its own matrix."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul import gpu, xla
from pallas_kernels.implementations import Implementation, first_supported

__all__ = ["grouped_matmul"]


IMPLEMENTATIONS = {"gpu": gpu.grouped_matmul, "xla": xla.grouped_matmul}


def grouped_matmul(
    lhs_Mi: Float[Array, "M i"], rhs_Eio: Float[Array, "E i o"], group_sizes_E: Int32[Array, "E"], *, implementation: Implementation = None
) -> Float[Array, "M o"]:
    """Row ``m`` of group ``g`` times ``rhs[g]``.

    Rows are sorted by group: the first ``group_sizes[0]`` rows belong to group 0, and so on; those after the last group's give zeros.
    The result is exact for any imbalance, even if one group has every row. Accumulates in float32 and returns ``lhs``'s dtype.
    ``implementation``: as for :func:`pallas_kernels.implementations.first_supported`.
    """
    return first_supported("grouped_matmul", IMPLEMENTATIONS, implementation, lhs_Mi, rhs_Eio, group_sizes_E)
