"""Experts of many rows on Hopper GPUs: two kernels over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels.experts.weights import Experts
from pallas_kernels.mosaic import ROWS, copy_in_turn, kernel, plgpu, swiglu, tiles

WARPGROUPS = 2
BLOCK = WARPGROUPS * ROWS
"""Rows of a thread block. Each warpgroup computes half of them."""
OUTPUTS, INPUTS = 128, 64
"""Outputs of each of two matrices that a thread block computes, and inputs that it reads at a time."""
STAGES = 3
REGISTERS = (240, 240, 24)
"""Of a thread of each warpgroup, the one that copies last."""
_GRANULE = 8
"""An expert's rows begin at a multiple of this many, which is what the copies can address."""


def shared_bytes() -> int:
    """Shared memory of a thread block, without barriers."""
    return STAGES * (BLOCK + 2 * OUTPUTS) * INPUTS * 2 + BLOCK * OUTPUTS * 2


def experts(x_MD: Float[Array, "M D"], expert_M: Int32[Array, "M"], routed: Experts) -> Float[Array, "M D"]:
    """The chosen expert's output for each row; for a row that chose none (number E), whatever is in memory."""
    M, D = x_MD.shape
    E, _, F, _ = routed.gate_up_E2FD.shape
    order_M = jnp.argsort(expert_M)
    size_E = jnp.bincount(expert_M, length=E).astype(jnp.int32)
    room_E = (size_E + _GRANULE - 1) // _GRANULE * _GRANULE
    first_E, sorted_first_E = jnp.cumsum(room_E) - room_E, jnp.cumsum(size_E) - size_E
    # Each expert's rows begin at a multiple of 8, so sorted rows move up to places with gaps between them. A row without an expert gets a
    # place past the end: it is dropped here, and read at the end as whatever the last place holds.
    places = -(-(M + E * (_GRANULE - 1)) // _GRANULE) * _GRANULE + BLOCK
    index_M, safe_expert_M = jnp.arange(M, dtype=jnp.int32), jnp.minimum(expert_M[order_M], E - 1)
    place_M = index_M - sorted_first_E[safe_expert_M] + first_E[safe_expert_M]
    place_M = jnp.where(expert_M[order_M] < E, place_M, places + index_M)
    source_P = jnp.zeros(places, jnp.int32).at[place_M].set(order_M, mode="drop", unique_indices=True)
    blocks = _blocks(size_E, first_E, M)

    hidden_PF = _kernel("experts_gate_up", x_MD.dtype, places, F, D, len(blocks), gated=True)(x_MD[source_P], routed.gate_up_E2FD, blocks)
    halves = routed.down_EDF.reshape(E, 2, D // 2, F)
    out_PD = _kernel("experts_down", x_MD.dtype, places, D // 2, F, len(blocks), gated=False)(hidden_PF, halves, blocks)
    return out_PD[jnp.zeros(M, jnp.int32).at[order_M].set(place_M, unique_indices=True)]


def _blocks(size_E: Array, first_E: Array, M: int) -> Int32[Array, "n 3"]:
    """For each block of up to ``BLOCK`` rows: its expert (-1: none, the block is left over), its first row, and its number of rows."""
    E = len(size_E)
    count_E = (size_E + BLOCK - 1) // BLOCK
    index_n = jnp.arange(-(-M // BLOCK) + min(E, M), dtype=jnp.int32)
    expert_n = jnp.sum(jnp.cumsum(count_E)[None, :] <= index_n[:, None], axis=1, dtype=jnp.int32)
    safe_n = jnp.minimum(expert_n, E - 1)
    begin_n = (index_n - (jnp.cumsum(count_E) - count_E)[safe_n]) * BLOCK
    rows_n = jnp.minimum(size_E[safe_n] - begin_n, BLOCK)
    return jnp.stack([jnp.where(expert_n < E, expert_n, -1), first_E[safe_n] + begin_n, rows_n], axis=1)


def _kernel(name: str, dtype: Any, places: int, outputs: int, inputs: int, blocks: int, *, gated: bool) -> Callable[..., Array]:
    """The kernel for two matrices [outputs, inputs] of each expert: (rows in their places, matrices, blocks of rows) to both products side
    by side, [places, 2 outputs], or if ``gated`` to SwiGLU of them, [places, outputs].
    """
    steps, products = inputs // INPUTS, 1 if gated else 2

    def body(
        x_ref: Any, w_ref: Any, blocks_ref: Any, out_ref: Any, x_s: Any, w_s: Any, out_s: Any, x_loaded: Any, w_loaded: Any, consumed: Any
    ) -> None:
        block, first = jax.lax.axis_index("block"), jax.lax.axis_index("tile") * OUTPUTS
        warpgroup = jax.lax.axis_index("warpgroup")
        expert, begin, rows = (blocks_ref[block, i] for i in range(3))
        begin = pl.multiple_of(begin, _GRANULE)

        @pl.when((expert >= 0) & (warpgroup == WARPGROUPS))
        def _copy() -> None:
            plgpu.set_max_registers(REGISTERS[-1], action="decrease")

            def fetch(step: Array, stage: Array) -> None:
                columns = pl.ds(step * INPUTS, INPUTS)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(begin, BLOCK), columns], x_s.at[stage], x_loaded.at[stage])
                for i in range(2):
                    plgpu.copy_gmem_to_smem(w_ref.at[expert, i, pl.ds(first, OUTPUTS), columns], w_s.at[stage, i], w_loaded.at[stage])

            copy_in_turn(jnp.int32(steps), STAGES, (consumed,), fetch)

        @pl.when((expert >= 0) & (warpgroup < WARPGROUPS))
        def _compute() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)

            def multiply(*sums: Any) -> tuple[Array, Array]:
                def step(index: Array, carry: int) -> int:
                    stage = jax.lax.rem(index, STAGES)
                    plgpu.barrier_wait(x_loaded.at[stage])
                    plgpu.barrier_wait(w_loaded.at[stage])
                    for i in range(2):
                        plgpu.wgmma(sums[i], x_s.at[stage, mine], w_s.at[stage, i].T)
                    plgpu.wgmma_wait(2)  # the products of the step before are done, and what they read may be replaced
                    pl.when(index > 0)(lambda: plgpu.barrier_arrive(consumed.at[jax.lax.rem(index + STAGES - 1, STAGES)]))
                    return carry

                jax.lax.fori_loop(0, steps, step, 0)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed.at[(steps - 1) % STAGES])
                return sums[0][...], sums[1][...]

            both = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, OUTPUTS), jnp.float32)] * 2)
            own_rows = rows - warpgroup * ROWS
            for i, result in enumerate([swiglu(*both)] if gated else both):
                plgpu.wait_smem_to_gmem(0)
                out_s[warpgroup] = result.astype(dtype)
                plgpu.commit_smem()
                columns = pl.ds(i * outputs + first, OUTPUTS)
                for granule in range(0, ROWS, _GRANULE):

                    def store(granule: int = granule, columns: Any = columns) -> None:
                        place = pl.ds(begin + warpgroup * ROWS + granule, _GRANULE)
                        plgpu.copy_smem_to_gmem(out_s.at[warpgroup, pl.ds(granule, _GRANULE)], out_ref.at[place, columns])

                    # The rows after an expert's last granule are another expert's.
                    pl.when(granule < own_rows)(store)
            plgpu.wait_smem_to_gmem(0)

    return kernel(
        name,
        body,
        out_type=jax.ShapeDtypeStruct((places, products * outputs), dtype),
        # Neighbours read the same rows, and one expert's matrices.
        grid=(blocks, outputs // OUTPUTS),
        grid_names=("block", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((STAGES, BLOCK, INPUTS), dtype, transforms=tiles(64)),
            plgpu.SMEM((STAGES, 2, OUTPUTS, INPUTS), dtype, transforms=tiles(64)),
            plgpu.SMEM((WARPGROUPS, ROWS, OUTPUTS), dtype, transforms=tiles(64)),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=WARPGROUPS),
        ],
    )
