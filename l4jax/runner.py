"""Runs the compiled programs over one resident cache: prompts in pieces, then decode in bursts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from l4jax.arrays import global_array, host_array, to_host
from l4jax.cache import CACHE_AXES, PAGE_SIZE, CacheShape, LayerCache
from l4jax.decoding.generate import BURST, DecodeState, DecodeTokens
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import NOT_FINITE, Logprobs, SamplingFeatures, SamplingRows, TokenCounts, batch_features, sampling_rows
from l4jax.placement import Placement
from l4jax.programs import PREFILL_LENGTHS, Programs
from l4jax.spread import H100_RING, Spreader, in_order
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
class Request:
    """A prompt with everything decided: its seed drawn, its end tokens collected, its ``max_tokens`` within the context."""

    token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token given out, and the likeliest alternatives as (token id, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What one step of a batch added to one row; ``logprobs`` is None unless the request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


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


class Runner:
    """A model's programs, its weights on the device and the KV cache they share.

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
        prefill_lengths: Sequence[int] | None = None,
        ring_hardware: RingHardware = H100_RING,
    ) -> None:
        """``weights`` as they are stored, or as ``placement`` has placed them.

        ``prefill_lengths``: what pieces of prompts are padded to; :data:`PREFILL_LENGTHS` for each token rank by default.
        """
        self.config = placement.config
        self.programs = Programs(placement)
        self._placement = placement
        self._leaves = self.programs.model.leaves(placement.place_all(weights))
        self._dtype = self._leaves[0].dtype
        self._data = placement.spec.data
        self._ranks = placement.spec.token_ranks.count
        self._spreader = Spreader(placement, self._dtype, ring_hardware)
        self._device = placement.mesh.local_devices[0]
        self.prefill_lengths = tuple(sorted(prefill_lengths or (length * self._ranks for length in PREFILL_LENGTHS)))
        self._shape = CacheShape(rows=0, capacity=0)
        self._cache: tuple[LayerCache, ...] = ()
        self._batch: Batch | None = None

    @property
    def cache_shape(self) -> CacheShape:
        """What the resident cache has room for."""
        return self._shape

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each counted once; KV heads that a mesh repeats, as often as it does."""
        return sum(leaf.nbytes for leaf in self._leaves)

    def row_bucket(self, rows: int) -> int:
        """Rows that a program for this many sequences is compiled with: the next power of two, on each rank along ``data``."""
        # XLA's CPU backend widens a whole bfloat16 matrix to multiply one row, and uses native kernels from two rows on.
        fewest = 2 if self._device.platform == "cpu" and self._dtype == jnp.bfloat16 else 1
        return self._data * max(fewest, 1 << (-(-rows // self._data) - 1).bit_length())

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
        lost = not self._cache or any(leaf.is_deleted() for leaf in jax.tree.leaves(self._cache))
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
            self._cache = shape.allocate(self.config, self._dtype, self._placement.array_sharding(*CACHE_AXES))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(refused) from error
        self._shape = shape

    def discard_cache(self) -> None:
        """Free the cache; the next call has a new one, and generations that used it are lost."""
        self._batch = None
        self._cache = ()
        self._shape = CacheShape(rows=0, capacity=0)

    def _needed_bytes(self, shape: CacheShape) -> int:
        if self._device.platform == "cpu":  # all of its devices share the machine's memory
            return shape.nbytes(self.config, self._dtype)
        return shape.device_nbytes(self.config, self._dtype, self._placement.array_sharding(*CACHE_AXES))

    def _available_bytes(self) -> float:
        """What a device of the least favoured process has beside the weights."""
        return min(map(float, hosts.share(str(self._own_available_bytes()))))

    def _own_available_bytes(self) -> float:
        if self._device.platform == "cpu":
            held = sum(shard.data.nbytes for leaf in self._leaves for shard in leaf.addressable_shards)
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - held
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in self._leaves)
        return (self._device.memory_stats() or {}).get("bytes_limit", math.inf) - held

    def logits(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Next-token logits at every position of each prompt, float32 [T, V]."""
        self.reserve(len(prompts), max(map(len, prompts)))
        self._batch = None
        collected: list[list[np.ndarray]] = [[] for _ in prompts]
        per_rank = self.row_bucket(len(prompts)) // self._data
        for piece in self._pieces(prompts, per_rank):
            tables = self._shape.identity_tables(self.config, piece.prompt_B % per_rank)
            layout, spread = self._spreader.spread(piece.start_B, piece.new_B, piece.token_BT.shape[1], tables)
            self._cache, logits_BTV = self.programs.logits(self._leaves, self._cache, *piece.inputs(), tables, layout, spread=spread)
            host = to_host(logits_BTV)
            if layout is not None:
                host = in_order(host, np.asarray(layout.position_NBT), piece.start_B)
            if not np.isfinite(host).all():
                self.discard_cache()
                raise ValueError(NOT_FINITE_ADVICE)
            for row, prompt in enumerate(piece.prompt_B):
                if prompt >= 0:
                    collected[prompt].append(host[row, : piece.new_B[row]])
        return [np.concatenate(parts) for parts in collected]

    def start(self, requests: Sequence[Request]) -> Batch:
        """Prefill a batch of requests; it holds the cache until the next call of ``start`` or ``logits``."""
        self.reserve(len(requests), max(len(r.token_ids) + r.params.max_tokens for r in requests))
        self._batch = None  # should the prefill fail, nobody holds the cache
        self._batch = Batch(self, requests)
        return self._batch

    def check_holds_cache(self, batch: Batch) -> None:
        """Raise RuntimeError if another call has used the cache since this batch was started."""
        if batch is not self._batch:
            raise RuntimeError("this generation was left unfinished and another call has used the cache since; start it again")

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: SamplingRows, counts: TokenCounts | None, features: SamplingFeatures
    ) -> tuple[np.ndarray, list[Logprobs | None]]:
        """Put the prompts in the cache; the first token of each, and its log-probabilities (of one row).

        ``rows`` and ``counts`` are those of the batch that will be decoded: of its bucket's size.
        """
        first = np.zeros(len(prompts), np.int32)
        logprobs: list[Logprobs | None] = [None] * len(prompts)
        per_rank = len(rows.temperature_B) // self._data
        for piece in self._pieces(prompts, per_rank):
            tables = self._shape.identity_tables(self.config, piece.prompt_B % per_rank)
            piece_rows, piece_counts = jax.tree.map(lambda leaf, prompt_B=piece.prompt_B: leaf[prompt_B], (rows, counts))
            layout, spread = self._spreader.spread(piece.start_B, piece.new_B, piece.token_BT.shape[1], tables)
            inputs = (*piece.inputs(), tables, layout, piece_rows, piece_counts)
            self._cache, token_B, piece_logprobs = self.programs.prefill(
                self._leaves, self._cache, *inputs, features=features, spread=spread
            )
            ends = [i for i, p in enumerate(piece.prompt_B) if p >= 0 and piece.start_B[i] + piece.new_B[i] == len(prompts[p])]
            if ends:
                token_B, piece_logprobs = jax.device_get((token_B, piece_logprobs))
                self.check_tokens(token_B[ends])
            for i in ends:
                first[piece.prompt_B[i]] = token_B[i]
                logprobs[piece.prompt_B[i]] = jax.tree.map(lambda leaf, i=i: leaf[i], piece_logprobs)
        return first, logprobs

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


