"""A request's random numbers: each is a function of (request seed, output position, purpose, index) and, for noise, of the token.

The generator is Threefry-2x32 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a two-word key
selects a bijection of two-word counters. Every random number comes from two applications of it (:func:`stream_keys`, :func:`gumbel`):

    stream key = threefry(key = the seed's high and low word, counter = (output position, purpose * 2**24 + index))
    64 bits    = threefry(key = the stream key,               counter = (token, 0))

Under one seed no two streams share a key, because the bijection maps different counters to different keys. So numbers of different
purposes, positions or nodes never come from the same bits.
"""

from __future__ import annotations

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

_ROUNDS = 13  # the fewest with which the authors found no failure in BigCrush; two applications make 26
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_INDICES = 1 << 24


class Purpose(enum.IntEnum):
    """What a random number is for. Every use of randomness while decoding has an entry here, and so its own streams.

    ``TOKEN``: the noise that chooses a token. ``RESIDUAL``: the noise that chooses one after every draft was rejected. ``ACCEPTANCE``:
    the uniform number that accepts or rejects a draft; its index is the number of siblings tried before. ``DRAFT``: the noise that
    draws a node's children; its index is the node.
    """

    TOKEN = 0
    RESIDUAL = 1
    ACCEPTANCE = 2
    DRAFT = 3


def threefry(
    key_2: tuple[Array, Array], counter_2: tuple[Array, Array], rounds: int = _ROUNDS
) -> tuple[UInt32[Array, "*B"], UInt32[Array, "*B"]]:
    """Threefry-2x32 of uint32 arrays of one shape. Plain operations, so that XLA fuses the generator into the pass that needs it."""
    words = (*key_2, key_2[0] ^ key_2[1] ^ jnp.uint32(_PARITY))
    a, b = counter_2[0] + words[0], counter_2[1] + words[1]
    for number in range(rounds):
        left = _ROTATIONS[number % 8]
        a = a + b
        b = ((b << jnp.uint32(left)) | (b >> jnp.uint32(32 - left))) ^ a
        if number % 4 == 3:
            injection = number // 4 + 1
            a = a + words[injection % 3]
            b = b + words[(injection + 1) % 3] + jnp.uint32(injection)
    return a, b


def stream_keys(
    seed_B2: UInt32[Array, "B 2"], position_B: Int32[Array, "B"], purpose: Purpose, index: Int32[Array, ""] | int = 0
) -> UInt32[Array, "B 2"]:
    """The key of each row's stream; ``index`` is at least 0 and below 2**24."""
    stream = jnp.uint32(purpose * _INDICES) + jnp.asarray(index).astype(jnp.uint32)
    counter_2 = position_B.astype(jnp.uint32), jnp.broadcast_to(stream, position_B.shape)
    return jnp.stack(threefry((seed_B2[:, 0], seed_B2[:, 1]), counter_2), axis=-1)


def uniform(key_B2: UInt32[Array, "B 2"]) -> Float32[Array, "B"]:
    """One number in (0, 1) for each stream. Small ones have full float32 precision, and the highest is 1 - 2**-24."""
    zero_B = jnp.zeros_like(key_B2[:, 0])
    high_B, low_B = threefry((key_B2[:, 0], key_B2[:, 1]), (zero_B, zero_B))
    return jnp.minimum(_fraction(high_B, low_B), 1 - 2**-24)


def gumbel(key_B2: UInt32[Array, "B 2"], token_V: Int32[Array, "V"]) -> Float32[Array, "B V"]:
    """Standard Gumbel noise of each stream for these tokens: -log(E), where E = -log(1 - u) is exponential and u has 64 random bits.

    Both tails reach as far as 64 bits allow: noise lies between -3.81 and 45.1, and every value has float32 precision. (Noise made from
    float32 uniform numbers would end at about 16.6, although one token in 17 million should exceed that.)
    """
    shape = len(key_B2), len(token_V)
    token_BV = jnp.broadcast_to(token_V.astype(jnp.uint32)[None], shape)
    key_2 = jnp.broadcast_to(key_B2[:, :1], shape), jnp.broadcast_to(key_B2[:, 1:], shape)
    high_BV, low_BV = threefry(key_2, (token_BV, jnp.zeros_like(token_BV)))
    u_BV, rest_BV = _fraction(high_BV, low_BV), _fraction(~high_BV, ~low_BV)  # rest is 1 - u, precise where u rounds to 1
    return -jnp.log(jnp.where(u_BV < 0.5, -jnp.log1p(-u_BV), -jnp.log(rest_BV)))


def _fraction(high: UInt32[Array, "*B"], low: UInt32[Array, "*B"]) -> Float32[Array, "*B"]:
    """64 random bits as a fraction of 2**64, plus half a unit, so that it is never 0: from 2**-65 to 1."""
    return high.astype(jnp.float32) * 2**-32 + (low.astype(jnp.float32) + 0.5) * 2**-64
