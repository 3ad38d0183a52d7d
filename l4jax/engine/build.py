"""From a model's parts to an engine: how many slots and pages there are, and which programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.compiled import Folder
from l4jax.config import ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.engine.engine import Engine
from l4jax.engine.memory import CacheMemory
from l4jax.engine.options import Options
from l4jax.engine.pages import PageShape
from l4jax.engine.runner import Runner
from l4jax.engine.speculator import Speculator
from l4jax.engine.warmup import program_bytes
from l4jax.parallel.placement import Placement
from l4jax.text.load import Text
from sharding.select import RingHardware

PREFILL_LENGTHS = (32, 128, 512)
"""A prefill piece is padded to one of these lengths times the ranks that share its tokens; longer prompts take several pieces."""
PREFILL_TOKENS = 2048
"""Tokens on each rank up to which a prefill takes several rows: past it the matmuls gain nothing from more."""
SLOTS = 8
"""Rows of each data rank, unless ``max_batch`` says otherwise."""
_SHORT_BURST = 4
"""Rounds of a burst while anyone waits or is prefilled."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an LLM is made of, checked, with everything decided: where its weights go, and how it speculates, if at all.

    ``folder``: where programs are kept.
    """

    config: ModelConfig
    placement: Placement
    weights: Mapping[str, jax.Array]
    speculator: Speculator | None
    text: Text
    max_batch: int | None
    kv_tokens: int | None
    prefill_lengths: Sequence[int] | None
    ring_hardware: RingHardware
    folder: Folder | None = None


def build_engine(parts: Parts) -> Engine:
    """Place the weights and size the cache, which is allocated when it is first needed.

    Raises ValueError if a weight is missing or has another shape, or if the cache does not fit beside the weights.
    """
    placement, speculator, spec = parts.placement, parts.speculator, parts.placement.spec
    runner = Runner(placement, parts.weights, speculator, parts.ring_hardware, parts.folder)
    slots = SLOTS if parts.max_batch is None else -(-parts.max_batch // spec.data)
    memory = CacheMemory(placement, speculator.placement if speculator else None, runner.dtype, slots)
    ranks = spec.token_ranks.count
    lengths = tuple(sorted([n * ranks for n in PREFILL_LENGTHS] if parts.prefill_lengths is None else parts.prefill_lengths))
    beyond_training = speculator is not None and speculator.beyond == "stop"
    options = Options(
        shape=PageShape(PAGE_SIZE, ranks, placement.config.attention_chunk_size),
        full_pages=0,  # both are known below
        local_pages=0,
        slots=slots,
        row_buckets=row_buckets(slots),
        piece_lengths=lengths,
        piece_rows=piece_rows(slots),
        piece_tokens=PREFILL_TOKENS * ranks,
        short_steps=_SHORT_BURST,
        long_steps=BURST,
        data_ranks=spec.data,
        plans=speculator.plans()[1] if speculator else ((1, None),),
        drafter=speculator is not None,
        drafts_up_to=speculator.placement.config.max_position_embeddings if speculator and beyond_training else math.inf,
    )

    def needed_bytes(shape: CacheShape) -> int:
        runner.lay_out(shape)
        return program_bytes(runner, options, memory.abstract(shape), placement.config.max_position_embeddings)

    shape = memory.shape(parts.kv_tokens, runner.all_weights, needed_bytes)
    options = dataclasses.replace(options, full_pages=shape.full_pages, local_pages=shape.local_pages)
    return Engine(runner, memory, shape, options, parts.text.tokenizer)


def row_buckets(slots: int) -> tuple[int, ...]:
    """Rows that bursts are compiled for: powers of two, and all slots."""
    return tuple(sorted({slots, *(1 << i for i in range(slots.bit_length()) if 1 << i < slots)}))


def piece_rows(slots: int) -> tuple[int, ...]:
    """Rows that prefills are compiled for, each for every length of a piece, scored or not: every second number of :func:`row_buckets`."""
    powers = row_buckets(slots)
    return tuple(sorted({*powers[::2], slots}))
