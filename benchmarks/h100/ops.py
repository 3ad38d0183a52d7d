"""Each op of ``pallas_kernels`` at real shapes, beside XLA's own lowering.

A program calls the op many times, with sets of arrays that together exceed the L2 cache. Each call waits for the result of the call
before, so that neither the host's work nor the cache affects the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from benchmarks.h100 import timing
from benchmarks.h100.bench import Bench, Record
from benchmarks.h100.shapes import SHAPES
from pallas_kernels.experts import Experts, experts
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.keys import Interval, NewKeys, PagedKeys, TreeKeys
from pallas_kernels.matmul import matmul
from pallas_kernels.merge import merge_attention
from pallas_kernels.shapes import Attention, Linear, Merge, Mixture
from pallas_kernels.tree_attention import tree_attention
from sharding.mesh import ONE_DEVICE

PAGE = 128
_LEAST_SECONDS, _BYTES_PER_SECOND, _FLOPS_PER_SECOND = 4e-6, 3e12, 8e14  # a lower bound on the time of a call on an H100


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Record the milliseconds that a call of the op, and of each rival in JAX, takes at every shape."""
    for shape in SHAPES[bench.sizes.name][op]:
        compare(bench, record, shape, *CASES[op](shape))


Shape = Attention | Linear | Mixture | Merge
Arrays = Callable[[Array], tuple[Array, ...]]
Implementations = Mapping[str, Callable[..., Any]]
Case = tuple[Arrays, Implementations, int]
"""A function that makes the arrays from a key, the functions that are called with them by name, and the FLOPs of a call."""


def _tree(shape: Attention) -> Case:
    B, N, W, G = shape.B, shape.T, shape.S // PAGE, shape.G
    pages_BW = jnp.arange(B * W, dtype=jnp.int32).reshape(B, W)
    start_BN, end_BN = jnp.zeros((B, N), jnp.int32), jnp.full((B, N), shape.S, jnp.int32)
    sees_BNS = jnp.broadcast_to(jnp.tril(jnp.ones((N, N), bool))[None], (B, N, N))

    def arrays(key: Array) -> tuple[Array, ...]:
        pool, nodes = (B * W, shape.K, PAGE, shape.h), (B, N, shape.K, shape.h)
        return normal(key, (B, N, shape.K, G, shape.h), pool, pool, *([] if N == 1 else [nodes, nodes]))

    def of(implementation: str | None) -> Callable[..., Array]:
        def call(q_BNKGh: Array, k_PKph: Array, v_PKph: Array, *nodes: Array) -> Array:
            prefix = PagedKeys(k_PKph, v_PKph, pages_BW, Interval(start_BN, end_BN))
            tree = TreeKeys(*nodes, sees_BNS) if nodes else None
            return tree_attention(q_BNKGh, tree, prefix, scale=shape.h**-0.5, implementation=implementation)[0]

        return call

    def gathered(q_BNKGh: Array, k_PKph: Array, v_PKph: Array) -> Array:
        q_BTHh = q_BNKGh.reshape(B, N, -1, shape.h)
        keys, values = (jnp.swapaxes(pool[pages_BW], 2, 3).reshape(B, shape.S, shape.K, shape.h) for pool in (k_PKph, v_PKph))
        return jax.nn.dot_product_attention(q_BTHh, keys, values, scale=shape.h**-0.5)

    implementations = {"own": of(None), "own (implementation='xla')": of("xla")}
    if N == 1:
        implementations["XLA: pages gathered, then dot_product_attention"] = gathered
    return arrays, implementations, shape.flops(shape.S if N == 1 else N * shape.S + N * N)


