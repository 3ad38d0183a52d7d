"""Merging partial attentions by their log-sum-exp."""

from pallas_kernels.merge.xla import Partial, merge_attention

__all__ = ["Partial", "merge_attention"]
