"""Kernels for H100s as the compiler makes them, at the shapes of real models: nothing is spilled, and they need no copies of the cache.

Run by ``make test-h100``.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from l4jax.planning.target import h100_devices
from pallas_kernels.experts import Experts, experts, few_rows, many_rows
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.hopper import shared_bytes
from pallas_kernels.heads import Heads, Pools, Targets, write_heads
from pallas_kernels.keys import Interval, NewKeys, PagedKeys, TreeKeys
from pallas_kernels.merge import merge_splits
from pallas_kernels.merge.hopper import shared_bytes as shared_bytes_of_splits
from pallas_kernels.norm import add_norm
from pallas_kernels.shapes import REAL
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.hopper import Tiling
from sharding.mesh import ONE_DEVICE

pytestmark = pytest.mark.h100

PAGE = 128
_SAID = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers")
_WARNINGS = ("C7508", "C7510")
"""What the assembler says if it ignores a change of the number of registers, or waits for matrix products one by one."""


@pytest.fixture
def compiled(monkeypatch, capfd):
    """Compiles a function for an H100; returns the program, and what the assembler says of each kernel that is not XLA's."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    mesh = ONE_DEVICE.build(h100_devices(1))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(function, *arguments, donated=()):
        given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), arguments)
        whole = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        program = jax.jit(whole, donate_argnums=donated).lower(*given).compile()
        said = capfd.readouterr().out
        assert not any(warning in said for warning in _WARNINGS)
        return program, [tuple(map(int, kernel)) for kernel in _SAID.findall(said)]

    return of


TREES = REAL["tree_attention"]


@pytest.mark.parametrize(("shape", "dtype"), [*((shape, "bfloat16") for shape in TREES), (TREES[0], "float16")], ids=str)
def test_tree_attention(shape, dtype, compiled, capfd):
    B, N, K, G, h, W = shape.B, shape.T, shape.K, shape.G, shape.h, shape.S // PAGE
    array = jax.ShapeDtypeStruct
    pool, nodes, bounds = array((B * W, K, PAGE, h), dtype), array((B, N, K, h), dtype), array((B, N), jnp.int32)
    prefix = PagedKeys(pool, pool, array((B, W), jnp.int32), Interval(bounds, bounds))
    tree = None if N == 1 else TreeKeys(nodes, nodes, array((B, N, N), jnp.bool_))

    def attend(*arguments):
        return tree_attention(*arguments, scale=0.1, implementation="hopper")[0]

    program, kernels = compiled(attend, array((B, N, K, G, h), dtype), tree, prefix)
    # A block has a warpgroup that copies, and one or two that compute: 255 or 168 registers a thread would be the most.
    # The second, which merges splits, has a test of its own; it is not there if an earlier test compiled it.
    assert kernels[0] == (0, 0, 232 if N * G <= 64 else 168)
    tiling = Tiling.of(B, K, N * G, N if tree else 0, shape.S, h)
    spilled, _, registers = kernels[0]
    with capfd.disabled():
        print(f"| tree_attention | {shape.label}, {dtype} | {registers} | {tiling.shared_bytes / 1024:.0f} | {spilled} |")
    partial_results = B * K * tiling.splits * tiling.rows * (h + 1) * 4
    queries = 0 if N == 1 else B * K * N * G * h * 2  # transposed
    numbers, padded_nodes = B * tiling.groups * 128 * 4 * 4, 2 * B * K * tiling.tree_keys * h * 2
    assert program.memory_analysis().temp_size_in_bytes < partial_results + 2 * (queries + numbers + padded_nodes) + 2**16


