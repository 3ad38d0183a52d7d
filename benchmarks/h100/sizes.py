"""The sizes of everything: for an H100, or as small as a test needs. Imports no JAX: the supervising process reads it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """``model`` and ``head``: fields of Llama 3.1 8B's configuration, and of its drafter's layer, that are replaced.

    ``rows``: batch sizes. ``contexts``: cached tokens at which a step is timed, by one program for each batch size.
    ``pieces``: lengths of prefill programs; each prefills all of ``prompts``. ``speculated_rows``: batch sizes at
    which rounds of speculation are timed. ``copy_bytes``: size of the array that is copied. ``matmul``: rows and columns of the square
    product. ``rotated_bytes``: an op's calls take turns over arrays of this size together, so that none stays in a cache.
    ``most_loops``: how often one program may go over these arrays. ``seconds``: how long a measurement may repeat, after three
    repetitions.
    """

    name: str
    model: Mapping[str, Any]
    head: Mapping[str, Any]
    draft_vocab_size: int
    dtype: str
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    speculated_rows: tuple[int, ...]
    prompts: tuple[int, ...]
    pieces: tuple[int, ...]
    copy_bytes: int
    matmul: int
    rotated_bytes: int
    most_loops: int
    seconds: float

    def copies(self, nbytes: int) -> int:
        """Sets of arrays of ``nbytes`` bytes that a measurement takes in turn, so that together they exceed the L2 cache."""
        return max(1, -(-self.rotated_bytes // nbytes))


REAL = Sizes(
    name="real",
    model={},
    head={},
    draft_vocab_size=32000,
    dtype="bfloat16",
    rows=(1, 8, 32),
    contexts=(1024, 8192),
    speculated_rows=(1, 8),
    prompts=(2048, 8192),
    pieces=(8192, 2048),
    copy_bytes=2**31,
    matmul=8192,
    rotated_bytes=120_000_000,  # more than twice an H100's L2 cache
    most_loops=64,
    seconds=1.5,
)
_TOY_LAYERS = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 64}
TOY = Sizes(
    name="toy",
    model={**_TOY_LAYERS, "vocab_size": 128, "num_layers": 2, "rope_layers": (True, True), "bos_token_id": None, "eos_token_ids": ()},
    head=_TOY_LAYERS,
    draft_vocab_size=64,
    dtype="bfloat16",
    rows=(1, 2),
    contexts=(16, 160),
    speculated_rows=(1,),
    prompts=(32, 64),
    pieces=(32,),
    copy_bytes=2**20,
    matmul=64,
    rotated_bytes=0,
    most_loops=2,
    seconds=0.0,
)
SIZES = {sizes.name: sizes for sizes in (REAL, TOY)}
