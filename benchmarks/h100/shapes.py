"""The shapes at which each op is timed, in JAX or other packages. Imports no JAX: PyTorch's worker reads it too."""

from __future__ import annotations

from pallas_kernels.shapes import NODES, REAL, Attention, Linear, Merge, Mixture, NewHeads, Residual, Splits

TOY = {
    "tree_attention": [Attention("toy decode", 2, 1, 256, K=2, G=2, h=16), Attention("toy tree", 1, NODES, 256, K=2, G=2, h=16)],
    "flash_attention": [Attention("toy prefill", 1, 64, 64, K=2, G=2, h=16), Attention("toy piece", 1, 64, 192, K=2, G=2, h=16)],
    "matmul": [Linear("toy down", 2, 64, 32)],
    "experts": [Mixture("toy experts", 16, 4, 32, 16)],
    "merge_splits": [Splits("toy splits", 2, 3, 5, K=2, G=2, h=16)],
    "write_heads": [NewHeads("toy heads", 2, K=2, G=2, h=16)],
    "add_norm": [Residual("toy norm", 2, 32)],
    "merge": [Merge("toy merge", 2, 1, 4, 3, h=16)],
}
SHAPES = {"real": REAL, "toy": TOY}