@pytest.mark.parametrize("shape", REAL["merge_splits"], ids=str)
def test_merge_splits(shape, compiled, capfd):
    B, T, K, G, h, splits = shape.B, shape.T, shape.K, shape.G, shape.h, shape.splits
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def merge(*arguments):
        return merge_splits(*arguments, T, G, jnp.bfloat16, implementation="hopper")[0]

    rows = -(-T * G // 8) * 8
    program, kernels = compiled(merge, array((B, K, splits, rows, h)), array((B, K, splits, rows)))
    ((stores, loads, registers),) = kernels
    assert stores == loads == 0 and registers <= 255
    assert program.memory_analysis().temp_size_in_bytes < 2**12
    with capfd.disabled():
        print(f"| merge_splits | {shape.label}, bfloat16 | {registers} | {shared_bytes_of_splits(splits, h) / 1024:.0f} | {stores} |")


@pytest.mark.parametrize("shape", REAL["flash_attention"], ids=str)
def test_flash_attention(shape, compiled, capfd):
    B, T, K, G, h, cached = shape.B, shape.T, shape.K, shape.G, shape.h, shape.S - shape.T
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    bounds = jax.ShapeDtypeStruct((B, T), jnp.int32)
    new = NewKeys(array((B, T, K, h)), array((B, T, K, h)), Interval(bounds, bounds))
    pool, tables = array((B * cached // PAGE, K, PAGE, h)), jax.ShapeDtypeStruct((B, cached // PAGE), jnp.int32)
    prefix = PagedKeys(pool, pool, tables, Interval(bounds, bounds)) if cached else None

    def attend(*arguments):
        return flash_attention(*arguments, scale=0.1, implementation="hopper")[0]

    program, kernels = compiled(attend, array((B, T, K, G, h)), new, prefix)
    spilled, _, registers = kernels[0]
    assert (len(kernels), spilled, registers) == (1, 0, 168 if T > 64 else 240)
    # The log-sum-exp, and each query's and block's bounds. Short prompts are padded to 64 tokens.
    padded = 0 if T % 128 == 0 else B * 64 * K * h * (2 * G + 4 + 4 * G)
    assert program.memory_analysis().temp_size_in_bytes < B * T * (K * G * 4 + 64) + padded + 2**17
    with capfd.disabled():
        shared = shared_bytes(1 if T <= 64 else 2, h)
        print(f"| flash_attention | {shape.label}, bfloat16 | {registers} | {shared / 1024:.0f} | {spilled} |")


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, "bfloat16") for shape in REAL["experts"]), (REAL["experts"][0], "float16")], ids=str
)
def test_experts(shape, dtype, compiled, capfd):
    M, E, D, F = shape.M, shape.E, shape.D, shape.F
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    routed, shared = (Experts(array((n, 2, F, D)), array((n, D, F))) for n in (E, 1))
    given = array((M, D)), jax.ShapeDtypeStruct((M,), jnp.float32), jax.ShapeDtypeStruct((M,), jnp.int32), routed, shared
    program, found = compiled(functools.partial(experts, implementation="hopper"), *given)
    few = M <= few_rows.MOST_ROWS
    block_bytes = [tiling.shared_bytes for tiling in few_rows.tilings(M, E, D, F)] if few else [many_rows.shared_bytes()] * 2
    for name, (stores, loads, registers), nbytes in zip(("gate_up", "down"), found, block_bytes, strict=True):
        assert stores == loads == 0
        # Of few rows two blocks of a warpgroup share a multiprocessor. Of many rows one block of three warpgroups fills it. They divide
        # anew what they have at the start, and would wait for ever if that were less than they ask for.
        assert registers <= 255 if few else registers == 168
        with capfd.disabled():
            print(f"| experts_{name} | {shape.label}, {dtype} | {registers} | {nbytes / 1024:.0f} | {stores} |")
    # Rows and hidden values, each with its place among the sorted rows; or partial results. Never a matrix.
    places = M + 8 * E + 128
    assert program.memory_analysis().temp_size_in_bytes < (2**23 if few else 2 * places * (2 * D + F) + 4 * M * (D + F) * 2)


@pytest.mark.parametrize("shape", REAL["write_heads"], ids=str)
def test_write_heads(shape, compiled, capfd):
    B, K, h = shape.B, shape.K, shape.h
    array, number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), jax.ShapeDtypeStruct((B, 1), jnp.int32)
    angle = jax.ShapeDtypeStruct((B, 1, h // 2), jnp.float32)
    heads = Heads(array((B, 1, K, shape.G + 2, h)), (angle, angle), jax.ShapeDtypeStruct((B, 1), jnp.float32), 1e-5)
    pools = Pools(array((64, K, PAGE, h)), array((64, K, PAGE, h)))
    write = functools.partial(write_heads, implementation="hopper")
    program, kernels = compiled(write, heads, pools, Targets(number, number), donated=1)
    ((stores, loads, registers),) = kernels
    assert stores == loads == 0 and registers <= 255
    # In place: the pools are neither copied nor part of the result.
    assert program.memory_analysis().alias_size_in_bytes == 2 * 64 * K * PAGE * h * 2
    assert program.memory_analysis().temp_size_in_bytes < 2 * B * h * 4 + 2**14
    with capfd.disabled():
        print(f"| heads | {shape.label}, bfloat16 | {registers} | {(64 * h * 2 + h * h * 2 + 8 * h) / 1024:.0f} | {stores} |")


@pytest.mark.parametrize("shape", REAL["add_norm"], ids=str)
def test_add_norm(shape, compiled, capfd):
    row, scale = jax.ShapeDtypeStruct((shape.M, shape.D), jnp.bfloat16), jax.ShapeDtypeStruct((shape.D,), jnp.bfloat16)
    _, kernels = compiled(functools.partial(add_norm, eps=1e-5, implementation="hopper"), row, row, scale)
    ((stores, loads, registers),) = kernels
    assert stores == loads == 0 and registers <= 255
    with capfd.disabled():
        print(f"| add_norm | {shape.label}, bfloat16 | {registers} | 0 | {stores} |")
