"""Experts: every implementation against the reference, the reference against float64, and what the kernels for Hopper GPUs copy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.cost import kernel_flops
from pallas_kernels.experts import IMPLEMENTATIONS, Experts, experts, few_rows, many_rows, reference
from pallas_kernels.experts.cost import experts_cost
from pallas_kernels.experts.few_rows import Tiling
from pallas_kernels.experts.grouped import grouped_matmul
from pallas_kernels.mosaic import SHARED_BYTES
from tests.pallas_kernels.programs import AN_H100, on_one_cpu
from tests.pallas_kernels.simulator import simulated


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows that chose these of E experts (another number: none), of width D, through experts of width F.

    ``here``: whether the shared expert counts on this device; None: there is none.
    """

    chosen: tuple[int, ...]
    E: int = 4
    D: int = 256
    F: int = 128
    here: bool | None = True
    scored: bool = True
    dtype: str = "bfloat16"
    multiprocessors: int = 132
    unsupported_on_hoppers: str = ""

    @functools.cached_property
    def arguments(self):
        """Experts that nobody chose are NaN, and so is a shared expert that counts elsewhere."""
        E, D, F = self.E, self.D, self.F
        rng = np.random.default_rng(len(self.chosen))

        def blocks(count, unused):
            gate_up, down = rng.normal(size=(count, 2, F, D)) * D**-0.5, rng.normal(size=(count, D, F)) * F**-0.5
            gate_up[unused] = down[unused] = np.nan
            return Experts(jnp.asarray(gate_up, self.dtype), jnp.asarray(down, self.dtype))

        routed, shared = blocks(E, [e for e in range(E) if e not in self.chosen]), blocks(1, [] if self.here else [0])
        x = jnp.asarray(rng.normal(size=(len(self.chosen), D)), self.dtype)
        score = jnp.asarray(rng.random(len(self.chosen)), jnp.float32) if self.scored else None
        given = x, score, jnp.asarray(self.chosen, jnp.int32), routed
        return given if self.here is None else (*given, shared, jnp.asarray(self.here))


def random_choices(rows, E=4):
    """Each row's choice, at random: any expert but number 1, or none: numbers of other devices' experts are below 0, or from E on."""
    return tuple(np.random.default_rng(rows).choice([-5, -1, 0, *range(2, E), E, E + 3], rows).tolist())


CASES = [
    Case((2,)),
    Case(random_choices(9)),
    Case(random_choices(30), here=False),
    Case((3,) * 64, here=None, scored=False),
    # One share of the inputs: more blocks of them than are copied at a time.
    Case(random_choices(8), multiprocessors=1),
    Case(random_choices(3), D=512, F=256, dtype="float16"),
    # Full blocks of rows, and others; an expert with one row; most rows in one expert.
    Case((2,) * 300 + (0,) + random_choices(20)),
    Case((0,) * 128 + (3,) * 7, here=None, scored=False),
    Case(random_choices(70), here=False, dtype="float16"),
    Case(random_choices(5), dtype="float32", unsupported_on_hoppers="takes bfloat16 or float16, the same for all arrays; they are float32"),
    Case(random_choices(5), F=96, unsupported_on_hoppers="takes D a multiple of 128 and F of 64; they are 256 and 96"),
    Case(random_choices(70), F=64, unsupported_on_hoppers="takes D a multiple of 256 and F of 128; they are 256 and 64"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case.chosen)}-{case.D}-{case.F}-{case.here}-{case.dtype}")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_the_reference_or_says_why_not(name, case, monkeypatch):
    monkeypatch.setattr(few_rows, "SMS", case.multiprocessors)

    def run(*arguments):
        return experts(*arguments, implementation=name)

    if name == "hopper" and case.unsupported_on_hoppers:
        with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
            jax.make_jaxpr(run)(*case.arguments)
        assert str(error.value) == f"no implementation of experts takes these arguments (hopper: {case.unsupported_on_hoppers})"
        return
    if name == "hopper":
        out, copied = simulated(run, *case.arguments)
        assert copied == experts_cost(np.array(case.chosen), case.E, case.D, case.F, shared=bool(case.here)).copied_bytes
    else:
        out = on_one_cpu(run)(*case.arguments)
    shared = case.arguments[4] if case.here else None
    expected = reference.experts(*case.arguments[:4], shared)
    assert out.dtype == case.arguments[0].dtype
    # Rows, hidden values and results are rounded to 8 bits (bfloat16), or 11; a sum of some hundreds of hidden values averages most of it.
    error = np.abs(np.asarray(out, np.float32) - expected).max() / np.abs(expected).max()
    assert error < {"bfloat16": 1e-2, "float16": 1.5e-3, "float32": 1e-5}[case.dtype]


@pytest.mark.parametrize("here", [None, True])
def test_the_reference_equals_float64(here):
    case = Case(random_choices(12), here=here, dtype="float32", D=8, F=6)
    x, score, _, routed, *shared = case.arguments
    x, score = np.asarray(x, np.float64), np.asarray(score, np.float64)

    def block(weights, e, row):
        gate, up = np.asarray(weights.gate_up_E2FD, np.float64)[e] @ row
        return np.asarray(weights.down_EDF, np.float64)[e] @ (gate / (1 + np.exp(-gate)) * up)

    expected = [
        (block(routed, e, score[m] * x[m]) if 0 <= e < case.E else 0) + (block(shared[0], 0, x[m]) if here else np.zeros(case.D))
        for m, e in enumerate(case.chosen)
    ]
    np.testing.assert_allclose(reference.experts(*case.arguments[:4], shared[0] if here else None), expected, rtol=1e-5, atol=1e-6)


