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

MOST_ROWS = 64
"""With more rows, products of a row with experts that it did not choose would take longer than reading the experts."""
OUTPUTS = INPUTS = 64
_BLOCKS_AN_SM = 2
"""Thread blocks that share a multiprocessor: while one stores its results or starts, the other reads."""
_STAGES = 3
"""Blocks of inputs in shared memory at a time. Two thread blocks with as many fit."""
_LEAST_STEPS = 4
"""Blocks of inputs in the smallest share. Smaller ones would write more partial results than they save time."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How ``products`` of all chosen experts are divided into thread blocks.

    Each computes ``OUTPUTS`` outputs of both of an expert's matrices, for all rows, of which ``rows`` are copied (those of the batch, and
    padding), over one of ``splits`` shares of the inputs. It reads up to ``stages`` blocks of ``INPUTS`` inputs ahead.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int
    stages: int

    @classmethod
    def of(cls, M: int, E: int, outputs: int, inputs: int, itemsize: int = 2) -> Tiling:
        """For M rows and E experts, of two matrices [outputs, inputs] each. It depends on shapes only, and fills an H100.

        Raises NotImplementedError if the sizes of the matrices cannot be divided so.
        """
        if outputs % OUTPUTS or inputs % INPUTS:
            raise NotImplementedError(f"takes matrices whose sizes are multiples of 64; these are [{outputs}, {inputs}]")
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
    """Of the products with gate and up, and with down, whose outputs are taken in two halves."""
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
    here_M = (expert_M >= 0) & (expert_M < E)
    slot_S, sources = _chosen(jnp.where(here_M, expert_M, E), E), [scaled(x_MD, score_M)]
    if shared is not None:
        first = jnp.int32(E) if shared_here is None else jnp.where(shared_here, E, -1)
        slot_S, sources = jnp.concatenate([first[None], slot_S]), [*sources, x_MD]
    expert_M = jnp.where(here_M, expert_M, -1)
    x_sRD = jnp.pad(jnp.stack(sources), ((0, 0), (0, up.rows - M), (0, 0)))

    def products(name: str, tiling: Tiling, x_sRi: Array, matrices: Callable[[Experts], Array]) -> Array:
        # Without a shared expert nothing reads its matrices.
        both = matrices(routed), matrices(routed if shared is None else shared)
        return _kernel(name, tiling, len(slot_S), E, M, len(sources), x_MD.dtype)(x_sRi, *both, slot_S, expert_M)

    hidden_sRF = products("experts_gate_up", up, x_sRD, lambda of: of.gate_up_E2FD)
    if up.splits > 1:
        gate_up_sRf = jnp.sum(hidden_sRF, axis=0)
        hidden_sRF = swiglu(gate_up_sRf[..., :F], gate_up_sRf[..., F:]).astype(x_MD.dtype)
    out_zsRD = products("experts_down", down, hidden_sRF, lambda of: of.down_EDF.reshape(-1, 2, D // 2, F))
    routed_MD, *shared_MD = jnp.sum(out_zsRD, axis=0)[:, :M]
    # What no expert computed is not zero but whatever was in memory.
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


def _kernel(name: str, tiling: Tiling, S: int, E: int, M: int, sources: int, dtype: Any) -> Callable[..., Array]:
    """Products of every slot's expert with the rows that chose it: (rows times their scores and, with a second source, rows as they are;
    the routed experts' matrices, the shared one's; each slot's expert, each row's) to a result for each share, source and row.

    The shared expert, which is number E, reads the second source.
    """
    rows, stages, splits, F = tiling.rows, tiling.stages, tiling.splits, tiling.outputs
    steps = tiling.inputs // INPUTS // splits
    gated = name == "experts_gate_up" and splits == 1
    out_type, parts = (dtype, 1) if gated else (jnp.float32, 2)

    def body(
        x_ref: Any, routed_ref: Any, shared_ref: Any, slot_ref: Any, expert_ref: Any, out_ref: Any,
        x_s: Any, w_s: Any, out_s: Any, x_loaded: Any, w_loaded: Any,
    ) -> None:  # fmt: skip
        slot, split = jax.lax.axis_index("slot"), jax.lax.axis_index("split")
        first = jax.lax.axis_index("tile") * OUTPUTS
        expert = slot_ref[slot]

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
            gate, up = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, OUTPUTS), jnp.float32)] * 2)
            for i, result in enumerate([swiglu(gate, up)] if gated else [gate, up]):
                plgpu.wait_smem_to_gmem(0)
                out_s[...] = result.astype(out_type)
                plgpu.commit_smem()

                columns = pl.ds(i * F + first, OUTPUTS)

                def store(row: int, source: int, columns: Any = columns) -> None:
                    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(row, 1)], out_ref.at[split, source, pl.ds(row, 1), columns])

                for row in range(M):
                    pl.when(expert == E)(functools.partial(store, row, sources - 1))
                    pl.when(expert == expert_ref[row])(functools.partial(store, row, 0))
            plgpu.wait_smem_to_gmem(0)

    shape = (splits, sources, rows, parts * F)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, out_type),
        grid=(S, splits, F // OUTPUTS),
        grid_names=("slot", "split", "tile"),
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
    return lambda *arguments: kernel(*arguments)[0] if gated else kernel(*arguments)
