"""Runs the compiled programs over one resident cache: prompts in pieces, then decode in bursts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from l4jax.cache import PAGE_SIZE, CacheShape, PageTables
from l4jax.decoding.generate import DecodeTokens
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.sampling import NOT_FINITE, Logprobs
from l4jax.decoding.speculate import BeyondTraining, RoundCounts
from l4jax.model.step import Spread
from l4jax.parallel.arrays import host_array, to_host
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import H100_RING, Spreader, in_order
from l4jax.program_inputs import Burst, Piece, Resident, Weights, slot_update
from l4jax.programs import PREFILL_LENGTHS, Programs
from sharding import hosts
from sharding.select import RingHardware

NOT_FINITE_ADVICE = (
    "the model's logits are not finite; expected numbers, not NaN or infinity: its values overflow (float16 does first: load with "
    'dtype="float32" or "bfloat16"), or its weights are damaged (`l4jax show --verify` checks them)'
)
_MIN_CAPACITY = 1024
# A prefill program takes several rows only up to this many tokens on each rank: past it the matmuls gain nothing from more rows.
_PREFILL_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A stretch of some rows' prompts, padded: ``prompt_B[i]`` is the prompt in program row i, ``new_B[i]`` tokens of it.

    Padding rows have -1 for a prompt, and no tokens.
    """

    prompt_B: np.ndarray
    token_BT: np.ndarray
    start_B: np.ndarray
    new_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Room:
    """Room for ``rows`` sequences of up to ``capacity`` tokens each."""

    rows: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Speculator:
    """A drafter on its target's mesh, how to speculate with it, and what it does beyond the length it was trained at.

    ``asked_for``: the user has said how; then a prompt that cannot be speculated for is an error.
    """

    placement: DrafterPlacement
    weights: Mapping[str, jax.Array]
    table: SpeculationTable
    beyond: BeyondTraining
    asked_for: bool


