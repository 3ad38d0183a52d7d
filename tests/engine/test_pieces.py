"""Which lengths the pieces of a prefill have by default."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import pytest

from l4jax.engine.pieces import PREFILL_LENGTHS, default_lengths, piece_bytes
from sharding.mesh import MeshSpec
from tests.tiny import llama3_like, scout_like

DENSE = dataclasses.replace(llama3_like(), head_dim=128, max_position_embeddings=131072)
MIXTURE = dataclasses.replace(scout_like(), head_dim=128, max_position_embeddings=131072)
LONG = (*PREFILL_LENGTHS, 2048, 8192)
H100 = "NVIDIA H100 80GB HBM3"


def lengths(config=DENSE, mesh="tensor=1", kind=H100, dtype="bfloat16", available=1e12):
    device = types.SimpleNamespace(device_kind=kind)
    return default_lengths(config, MeshSpec.parse(mesh), device, jnp.dtype(dtype), available)


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
    needed = [piece_bytes(config, MeshSpec.parse(mesh), jnp.dtype("bfloat16"), tokens) for tokens in (2048, 8192)]
    for available, expected in ((10 * needed[1], LONG), (10 * needed[1] - 11, LONG[:-1]), (10 * needed[0] - 11, PREFILL_LENGTHS)):
        assert lengths(config, mesh, available=available) == expected


def test_bytes_of_a_piece():
    """Eight states of a token, and a rank's share of gate, up and hidden values; five states of each token that other ranks may send."""
    D, F = DENSE.hidden_size, DENSE.intermediate_size
    assert piece_bytes(DENSE, MeshSpec(tensor=2), jnp.dtype("bfloat16"), 100) == 2 * 100 * (8 * D + 3 * F // 2)
    D, F = MIXTURE.hidden_size, max(MIXTURE.intermediate_size, MIXTURE.moe.intermediate_size)
    assert piece_bytes(MIXTURE, MeshSpec(expert=2), jnp.dtype("bfloat16"), 100) == 2 * 100 * (18 * D + 3 * F)
