"""The compiled programs: what is traced, what is donated, and which shapes exist.

A program is a pure function of the flat weights, small inputs and a donated state. Every distinct combination of input
shapes and :class:`SamplingFeatures` is compiled once; the buckets below keep the number of combinations small.

Programs run inside ``jax.shard_map``: every device computes on its own share of weights, rows, cache and vocabulary, and
every transfer between devices is an explicit call in the code. A single device is a mesh of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from l4jax.cache import CACHE_AXES, LayerCache, PageTables
from l4jax.decoding.draft import DraftState
from l4jax.decoding.generate import DecodeState, DecodeTokens, decode_tokens
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import Logprobs, SamplingFeatures, SamplingRows, TokenCounts, sample
from l4jax.decoding.speculate import BeyondTraining, RoundCounts, SpeculationState, prefill_drafter, speculate_tokens
from l4jax.decoding.tree import NONE
from l4jax.model.drafter import Drafter
from l4jax.model.llama import Llama
from l4jax.model.step import PieceLayout, Spread, last_state
from l4jax.model.weights import BoundModel, weight_specs
from l4jax.parallel.placement import DrafterPlacement, Placement
from sharding.rules import partition

PREFILL_LENGTHS = (32, 128, 512)
"""A prefill piece is padded to one of these lengths times the ranks that share its tokens; longer prompts take several pieces."""

_CAPTURED = ["FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION", "CONDITIONAL", "WHILE"]
if jax.__version_info__ >= (0, 12):
    _CAPTURED.append("COLLECTIVES_KERNEL")  # 0.11 does not know it

_FOR_GPUS = {
    # XLA's own all-reduce kernels take one array; two sums that it combined into one message would go by NCCL, four times as slow.
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    # What XLA takes into CUDA graphs: what it does by default, and loops. A loop outside a graph makes the host wait for its
    # condition at every turn. XLA leaves a loop out if it counts fewer than this many kernels around it.
    "xla_gpu_enable_command_buffer": ",".join(_CAPTURED),
    "xla_gpu_graph_min_graph_size": 1,
}

Cache = tuple[LayerCache, ...]
Leaves = tuple[Array, ...]


class Programs:
    """The programs of one model, and of its drafter if there is one, on one mesh. Each is compiled on first use for each set of shapes."""

    def __init__(self, placement: Placement, drafter: DrafterPlacement | None = None) -> None:
        model = Llama(placement.config, placement.spec, taps=drafter.drafter.aux_layers if drafter else ())
        self.model = BoundModel(model)
        self._mesh = placement.mesh
        self._data, self._vocab = placement.spec.along("data"), placement.spec.along("tensor")
        self._ranks = placement.spec.token_ranks
        spec = functools.partial(partition, placement.spec)
        row: Any = spec("batch")
        cache: Any = spec(*CACHE_AXES)
        counts: Any = spec("batch", "vocab")
        everywhere = PartitionSpec()
        leaves = tuple(spec(*weight.axes) for weight in weight_specs(model).values())
        state = DecodeState(cache=cache, token_B=row, length_B=row, produced_B=row, done_B=row, counts=counts)
        positions: Any = PartitionSpec(None, *row)
        layout: Any = PieceLayout(positions, row) if self._ranks.count > 1 else everywhere
        piece = (leaves, cache, row, row, row, row, layout)
        self.prefill = self._program(self._prefill, (*piece, row, counts), (cache, everywhere, everywhere), donated=1)
        self.decode = self._program(self._decode, (leaves, state, row, row, everywhere), (state, everywhere), donated=1)
        logits = PartitionSpec(self._data.axes or None, self._ranks.axes or None, self._vocab.axes or None)
        self.logits = self._program(self._logits, piece, (cache, logits), donated=1)
        if drafter is None:
            return
        module = drafter.build(drafter.config, placement.spec)
        self.drafter = BoundModel(module)
        draft_leaves = tuple(spec(*weight.axes) for weight in weight_specs(module).values())
        drafting: Any = DraftState(cache=cache, hidden_BD=row)
        self.draft_prefill = self._program(
            self._draft_prefill,
            (leaves, draft_leaves, (cache, cache), row, row, row, row, row, layout, row, counts, row),
            ((cache, cache), everywhere, everywhere, everywhere),
            donated=2,
        )
        self.speculate = self._program(
            self._speculate,
            (leaves, draft_leaves, SpeculationState(state, drafting), row, row, row, everywhere),
            (SpeculationState(state, drafting), everywhere, everywhere),
            donated=2,
        )

    def _program(self, body: Callable[..., Any], in_specs: Any, out_specs: Any, *, donated: int) -> jax.stages.Wrapped:
        def program(*arguments: Any, **static: Any) -> Any:
            on_device = functools.partial(body, **static)
            # Unchecked: tests show that replicated results are equal on every device; shard_map cannot infer it.
            mapped = jax.shard_map(on_device, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return mapped(*arguments)

        return jax.jit(
            program,
            donate_argnums=donated,
            static_argnames=("features", "spread", "plan", "beyond"),
            compiler_options=None if self._mesh.devices.flat[0].platform == "cpu" else _FOR_GPUS,
        )

    def _prefill(
        self,
        leaves: Leaves,
        cache: Cache,
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
        layout: PieceLayout | None,
        rows: SamplingRows,
        counts: TokenCounts | None,
        *,
        features: SamplingFeatures,
        spread: Spread | None,
    ) -> tuple[Cache, Int32[Array, "A"], Logprobs | None]:
        """Prefill a piece of each row's prompt, and sample the first output token (used in rows whose prompt ends with this piece)."""
        model: Llama = self.model.bind(leaves)
        x_BTD, _, cache = model(token_BT, start_B, new_B, cache, tables, layout, spread)
        token_B, logprobs = self._first_token(model, x_BTD, start_B, new_B, layout, rows, counts, features)
        return cache, *self._of_all_rows((token_B, logprobs))

    def _first_token(
        self,
        model: Llama,
        x_BTD: Array,
        start_B: Array,
        new_B: Array,
        layout: PieceLayout | None,
        rows: SamplingRows,
        counts: TokenCounts | None,
        features: SamplingFeatures,
    ) -> tuple[Int32[Array, "B"], Logprobs | None]:
        last_BD = last_state(x_BTD, start_B, new_B, layout, self._ranks)
        token_B, logprobs = sample(model.logits(last_BD), rows, counts, jnp.zeros_like(new_B), features, self._vocab)
        return self._ranks.from_first(token_B), logprobs  # as in decoding

    def _of_all_rows(self, tree: Any) -> Any:
        """Gather the rows of every rank along ``data``, because every host returns every row's tokens."""
        return jax.tree.map(lambda rows: self._data.concatenate(rows, axis=0), tree)

    def _draft_prefill(
        self,
        leaves: Leaves,
        draft_leaves: Leaves,
        caches: tuple[Cache, Cache],
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
        draft_tables: PageTables,
        layout: PieceLayout | None,
        rows: SamplingRows,
        counts: TokenCounts | None,
        following_B: Int32[Array, "B"],
        *,
        features: SamplingFeatures,
        spread: Spread | None,
        beyond: BeyondTraining,
    ) -> tuple[tuple[Cache, Cache], Int32[Array, "A"], Logprobs | None, Float[Array, "A D"]]:
        """As :meth:`_prefill`, and prefill the drafter; also returns its cache and its output at the piece's last token.

        ``following_B``: the prompt's token after the piece, NONE where the prompt ends with the piece.
        """
        model: Llama = self.model.bind(leaves)
        drafter: Drafter = self.drafter.bind(draft_leaves)
        cache, draft_cache = caches
        x_BTD, feature_BTf, cache = model(token_BT, start_B, new_B, cache, tables, layout, spread)
        token_B, logprobs = self._first_token(model, x_BTD, start_B, new_B, layout, rows, counts, features)
        following_B = jnp.where(following_B == NONE, token_B, following_B)
        piece = (token_BT, following_B, feature_BTf, start_B, new_B)
        hidden_BD, draft_cache = prefill_drafter(drafter, model, draft_cache, *piece, draft_tables, layout, spread, beyond)
        return (cache, draft_cache), *self._of_all_rows((token_B, logprobs, hidden_BD))

    def _speculate(
        self,
        leaves: Leaves,
        draft_leaves: Leaves,
        state: SpeculationState,
        tables: PageTables,
        draft_tables: PageTables,
        rows: SamplingRows,
        steps: Int32[Array, ""],
        *,
        features: SamplingFeatures,
        plan: Speculation,
        beyond: BeyondTraining,
    ) -> tuple[SpeculationState, DecodeTokens, RoundCounts]:
        """Run rounds of speculation until a row has ``steps`` tokens, in one dispatch."""
        model: Llama = self.model.bind(leaves)
        drafter: Drafter = self.drafter.bind(draft_leaves)
        state, out, counted = speculate_tokens(model, drafter, state, tables, draft_tables, rows, steps, features, plan, beyond)
        return state, self._tokens_of_all_rows(out), self._of_all_rows(counted)

    def _decode(
        self,
        leaves: Leaves,
        state: DecodeState,
        tables: PageTables,
        rows: SamplingRows,
        steps: Int32[Array, ""],
        *,
        features: SamplingFeatures,
    ) -> tuple[DecodeState, DecodeTokens]:
        """Decode up to ``steps`` tokens for every unfinished row, in one dispatch."""
        state, out = decode_tokens(self.model.bind(leaves), state, tables, rows, steps, features)
        return state, self._tokens_of_all_rows(out)

    def _tokens_of_all_rows(self, out: DecodeTokens) -> DecodeTokens:
        token_sB, logprobs = jax.tree.map(lambda rows: self._data.concatenate(rows, axis=1), (out.token_sB, out.logprobs))
        return DecodeTokens(token_sB, logprobs, out.steps, self._data.concatenate(out.done_B, axis=0))

    def _logits(
        self,
        leaves: Leaves,
        cache: Cache,
        token_BT: Int32[Array, "B T"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        tables: PageTables,
        layout: PieceLayout | None,
        *,
        spread: Spread | None,
    ) -> tuple[Cache, Float32[Array, "B t V"]]:
        """Compute next-token logits at every position of a piece; with a layout, in the layout's order, one rank after the other."""
        model: Llama = self.model.bind(leaves)
        x_BTD, _, cache = model(token_BT, start_B, new_B, cache, tables, layout, spread)
        return cache, model.logits(x_BTD)