class Runner:
    """A model's programs, its weights on the device and the KV cache they share; a drafter's too, if there is one.

    The cache grows to the largest batch and length seen and stays; page tables pick the rows that a program works on. So
    program shapes depend on the batch's size bucket and on nothing else once the cache has its final size; where tokens are spread
    over ranks, prefill's also on the cached length's (``Spreader``).

    On a mesh with a ``data`` axis its ranks share out the rows of a batch evenly and in order, and each has the cache of its own.
    """

    def __init__(
        self,
        placement: Placement,
        weights: Mapping[str, jax.Array],
        *,
        speculator: Speculator | None = None,
        prefill_lengths: Sequence[int] | None = None,
        ring_hardware: RingHardware = H100_RING,
    ) -> None:
        """``weights`` (the drafter's too) as they are stored, or as their placement has placed them.

        ``prefill_lengths``: what pieces of prompts are padded to; :data:`PREFILL_LENGTHS` for each token rank by default.
        """
        self.config = placement.config
        self.programs = Programs(placement, speculator.placement if speculator else None)
        self._placement = placement
        self._speculator = speculator
        draft_leaves = self.programs.drafter.leaves(speculator.placement.place_all(speculator.weights)) if speculator else ()
        self._weights = Weights(self.programs.model.leaves(placement.place_all(weights)), draft_leaves)
        self._dtype = self._weights.target[0].dtype
        self._data = placement.spec.data
        self._ranks = placement.spec.token_ranks.count
        self._spreader = Spreader(placement, self._dtype, ring_hardware)
        self._device = placement.mesh.local_devices[0]
        self.prefill_lengths = tuple(
            sorted((length * self._ranks for length in PREFILL_LENGTHS) if prefill_lengths is None else prefill_lengths)
        )
        self._room = Room(0, 0)
        self._resident: Resident | None = None
        self._claim: object | None = None

    @property
    def room(self) -> Room:
        """What the resident cache has room for."""
        return self._room

    @property
    def weights(self) -> dict[str, Array]:
        """The model's weights by name, as they lie on the mesh."""
        return dict(zip(self.programs.model.names, self._weights.target, strict=True))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the drafter's included, each counted once; KV heads that a mesh repeats, as often as it does."""
        return sum(leaf.nbytes for leaf in self._all_leaves)

    @property
    def _all_leaves(self) -> tuple[Array, ...]:
        return (*self._weights.target, *self._weights.drafter)

    def row_bucket(self, rows: int) -> int:
        """Rows that a program for this many sequences is compiled with: the next power of two, on each rank along ``data``."""
        return self._data * (1 << (-(-rows // self._data) - 1).bit_length())

    def warmup_lengths(self, longest: int) -> list[int]:
        """Prompts of these lengths, up to ``longest`` tokens, are prefilled by every program that any up to there is."""
        piece, chunk = self.prefill_lengths[-1], self.config.attention_chunk_size
        whole_chunks = range(chunk, piece, chunk) if chunk is not None and self._ranks > 1 else ()
        lengths: dict[Any, int] = {}
        for start in range(0, longest, piece):
            for new in (min(new, longest - start) for new in (*self.prefill_lengths, *whole_chunks)):
                T = self._length_bucket(new)
                lengths.setdefault((T, *self._spreader.program([(start, new)], T)), start + new)
        return sorted(set(lengths.values()))

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for ``rows`` sequences of ``tokens`` tokens; what the cache held is lost if it has to grow."""
        rows = self.row_bucket(rows)
        context = -(-self.config.max_position_embeddings // PAGE_SIZE) * PAGE_SIZE
        capacity = max(tokens, min(context, max(_MIN_CAPACITY, 1 << (tokens - 1).bit_length())))
        room = Room(max(self._room.rows, rows), max(self._room.capacity, capacity))
        # A call that was interrupted may have donated it and never received the new one.
        lost = self._resident is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(self._resident))
        if room == self._room and not lost:
            return
        available = self._available_bytes()
        if self._needed_bytes(room) > available:  # give up what earlier calls needed, and room to grow, before refusing this one
            room = Room(rows, capacity)
        if self._needed_bytes(room) > available:
            room = Room(rows, tokens)
        needed = self._needed_bytes(room)
        refused = (
            f"a KV cache for {room.rows} sequences of {room.capacity} tokens takes {needed / 1e9:.1f} GB, and beside the weights "
            f"this device has {available / 1e9:.1f} GB; lower max_tokens or the number of prompts, or shorten the prompt"
        )
        if needed > available:
            raise ValueError(refused)
        self.discard_cache()  # freed before the new one is allocated
        try:
            self._resident = Resident.empty(self._abstract(room))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(refused) from error
        self._room = room

    def discard_cache(self) -> None:
        """Free the cache; the next call has a new one, and generations that used it are lost."""
        self._claim = None
        self._resident = None
        self._room = Room(0, 0)

    def _needed_bytes(self, room: Room) -> int:
        leaves = jax.tree.leaves(self._abstract(room))
        if self._device.platform == "cpu":  # all of its devices share the machine's memory
            return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def _abstract(self, room: Room) -> Resident:
        drafter = self._speculator.placement if self._speculator else None
        return Resident.abstract(self._placement, drafter, self._shape(room), self._dtype)

    def _shape(self, room: Room) -> CacheShape:
        return CacheShape.for_rows(self.config, room.rows, room.capacity, self._placement.spec)

    def _tables(self, rows: np.ndarray) -> PageTables:
        return self._shape(self._room).identity_tables(rows)

    def _available_bytes(self) -> float:
        """What a device of the least favoured process has beside the weights."""
        return min(map(float, hosts.share(str(self._own_available_bytes()))))

    def _own_available_bytes(self) -> float:
        if self._device.platform == "cpu":
            held = sum(shard.data.nbytes for leaf in self._all_leaves for shard in leaf.addressable_shards)
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - held
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in self._all_leaves)
        return (self._device.memory_stats() or {}).get("bytes_limit", math.inf) - held

    def logits(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Next-token logits at every position of each prompt, float32 [T, V]."""
        self.reserve(len(prompts), max(map(len, prompts)))
        self._claim = None
        collected: list[list[np.ndarray]] = [[] for _ in prompts]
        per_rank = self.row_bucket(len(prompts)) // self._data
        for piece in self._pieces(prompts, per_rank):
            inputs, spread = self._inputs(piece, prompts, per_rank, drafting=False)
            resident = self._held
            cache, logits_BTV = self.programs.logits(self._weights, resident.cache, inputs, spread=spread)
            self._resident = dataclasses.replace(resident, cache=cache)
            host = to_host(logits_BTV)
            if inputs.layout is not None:
                host = in_order(host, np.asarray(inputs.layout.position_RBT), piece.start_B)
            if not np.isfinite(host).all():
                self.discard_cache()
                raise ValueError(NOT_FINITE_ADVICE)
            for row, prompt in enumerate(piece.prompt_B):
                if prompt >= 0:
                    collected[prompt].append(host[row, : piece.new_B[row]])
        return [np.concatenate(parts) for parts in collected]

    def claim_cache(self) -> object:
        """What stands for the right to use the cache, from now until the next call of this or of ``logits``."""
        self._claim = object()
        return self._claim

    def check_claim(self, claim: object) -> None:
        """Raise RuntimeError if another call has used the cache since this claim was given out."""
        if claim is not self._claim:
            raise RuntimeError("this generation was left unfinished and another call has used the cache since; start it again")

    @property
    def drafts_up_to(self) -> float:
        """Tokens of a sequence behind which nothing is drafted any more."""
        if self._speculator is None:
            return 0
        return self._speculator.placement.config.max_position_embeddings if self._speculator.beyond == "stop" else math.inf

    def speculation(self, rows: int, longest: int) -> Speculation | None:
        """How a batch of so many prompts, of up to ``longest`` tokens, is speculated for, if at all."""
        if self._speculator is None or longest > self.drafts_up_to:
            return None
        return self._speculator.table.at(-(-rows // self._data))

    @property
    def _held(self) -> Resident:
        assert self._resident is not None
        return self._resident

    @property
    def _a_rank(self) -> int:
        """Slots of each rank along ``data``."""
        return self._room.rows // self._data

    def _slots(self, number_b: np.ndarray, per_rank: int) -> np.ndarray:
        """Slots, counted on their own rank, of a batch's rows; past the last one for numbers below 0, which are padding."""
        return np.where(number_b >= 0, number_b % per_rank, self._a_rank).astype(np.int32)

    def admit(
        self, rows: Sequence[int], batch: int, params: Sequence[SamplingParams], seeds: Sequence[int], stop_ids: Sequence[Sequence[int]]
    ) -> None:
        """Give the slots of these rows, of a batch of ``batch`` rows, to new requests; none is decoded until it has been prefilled."""
        per_rank = self.row_bucket(batch) // self._data
        slots = [row // per_rank * self._a_rank + row % per_rank for row in rows]
        update = slot_update(self._room.rows, self._data, slots, params, seeds, stop_ids, self.config.vocab_size)
        resident = self._held
        self._resident = dataclasses.replace(resident, slots=self.programs.update_slots(resident.slots, update))

    def free(self, row: int, batch: int) -> None:
        """Free the slot of a row, of a batch of ``batch`` rows: nothing is decoded for it any more."""
        self.admit([row], batch, [SamplingParams(temperature=0.0)], [0], [[]])

    def prefill(self, prompts: Sequence[Sequence[int]], *, drafting: bool) -> tuple[np.ndarray, list[Logprobs], list[bool]]:
        """Put the prompts of a batch's rows in the cache, with ``drafting`` also in the drafter's.

        Returns the first token of each, its log-probabilities (of one row), and whether its answer ends with it.
        """
        first = np.zeros(len(prompts), np.int32)
        logprobs: dict[int, Logprobs] = {}
        done = [False] * len(prompts)
        per_rank = self.row_bucket(len(prompts)) // self._data
        beyond = self._speculator.beyond if drafting and self._speculator else None
        for piece in self._pieces(prompts, per_rank):
            inputs, spread = self._inputs(piece, prompts, per_rank, drafting=drafting)
            self._resident, tokens = self.programs.prefill(self._weights, self._held, inputs, spread=spread, beyond=beyond)
            ends = np.flatnonzero(np.asarray(inputs.ends_B))
            if len(ends):
                tokens = jax.device_get(tokens)
                self.check_tokens(tokens.token_B[ends])
            for i in ends:
                prompt = int(piece.prompt_B[i])
                first[prompt], done[prompt] = tokens.token_B[i], bool(tokens.done_B[i])
                logprobs[prompt] = jax.tree.map(lambda leaf, i=i: leaf[i], tokens.logprobs)
        return first, [logprobs[prompt] for prompt in range(len(prompts))], done

    def _inputs(self, piece: _Piece, prompts: Sequence[Sequence[int]], per_rank: int, *, drafting: bool) -> tuple[Piece, Spread | None]:
        rows, lengths = list(zip(piece.prompt_B, piece.start_B + piece.new_B, strict=True)), [*map(len, prompts)]
        tables = self._tables(piece.prompt_B % per_rank)
        layout, spread = self._spreader.spread(piece.start_B, piece.new_B, piece.token_BT.shape[1], tables)
        inputs = Piece(
            token_BT=host_array(piece.token_BT, np.int32),
            start_B=host_array(piece.start_B, np.int32),
            new_B=host_array(piece.new_B, np.int32),
            prompt_length_B=host_array([lengths[p] if p >= 0 else 0 for p, _ in rows], np.int32),
            ends_B=host_array([p >= 0 and end == lengths[p] for p, end in rows], np.bool_),
            following_B=host_array([-1 if p < 0 or end == lengths[p] else prompts[p][end] for p, end in rows], np.int32),
            slot_B=host_array(self._slots(piece.prompt_B, per_rank), np.int32),
            tables=tables,
            draft_tables=tables if drafting else None,
            layout=layout,
        )
        return inputs, spread

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raise ValueError where the logits were not finite. The cache is discarded: it has NaNs, which do not stay in their row."""
        if (tokens == NOT_FINITE).any():
            self.discard_cache()
            raise ValueError(NOT_FINITE_ADVICE)

    def _burst(self, batch: int, steps: int) -> Burst:
        B = self.row_bucket(batch)
        tables = self._tables(np.arange(B) % (B // self._data))
        return Burst(
            slot_B=host_array(self._slots(np.where(np.arange(B) < batch, np.arange(B), -1), B // self._data), np.int32),
            limit_B=host_array(np.full(B, self._room.capacity), np.int32),
            tables=tables,
            draft_tables=tables if self._speculator else None,
            steps=host_array(steps, np.int32),
        )

    def decode(self, batch: int, steps: int) -> DecodeTokens:
        """Up to ``steps`` tokens of each of the batch's rows that is not done."""
        beyond = self._speculator.beyond if self._speculator else None
        self._resident, tokens = self.programs.decode(self._weights, self._held, self._burst(batch, steps), beyond=beyond)
        return tokens

    def speculate(self, batch: int, steps: int, plan: Speculation) -> tuple[DecodeTokens, RoundCounts]:
        """As :meth:`decode`, by ``steps`` rounds of speculation."""
        assert self._speculator is not None
        burst = self._burst(batch, steps)
        self._resident, tokens, counted = self.programs.speculate(
            self._weights, self._held, burst, plan=plan, beyond=self._speculator.beyond
        )
        return tokens, counted

    def _pieces(self, prompts: Sequence[Sequence[int]], per_rank: int) -> Iterator[_Piece]:
        """Cut prompts into padded pieces; prompts whose next pieces are of one length go together.

        Each rank along ``data`` has ``per_rank`` of the prompts. One that has none of a piece's length takes shorter ones.
        """
        position = [0] * len(prompts)
        while unfinished := [i for i, p in enumerate(prompts) if position[i] < len(p)]:
            bucket = {i: self._length_bucket(len(prompts[i]) - position[i]) for i in unfinished}
            T = max(bucket.values())
            most = max(1, _PREFILL_TOKENS * self._ranks // T)
            taken: list[list[int]] = []
            for rank in range(self._data):
                own = [i for i in unfinished if i // per_rank == rank]
                taken.append(([i for i in own if bucket[i] == T] or own)[:most])
            rows = self.row_bucket(self._data * max(map(len, taken))) // self._data
            prompt_B = np.array([i for own in taken for i in [*own, *[-1] * (rows - len(own))]])
            B = len(prompt_B)
            token_BT, start_B, new_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
            for row, i in enumerate(prompt_B):
                if i >= 0:
                    tokens = prompts[i][position[i] : position[i] + T]
                    token_BT[row, : len(tokens)] = tokens
                    start_B[row], new_B[row] = position[i], len(tokens)
                    position[i] += len(tokens)
            yield _Piece(prompt_B, token_BT, start_B, new_B)

    def _length_bucket(self, tokens: int) -> int:
        return next((n for n in self.prefill_lengths if n >= tokens), self.prefill_lengths[-1])
