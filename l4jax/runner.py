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

from l4jax.cache import CACHE_AXES, PAGE_SIZE, CacheShape, LayerCache, PageTables
from l4jax.config import ModelConfig
from l4jax.decoding.generate import DecodeState, DecodeTokens
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.sampling import NOT_FINITE, Logprobs, SamplingFeatures, SamplingRows, TokenCounts
from l4jax.decoding.speculate import BeyondTraining, RoundCounts, SpeculationState
from l4jax.parallel.arrays import global_array, host_array, to_host
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import H100_RING, Spreader, in_order
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

    def inputs(self) -> tuple[Array, Array, Array]:
        """As the programs take them."""
        return host_array(self.token_BT, np.int32), host_array(self.start_B, np.int32), host_array(self.new_B, np.int32)


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
        self._draft_leaves = self.programs.drafter.leaves(speculator.placement.place_all(speculator.weights)) if speculator else ()
        self._leaves = self.programs.model.leaves(placement.place_all(weights))
        self._dtype = self._leaves[0].dtype
        self._data = placement.spec.data
        self._ranks = placement.spec.token_ranks.count
        self._spreader = Spreader(placement, self._dtype, ring_hardware)
        self._device = placement.mesh.local_devices[0]
        self.prefill_lengths = tuple(
            sorted((length * self._ranks for length in PREFILL_LENGTHS) if prefill_lengths is None else prefill_lengths)
        )
        self._shape = CacheShape(rows=0, capacity=0)
        self._cache: tuple[LayerCache, ...] = ()
        self._draft_cache: tuple[LayerCache, ...] = ()
        self._claim: object | None = None

    @property
    def cache_shape(self) -> CacheShape:
        """What the resident cache has room for."""
        return self._shape

    @property
    def weights(self) -> dict[str, Array]:
        """The model's weights by name, as they lie on the mesh."""
        return dict(zip(self.programs.model.names, self._leaves, strict=True))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the drafter's included, each counted once; KV heads that a mesh repeats, as often as it does."""
        return sum(leaf.nbytes for leaf in self._all_leaves)

    @property
    def _all_leaves(self) -> tuple[Array, ...]:
        return (*self._leaves, *self._draft_leaves)

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
        shape = CacheShape(max(self._shape.rows, rows), max(self._shape.capacity, capacity), self._ranks)
        # A call that was interrupted may have donated the cache and never received the new one.
        lost = not self._cache or any(leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._draft_cache)))
        if shape == self._shape and not lost:
            return
        available = self._available_bytes()
        if self._needed_bytes(shape) > available:  # give up what earlier calls needed, and room to grow, before refusing this one
            shape = CacheShape(rows, capacity, self._ranks)
        if self._needed_bytes(shape) > available:
            shape = CacheShape(rows, tokens, self._ranks)
        needed = self._needed_bytes(shape)
        refused = (
            f"a KV cache for {shape.rows} sequences of {shape.capacity} tokens takes {needed / 1e9:.1f} GB, and beside the weights "
            f"this device has {available / 1e9:.1f} GB; lower max_tokens or the number of prompts, or shorten the prompt"
        )
        if needed > available:
            raise ValueError(refused)
        self.discard_cache()  # freed before the new one is allocated
        try:
            sharding = self._placement.array_sharding(*CACHE_AXES)
            self._cache, *draft_cache = (shape.allocate(config, self._dtype, sharding) for config in self._cached)
            self._draft_cache = draft_cache[0] if draft_cache else ()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(refused) from error
        self._shape = shape

    def discard_cache(self) -> None:
        """Free the cache; the next call has a new one, and generations that used it are lost."""
        self._claim = None
        self._cache = self._draft_cache = ()
        self._shape = CacheShape(rows=0, capacity=0)

    def _needed_bytes(self, shape: CacheShape) -> int:
        if self._device.platform == "cpu":  # all of its devices share the machine's memory
            return sum(shape.nbytes(config, self._dtype) for config in self._cached)
        sharding = self._placement.array_sharding(*CACHE_AXES)
        return sum(shape.device_nbytes(config, self._dtype, sharding) for config in self._cached)

    @property
    def _cached(self) -> list[ModelConfig]:
        """The decoders that have a cache."""
        return [self.config, *([self._speculator.placement.config] if self._speculator else [])]

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
            tables = self._shape.identity_tables(self.config, piece.prompt_B % per_rank)
            layout, spread = self._spreader.spread(piece.start_B, piece.new_B, piece.token_BT.shape[1], tables)
            self._cache, logits_BTV = self.programs.logits(self._leaves, self._cache, *piece.inputs(), tables, layout, spread=spread)
            host = to_host(logits_BTV)
            if layout is not None:
                host = in_order(host, np.asarray(layout.position_RBT), piece.start_B)
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

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        rows: SamplingRows,
        counts: TokenCounts | None,
        features: SamplingFeatures,
        *,
        drafting: bool,
    ) -> tuple[np.ndarray, list[Logprobs | None], np.ndarray | None]:
        """Put the prompts in the cache, with ``drafting`` also in the drafter's.

        Returns the first token of each, its log-probabilities (of one row), and what the drafter, if it is drafting, makes of each prompt's
        last token: [rows, D].
        ``rows`` and ``counts`` are those of the batch that will be decoded: of its bucket's size.
        """
        first = np.zeros(len(prompts), np.int32)
        logprobs: list[Logprobs | None] = [None] * len(prompts)
        hidden_BD = None
        per_rank = len(rows.temperature_B) // self._data
        for piece in self._pieces(prompts, per_rank):
            tables = self._shape.identity_tables(self.config, piece.prompt_B % per_rank)
            piece_rows, piece_counts = jax.tree.map(lambda leaf, prompt_B=piece.prompt_B: leaf[prompt_B], (rows, counts))
            layout, spread = self._spreader.spread(piece.start_B, piece.new_B, piece.token_BT.shape[1], tables)
            sampling = (layout, piece_rows, piece_counts)
            if drafting:
                assert self._speculator is not None
                following = [
                    -1 if p < 0 else (*prompts[p], -1)[s + n] for p, s, n in zip(piece.prompt_B, piece.start_B, piece.new_B, strict=True)
                ]
                inputs = (
                    *piece.inputs(),
                    tables,
                    self._draft_tables(piece.prompt_B % per_rank),
                    *sampling,
                    host_array(following, np.int32),
                )
                caches, token_B, piece_logprobs, piece_hidden_BD = self.programs.draft_prefill(
                    self._leaves,
                    self._draft_leaves,
                    (self._cache, self._draft_cache),
                    *inputs,
                    features=features,
                    spread=spread,
                    beyond=self._speculator.beyond,
                )
                self._cache, self._draft_cache = caches
            else:
                self._cache, token_B, piece_logprobs = self.programs.prefill(
                    self._leaves, self._cache, *piece.inputs(), tables, *sampling, features=features, spread=spread
                )
            ends = [i for i, p in enumerate(piece.prompt_B) if p >= 0 and piece.start_B[i] + piece.new_B[i] == len(prompts[p])]
            if ends:
                token_B, piece_logprobs = jax.device_get((token_B, piece_logprobs))
                self.check_tokens(token_B[ends])
                if drafting:
                    piece_hidden_BD = jax.device_get(piece_hidden_BD)
                    if hidden_BD is None:
                        hidden_BD = np.zeros((len(rows.temperature_B), piece_hidden_BD.shape[1]), piece_hidden_BD.dtype)
                    hidden_BD[piece.prompt_B[ends]] = piece_hidden_BD[ends]
            for i in ends:
                first[piece.prompt_B[i]] = token_B[i]
                logprobs[piece.prompt_B[i]] = jax.tree.map(lambda leaf, i=i: leaf[i], piece_logprobs)
        return first, logprobs, hidden_BD

    def _draft_tables(self, rows: np.ndarray) -> PageTables:
        assert self._speculator is not None
        return self._shape.identity_tables(self._speculator.placement.config, rows)

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Raise ValueError where the logits were not finite. The cache is discarded: it has NaNs, which do not stay in their row."""
        if (tokens == NOT_FINITE).any():
            self.discard_cache()
            raise ValueError(NOT_FINITE_ADVICE)

    def commit(self, state: DecodeState) -> DecodeState:
        """The state on the devices, as a burst returns it: a program called with both kinds would compile twice."""
        row, counts = self._placement.array_sharding("batch"), self._placement.array_sharding("batch", "vocab")
        committed: dict[str, Any] = {
            name: global_array(getattr(state, name), row) for name in ("token_B", "length_B", "produced_B", "done_B")
        }
        return dataclasses.replace(state, **committed, counts=jax.tree.map(lambda leaf: global_array(leaf, counts), state.counts))

    def commit_hidden(self, hidden_BD: np.ndarray) -> Array:
        """The drafter's output on the devices, as a round returns it."""
        return global_array(hidden_BD, self._placement.array_sharding("batch"))

    def speculate(
        self, state: SpeculationState, rows: SamplingRows, steps: int, features: SamplingFeatures, plan: Speculation
    ) -> tuple[SpeculationState, DecodeTokens, RoundCounts]:
        """As :meth:`decode`, by rounds of speculation."""
        assert self._speculator is not None
        B = len(state.decode.token_B)
        numbers = np.arange(B) % (B // self._data)
        tables = (self._shape.identity_tables(self.config, numbers), self._draft_tables(numbers))
        state = SpeculationState(
            dataclasses.replace(state.decode, cache=self._cache), dataclasses.replace(state.draft, cache=self._draft_cache)
        )
        state, tokens, counted = self.programs.speculate(
            self._leaves,
            self._draft_leaves,
            state,
            *tables,
            rows,
            np.int32(steps),
            features=features,
            plan=plan,
            beyond=self._speculator.beyond,
        )
        self._cache, self._draft_cache = state.decode.cache, state.draft.cache
        without = SpeculationState(dataclasses.replace(state.decode, cache=()), dataclasses.replace(state.draft, cache=()))
        return without, tokens, counted

    def decode(self, state: DecodeState, rows: SamplingRows, steps: int, features: SamplingFeatures) -> tuple[DecodeState, DecodeTokens]:
        """One burst over the resident cache; the state comes without a cache and goes back without one."""
        B = len(state.token_B)
        tables = self._shape.identity_tables(self.config, np.arange(B) % (B // self._data))
        state = dataclasses.replace(state, cache=self._cache)
        state, tokens = self.programs.decode(self._leaves, state, tables, rows, np.int32(steps), features=features)
        self._cache = state.cache
        return dataclasses.replace(state, cache=()), tokens

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
