"""Experts of a few rows on Hopper GPUs: two kernels that read the matrices of the experts that rows chose, and no others.

Decoding reads much and computes little, so a chosen expert's matrices are multiplied by all rows, and each row keeps the results of its
own expert: nothing is sorted or listed, and a row's bits do not depend on the others.
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

from pallas_kernels.experts.weights import Experts
from pallas_kernels.mosaic import ROWS, SMS, kernel, over, plgpu, swiglu, tiles

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

    Each multiplies all rows by ``OUTPUTS`` rows of each of an expert's two matrices [``outputs``, ``inputs``], over one of ``splits`` equal
    parts of the inputs. ``stages``: steps of ``INPUTS`` inputs that are in shared memory at a time.
    """

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
        return cls(outputs, inputs, splits, min(steps // splits, _STAGES))

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
    # Each row's expert and the bits of its score are one array, so that XLA makes both in one kernel. E is the shared expert's number.
    numbers_M = jnp.where(here_M, expert_M, -1)
    scores_M = jnp.zeros_like(numbers_M) if score_M is None else jax.lax.bitcast_convert_type(score_M, jnp.int32)
    chosen_264 = jnp.pad(jnp.stack([numbers_M, scores_M]), ((0, 0), (0, ROWS - M)))
    here = [] if shared_here is None else [shared_here.astype(jnp.int32)[None]]

    def products(name: str, tiling: Tiling, x: Array, matrices: Callable[[Experts], Array], *, scored: bool, gated: bool) -> Array:
        given = [matrices(of) for of in (routed, shared) if of is not None]
        options = {"shared": shared is not None, "always_here": shared_here is None, "scored": scored, "gated": gated}
        return _kernel(name, tiling, E, M, x_MD.dtype, **options)(x, *given, chosen_264, *here)

    # SwiGLU needs whole sums: it is in the kernel only if the inputs are in one part.
    in_kernel = up.splits == 1
    up_results = products("experts_gate_up", up, x_MD, lambda of: of.gate_up_E2FD, scored=score_M is not None, gated=in_kernel)
    hidden_uMF = up_results[0]
    if not in_kernel:
        gate_up_uMf = jnp.sum(up_results, axis=0)
        hidden_uMF = swiglu(gate_up_uMf[..., :F], gate_up_uMf[..., F:]).astype(x_MD.dtype)
    halves = functools.partial(jnp.reshape, shape=(-1, 2, D // 2, F))
    out_zuMD = products("experts_down", down, hidden_uMF, lambda of: halves(of.down_EDF), scored=False, gated=False)
    routed_MD, *shared_MD = jnp.sum(out_zuMD, axis=0)
    # Rows without an expert were never written.
    y_MD = jnp.where(here_M[:, None], routed_MD, 0.0)
    if shared is not None:
        y_MD = y_MD + (shared_MD[0] if shared_here is None else jnp.where(shared_here, shared_MD[0], 0.0))
    return y_MD.astype(x_MD.dtype)


def _kernel(
    name: str, tiling: Tiling, E: int, M: int, dtype: Any, *, shared: bool, always_here: bool, scored: bool, gated: bool
) -> Callable[..., Array]:
    """The kernel of two products of each chosen expert with the rows that chose it.

    Operands: rows [M, i], or [2, M, i] if the shared expert reads other rows; the routed experts' matrices [E, 2, o, i]; if ``shared``, the
    shared one's [1, 2, o, i]; each row's expert, -1 for none, and the bits of its float32 score, [2, 64]; unless ``always_here``, [1]: 1 if
    the shared expert counts on this device. Result: [splits, sources, M, 2 o] in float32, or if ``gated`` SwiGLU of the two products,
    [splits, sources, M, o], in ``dtype``. The first source is the routed expert, the second the shared one, whose number is E. If
    ``scored``, the rows of routed experts are multiplied by their scores.
    """
    stages, splits, outputs = tiling.stages, tiling.splits, tiling.outputs
    steps = tiling.inputs // INPUTS // splits
    out_type, results = (dtype, 1) if gated else (jnp.float32, 2)
    sources = 1 + shared
    slots = min(E, M)  # rows choose no more routed experts than there are, and one each; the shared expert has a slot after them

    def body(x_ref: Any, routed_ref: Any, *given: Any) -> None:
        refs = iter(given)
        shared_ref = next(refs) if shared else None
        chosen_ref = next(refs)
        here_ref = None if always_here else next(refs)
        out_ref, x_s, w_s, out_s, x_loaded, w_loaded = refs
        slot, split, first = jax.lax.axis_index("slot"), jax.lax.axis_index("split"), jax.lax.axis_index("tile") * OUTPUTS

        def of_slot() -> Array:
            """The slot's expert; -1 if no row chose it, or if an earlier slot has it."""
            if M < E:  # a slot for each row
                own = chosen_ref[0, jnp.minimum(slot, M - 1)]
                repeated = [(row < slot) & (chosen_ref[0, row] == own) for row in range(M - 1)]
                return jnp.where(functools.reduce(jnp.logical_or, repeated, jnp.bool_(False)), -1, own)
            taken = functools.reduce(jnp.logical_or, [chosen_ref[0, row] == slot for row in range(M)])
            return jnp.where(taken, slot, -1)

        expert = of_slot()
        if shared:
            expert = jnp.where(slot < slots, expert, E if here_ref is None else jnp.where(here_ref[0] != 0, E, -1))

        def fetch(step: Any, stage: Any) -> None:
            inputs = pl.ds((split * steps + step) * INPUTS, INPUTS)

            def of(source: int, matrices_ref: Any, number: Any) -> None:
                source_ref = x_ref if len(x_ref.shape) == 2 else x_ref.at[source]
                plgpu.copy_gmem_to_smem(source_ref.at[:, inputs], x_s.at[stage, pl.ds(0, M)], x_loaded.at[stage])
                for i in range(2):
                    matrix_ref = matrices_ref.at[number, i, pl.ds(first, OUTPUTS), inputs]
                    plgpu.copy_gmem_to_smem(matrix_ref, w_s.at[stage, i], w_loaded.at[stage])

            pl.when(expert < E)(lambda: of(0, routed_ref, expert))
            if shared:
                pl.when(expert == E)(lambda: of(sources - 1, shared_ref, 0))

        def multiply(*sums: Any) -> tuple[Array, Array]:
            if scored:
                # From the GPU's memory JAX 0.11 loads this layout only so.
                bits = plgpu.load(chosen_ref.at[1], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                score = jax.lax.bitcast_convert_type(bits, jnp.float32)
                score = jax.lax.cond(expert < E, lambda score: score, jnp.ones_like, score)

            def step(index: Array, carry: int) -> int:
                stage = jax.lax.rem(index, stages)
                plgpu.barrier_wait(x_loaded.at[stage])
                # A copy of fewer than 64 rows needs shared memory that is not tiled. Products cannot read that, so the rows go through
                # registers. Rows from M on are whatever is in shared memory; their products are never stored.
                x = plgpu.load(x_s.at[stage], layout=plgpu.Layout.WGMMA)
                if scored:
                    x = (x.astype(jnp.float32) * over(score, INPUTS)).astype(dtype)
                plgpu.barrier_wait(w_loaded.at[stage])
                for i in range(2):
                    plgpu.wgmma(sums[i], x, w_s.at[stage, i].T)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()
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

                def store(source: int, row: int, count: int, columns: Any) -> None:
                    plgpu.copy_smem_to_gmem(out_s.at[pl.ds(row, count)], out_ref.at[split, source, pl.ds(row, count), columns])

                columns = pl.ds(i * outputs + first, OUTPUTS)
                if shared:
                    pl.when(expert == E)(functools.partial(store, 1, 0, M, columns))
                for row in range(M):
                    pl.when(expert == chosen_ref[0, row])(functools.partial(store, 0, row, 1, columns))
            plgpu.wait_smem_to_gmem(0)

    return kernel(
        name,
        body,
        out_type=jax.ShapeDtypeStruct((splits, sources, M, results * outputs), out_type),
        grid=(slots + shared, splits, outputs // OUTPUTS),
        # A name that a mesh axis has, such as "expert", would be taken for the mesh axis.
        grid_names=("slot", "split", "tile"),
        scratch_types=[
            plgpu.SMEM((stages, ROWS, INPUTS), dtype),
            plgpu.SMEM((stages, 2, OUTPUTS, INPUTS), dtype, transforms=tiles(64)),
            plgpu.SMEM((ROWS, OUTPUTS), out_type),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        ],
    )