def _flash(shape: Attention) -> Case:
    """The last T of S tokens: the tokens before them are cached."""
    B, T, cached = shape.B, shape.T, shape.S - shape.T
    pages_BW = jnp.arange(B * cached // PAGE, dtype=jnp.int32).reshape(B, -1)
    token_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    causal = Interval(jnp.zeros_like(token_BT), token_BT + 1)
    whole = Interval(jnp.zeros_like(token_BT), jnp.full_like(token_BT, cached))
    scale = shape.h**-0.5

    def arrays(key: Array) -> tuple[Array, ...]:
        keys, pool = (B, T, shape.K, shape.h), (B * cached // PAGE, shape.K, PAGE, shape.h)
        return normal(key, (B, T, shape.K, shape.G, shape.h), keys, keys, *([pool, pool] if cached else []))

    def of(implementation: str | None) -> Callable[..., Array]:
        def call(q_BTKGh: Array, k_BSKh: Array, v_BSKh: Array, *pools: Array) -> Array:
            prefix = PagedKeys(*pools, pages_BW, whole) if cached else None
            new = NewKeys(k_BSKh, v_BSKh, causal)
            return flash_attention(q_BTKGh, new, prefix, scale=scale, implementation=implementation)[0]

        return call

    def jax_nn(implementation: str) -> Callable[..., Array]:
        def call(q_BTKGh: Array, k_BSKh: Array, v_BSKh: Array) -> Array:
            q_BTHh = q_BTKGh.reshape(B, T, -1, shape.h)
            options: Any = {"implementation": implementation, "is_causal": True, "scale": scale}
            return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, **options)

        return call

    rivals = {"XLA: dot_product_attention": jax_nn("xla"), "cuDNN: dot_product_attention": jax_nn("cudnn")}
    own = {"own": of(None), "own (implementation='xla')": of("xla")}
    return arrays, own if cached else own | rivals, shape.flops(T * cached + T * (T + 1) // 2)


def _experts(shape: Mixture) -> Case:
    M, E, D, F = shape.M, shape.E, shape.D, shape.F
    expert_M = jnp.repeat(jnp.arange(E, dtype=jnp.int32), jnp.asarray(shape.sizes), total_repeat_length=M)

    def arrays(key: Array) -> tuple[Array, ...]:
        return normal(key, (M, D), (E, 2, F, D), (E, D, F))

    def of(implementation: str | None) -> Callable[..., Array]:
        def call(x_MD: Array, gate_up_E2FD: Array, down_EDF: Array) -> Array:
            return experts(x_MD, None, expert_M, Experts(gate_up_E2FD, down_EDF), implementation=implementation)

        return call

    def ragged(x_MD: Array, gate_up_E2FD: Array, down_EDF: Array) -> Array:
        matrices = jnp.swapaxes(gate_up_E2FD.reshape(E, 2 * F, D), 1, 2), jnp.swapaxes(down_EDF, 1, 2)
        return in_groups(jax.lax.ragged_dot, shape, x_MD, *matrices)

    return arrays, {"own": of(None), "own (implementation='xla')": of("xla"), "XLA: ragged_dot, twice": ragged}, shape.flops


def in_groups(grouped: Callable[..., Array], shape: Mixture, x_MD: Array, gate_up_EDf: Array, down_EFD: Array) -> Array:
    """Experts by two products of sorted rows, ``grouped(rows, matrices, group_sizes=...)``, which takes matrices as [in, out]."""
    sizes_E = jnp.asarray(shape.sizes, jnp.int32)
    gate_up_Mf = grouped(x_MD, gate_up_EDf, group_sizes=sizes_E)
    return grouped(jax.nn.silu(gate_up_Mf[:, : shape.F]) * gate_up_Mf[:, shape.F :], down_EFD, group_sizes=sizes_E)


def _linear(shape: Linear) -> Case:
    def arrays(key: Array) -> tuple[Array, ...]:
        return normal(key, (shape.M, shape.i), (shape.o, shape.i))

    def dot(x_Mi: Array, weight_oi: Array) -> Array:
        return x_Mi @ weight_oi.T

    return arrays, {"own": matmul, "XLA: dot": dot}, shape.flops


def _merge(shape: Merge) -> Case:
    B, T, H, h = shape.B, shape.T, shape.H, shape.h

    def arrays(key: Array) -> tuple[Array, ...]:
        out, lse = (B, T, H, h), (B, T, H)
        return normal(key, *[out] * shape.parts, *[lse] * shape.parts, dtype=jnp.float32)

    def own(*given: Array) -> Any:
        return merge_attention(list(zip(given[: shape.parts], given[shape.parts :], strict=True)))

    return arrays, {"own": own}, shape.flops


CASES: Mapping[str, Callable[[Any], Case]] = {
    "tree_attention": _tree,
    "flash_attention": _flash,
    "matmul": _linear,
    "experts": _experts,
    "merge": _merge,
}


def compare(bench: Bench, record: Record, shape: Shape, arrays: Arrays, implementations: Implementations, flops: int) -> None:
    """Time each implementation at a shape. One that fails is a line of the table, and the others are timed; errors of the device
    that it does not recover from raise DeviceBroken.
    """
    for name, function in implementations.items():
        key, costs = f"{shape.label} | {name}", {"bytes": shape.nbytes, "flops": flops}
        if name.startswith("own"):
            function = on_device(function, bench.device)
        try:
            times, compile_seconds = timed(bench, function, arrays, shape.nbytes, flops)
        except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            record(key, costs | {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
            bench.check()
        else:
            record(key, costs | times)
            record("compile", {key: compile_seconds})


def on_device(function: Callable[..., Any], device: jax.Device) -> Callable[..., Any]:
    """The function on a mesh of one device, as l4jax's programs are: our ops read off the mesh which device they are traced for."""
    everywhere = PartitionSpec()
    return jax.shard_map(function, mesh=ONE_DEVICE.build([device]), in_specs=everywhere, out_specs=everywhere, check_vma=False)


def timed(bench: Bench, function: Callable[..., Any], arrays: Arrays, nbytes: int, flops: int) -> tuple[dict[str, Any], float]:
    """The milliseconds of a call, and the seconds of compilation."""
    copies = bench.sizes.copies(nbytes)
    least = max(_LEAST_SECONDS, nbytes / _BYTES_PER_SECOND, flops / _FLOPS_PER_SECOND)
    loops = max(1, min(bench.sizes.most_loops, int(0.01 / (least * copies))))
    with jax.default_device(bench.device):
        sets = [jax.jit(arrays)(jax.random.key(copy)) for copy in range(copies)]
        started = time.perf_counter()
        compiled = jax.jit(in_turn(function, loops)).lower(sets).compile()
        compile_seconds = time.perf_counter() - started
        seconds = timing.repeated(lambda: compiled(sets), budget=bench.sizes.seconds / 3)
    return timing.summary(seconds, per=copies * loops), compile_seconds


def in_turn(function: Callable[..., Any], loops: int) -> Callable[[list[tuple[Array, ...]]], Any]:
    """A program that calls the function with each set of arrays, one call after the other, ``loops`` times; it returns the last results."""

    def program(sets: list[tuple[Array, ...]]) -> Any:
        def again(turn: Array, _: Any) -> Any:
            results: list[Any] = []
            for given in sets:
                # All that a call is given waits for the turn of the loop and for the call before, so that XLA can neither move the
                # call, or what it does with some of its arrays alone, out of the loop, nor run two at once. It removes a wait
                # for something that nothing else needs, and a call whose result nothing needs; so all are returned.
                given, results[-1:], turn = jax.lax.optimization_barrier((given, results[-1:], turn))
                results.append(function(*given))
            return turn, results

        result = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *sets[0]))
        return jax.lax.fori_loop(0, loops, again, (jnp.int32(0), [result] * len(sets)))

    return program


def normal(key: Array, *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, shape, jnp.float32).astype(dtype) for k, shape in zip(keys, shapes, strict=True))
