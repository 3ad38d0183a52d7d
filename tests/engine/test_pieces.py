"""Which lengths the pieces of a prefill have by default."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import pytest

from l4jax.engine.pages import PageShape
from l4jax.engine.pieces import PREFILL_LENGTHS, default_lengths, piece_bytes
from sharding.mesh import MeshSpec
from tests.engine.calls import SMALL
from tests.tiny import drafter, llama3_like, scout_like

DENSE = dataclasses.replace(llama3_like(), head_dim=128, max_position_embeddings=131072)
MIXTURE = dataclasses.replace(scout_like(), head_dim=128, max_position_embeddings=131072)
HEAD = dataclasses.replace(drafter(DENSE).decoder, head_dim=64)
LONG = (*PREFILL_LENGTHS, 2048, 8192)
H100 = "NVIDIA H100 80GB HBM3"


def lengths(config=DENSE, mesh="tensor=1", kind=H100, dtype="bfloat16", available=1e12, head=None):
    device = types.SimpleNamespace(device_kind=kind)
    return default_lengths(config, head, MeshSpec.parse(mesh), device, jnp.dtype(dtype), available)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LONG),
        ({"dtype": "float16", "mesh": "sequence=8,tensor=2"}, LONG),
        # What the kernels do not support: XLA's lowering stores all scores.
        ({"dtype": "float32"}, PREFILL_LENGTHS),
        ({"kind": "NVIDIA A100-SXM4-80GB"}, PREFILL_LENGTHS),
        ({"kind": "cpu"}, PREFILL_LENGTHS),
        ({"config": dataclasses.replace(DENSE, head_dim=96)}, PREFILL_LENGTHS),
        # A drafter attends all tokens of a piece too.
        ({"head": HEAD}, LONG),
        ({"head": dataclasses.replace(HEAD, head_dim=96)}, PREFILL_LENGTHS),
        # No piece is longer than a rank's part of the context, in whole pages.
        ({"config": dataclasses.replace(DENSE, max_position_embeddings=8100)}, LONG),
        ({"config": dataclasses.replace(DENSE, max_position_embeddings=8000)}, LONG[:-1]),
        ({"config": dataclasses.replace(DENSE, max_position_embeddings=8192), "mesh": "sequence=8"}, PREFILL_LENGTHS),
    ],
)
def test_long_pieces_are_for_kernels_that_keep_no_scores(options, expected):
    assert lengths(**options) == expected


@pytest.mark.parametrize(("config", "mesh"), [(DENSE, "tensor=1"), (MIXTURE, "expert=2")])
def test_a_long_piece_takes_a_tenth_of_the_memory_at_most(config, mesh):
    needed = [piece_bytes(config, None, MeshSpec.parse(mesh), jnp.dtype("bfloat16"), tokens) for tokens in (2048, 8192)]
    for available, expected in ((10 * needed[1], LONG), (10 * needed[1] - 11, LONG[:-1]), (10 * needed[0] - 11, PREFILL_LENGTHS)):
        assert lengths(config, mesh, available=available) == expected


def ends(target, *, scores=False, ranks=1):
    """Of each piece of a prompt, the tokens and what they are padded to."""
    long = tuple(n * ranks for n in LONG)
    options = dataclasses.replace(SMALL, piece_lengths=long, most_scored=512 * ranks, shape=PageShape(128, ranks, None))
    start, found = 0, []
    while start < target:
        end = options.piece_end(start, target, scores=scores)
        found.append((end - start, options.piece_length(end - start)))
        start = end
    return found


@pytest.mark.parametrize(
    ("target", "pieces"),
    [
        (20, [(20, 32)]),
        (600, [(512, 512), (88, 128)]),
        (1700, [(1700, 2048)]),
        (2100, [(2048, 2048), (52, 128)]),
        (7800, [(7800, 8192)]),
        (20000, [(8192, 8192), (8192, 8192), (2048, 2048), (1568, 2048)]),
    ],
)
def test_long_pieces_are_little_padding(target, pieces):
    assert ends(target) == pieces
    assert ends(4 * target, ranks=4) == [(4 * tokens, 4 * length) for tokens, length in pieces]


def test_a_piece_that_ends_with_a_chunk_is_little_padding_too():
    """Of an attention chunk of 8,192 tokens 5,000 are cached."""
    options = dataclasses.replace(SMALL, piece_lengths=LONG, shape=PageShape(128, 1, 8192))
    start, ended = 5000, []
    while start < 20_000:
        start = options.piece_end(start, 20_000)
        ended.append(start)
    assert ended == [7048, 7560, 8072, 8192, 16384, 18432, 20_000]


def test_padding_is_never_much():
    for target in range(1, 20_000, 37):
        assert sum(length - tokens for tokens, length in ends(target)) <= 512


def test_pieces_of_scored_prompts_are_short():
    """All logits of a piece are kept."""
    assert ends(1100, scores=True) == [(512, 512), (512, 512), (76, 128)]
    assert dataclasses.replace(SMALL, piece_lengths=LONG, most_scored=512).scored_lengths == PREFILL_LENGTHS


def test_bytes_of_a_piece():
    """Eight states of a token, and a rank's share of gate, up and hidden values; five states of each token that other ranks may send."""
    D, F = DENSE.hidden_size, DENSE.intermediate_size
    assert piece_bytes(DENSE, None, MeshSpec(tensor=2), jnp.dtype("bfloat16"), 100) == 2 * 100 * (8 * D + 3 * F // 2)
    assert piece_bytes(DENSE, HEAD, MeshSpec(tensor=2), jnp.dtype("bfloat16"), 100) == 2 * 100 * (16 * D + 3 * F // 2)
    D, F = MIXTURE.hidden_size, max(MIXTURE.intermediate_size, MIXTURE.moe.intermediate_size)
    assert piece_bytes(MIXTURE, None, MeshSpec(expert=2), jnp.dtype("bfloat16"), 100) == 2 * 100 * (18 * D + 3 * F)
