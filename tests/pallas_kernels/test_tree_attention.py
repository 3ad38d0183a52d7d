"""Tree attention: every implementation against the reference, and the reference against softmax over one long row of keys."""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.keys import Interval, PagedKeys, TreeKeys
from pallas_kernels.tree_attention import IMPLEMENTATIONS, hopper, reference, tree_attention
from pallas_kernels.tree_attention.cost import tree_attention_cost
from pallas_kernels.tree_attention.hopper import KEYS, Tiling
from tests.pallas_kernels.programs import AN_H100, on_a, on_one_cpu
from tests.pallas_kernels.simulator import simulated


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of N nodes, a tree of S keys, and page tables of W pages of p tokens."""

    B: int = 2
    N: int = 1
    S: int = 1
    K: int = 1
    G: int = 4
    h: int = 64
    W: int = 3
    p: int = 128
    dtype: str = "bfloat16"
    windows: bool = False
    multiprocessors: int = 132
    unsupported_on_hoppers: str = ""

    @property
    def scale(self):
        return self.h**-0.5

    @functools.cached_property
    def arguments(self):
        """With several rows the first one's prefix is empty. The last one's ends in its last page. A row's first node sees no node.

        Pages that are in no row's table are NaN, and so are the first and last ones if no row sees them.
        """
        B, N, S, K, G, h, W, p = self.B, self.N, self.S, self.K, self.G, self.h, self.W, self.p
        rng = np.random.default_rng(N)
        pages = rng.permutation(B * W + 2)[: B * W].reshape(B, W)
        end = rng.integers(0, W * p, B)
        end[0], end[-1] = 0, W * p - 13
        start = np.where(np.arange(B) % 2, 0, 9)
        start_BN, end_BN = (np.broadcast_to(a[:, None], (B, N)).astype(np.int32) for a in (start, end))
        if self.windows:
            start_BN = start_BN + np.arange(N, dtype=np.int32)
            end_BN = end_BN - 7 * np.arange(N, dtype=np.int32)
            start_BN[:, N // 2] = end_BN[:, N // 2] + 5
        sees = rng.random((B, N, S)) < 0.4
        sees[:, 1:, :1] = True
        sees[:, 0] = False
        k_pool, v_pool = (rng.normal(size=(B * W + 2, K, p, h)) for _ in range(2))
        unseen = np.ones(B * W + 2, bool)
        unseen[pages[:, start_BN.min() // p : -(-end_BN.max() // p)]] = False
        k_pool[unseen] = v_pool[unseen] = np.nan
        q, k, v, k_pool, v_pool = (
            jnp.asarray(a, self.dtype)
            for a in (rng.normal(size=(B, N, K, G, h)), rng.normal(size=(B, S, K, h)), rng.normal(size=(B, S, K, h)), k_pool, v_pool)
        )
        interval = Interval(jnp.asarray(start_BN), jnp.asarray(end_BN))
        tree = TreeKeys(k, v, jnp.asarray(sees)) if S else None
        return q, tree, PagedKeys(k_pool, v_pool, jnp.asarray(pages, jnp.int32), interval)

    @property
    def cost(self):
        _, tree, prefix = self.arguments
        bounds = np.asarray(prefix.interval.start_BT), np.asarray(prefix.interval.end_BT)
        seen = int(tree.sees_BNS.sum()) if tree else 0
        return tree_attention_cost(self.K, self.G, self.h, self.S, *bounds, seen, self.W * self.p)


CASES = [
    Case(),
    # Without a tree.
    Case(S=0, G=5, h=128),
    Case(S=0, B=1, N=14, G=5, W=2),
    # One split: more blocks of keys than are copied at a time, from within one to within another; one warpgroup, and two.
    Case(G=2, W=5, multiprocessors=1),
    Case(B=1, N=33, S=33, G=2, W=3, windows=True, multiprocessors=1),
    Case(N=2, S=4, W=2, dtype="float16"),
    # Rows that are no multiple of 8, the last of a full warpgroup when rounded up.
    Case(B=1, N=12, S=12, G=5, W=1),
    Case(B=1, N=25, S=25, G=5, W=1),
    # Two warpgroups, several groups of them, and one that has only padding; more than 32 nodes.
    Case(B=1, N=26, S=26, G=5, h=128, W=2),
    Case(B=1, N=40, S=64, G=5, W=2, windows=True),
    Case(K=2, G=3, B=3, p=64),
    Case(dtype="float32", unsupported_on_hoppers="takes bfloat16 or float16, the same for all arrays; they are float32"),
    Case(h=32, unsupported_on_hoppers="takes head dimensions 64 and 128; this one is 32"),
    Case(p=16, unsupported_on_hoppers="takes pages of a multiple of 64 tokens; they have 16, 3 a row"),
    Case(S=65, unsupported_on_hoppers="takes up to 64 keys of a tree; this one has 65"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_the_reference_or_says_why_not(name, case, monkeypatch):
    monkeypatch.setattr(hopper, "SMS", case.multiprocessors)

    def attend(*arguments):
        return tree_attention(*arguments, scale=case.scale, implementation=name)

    if name == "hopper" and case.unsupported_on_hoppers:
        with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
            jax.make_jaxpr(attend)(*case.arguments)
        assert str(error.value) == f"no implementation of tree_attention takes these arguments (hopper: {case.unsupported_on_hoppers})"
        return
    if name == "hopper":
        (out, lse), copied = simulated(attend, *case.arguments)
        assert copied == case.cost.copied_bytes
    else:
        out, lse = on_one_cpu(attend)(*case.arguments)
    expected_out, expected_lse = reference.tree_attention(*case.arguments, scale=case.scale)
    assert out.dtype == lse.dtype == jnp.float32
    nothing = np.isneginf(expected_lse)
    assert nothing.any() or case.B == 1
    assert (np.isneginf(lse) == nothing).all() and (np.asarray(out)[nothing] == 0).all()
    # Weights are rounded to the values' dtype, which has 8 bits (bfloat16), or 11; the sums' order differs.
    error = np.abs(out - expected_out).max() / np.abs(expected_out).max()
    assert error < {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5}[case.dtype]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_output_is_rounded_to_a_dtype_that_is_asked_for(name):
    case = Case(S=0, B=1, G=5, h=128)
    run = (lambda *a: simulated(*a)[0]) if name == "hopper" else lambda function, *a: on_one_cpu(function)(*a)
    rounded, whole = (
        run(lambda *a, dtype=dtype: tree_attention(*a, scale=case.scale, dtype=dtype, implementation=name), *case.arguments)
        for dtype in (jnp.bfloat16, None)
    )
    assert (rounded[0].dtype, whole[0].dtype, rounded[1].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(rounded[0], whole[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded[1], whole[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("implementation", [tree_attention, reference.tree_attention], ids=["merged", "reference"])
def test_equals_masked_softmax(implementation, nodes, dtype, tolerance):
    """Rows of no cached keys, of some, and of all; a window that begins after a page; a node that sees nothing."""
    B, K, G, H, PAGE = 3, 2, 2, 8, 4
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(nodes)
        pages = np.array([[3, 0, 4], [1, 5, 2], [6, 8, 7]])
        q = rng.normal(size=(B, nodes, K, G, H)).astype(dtype)
        k_new, v_new = rng.normal(size=(2, B, nodes + 2, K, H)).astype(dtype)
        k_pool, v_pool = rng.normal(size=(2, 9, K, PAGE, H)).astype(dtype)
        sees = rng.random((B, nodes, nodes + 2)) < 0.5
        start = np.array([[0], [5], [0]]) + np.zeros((1, nodes), int)
        end = np.array([[0], [9], [12]]) + np.zeros((1, nodes), int)
        sees[0, 0] = False
        interval = Interval(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))
        prefix = PagedKeys(jnp.asarray(k_pool), jnp.asarray(v_pool), jnp.asarray(pages, jnp.int32), interval)
        tree = TreeKeys(jnp.asarray(k_new), jnp.asarray(v_new), jnp.asarray(sees))
        out, lse = on_one_cpu(lambda *a: implementation(*a, scale=0.3))(jnp.asarray(q), tree, prefix)

        def cached(pool):
            return np.swapaxes(pool[pages], 2, 3).reshape(B, -1, K, H)

        k, v = np.concatenate([cached(k_pool), k_new], axis=1), np.concatenate([cached(v_pool), v_new], axis=1)
        slots = np.arange(12)
        inside = (slots >= start[:, :, None]) & (slots < end[:, :, None])
        visible = np.concatenate([inside, sees], axis=2)[:, :, None, None]
        weights = np.where(visible, np.exp(0.3 * np.einsum("bnkgh,bskh->bnkgs", q, k)), 0.0)
        total = weights.sum(-1)
        expected = np.einsum("bnkgs,bskh->bnkgh", weights, v) / np.where(total == 0, 1, total)[..., None]
        assert np.abs(np.asarray(out) - expected).max() < tolerance
        assert np.isneginf(lse[0, 0]).all() and (np.asarray(out)[0, 0] == 0).all()
        seen = total > 0
        assert np.abs(np.asarray(lse)[seen] - np.log(total[seen])).max() < 10 * tolerance


def test_a_gpu_that_is_no_hopper_takes_xla_s_and_the_log_says_so_once(caplog):
    case = Case()

    def traced(mesh):
        with jax.sharding.use_abstract_mesh(mesh), caplog.at_level(logging.INFO):
            return str(jax.make_jaxpr(lambda *a: tree_attention(*a, scale=1.0))(*case.arguments))

    hopper = "mpmd_map"
    assert all(hopper in traced(on_a(f"NVIDIA {kind}")) for kind in ("H100 80GB HBM3", "H200", "H800", "GH200 480GB"))
    assert not caplog.messages
    assert hopper not in traced(on_a("NVIDIA A100-SXM4-80GB")) + traced(on_a("NVIDIA A100-SXM4-80GB"))
    assert caplog.messages == [
        "NVIDIA A100-SXM4-80GB is not a Hopper GPU: XLA's kernels are used instead of l4jax's own, which are written for H100s"
    ]


def test_a_name_that_the_op_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"^implementation is 'triton'; tree_attention has hopper, xla$"):
        tree_attention(*Case().arguments, scale=1.0, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"\(hopper: written for GPUs; there is no mesh that says what the program is for\)$"):
        tree_attention(*Case().arguments, scale=1.0, implementation=["hopper"])


@pytest.mark.parametrize("case", [case for case in CASES if case.multiprocessors == 1], ids=str)
def test_a_case_refills_every_stage(case, monkeypatch):
    """Or the simulator would show nothing of it."""
    monkeypatch.setattr(hopper, "SMS", 1)
    tiling = Tiling.of(case.B, case.K, case.N * case.G, case.S, case.W * case.p, case.h)
    assert tiling.splits == 1 and tiling.warpgroups == (1 if case.N == 1 else 2)
    assert case.W * case.p // KEYS - 1 > tiling.stages


def test_registers_of_all_warpgroups_fit():
    """Those of a thread at the start (``test_compiled.py`` reads them off the assembler) are divided anew by the kernel."""
    for warpgroups, at_the_start in ((1, 232), (2, 168)):
        assert 40 + warpgroups * hopper._REGISTERS[warpgroups] <= (warpgroups + 1) * at_the_start


def test_a_sequence_gets_the_same_bits_whatever_is_beside_it():
    case = Case(B=3, N=2, S=2, G=2, W=2)
    q, tree, prefix = case.arguments

    def attended(keep):
        interval = jax.tree.map(lambda bound: jnp.where(keep[:, None], bound, 0), prefix.interval)
        sees = tree.sees_BNS & keep[:, None, None]
        given = q, dataclasses.replace(tree, sees_BNS=sees), dataclasses.replace(prefix, interval=interval)
        return simulated(lambda *a: tree_attention(*a, scale=0.1, implementation="hopper"), *given)[0]

    together, alone = attended(jnp.ones(3, bool)), attended(jnp.arange(3) == 2)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[2], b[2])


def test_how_a_row_is_cut_depends_on_shapes_and_fills_an_h100():
    assert Tiling.of(1, 8, 4, 1, 8192, 128) == Tiling(rows=8, h=128, warpgroups=1, groups=1, splits=16, tree_keys=16, stages=4)
    assert Tiling.of(32, 8, 16, 4, 8192, 128) == Tiling(rows=16, h=128, warpgroups=1, groups=1, splits=1, tree_keys=16, stages=4)
    assert Tiling.of(8, 1, 26 * 5, 26, 8192, 128) == Tiling(rows=136, h=128, warpgroups=2, groups=2, splits=8, tree_keys=32, stages=3)
    assert Tiling.of(1, 1, 64 * 5, 64, 8192, 128) == Tiling(rows=320, h=128, warpgroups=2, groups=3, splits=44, tree_keys=64, stages=2)
    # 72 blocks in one wave would leave 60 multiprocessors idle: 7 splits are 504 blocks, 4 waves, 57 % of the time.
    assert [Tiling.of(batch, 8, 4, 1, 8192, 128).splits for batch in (2, 4, 9, 16, 17)] == [8, 4, 7, 1, 3]
    assert Tiling.of(1, 1, 8, 64, 128, 64) == Tiling(rows=8, h=64, warpgroups=1, groups=1, splits=2, tree_keys=64, stages=4)


def test_costs_of_decoding_8_rows_with_8k_tokens():
    """Llama 3.1 8B: almost all is keys and values, 4 KiB a token and layer."""
    start, end = np.zeros((8, 1), int), np.full((8, 1), 8192)
    cost = tree_attention_cost(8, 4, 128, 1, start, end, seen=8, slots=8192)
    assert cost.flops == 4 * 32 * 128 * 8 * 8193
    assert cost.least_bytes == 8 * (8193 * 4096 + 32 * 128 * 2 + 32 * 129 * 4)
    assert cost.copied_bytes < 1.02 * cost.least_bytes
