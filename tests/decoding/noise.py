"""The documented random numbers in NumPy and float64, written anew from the papers: what the compiled ones are held against."""

from __future__ import annotations

import numpy as np


def threefry(key, counter, rounds=13):
    """Threefry-2x32 of uint32 arrays (Salmon et al., SC 2011)."""
    words = [np.asarray(word, np.uint64) for word in (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))]
    mask = np.uint64(0xFFFFFFFF)
    x, y = (np.asarray(counter[i], np.uint64) + words[i] & mask for i in (0, 1))
    for i in range(rounds):
        turn = np.uint64((13, 15, 26, 6, 17, 29, 16, 24)[i % 8])
        x = x + y & mask
        y = (y << turn | y >> np.uint64(32) - turn) & mask ^ x
        if i % 4 == 3:
            n = i // 4 + 1
            x, y = x + words[n % 3] & mask, y + words[(n + 1) % 3] + np.uint64(n) & mask
    return x.astype(np.uint32), y.astype(np.uint32)


def gumbel_of_bits(high, low):
    """-log(-log(1 - u)) of u = (high + (low + 1/2) / 2**32) / 2**32, without losing u near 0 or near 1."""
    u, rest = (h.astype(np.float64) * 2.0**-32 + (x.astype(np.float64) + 0.5) * 2.0**-64 for h, x in ((high, low), (~high, ~low)))
    return -np.log(np.where(u < 0.5, -np.log1p(-np.minimum(u, 0.5)), -np.log(rest)))


def token_noise(seed, position, vocab, stream=0):
    """The noise [vocab] of a seed's stream (purpose * 2**24 + index) at an output position; 0 is that of sampled tokens."""
    seed_2 = np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF)
    key_2 = threefry(seed_2, (np.uint32(position), np.uint32(stream)))
    token_V = np.arange(vocab, dtype=np.uint32)
    return gumbel_of_bits(*threefry(key_2, (token_V, np.zeros_like(token_V))))
