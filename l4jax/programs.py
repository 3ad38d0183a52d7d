"""The compiled programs: what is traced, and what is donated.

A program is a pure function of the weights, the state that stays on the devices (donated), and small inputs. It is compiled once for each
combination of input shapes; ``l4jax.engine.options`` keeps their number small. What a sampling setting needs is decided at run time, so no
setting needs a program of its own.

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
from jaxtyping import Array, Bool, Float32, Int32

from l4jax.cache import CACHE_AXES, PageTables, is_local
from l4jax.compiled import Folder, Program, ProgramInfo
from l4jax.config import ModelConfig
from l4jax.decoding.entries import Entries
from l4jax.decoding.generate import DecodeState, DecodeTokens, decode_tokens
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import Logprobs, sample, token_logprobs
from l4jax.decoding.slots import SlotMasks, Slots, SlotTokens, SlotUpdate
from l4jax.decoding.speculate import BeyondTraining, RoundCounts, speculate_tokens, window
from l4jax.decoding.tree import NONE
from l4jax.model.drafter import Drafter
from l4jax.model.llama import Llama
from l4jax.model.steps.spread import Spread, last_state, tokens_at
from l4jax.model.weights import BoundModel, weight_specs
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.program_inputs import Burst, Cache, FirstTokens, Piece, Resident, SlotPages, Weights, copy_specs
from sharding.rules import partition

_CAPTURED = ["FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION", "CONDITIONAL", "WHILE"]
if jax.__version_info__ >= (0, 12):
    _CAPTURED.append("COLLECTIVES_KERNEL")  # 0.11 does not know it

_FOR_GPUS = {
    # XLA's own all-reduce kernels take one array; two sums that it combined into one message would go by NCCL, four times as slow.
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    # What XLA puts into CUDA graphs: its defaults, and loops. For a loop outside a graph the host waits for the condition at every
    # turn. XLA makes no graph of fewer kernels than the second number.
    "xla_gpu_enable_command_buffer": ",".join(_CAPTURED),
    "xla_gpu_graph_min_graph_size": 1,
}


class Programs:
    """The programs of one model, and of its drafter if there is one, on one mesh. Each is compiled on first use for each set of shapes."""

    def __init__(self, placement: Placement, drafter: DrafterPlacement | None = None, folder: Folder | None = None) -> None:
        """``folder``: where compiled programs are kept from one process to the next."""
        model = Llama(placement.config, placement.spec, taps=drafter.drafter.aux_layers if drafter else ())
        self.model = BoundModel(model)
        self._config, self._draft_config = placement.config, drafter.config if drafter else None
        self._mesh, spec, self._folder = placement.mesh, placement.spec, folder
        self._data, self._vocab, self._ranks = spec.along("data"), spec.along("tensor"), spec.token_ranks
        module = drafter.build(drafter.config, spec) if drafter else None
        self._drafter = BoundModel(module) if module else None

        def leaves(module: Any) -> Any:
            return () if module is None else tuple(partition(spec, *weight.axes) for weight in weight_specs(module).values())

        weights, resident = Weights(leaves(model), leaves(module)), Resident.specs(spec)
        everywhere: Any = PartitionSpec()
        self._all: list[Program] = []
        self.prefill = self._program(self._prefill, (weights, resident, Piece.specs(spec)), (resident, everywhere))
        self.decode = self._program(self._decode, (weights, resident, Burst.specs(spec)), (resident, everywhere))
        self.speculate = self._program(self._speculate, (weights, resident, Burst.specs(spec)), (resident, everywhere, everywhere))
        slots, row = resident.slots, partition(spec, "batch")
        self.update_slots = self._program(self._update_slots, (slots, row), slots, donated=0)
        self.count = self._program(self._count, (slots, row), slots, donated=0)
        self.mask = self._program(self._mask, (slots, row), slots, donated=0)
        self.zero_pages = self._program(self._zero_pages, (resident, row), resident, donated=0)
        positions = self._data.axes or None, self._ranks.axes or None
        copy, pages = copy_specs(spec), SlotPages.specs(spec)
        self.save = self._program(self._save, (resident, pages), copy, donated=())
        self.load = self._program(self._load, (resident, copy, pages), resident, donated=0)
        pools = partition(spec, *CACHE_AXES)
        scored = pools, PartitionSpec(*positions, self._vocab.axes or None), everywhere
        self.score = self._program(self._score, (weights, pools, Piece.specs(spec), row), scored)

    @property
    def drafter(self) -> BoundModel:
        """The drafter; there must be one."""
        assert self._drafter is not None
        return self._drafter

    @property
    def are_kept(self) -> bool:
        """Whether there is a folder where compiled programs are kept."""
        return self._folder is not None

    def forget(self) -> None:
        """Drop all that is compiled."""
        for program in self._all:
            program.forget()

    def compiled(self) -> list[ProgramInfo]:
        """All programs that are compiled, or loaded, so far."""
        return [info for program in self._all for info in program.compiled()]

    def _program(self, body: Callable[..., Any], in_specs: Any, out_specs: Any, *, donated: int | tuple[()] = 1) -> Program:
        def program(*arguments: Any, **static: Any) -> Any:
            on_device = functools.partial(body, **static)
            # Unchecked: tests show that replicated results are equal on every device; shard_map cannot infer it.
            mapped = jax.shard_map(on_device, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return mapped(*arguments)

        devices = list(self._mesh.devices.flat)
        function = jax.jit(
            program,
            donate_argnums=donated,
            static_argnames=("spread", "plan", "beyond"),
            compiler_options=None if devices[0].platform == "cpu" else _FOR_GPUS,
        )
        context = repr((self._config, self._draft_config, self._mesh))
        made = Program(body.__name__.removeprefix("_"), function, context, devices, self._folder)
        self._all.append(made)
        return made

    def _update_slots(self, slots: Slots, update: SlotUpdate) -> Slots:
        """Give slots to new requests."""
        return slots.updated(update)

    def _count(self, slots: Slots, tokens: SlotTokens) -> Slots:
        """Count tokens that are not prefilled, because they are cached."""
        return slots.counted(tokens, self._vocab)

    def _mask(self, slots: Slots, masks: SlotMasks) -> Slots:
        """Say which tokens may be next in slots whose requests have a guide."""
        return slots.masked(masks)

    def _zero_pages(self, resident: Resident, pages: PageTables) -> Resident:
        """Zero pages of the model's cache and the drafter's: those in the data rank's one row, on every token rank.

        Numbers past the last page change nothing.
        """

        def zeroed(cache: Cache, pages_of_layers: list[Array]) -> Cache:
            return tuple(layer.zeroed(page_W) for layer, page_W in zip(cache, pages_of_layers, strict=True))

        of_model, of_drafter = self._pages_of_layers(pages)
        return Resident(zeroed(resident.cache, of_model), zeroed(resident.draft_cache, of_drafter), resident.slots)

    def _pages_of_layers(self, pages: PageTables) -> tuple[list[Array], list[Array]]:
        """For each layer of the model, and of the drafter, the pages in this data rank's one row."""

        def of(config: ModelConfig) -> list[Array]:
            return [(pages.local_Bw if is_local(config, i) else pages.full_BW)[0] for i in range(config.num_layers)]

        return of(self._config), of(self._draft_config) if self._draft_config else []

    def _save(self, resident: Resident, pages: SlotPages) -> Resident:
        """Copy one slot and some pages, of the drafter's cache too. The copy is the same on all data ranks."""
        owner = jnp.argmax(self._data.gather(pages.slot_B[0] < len(resident.slots.token_U)))

        def copied(tree: Any, index_W: Array) -> Any:
            taken = jax.tree.map(lambda pool: pool.at[index_W].get(mode="fill", fill_value=0), tree)
            return jax.tree.map(lambda part: self._data.gather(part)[owner], taken)

        def of_layers(cache: Cache, pages_of_layers: list[Array]) -> Cache:
            return tuple(copied(layer, page_W) for layer, page_W in zip(cache, pages_of_layers, strict=True))

        of_model, of_drafter = self._pages_of_layers(pages.pages)
        caches = of_layers(resident.cache, of_model), of_layers(resident.draft_cache, of_drafter)
        return Resident(*caches, slots=copied(resident.slots, pages.slot_B))

    def _load(self, resident: Resident, copy: Resident, pages: SlotPages) -> Resident:
        """Write a copy that :meth:`_save` made to a slot and to pages, on any data rank."""

        def written(tree: Any, part: Any, index_W: Array) -> Any:
            return jax.tree.map(lambda pool, values: pool.at[index_W].set(values, mode="drop"), tree, part)

        def of_layers(cache: Cache, parts: Cache, pages_of_layers: list[Array]) -> Cache:
            return tuple(written(*layer) for layer in zip(cache, parts, pages_of_layers, strict=True))

        of_model, of_drafter = self._pages_of_layers(pages.pages)
        caches = of_layers(resident.cache, copy.cache, of_model), of_layers(resident.draft_cache, copy.draft_cache, of_drafter)
        return Resident(*caches, slots=written(resident.slots, copy.slots, pages.slot_B))

    def _prefill(
        self, weights: Weights, resident: Resident, piece: Piece, *, spread: Spread | None, beyond: BeyondTraining | None
    ) -> tuple[Resident, FirstTokens]:
        """Prefill a piece of each row. If the row's prefill ends, sample its next token and write it to the slot.

        With ``beyond`` the drafter is prefilled too.
        """
        model: Llama = self.model.bind(weights.target)
        token_BT, start_B, new_B = piece.token_BT, piece.start_B, piece.new_B
        x_BTD, feature_BTf, cache = model(token_BT, start_B, new_B, resident.cache, piece.tables, piece.layout, spread)
        slots = resident.slots.counted(piece.tokens, self._vocab)
        rows = slots.settings(piece.slot_B)
        logits_BV = model.logits(last_state(x_BTD, start_B, new_B, piece.layout, self._ranks))
        # Ranks that do the same work may round differently; without this each might choose another token.
        token_B = self._ranks.from_first(sample(logits_BV, rows, slots.counts, piece.tokens.produced_B, self._vocab))
        logprobs = token_logprobs(logits_BV, token_B, jnp.any(rows.reported_B), self._vocab)
        draft_cache, hidden_BD = resident.draft_cache, None
        if beyond is not None:
            assert piece.draft_tables is not None
            entries = self._entries(weights, model, piece.draft_tables, beyond)
            following_B = jnp.where(piece.following_B == NONE, token_B, piece.following_B)
            added = entries.add(draft_cache, token_BT, following_B, feature_BTf, start_B, new_B, piece.layout, spread)
            draft_cache, hidden_BD = added.cache, added.hidden_BD
        slots, done_B = slots.begun(piece.tokens, piece.ends_B, token_B, hidden_BD, self._vocab)
        return Resident(cache, draft_cache, slots), FirstTokens(*self._of_all_rows((token_B, logprobs, done_B)))

    def _of_all_rows(self, tree: Any) -> Any:
        """Gather the rows of every rank along ``data``, because every host returns every row's tokens."""
        return jax.tree.map(lambda rows: self._data.concatenate(rows, axis=0), tree)

    def _entries(self, weights: Weights, model: Llama, tables: PageTables | None, beyond: BeyondTraining) -> Entries:
        assert tables is not None
        drafter: Drafter = self.drafter.bind(weights.drafter)
        return Entries(drafter, model, tables, window(drafter, beyond))

    def _speculate(
        self, weights: Weights, resident: Resident, burst: Burst, *, plan: Speculation, beyond: BeyondTraining
    ) -> tuple[Resident, DecodeTokens, RoundCounts]:
        """As :meth:`_decode`, in rounds of speculation."""
        entries = self._entries(weights, self.model.bind(weights.target), burst.draft_tables, beyond)
        slots, slot_B = resident.slots, burst.slot_B
        state = slots.decoding(slot_B, resident.cache, resident.draft_cache)
        rows = slots.active_settings(slot_B)
        state, out, counted = speculate_tokens(entries, state, burst.tables, rows, burst.limit_B, burst.steps, plan, beyond)
        return self._after(resident, slot_B, state), self._tokens_of_all_rows(out), self._of_all_rows(counted)

    def _decode(
        self, weights: Weights, resident: Resident, burst: Burst, *, beyond: BeyondTraining | None
    ) -> tuple[Resident, DecodeTokens]:
        """Decode, for as many rounds as the burst says, every row that is neither done nor at its limit.

        With ``beyond`` the drafter's entries of the tokens that are run are written too.
        """
        model: Llama = self.model.bind(weights.target)
        entries = None if beyond is None else self._entries(weights, model, burst.draft_tables, beyond)
        slots, slot_B = resident.slots, burst.slot_B
        state = slots.decoding(slot_B, resident.cache, resident.draft_cache)
        rows = slots.active_settings(slot_B)
        state, out = decode_tokens(model, state, burst.tables, rows, burst.limit_B, burst.steps, entries)
        return self._after(resident, slot_B, state), self._tokens_of_all_rows(out)

    def _after(self, resident: Resident, slot_B: Int32[Array, "B"], state: DecodeState) -> Resident:
        return Resident(state.cache, state.draft.cache if state.draft else (), resident.slots.after(slot_B, state))

    def _tokens_of_all_rows(self, out: DecodeTokens) -> DecodeTokens:
        token_sB, logprobs = jax.tree.map(lambda rows: self._data.concatenate(rows, axis=1), (out.token_sB, out.logprobs))
        return DecodeTokens(token_sB, logprobs, out.steps, self._data.concatenate(out.done_B, axis=0))

    def _score(
        self, weights: Weights, cache: Cache, piece: Piece, wanted_B: Bool[Array, "B"], *, spread: Spread | None
    ) -> tuple[Cache, Float32[Array, "B t V"], Logprobs]:
        """Compute next-token logits at every position of a piece, and the log-probability of the token that follows each position.

        Log-probabilities are zeros if no row of the data rank wants them. With a layout, positions are in its order, rank after rank.
        """
        model: Llama = self.model.bind(weights.target)
        x_BTD, _, cache = model(piece.token_BT, piece.start_B, piece.new_B, cache, piece.tables, piece.layout, spread)
        logits_BTV = model.logits(x_BTD)
        follows_BT = jnp.roll(piece.token_BT, -1, axis=1).at[jnp.arange(len(piece.new_B)), piece.new_B - 1].set(piece.following_B)
        if piece.layout is not None:
            follows_BT = tokens_at(follows_BT, piece.layout.position_RBT[self._ranks.index()], piece.start_B)
        B, T, V = logits_BTV.shape
        logprobs = token_logprobs(logits_BTV.reshape(B * T, V), follows_BT.reshape(B * T), jnp.any(wanted_B), self._vocab)

        def of_all(leaf: Array) -> Array:
            return self._of_all_rows(self._ranks.concatenate(leaf.reshape(B, T, *leaf.shape[1:]), axis=1))

        return cache, logits_BTV, jax.tree.map(of_all, logprobs)
