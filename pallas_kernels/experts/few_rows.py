"""Experts of a few rows on Hopper GPUs: two kernels that read the matrices of the experts that rows chose, and no others.

Decoding reads much and computes little, so a chosen expert's matrices are multiplied by all rows, and each row keeps the results of its
own expert: nothing is sorted, and a row's bits do not depend on the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.experts.weights import Experts, scaled
from pallas_kernels.mosaic import ROWS, SMS, plgpu, swiglu, tiles

MOST_ROWS = ROWS
"""Rows of one matrix product of a warpgroup: multiplying by as many takes no longer than by one."""
OUTPUTS = INPUTS = 64
_BLOCKS_AN_SM = 2
"""Thread blocks that share a multiprocessor: while one stores its results or starts, the other reads."""
_STAGES = 3
"""Steps of inputs in shared memory at a time. Two thread blocks with as many fit."""
_LEAST_STEPS = 4
"""Steps of the smallest part of the inputs. With smaller parts, writing partial results costs more time than splitting saves."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the products of a kernel are divided into thread blocks.

    Each multiplies 64 rows, of which the first ``rows`` are copied (the batch, rounded up to 8), by ``OUTPUTS`` rows of each of an expert's
    two matrices [``outputs``, ``inputs``], over one of ``splits`` equal parts of the inputs. ``stages``: steps of ``INPUTS`` inputs that
    are in shared memory at a time.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    stages: int

    @classmethod
    def of(cls, M: int, E: int, outputs: int, inputs: int) -> Tiling:
        """For M rows and E experts: as many parts of the inputs as an H100 needs to be busy. Only sizes of arrays decide."""
        # The chosen experts, if rows choose at random, and the shared one.
        chosen = 1 + E * (1 - (1 - 1 / E) ** M)
        steps, blocks = inputs // INPUTS, chosen * outputs / OUTPUTS
        shares = [splits for splits in range(1, steps + 1) if steps % splits == 0 and steps // splits >= _LEAST_STEPS] or [1]
        splits = next((splits for splits in shares if splits * blocks >= SMS * _BLOCKS_AN_SM), shares[-1])
        return cls(-(-M // 8) * 8, outputs, inputs, splits, min(steps // splits, _STAGES))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block, without barriers."""
        return self.stages * (ROWS + 2 * OUTPUTS) * INPUTS * 2 + ROWS * OUTPUTS * 4


def tilings(M: int, E: int, D: int, F: int) -> tuple[Tiling, Tiling]:
    """The tiling of gate and up, and that of down, whose outputs are halved to make two matrices.

    Raises NotImplementedError for sizes that cannot be divided so.
    """
    if D % (2 * OUTPUTS) or F % OUTPUTS:
        raise NotImplementedError(f"takes D a multiple of {2 * OUTPUTS} and F of {OUTPUTS}; they are {D} and {F}")
    return Tiling.of(M, E, F, D), Tiling.of(M, E, D // 2, F)


def experts(
    x_MD: Float[Array, "M D"],
    score_M: Float32[Array, "M"] | None,
    expert_M: Int32[Array, "M"],
    routed: Experts,
    shared: Experts | None,
    shared_here: Bool[Array, ""] | None,
) -> Float[Array, "M D"]:
    """Gate and up, then down. Raises NotImplementedError for sizes of matrices that the kernels do not take."""
    (M, D), (E, _, F, _) = x_MD.shape, routed.gate_up_E2FD.shape
    up, down = tilings(M, E, D, F)
    here_M = expert_M < E
    chosen, sources = _chosen(expert_M, E), [scaled(x_MD, score_M)]
    if shared is not None:
        number = jnp.int32(E) if shared_here is None else jnp.where(shared_here, E, -1)
        chosen, sources = jnp.concatenate([number[None], chosen]), [*sources, x_MD]
    expert_M = jnp.where(here_M, expert_M, -1)  # E is the shared expert's number
    x_sRD = jnp.pad(jnp.stack(sources), ((0, 0), (0, up.rows - M), (0, 0)))

    def products(name: str, tiling: Tiling, x_sRi: Array, matrices: Callable[[Experts], Array], *, gated: bool) -> Array:
        # Without a shared expert the second is a placeholder: the kernel reads it for number E only.
        both = matrices(routed), matrices(routed if shared is None else shared)
        return _kernel(name, tiling, len(chosen), E, M, len(sources), x_MD.dtype, gated=gated)(x_sRi, *both, chosen, expert_M)

    # SwiGLU needs whole sums: it is in the kernel only if the inputs are in one part.
    in_kernel = up.splits == 1
    up_results = products("experts_gate_up", up, x_sRD, lambda of: of.gate_up_E2FD, gated=in_kernel)
    hidden_sRF = up_results[0]
    if not in_kernel:
        gate_up_sRf = jnp.sum(up_results, axis=0)
        hidden_sRF = swiglu(gate_up_sRf[..., :F], gate_up_sRf[..., F:]).astype(x_MD.dtype)
    out_zsRD = products("experts_down", down, hidden_sRF, lambda of: of.down_EDF.reshape(-1, 2, D // 2, F), gated=False)
    routed_MD, *shared_MD = jnp.sum(out_zsRD, axis=0)[:, :M]
    # Rows without an expert were never written.
    y_MD = jnp.where(here_M[:, None], routed_MD, 0.0)
    if shared is not None:
        y_MD = y_MD + (shared_MD[0] if shared_here is None else jnp.where(shared_here, shared_MD[0], 0.0))
    return y_MD.astype(x_MD.dtype)


def _chosen(expert_M: Int32[Array, "M"], E: int) -> Int32[Array, "S"]:
    """The experts that rows chose, each once and in order, then -1. ``expert_M`` is E for a row that chose none."""
    index_E, index_S = jnp.arange(E, dtype=jnp.int32), jnp.arange(min(E, len(expert_M)), dtype=jnp.int32)
    chosen_E = jnp.any(expert_M[None, :] == index_E[:, None], axis=1)
    rank_E = jnp.sum(chosen_E[None, :] & (index_E[None, :] < index_E[:, None]), axis=1, dtype=jnp.int32)
    return jnp.max(jnp.where(chosen_E[None, :] & (rank_E[None, :] == index_S[:, None]), index_E[None, :], -1), axis=1)


def _kernel(name: str, tiling: Tiling, most_chosen: int, E: int, M: int, sources: int, dtype: Any, *, gated: bool) -> Callable[..., Array]:
    """Products of each chosen expert with the rows that chose it: (rows times their scores and, as a second source, rows as they are; the
    routed experts' matrices, the shared one's; the chosen experts, -1 for none; each row's expert) to a result for each part of the inputs,
    source and row: both products, or if ``gated`` SwiGLU of them.

    The shared expert, which is number E, reads the second source.
    """
    rows, stages, splits, outputs = tiling.rows, tiling.stages, tiling.splits, tiling.outputs
    steps = tiling.inputs // INPUTS // splits
    out_type, products = (dtype, 1) if gated else (jnp.float32, 2)

    def body(
        x_ref: Any, routed_ref: Any, shared_ref: Any, chosen_ref: Any, expert_ref: Any, out_ref: Any,
        x_s: Any, w_s: Any, out_s: Any, x_loaded: Any, w_loaded: Any,
    ) -> None:  # fmt: skip
        split, first = jax.lax.axis_index("split"), jax.lax.axis_index("tile") * OUTPUTS
        expert = chosen_ref[jax.lax.axis_index("chosen")]

        def fetch(step: Any, stage: Any) -> None:
            inputs = pl.ds((split * steps + step) * INPUTS, INPUTS)

            def of(source: int, matrices_ref: Any, number: Any) -> None:
                plgpu.copy_gmem_to_smem(x_ref.at[source, :, inputs], x_s.at[stage, pl.ds(0, rows)], x_loaded.at[stage])
                for i in range(2):
                    matrix_ref = matrices_ref.at[number, i, pl.ds(first, OUTPUTS), inputs]
                    plgpu.copy_gmem_to_smem(matrix_ref, w_s.at[stage, i], w_loaded.at[stage])

            pl.when(expert < E)(lambda: of(0, routed_ref, expert))
            pl.when(expert == E)(lambda: of(sources - 1, shared_ref, 0))

        def multiply(*sums: Any) -> tuple[Array, Array]:
            def step(index: Array, carry: int) -> int:
                stage = jax.lax.rem(index, stages)
                plgpu.barrier_wait(x_loaded.at[stage])
                plgpu.barrier_wait(w_loaded.at[stage])
                for i in range(2):
                    plgpu.wgmma(sums[i], x_s.at[stage], w_s.at[stage, i].T)
                plgpu.wgmma_wait(0)
                pl.when(index + stages < steps)(lambda: fetch(index + stages, stage))
                return carry

            jax.lax.fori_loop(0, steps, step, 0)
            return sums[0][...], sums[1][...]

        @pl.when(expert >= 0)
        def _compute() -> None:
            for stage in range(stages):
                fetch(stage, stage)
            both = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, OUTPUTS), jnp.float32)] * 2)
            for i, result in enumerate([swiglu(*both)] if gated else both):
                plgpu.wait_smem_to_gmem(0)
                out_s[...] = result.astype(out_type)
                plgpu.commit_smem()

                columns = pl.ds(i * outputs + first, OUTPUTS)

                def store(row: int, source: int, columns: Any = columns) -> None:
                    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(row, 1)], out_ref.at[split, source, pl.ds(row, 1), columns])

                for row in range(M):
                    pl.when(expert == E)(functools.partial(store, row, sources - 1))
                    pl.when(expert == expert_ref[row])(functools.partial(store, row, 0))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, sources, rows, products * outputs), out_type),
        grid=(most_chosen, splits, outputs // OUTPUTS),
        grid_names=("chosen", "split", "tile"),
        scratch_types=[
            plgpu.SMEM((stages, ROWS, INPUTS), dtype, transforms=tiles(64)),
            plgpu.SMEM((stages, 2, OUTPUTS, INPUTS), dtype, transforms=tiles(64)),
            plgpu.SMEM((ROWS, OUTPUTS), out_type),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
