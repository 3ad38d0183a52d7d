"""Facts of the compiled programs: what is donated, what is allocated, and that nothing is compiled twice."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams
from l4jax.cache import PAGE_SIZE, CacheShape, PageTables
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.slots import SlotTokens
from l4jax.parallel.placement import Placement
from l4jax.planning.compile import AbstractModel
from sharding.mesh import ONE_DEVICE, MeshSpec
from tests.tiny import drafter, few_tokens, llama3_like, loaded_drafter, maverick_like, prompts, scout_like, weights


def decode_memory(config, pages_per_row, plan=None):
    """(bytes of the resident state, XLA's memory analysis of the decode program) for four rows of this many pages.

    ``plan``: of a burst that speculates; "entries": the plain burst of a model with a drafter.
    """
    made = None if plan is None else drafter(config, aux_layers=(0, 1, 2))
    model = AbstractModel(config, ONE_DEVICE, jax.local_devices()[:1], jnp.dtype(jnp.float32), made)
    size = (4, pages_per_row * PAGE_SIZE)
    plain = plan in (None, "entries")
    call = model.decode_call(*size, drafting=plan is not None) if plain else model.speculate_call(*size, Speculation.parse(plan))
    resident = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(call.arguments[1]))
    return resident, call.lower().compile().memory_analysis()


PLANS = (None, "entries", "chain:3", "dynamic:steps=3,topk=2,nodes=6")
# Decoding of every model, and each way to speculate once with experts; the others run with `make test-all`.
USUAL = {
    *((make, None) for make in (scout_like, maverick_like, llama3_like)),
    (llama3_like, PLANS[1]),
    (maverick_like, PLANS[2]),
    (scout_like, PLANS[3]),
}


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.more_meshes)
        for case in itertools.product((scout_like, maverick_like, llama3_like), PLANS)
    ],
)
def test_decode_donates_all_that_is_resident_and_makes_no_second_copy(make, plan):
    resident, memory = decode_memory(few_tokens(make), 4096, plan)
    assert memory.alias_size_in_bytes >= resident
    # The temporaries are activations, and the page table that the loop carries.
    assert memory.temp_size_in_bytes < 0.01 * resident


@pytest.mark.optimized
def test_pages_are_zeroed_and_tokens_counted_in_place():
    config = few_tokens(scout_like)
    model = AbstractModel(config, ONE_DEVICE, jax.local_devices()[:1], jnp.dtype(jnp.float32), drafter(config, aux_layers=(0, 1, 2)))
    resident = model.decode_call(4, 4096 * PAGE_SIZE).arguments[1]
    pages, one = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = SlotTokens(jax.ShapeDtypeStruct((1, 512), jnp.int32), one, one, one, one)
    zero = model.programs.zero_pages.lower(resident, PageTables(pages, pages))
    count = model.programs.count.lower(resident.slots, tokens)
    for lowered, donated in ((zero, resident), (count, resident.slots)):
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated))
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= nbytes
        # Of the pages or tokens that it is given, not of the whole.
        assert memory.temp_size_in_bytes < 2**20


def test_chunk_local_layers_hold_one_chunk():
    config = scout_like(attention_chunk_size=256)
    shapes = CacheShape.for_rows(config, 2, 100_000, ONE_DEVICE).layer_shapes(config, ONE_DEVICE)
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
def test_nothing_compiles_after_warm_up_with_a_drafter(beyond, row_buckets):
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


def test_nothing_compiles_after_warm_up(row_buckets):
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
                    max_tokens=int(rng.integers(1, 9)),
                    temperature=float(rng.choice([0.0, 0.8])),
                    top_k=int(rng.integers(0, 5)),
                    top_p=float(rng.choice([1.0, 0.9])),
                    min_p=float(rng.choice([0.0, 0.1])),
                    repetition_penalty=float(rng.choice([1.0, 1.2])),
                    presence_penalty=float(rng.choice([0.0, 0.0, 0.5])),
                    frequency_penalty=float(rng.choice([0.0, 0.5])),
                    logit_bias={} if rng.random() < 0.7 else {int(token): 1.0 for token in rng.integers(0, config.vocab_size, 12)},
                    stop_token_ids=rng.integers(0, config.vocab_size, rng.integers(0, 12)).tolist(),
                    logprobs=None if rng.random() < 0.7 else 3,
                    seed=1,
                )
                for _ in range(size)
            ]
            asked = prompts(config, tuple(rng.integers(1, 200, size)), seed=served)
            cancelled = llm.add(asked[0], params[0])
            llm.step()
            cancelled.cancel()
            served += len(llm.generate(asked, params))
        llm.score(asked, top=3)
        llm.logits(asked)
        assert compiled == []
