"""Builds an engine from a model's parts: decides how many slots and pages there are, and which programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import jax

from l4jax import arguments
from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.compiled import Folder
from l4jax.config import ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.engine.engine import Engine
from l4jax.engine.memory import CacheMemory
from l4jax.engine.options import Options
from l4jax.engine.pages import PageShape
from l4jax.engine.pieces import PREFILL_LENGTHS, default_lengths
from l4jax.engine.runner import Runner
from l4jax.engine.speculator import Speculator
from l4jax.engine.warmup import program_bytes
from l4jax.parallel.placement import Placement
from l4jax.text.load import Text
from sharding.kinds import shown
from sharding.mesh import MeshSpec
from sharding.select import RingHardware

PREFILL_TOKENS = 2048
"""The most tokens on each token rank that a prefill of several rows has: matmuls gain nothing from more."""
SLOTS = 8
"""Slots of each data rank, unless ``max_batch`` says otherwise."""
_SHORT_BURST = 4
"""The most rounds of a burst while a request waits or is prefilled."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The engine's arguments of :func:`l4jax.load`, checked."""

    max_batch: int | None
    kv_tokens: int | None
    prefill_lengths: tuple[int, ...] | None
    deterministic: bool
    ring_hardware: RingHardware

    @classmethod
    def checked(
        cls, max_batch: object, kv_tokens: object, prefill_lengths: object, deterministic: object, ring_hardware: object
    ) -> Settings:
        """Check a user's arguments. Raises ValueError for one of the wrong kind or out of range."""
        arguments.check_kind("ring_hardware", ring_hardware, RingHardware, "a sharding.select.RingHardware")
        return cls(
            None if max_batch is None else arguments.batch_size(max_batch),
            None if kv_tokens is None else arguments.cache_tokens(kv_tokens),
            None if prefill_lengths is None else arguments.piece_lengths(prefill_lengths),
            arguments.truth("deterministic", deterministic),
            cast(RingHardware, ring_hardware),
        )

    def slots(self, spec: MeshSpec) -> int:
        """The rows of each data rank."""
        return SLOTS if self.max_batch is None else -(-self.max_batch // spec.data)

    def piece_lengths(self, spec: MeshSpec, context: int, default: tuple[int, ...] = PREFILL_LENGTHS) -> tuple[int, ...]:
        """The lengths of prefill pieces, ascending, for a model with this context. ``default``: those of each rank that shares a prompt.

        Raises ValueError for a length that no prompt needs, and for lengths that a deterministic engine could not compute.
        """
        ranks, asked_for = spec.token_ranks.count, self.prefill_lengths
        if asked_for is None:
            return tuple(n * ranks for n in (PREFILL_LENGTHS[-1:] if self.deterministic else default))
        block = PAGE_SIZE * ranks
        most = -(-context // block) * block
        if max(asked_for) > most:
            raise ValueError(
                f"prefill_lengths has {shown(max(asked_for))}; expected at most {most}, the model's context of {context} tokens in whole "
                "pages; no prompt is longer"
            )
        if self.deterministic and (len(asked_for) > 1 or asked_for[0] % block):
            raise ValueError(
                f"prefill_lengths is {shown(list(asked_for))} with deterministic=True; expected one length, a multiple of {block} (the "
                f"tokens of a page{' on all ranks that share them' if ranks > 1 else ''}), such as [{PREFILL_LENGTHS[-1] * ranks}]"
            )
        return tuple(sorted(asked_for))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an LLM is made of, with everything decided. ``speculator``: None without speculation; ``folder``: where programs are kept."""

    config: ModelConfig
    placement: Placement
    weights: Mapping[str, jax.Array]
    speculator: Speculator | None
    text: Text
    settings: Settings
    folder: Folder | None = None


def build_engine(parts: Parts) -> Engine:
    """Place the weights and size the cache. The cache itself is allocated when it is first needed.

    Raises ValueError if a weight is missing or has another shape, or if the cache does not fit beside the weights.
    """
    placement, spec, settings, deterministic = parts.placement, parts.placement.spec, parts.settings, parts.settings.deterministic
    slots, context = settings.slots(spec), placement.config.max_position_embeddings
    settings.piece_lengths(spec, context)  # raises now, not after the weights are placed
    speculator = parts.speculator and parts.speculator.pinned(slots) if deterministic else parts.speculator
    runner = Runner(placement, parts.weights, speculator, settings.ring_hardware, parts.folder, rows_apart=deterministic)
    memory = CacheMemory(placement, speculator.placement if speculator else None, runner.dtype, slots)
    available = memory.available_bytes(runner.all_weights)
    decoder = speculator.placement.config if speculator else None
    lengths = default_lengths(placement.config, decoder, spec, placement.mesh.local_devices[0], runner.dtype, available)
    piece_lengths = settings.piece_lengths(spec, context, lengths)
    ranks = spec.token_ranks.count
    beyond_training = speculator is not None and speculator.beyond == "stop"
    options = Options(
        shape=PageShape(PAGE_SIZE, ranks, placement.config.attention_chunk_size),
        full_pages=0,  # set below, when the cache's size is known
        local_pages=0,
        slots=slots,
        row_buckets=(slots,) if deterministic else row_buckets(slots),
        piece_lengths=piece_lengths,
        most_scored=PREFILL_LENGTHS[-1] * ranks if settings.prefill_lengths is None else piece_lengths[-1],
        # One row: no padding is computed, and no other prompt changes how ranks share this one.
        piece_rows=(1,) if deterministic else piece_rows(slots),
        piece_tokens=PREFILL_TOKENS * ranks,
        short_steps=_SHORT_BURST,
        long_steps=BURST,
        data_ranks=spec.data,
        plans=speculator.plans()[1] if speculator else ((1, None),),
        drafter=speculator is not None,
        drafts_up_to=speculator.placement.config.max_position_embeddings if speculator and beyond_training else math.inf,
        deterministic=deterministic,
    )

    def needed_bytes(shape: CacheShape) -> int:
        runner.lay_out(shape)
        return program_bytes(runner, options, memory.abstract(shape), context)

    shape = memory.shape(settings.kv_tokens, runner.all_weights, needed_bytes)
    runner.lay_out(shape)
    options = dataclasses.replace(options, full_pages=shape.full_pages, local_pages=shape.local_pages)
    return Engine(runner, memory, shape, options, parts.text.tokenizer)


def row_buckets(slots: int) -> tuple[int, ...]:
    """Rows that bursts are compiled for: powers of two, and all slots."""
    return tuple(sorted({slots, *(1 << i for i in range(slots.bit_length()) if 1 << i < slots)}))


def piece_rows(slots: int) -> tuple[int, ...]:
    """Rows that prefills are compiled for: only every second of :func:`row_buckets`, because each needs two programs for each length."""
    powers = row_buckets(slots)
    return tuple(sorted({*powers[::2], slots}))