def test_a_row_gets_the_same_bits_whatever_is_beside_it():
    case = Case((2, 0, 2, 3, -1), here=True)
    x, score, chosen, *weights = case.arguments

    def run(x, chosen):
        return simulated(lambda *a: experts(*a, implementation="hopper"), x, score, chosen, *weights)[0]

    together, alone = run(x, chosen), run(jnp.where(jnp.arange(5)[:, None] == 2, x, 7), jnp.where(jnp.arange(5) == 2, chosen, 3))
    np.testing.assert_array_equal(together[2], alone[2])


def test_tiling_of_few_rows_fills_an_h100():
    # Scout on tensor=8: two experts' gate and up matrices are 32 blocks, which are divided by 10 for two to a multiprocessor.
    assert Tiling.of(1, 16, 1024, 5120) == Tiling(outputs=1024, inputs=5120, splits=10, stages=3)
    assert Tiling.of(1, 16, 2560, 1024) == Tiling(outputs=2560, inputs=1024, splits=4, stages=3)
    assert Tiling.of(64, 16, 1024, 5120) == Tiling(outputs=1024, inputs=5120, splits=1, stages=3)
    # All of Maverick's 128 experts, each a sixteenth: 28 of them and the shared one.
    assert Tiling.of(32, 128, 512, 5120) == Tiling(outputs=512, inputs=5120, splits=2, stages=3)
    assert 2 * (Tiling.of(64, 16, 1024, 5120).shared_bytes + 2048) < SHARED_BYTES  # two blocks fit
    assert many_rows.shared_bytes() < SHARED_BYTES


def test_registers_of_all_warpgroups_of_many_rows_fit():
    """Those of a thread at the start (``test_compiled.py`` reads them off the assembler) are divided anew by the kernel."""
    assert sum(many_rows.REGISTERS) <= 3 * 168


def test_flops_of_kernels_are_read_off_their_operands():
    """Of 5 rows through experts of width 128, and as many without a score through the shared one."""
    operands = [(5, 256), (4, 2, 128, 256), (1, 2, 128, 256), (2, 64), (1,)]
    assert kernel_flops("experts_gate_up", operands) == 2 * 2 * 5 * 256 * (2 * 128)
    assert kernel_flops("experts_down", [(1, 5, 128), (4, 2, 128, 128), (2, 64)]) == 2 * 5 * 128 * 256
    assert kernel_flops("experts_gate_up", [(456, 256), (4, 2, 128, 256), (7, 3)]) == 2 * 456 * 256 * (2 * 128)


def test_costs_of_32_rows_of_a_sixteenth_of_maverick():
    """28 experts and the shared one, 15.7 MB each: almost all bytes are their matrices."""
    chosen = np.arange(32) % 28
    cost = experts_cost(chosen, 128, 5120, 512, shared=True)
    assert cost.flops == 6 * 64 * 5120 * 512
    assert cost.least_bytes == 29 * 6 * 5120 * 512 + 4 * 32 * 5120
    assert cost.copied_bytes < 1.4 * cost.least_bytes  # each block of outputs reads the rows again, from the L2 cache


LOOP = jax.jit(grouped_matmul)


def check(sizes, seed=0, *, after=0):
    """Groups of these sizes, and ``after`` rows of no group."""
    rng = np.random.default_rng(seed)
    lhs = rng.normal(size=(sum(sizes) + after, 5)).astype(np.float32)
    rhs = rng.normal(size=(len(sizes), 3, 5)).astype(np.float32)
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.zeros((len(lhs), 3))
    expected[: sum(sizes)] = np.einsum("mi,moi->mo", lhs[: sum(sizes)], rhs[group], dtype=np.float64)
    np.testing.assert_allclose(LOOP(lhs, rhs, np.array(sizes, np.int32)), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(shape=st.sampled_from([(1, 1), (9, 3), (70, 6), (200, 2)]), seed=st.integers(0, 2**32 - 1))
def test_the_loop_multiplies_each_group_by_its_matrix(shape, seed):
    rows, groups = shape
    cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, groups))
    check(np.diff([0, *cuts]).tolist(), seed, after=rows - int(cuts[-1]))


@pytest.mark.parametrize("sizes", [[300, 0, 0, 0], [0, 0, 0, 300], [0, 1, 298, 1], [128, 128, 0, 44], [1, 0, 0, 0]])
def test_the_loop_is_exact_for_any_imbalance(sizes):
    check(sizes)


@pytest.mark.parametrize("sizes", [[0, 0], [1, 0], [0, 5], [3, 9]])
def test_the_loop_gives_zeros_after_the_last_group(sizes):
    """Also in rows that the last group's last block reaches."""
    check(sizes, after=40 - sum(sizes))


def test_the_loop_accumulates_bfloat16_in_float32():
    lhs = jnp.ones((2, 4096), jnp.bfloat16)
    rhs = jnp.full((2, 1, 4096), 1 / 64, jnp.bfloat16)
    out = LOOP(lhs, rhs, np.array([1, 1], np.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 64.0)


@pytest.mark.optimized
def test_no_program_of_dense_size_exists():
    """All experts on all rows would be a [M, E, o] product or a [M, E * i] operand; neither fits in the temporaries."""
    M, E, i, o = 256, 16, 64, 96
    shapes = jax.ShapeDtypeStruct((M, i), jnp.float32), jax.ShapeDtypeStruct((E, o, i), jnp.float32), jax.ShapeDtypeStruct((E,), jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(M * E * o, M * E * i) * 4 / 2
    block_flops = 2 * 16 * i * o  # sixteen rows a group on average: the block that the loop's body multiplies
    assert compiled.cost_analysis()["flops"] < 4 * block_flops
