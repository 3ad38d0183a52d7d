"""Facts of the compiled programs: what is donated, what is allocated, and that nothing is compiled twice."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams
from l4jax.cache import PAGE_SIZE, CacheShape
from l4jax.decoding.draft import DraftState
from l4jax.decoding.generate import DecodeState
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.sampling import batch_features, sampling_rows
from l4jax.decoding.speculate import SpeculationState
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.programs import Programs
from sharding.mesh import ONE_DEVICE, MeshSpec
from tests.tiny import drafter, few_tokens, llama3_like, loaded_drafter, maverick_like, prompts, scout_like, weights


def decode_memory(config, pages_per_row, plan=None):
    """(bytes of the cache, XLA's memory analysis of the decode program) for four rows of this many pages; by speculation with a plan."""
    B, shape = 4, CacheShape(rows=4, capacity=pages_per_row * PAGE_SIZE)
    draft_placement = DrafterPlacement(drafter(config, aux_layers=(0, 1, 2)), ONE_DEVICE.build())
    placement = Placement.on(config, ONE_DEVICE)
    programs = Programs(placement, draft_placement)
    leaves = programs.model.leaves(placement.abstract_weights(jnp.dtype(jnp.float32)))
    params = [SamplingParams()] * B
    cache = jax.eval_shape(lambda: shape.allocate(config, jnp.dtype(jnp.float32), None))
    ints = jax.ShapeDtypeStruct((B,), jnp.int32)
    state = DecodeState(cache, ints, ints, ints, jax.ShapeDtypeStruct((B,), jnp.bool_), None)
    rows = sampling_rows(params, [0] * B, [[]] * B, config.vocab_size)
    tables = shape.identity_tables(config, range(B))
    features = batch_features(params)
    if plan is None:
        compiled = programs.decode.lower(leaves, state, tables, rows, np.int32(8), features=features).compile()
        return sum(leaf.size * 4 for leaf in jax.tree.leaves(cache)), compiled.memory_analysis()
    draft_config = draft_placement.config
    draft_cache = jax.eval_shape(lambda: shape.allocate(draft_config, jnp.dtype(jnp.float32), None))
    hidden_BD = jax.ShapeDtypeStruct((B, draft_config.hidden_size), jnp.float32)
    draft_leaves = programs.drafter.leaves(draft_placement.abstract_weights(jnp.dtype(jnp.float32)))
    both = SpeculationState(state, DraftState(draft_cache, hidden_BD))
    all_tables = (tables, shape.identity_tables(draft_config, range(B)))
    arguments = (leaves, draft_leaves, both, *all_tables, rows, np.int32(8))
    compiled = programs.speculate.lower(*arguments, features=features, plan=Speculation.parse(plan), beyond="window").compile()
    return sum(leaf.size * 4 for leaf in jax.tree.leaves((cache, draft_cache))), compiled.memory_analysis()


PLANS = (None, "chain:3", "dynamic:steps=3,topk=2,nodes=6")
# Decoding of every model, and each way to speculate once with experts; the others run with `make test-all`.
USUAL = {*((make, None) for make in (scout_like, maverick_like, llama3_like)), (maverick_like, PLANS[1]), (scout_like, PLANS[2])}


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.more_meshes)
        for case in itertools.product((scout_like, maverick_like, llama3_like), PLANS)
    ],
)
def test_decode_donates_the_cache_and_makes_no_second_copy(make, plan):
    cache, memory = decode_memory(few_tokens(make), 4096, plan)
    assert memory.alias_size_in_bytes >= cache
    # The temporaries are activations, and the page table that the loop carries.
    assert memory.temp_size_in_bytes < 0.01 * cache


def test_chunk_local_layers_hold_one_chunk():
    config = scout_like(attention_chunk_size=256)
    shapes = CacheShape(rows=2, capacity=100_000).layer_shapes(config)
    tokens = [pages * PAGE_SIZE for pages, *_ in shapes]
    assert tokens[:3] == [2 * 256] * 3
    assert 2 * 100_000 <= tokens[3] < 2 * (100_000 + PAGE_SIZE)


