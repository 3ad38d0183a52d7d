"""Deterministic mode's own parts: what it pins, what it refuses, and copies of sequences that wait in host memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, load
from l4jax.cache import is_local
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.engine.saved import SavedSequences
from l4jax.engine.step import Load, Save
from tests.engine.families import watched
from tests.tiny import drafter, few_tokens, llama3_like, loaded_drafter, prompts, scout_like, weights

CONFIG = few_tokens(llama3_like)
CHUNKED = few_tokens(scout_like)


def made(config=CONFIG, **options) -> LLM:
    return LLM(config, weights(config), **{"max_batch": 2, "prefill_lengths": (128,), "deterministic": True, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prefill_lengths": (128, 256)},
            r"^prefill_lengths is \[128, 256\] with deterministic=True; expected one length, a multiple of 128 ",
        ),
        ({"prefill_lengths": (100,)}, r"^prefill_lengths is \[100\] with deterministic=True; expected one length, a multiple of 128 "),
        ({"prefill_lengths": (128,), "mesh": "sequence=2"}, r"expected one length, a multiple of 256 \(the tokens of a page on all ranks"),
        ({"deterministic": "yes"}, r"^deterministic is 'yes'; expected True or False$"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_load_refuses_what_is_no_truth_value():
    with pytest.raises(ValueError, match=r"^deterministic is 1; expected True or False$"):
        load("folder", deterministic=1)


def test_it_has_one_size_of_each_program():
    options = made(prefill_lengths=None, max_batch=5).engine.options
    assert (options.row_buckets, options.piece_lengths, options.piece_rows, options.grid) == ((5,), (512,), (1,), 512)
    on_ranks = made(CHUNKED, mesh="data=2,sequence=2", prefill_lengths=None, max_batch=6).engine.options
    assert (on_ranks.row_buckets, on_ranks.piece_lengths, on_ranks.one_piece) == ((3,), (1024,), True)


CHAIN = Speculation.parse("chain:2")


@pytest.mark.parametrize(("entries", "plan"), [(((1, CHAIN), (2, None)), None), (((1, None), (2, CHAIN)), CHAIN), (((1, CHAIN),), CHAIN)])
def test_it_speculates_as_the_table_says_for_all_rows(entries, plan):
    own = dataclasses.replace(loaded_drafter(drafter(CONFIG, aux_layers=(0, 1, 2))), table=SpeculationTable(entries))
    llm = made(drafter=own)
    assert [kind for _, kind in llm.engine.options.plans] == ([None] if plan is None else [*llm.engine.runner._plans])
    assert [*llm.engine.runner._plans.values()] == ([] if plan is None else [plan])
    assert llm.engine.options.drafter == (plan is not None)


def filled(llm: LLM) -> None:
    """Fill the state on the devices with numbers that are all different."""
    llm.engine._start()
    runner, count = llm.engine.runner, iter(range(1000))

    def numbered(leaf):
        values = np.arange(leaf.size).reshape(leaf.shape) * 7 + next(count)
        return jax.device_put((values % (2 if leaf.dtype == jnp.bool_ else 65_521)).astype(leaf.dtype), leaf.sharding)

    runner._resident = jax.tree.map(numbered, runner.resident)


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2,sequence=2,tensor=2"])
def test_a_copy_is_written_to_other_pages_and_to_another_rank_as_it_was(mesh):
    own = loaded_drafter(drafter(CHUNKED, aux_layers=(0, 1, 2)))
    own = dataclasses.replace(own, table=SpeculationTable.always(CHAIN))
    llm = made(CHUNKED, mesh=mesh, drafter=own, prefill_lengths=(256,), max_batch=4, kv_tokens=80 * 128)
    filled(llm)
    runner, shape, spec = llm.engine.runner, llm.engine.shape, llm.placement.spec
    ranks = spec.token_ranks.count
    assert shape.full_pages >= 20 and shape.local_pages >= 3
    before = jax.device_get(runner.resident)
    saved = SavedSequences(runner.programs, spec)
    save = Save(7, 1, (3, 0, 2, 5, 4, 1, 9, 8, 11, 6), (2, 0))
    saved.save(runner.resident, save)
    saved.fetch()
    # One page fewer than was saved, on the last data rank.
    load_ = Load(7, shape.slots * spec.data - 1, (15, 14, 13, 12, 10, 7, 16, 17, 18), (1, 2))
    after = jax.device_get(saved.load(runner.resident, load_))

    def moved(pool, count: int, source: tuple[int, ...], target: tuple[int, ...], token_ranks: int):
        """What a pool of ``count`` pages on each data and token rank must hold then."""
        expected = np.asarray(pool).copy()
        by_rank = expected.reshape(spec.data, token_ranks, count, *expected.shape[1:])
        for a, b in zip(source, target, strict=False):
            by_rank[-1, :, b] = np.asarray(pool).reshape(by_rank.shape)[0, :, a]
        return expected

    slots_a_rank = shape.slots
    for name in ("cache", "draft_cache"):
        for index, (layer, found) in enumerate(zip(getattr(before, name), getattr(after, name), strict=True)):
            for pool, pool_found in ((layer.k_PKph, found.k_PKph), (layer.v_PKph, found.v_PKph)):
                local = name == "cache" and is_local(CHUNKED, index)
                kind = (shape.local_pages, save.local, load_.local) if local else (shape.full_pages, save.full, load_.full)
                np.testing.assert_array_equal(pool_found, moved(pool, *kind, ranks))
    for leaf, found in zip(jax.tree.leaves(before.slots), jax.tree.leaves(after.slots), strict=True):
        np.testing.assert_array_equal(found, moved(leaf, slots_a_rank, (save.slot,), (slots_a_rank - 1,), 1))
    with pytest.raises(KeyError):
        saved.drop(7)


def test_zeroed_pages_are_the_drafters_too():
    own = dataclasses.replace(loaded_drafter(drafter(CHUNKED, aux_layers=(0, 1, 2))), table=SpeculationTable.always(CHAIN))
    llm = made(CHUNKED, drafter=own)
    filled(llm)
    runner = llm.engine.runner
    before = jax.device_get(runner.resident)
    runner._zero([(0, 1)], [(0, 0)])
    after = jax.device_get(runner.resident)
    layers = zip((*before.cache, *before.draft_cache), (*after.cache, *after.draft_cache), strict=True)
    for index, (layer, found) in enumerate(layers):
        page = 0 if index < CHUNKED.num_layers and is_local(CHUNKED, index) else 1
        for pool, pool_found in ((layer.k_PKph, found.k_PKph), (layer.v_PKph, found.v_PKph)):
            pool = np.asarray(pool).copy()
            pool[page] = 0
            np.testing.assert_array_equal(pool_found, pool)


@pytest.mark.parametrize(("config", "mesh"), [(CHUNKED, "data=2,sequence=2"), (CONFIG, "data=2,tensor=2")])
def test_on_meshes_requests_get_to_the_last_bit_what_they_get_alone(config, mesh):
    """Six requests at a time on two data ranks, with too few pages: some wait in host memory."""
    config = dataclasses.replace(config, max_position_embeddings=1024)
    own = dataclasses.replace(loaded_drafter(drafter(config, aux_layers=(0, 1, 2))), table=SpeculationTable.always(CHAIN))
    saves = []
    tokens = 256 if "sequence" in mesh else 128
    llm = made(config, mesh=mesh, drafter=own, prefill_lengths=(tokens,), max_batch=6, kv_tokens=2 * 4 * tokens)
    llm = watched(llm, lambda step: saves.extend(step.saves), long_steps=4, short_steps=4)
    asked = prompts(config, (tokens - 30, tokens - 25, tokens - 20, tokens - 15, 5, tokens - 35, tokens + 3, 2 * tokens - 10))
    params = [SamplingParams(max_tokens=60, seed=i, temperature=float(i % 2), logprobs=2, presence_penalty=0.3) for i in range(len(asked))]
    found = llm.generate(asked, params)
    assert saves
    for prompt, its_params, completion in zip(asked, params, found, strict=True):
        llm.engine.discard()
        [alone] = llm.generate([prompt], its_params)
        assert (completion.token_ids, completion.logprobs) == (alone.token_ids, alone.logprobs)


def test_warmup_makes_the_copying_programs_ready_too():
    llm = made()
    llm.warmup()
    assert {info.kind for info in llm.programs()} == {
        "update_slots",
        "count",
        "mask",
        "zero_pages",
        "save",
        "load",
        "prefill",
        "score",
        "decode",
    }
