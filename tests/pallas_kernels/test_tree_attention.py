"""Tree attention against softmax over one long row of keys with a dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import reference, tree_attention
from tests.pallas_kernels.programs import on_one_cpu

B, K, G, H, PAGE = 3, 2, 2, 8, 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("implementation", [tree_attention, reference.tree_attention], ids=["merged", "reference"])
def test_equals_masked_softmax(implementation, nodes, dtype, tolerance):
    """Rows of no cached keys, of some, and of all; a window that begins after a page; a node that sees nothing."""
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
        arguments = (q, k_new, v_new, sees, k_pool, v_pool, pages.astype(np.int32), start.astype(np.int32), end.astype(np.int32))
        out, lse = on_one_cpu(lambda *a: implementation(*a, scale=0.3))(*map(jnp.asarray, arguments))

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