@contextlib.contextmanager
def count_compilations():
    """A list that grows by one for every program that XLA compiles."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# What is compiled depends on shapes and settings, not on depth: one layer with RoPE and chunks, one without, and no experts.
SHALLOW = {"num_layers": 2, "rope_layers": (True, False), "moe": None}


def test_nothing_compiles_after_warm_up_on_a_mesh_whose_ranks_share_out_tokens():
    config = scout_like(**SHALLOW)
    placed = Placement.on(config, MeshSpec(sequence=2)).place_all(weights(config))
    llm = LLM(config, placed, mesh="sequence=2", max_batch=1, prefill_lengths=(48,))
    llm.warmup(max_length=config.max_position_embeddings)
    rng = np.random.default_rng(0)
    with count_compilations() as compiled:
        for served in range(40):
            params = SamplingParams(max_tokens=int(rng.integers(1, 5)), temperature=float(rng.choice([0.0, 0.8])), seed=1)
            llm.generate(prompts(config, (int(rng.integers(1, 250)),), seed=served), params)
        assert compiled == []


@pytest.mark.parametrize("beyond", [pytest.param("window", marks=pytest.mark.more_meshes), "stop"])
def test_nothing_compiles_after_warm_up_with_a_drafter(beyond):
    """Warm-up compiles every plan of the drafter's table, and plain decoding for texts that grow longer than the drafter drafts for."""
    config = llama3_like(num_layers=1, rope_layers=(True,))
    table = SpeculationTable.from_json({"float32": {"1": "off", "2": "chain:2"}}, "float32")
    loaded = dataclasses.replace(loaded_drafter(drafter(config, "eagle1")), table=table)
    committed = jax.device_put((weights(config), loaded.weights), jax.local_devices()[0])
    loaded = dataclasses.replace(loaded, weights=committed[1])
    llm = LLM(config, committed[0], drafter=loaded, beyond_training=beyond, max_batch=2, prefill_lengths=(32,))
    llm.warmup(max_length=100)
    rng, rounds = np.random.default_rng(0), 0
    with count_compilations() as compiled:
        for served in range(40):
            size = int(rng.integers(1, 3))
            params = SamplingParams(max_tokens=int(rng.integers(1, 20)), temperature=float(rng.choice([0.0, 0.8])), seed=1)
            completions = llm.generate(prompts(config, tuple(rng.integers(1, 80, size)), seed=served), params)
            rounds += sum(c.stats.rounds for c in completions)
            assert size != 1 or all(c.stats.rounds == 0 for c in completions)
        assert compiled == [] and rounds > 0


def test_nothing_compiles_after_warm_up():
    config = scout_like(**SHALLOW)
    with count_compilations() as compiled:
        # Committed to their device, as a checkpoint's weights are: programs tell such arrays from others.
        committed = jax.device_put(weights(config), jax.local_devices()[0])
        llm = LLM(config, committed, max_batch=4, prefill_lengths=(8, 32))
        llm.warmup(max_length=config.max_position_embeddings)
        assert compiled  # the counter counts
        compiled.clear()
        # The longest prompt there may be, and a token.
        llm.generate(prompts(config, (config.max_position_embeddings - 1,)), SamplingParams(max_tokens=1, temperature=0.0))
        rng = np.random.default_rng(0)
        served = 0
        while served < 200:
            size = int(rng.integers(1, 7))
            params = [
                SamplingParams(
                    max_tokens=int(rng.integers(1, 9)), temperature=float(rng.choice([0.0, 0.8])), top_k=int(rng.integers(0, 5)), seed=1
                )
                for _ in range(size)
            ]
            completions = llm.generate(prompts(config, tuple(rng.integers(1, 200, size)), seed=served), params)
            served += len(completions)
        assert compiled == []