class Batch:
    """Requests that are decoded together, from their first token to the last one's end."""

    def __init__(self, runner: Runner, requests: Sequence[Request]) -> None:
        self._runner = runner
        self._requests = requests
        # Rows that fill up the bucket repeat the last request and are finished from the start.
        padding = runner.row_bucket(len(requests)) - len(requests)
        padded = [*requests, *[requests[-1]] * padding]
        params = [r.params for r in padded]
        self._features = batch_features(params)
        self._rows = sampling_rows(params, [r.seed for r in padded], [r.stop_ids for r in padded], runner.config.vocab_size)
        counts = self._prompt_counts(padded) if self._features.adjusted else None
        prompts = [r.token_ids for r in requests]
        first, first_logprobs = runner.prefill(prompts, self._rows, counts, self._features)
        self._first: list[NewTokens] | None = [
            NewTokens([int(token)], self._logprobs(row, [logprobs]))
            for row, (token, logprobs) in enumerate(zip(first, first_logprobs, strict=True))
        ]
        done = [row >= len(requests) or r.params.max_tokens == 1 or int(first[row]) in r.stop_ids for row, r in enumerate(padded)]
        token_B = [*first.tolist(), *[0] * padding]
        if counts is not None:
            output_BV = np.zeros(counts.output_BV.shape, np.int32)
            output_BV[np.arange(len(padded)), token_B] = 1
            counts = dataclasses.replace(counts, output_BV=host_array(output_BV, np.int32))
        state = DecodeState(
            cache=(),
            token_B=host_array(token_B, np.int32),
            length_B=host_array([len(r.token_ids) for r in padded], np.int32),
            produced_B=host_array([1] * len(padded), np.int32),
            done_B=host_array(done, bool),
            counts=counts,
        )
        self._state = runner.commit(state)
        self.done = done[: len(requests)]

    def finish(self, row: int) -> None:
        """End a row from outside (a stop string was found)."""
        self.done[row] = True
        done_B = [*self.done, *[True] * (len(self._state.done_B) - len(self.done))]
        self._state = self._runner.commit(dataclasses.replace(self._state, done_B=host_array(done_B, bool)))

    def step(self, steps: int) -> list[NewTokens]:
        """The next tokens of each row: the first call gives the prefill's, each later one up to ``steps``."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        self._runner.check_holds_cache(self)
        self._state, tokens = self._runner.decode(self._state, self._rows, steps, self._features)
        token_SB, logprobs, taken, done_B = jax.device_get((tokens.token_SB, tokens.logprobs, tokens.steps, tokens.done_B))
        self._runner.check_tokens(token_SB[:taken])
        self.done = [bool(done_B[row]) for row in range(len(self._requests))]
        result = []
        for row in range(len(self._requests)):
            count = int((token_SB[:taken, row] >= 0).sum())
            at_step = [None if logprobs is None else jax.tree.map(lambda leaf, s=s, row=row: leaf[s, row], logprobs) for s in range(count)]
            result.append(NewTokens(token_SB[:count, row].tolist(), self._logprobs(row, at_step)))
        return result

    def run_to_end(self) -> None:
        """Decode until every row is done, and drop the tokens."""
        while not all(self.done):
            self.step(BURST)

    def _logprobs(self, row: int, logprobs: Sequence[Logprobs | None]) -> list[TokenLogprob] | None:
        wanted = self._requests[row].params.logprobs
        if wanted is None:
            return None
        return [
            TokenLogprob(float(entry.chosen_B), tuple(zip(entry.top_id_BN[:wanted].tolist(), entry.top_BN[:wanted].tolist(), strict=True)))
            for entry in logprobs
            if entry is not None
        ]

    def _prompt_counts(self, requests: Sequence[Request]) -> TokenCounts:
        V = self._runner.config.vocab_size
        in_prompt_BV = np.zeros((len(requests), V), bool)
        for row, request in zip(in_prompt_BV, requests, strict=True):
            row[np.asarray(request.token_ids)] = True
        return TokenCounts(host_array(in_prompt_BV, bool), host_array(np.zeros(in_prompt_BV.shape), np.int32))
