"""Exact attention over intervals of keys, returned with its log-sum-exp so that partial results merge."""

from pallas_kernels.flash_attention.reference import attend, attend_masked, attend_pages

__all__ = ["attend", "attend_masked", "attend_pages"]
