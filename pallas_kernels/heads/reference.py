"""What :func:`pallas_kernels.heads.split_heads` computes, written out in float64."""

from __future__ import annotations

import numpy as np

from pallas_kernels.heads.inputs import Heads


def split_heads(heads: Heads) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values. A rotation is a product of complex numbers."""
    x_BTKgh = np.asarray(heads.qkv_BTKgh, np.float64)
    qk_BTKgh, v_BTKh = x_BTKgh[:, :, :, :-1], x_BTKgh[:, :, :, -1]
    if heads.angles is not None:
        cos, sin = (np.asarray(a, np.float64)[:, :, None, None] for a in heads.angles)
        qk_BTKgh = ((qk_BTKgh[..., ::2] + 1j * qk_BTKgh[..., 1::2]) * (cos + 1j * sin)).view(np.float64).reshape(qk_BTKgh.shape)
        if heads.norm_eps is not None:
            qk_BTKgh = qk_BTKgh / np.sqrt((qk_BTKgh**2).mean(-1, keepdims=True) + heads.norm_eps)
    q_BTKGh, k_BTKh = qk_BTKgh[:, :, :, :-1], qk_BTKgh[:, :, :, -1]
    if heads.scale_BT is not None:
        q_BTKGh = q_BTKGh * np.asarray(heads.scale_BT, np.float64)[:, :, None, None, None]
    return q_BTKGh, k_BTKh, v_BTKh
