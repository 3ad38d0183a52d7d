"""Attention's heads: every implementation against the reference, what is written where, and what is copied."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.heads import SPLIT, WRITE, Heads, Pools, Targets, reference, split_heads, write_heads
from pallas_kernels.heads.cost import heads_cost
from tests.pallas_kernels.programs import AN_H100, on_one_cpu
from tests.pallas_kernels.simulator import simulated

PAGES, PAGE = 5, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of T tokens, with K KV heads of G query heads each."""

    B: int = 2
    T: int = 3
    K: int = 2
    G: int = 4
    h: int = 128
    rotated: bool = True
    scaled: bool = False
    eps: float | None = None
    dtype: str = "bfloat16"
    unsupported_on_hoppers: str = ""

    @functools.cached_property
    def heads(self):
        rng = np.random.default_rng(self.h)
        qkv = jnp.asarray(rng.normal(size=(self.B, self.T, self.K, self.G + 2, self.h)), self.dtype)
        angle = rng.uniform(-9, 9, (self.B, self.T, self.h // 2)).astype(np.float32)
        angles = (jnp.cos(angle), jnp.sin(angle)) if self.rotated else None
        scale = jnp.asarray(rng.uniform(0.5, 2, (self.B, self.T)), jnp.float32) if self.scaled else None
        return Heads(qkv, angles, scale, self.eps)

    @functools.cached_property
    def written(self):
        """Pools, and targets of which the last is nowhere."""
        rng = np.random.default_rng(0)
        pools = [jnp.asarray(rng.normal(size=(PAGES, self.K, PAGE, self.h)), self.dtype) for _ in range(2)]
        place = rng.permutation(PAGES * PAGE)[: self.B * self.T].reshape(self.B, self.T).astype(np.int32)
        page = place // PAGE
        page[-1, -1] = PAGES
        return Pools(*pools), Targets(jnp.asarray(page), jnp.asarray(place % PAGE))


CASES = [
    Case(),
    Case(rotated=False, G=1, h=64),
    Case(rotated=False, scaled=True, G=5),
    Case(B=1, T=2, K=1, G=8, eps=1e-5),
    Case(B=3, T=1, G=3, h=64, scaled=True, eps=0.3, dtype="float16"),
    Case(dtype="float32", unsupported_on_hoppers="takes bfloat16 or float16; the heads are float32"),
    Case(h=32, unsupported_on_hoppers="takes head dimensions 64 and 128 and up to 62 query heads a KV head; these are 32 and 4"),
    Case(G=63, h=64, unsupported_on_hoppers="takes head dimensions 64 and 128 and up to 62 query heads a KV head; these are 64 and 63"),
    Case(B=64, T=9, K=4, G=1, h=64, unsupported_on_hoppers="takes up to 2048 tokens times KV heads; there are 2304"),
]
# Each of up to three operations rounds to 8 bits (bfloat16), 11 or 24.
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3, "float32": 1e-5}


def run(name, function, *arguments):
    """The results, and the bytes that kernels copy."""
    return simulated(function, *arguments) if name == "hopper" else (on_one_cpu(function)(*arguments), None)


def refused(case, op, function, *arguments):
    with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
        jax.make_jaxpr(function)(*arguments)
    assert str(error.value) == f"no implementation of {op} takes these arguments (hopper: {case.unsupported_on_hoppers})"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_heads_are_rotated_normalised_and_scaled(name, case):
    def split(heads):
        return split_heads(heads, implementation=name)

    if name == "hopper" and case.unsupported_on_hoppers:
        refused(case, "split_heads", split, case.heads)
        return
    results, copied = run(name, split, case.heads)
    if name == "hopper":
        assert copied == heads_cost(case.B, case.T, case.K, case.G, case.h, rotated=case.rotated).copied_bytes
    for found, expected in zip(results, reference.split_heads(case.heads), strict=True):
        assert found.dtype == case.dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", WRITE)
def test_keys_and_values_are_written_to_their_targets_and_nowhere_else(name, case):
    pools, targets = case.written

    def write(heads, pools, targets):
        return write_heads(heads, pools, targets, implementation=name)

    if name == "hopper" and case.unsupported_on_hoppers:
        refused(case, "write_heads", write, case.heads, pools, targets)
        return
    (q, after), copied = run(name, write, case.heads, pools, targets)
    if name == "hopper":
        written = case.B * case.T - 1
        assert copied == heads_cost(case.B, case.T, case.K, case.G, case.h, rotated=case.rotated, written=written).copied_bytes
    (expected_q, k, v), _ = run(name, lambda heads: split_heads(heads, implementation=name), case.heads)
    np.testing.assert_array_equal(q, expected_q)
    for before, new, found in ((pools.k_PKph, k, after.k_PKph), (pools.v_PKph, v, after.v_PKph)):
        wanted = np.array(before)
        for b, t in np.ndindex(case.B, case.T):
            if targets.page_BT[b, t] < PAGES:
                wanted[targets.page_BT[b, t], :, targets.offset_BT[b, t]] = new[b, t]
        np.testing.assert_array_equal(found, wanted)


def test_pools_of_another_dtype_are_left_to_xla():
    pools, targets = dataclasses.replace(Case(), dtype="float16").written
    with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError, match=r"takes pools of the heads' dtype; they are"):
        jax.make_jaxpr(lambda *a: write_heads(*a, implementation="hopper"))(Case().heads, pools, targets)
    assert on_one_cpu(write_heads)(Case().heads, pools, targets)[1].k_PKph.dtype == jnp.float16


def test_cost_of_heads():
    """Two tokens of one KV head with 3 query heads, one of them written. Each pair's angle is needed once, and copied for both numbers."""
    cost = heads_cost(1, 2, 1, 3, 64, rotated=True, written=1)
    assert cost.flops == 4 * 2 * 4 * 64
    assert cost.least_bytes == 2 * 5 * 128 + 2 * (2 * 32 * 4 + 3 * 128) + 2 * 128
    assert cost.copied_bytes == 2 * 5 * 128 + 2 * (2 * 64 * 4 + 3 * 128) + 2 * 128
