"""Exact attention of a draft tree's nodes: over the cached prefix, which all may see, and over each other, by the tree's mask."""

from pallas_kernels.tree_attention.xla import tree_attention

__all__ = ["tree_attention"]
