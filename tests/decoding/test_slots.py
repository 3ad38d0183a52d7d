"""The slots that stay on the devices: what each program writes to them, and that it leaves all others as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import SamplingParams
from l4jax.cache import CacheShape
from l4jax.decoding.slots import SlotTokens
from l4jax.parallel.placement import Placement
from l4jax.program_inputs import Resident, slot_update
from sharding.mesh import ONE_DEVICE
from sharding.ranks import ONE
from tests.tiny import llama3_like

V, SLOTS = 64, 4
PARAMS = SamplingParams(temperature=0.5, presence_penalty=0.3, logprobs=2, max_tokens=2)


@pytest.fixture
def slots():
    """Four slots, each of an earlier request with a prompt and an answer."""
    config = llama3_like(num_layers=1, rope_layers=(True,))
    assert config.vocab_size == V
    free = Resident.empty(
        Resident.abstract(Placement.on(config, ONE_DEVICE), None, CacheShape(SLOTS, SLOTS, 0), jnp.dtype(jnp.float32))
    ).slots
    assert free.done_U.all()
    used = free.updated(slot_update(SLOTS, 1, range(SLOTS), [PARAMS] * SLOTS, range(SLOTS), [[7]] * SLOTS, V))
    prompts = slot_tokens(range(SLOTS), [[1, 2, 3]] * SLOTS, prompt_length=[3] * SLOTS)
    return used.counted(prompts, ONE).begun(prompts, jnp.ones(SLOTS, bool), jnp.full(SLOTS, 9, jnp.int32), None, ONE)[0]


def slot_tokens(slots, tokens, start=None, new=None, prompt_length=None):
    """Tokens of these slots; by default all are new, from position 0 on, and the prompt's."""
    everything = [len(tokens[0])] * len(tokens)
    rest = (start or [0] * len(tokens), new or everything, prompt_length or [100] * len(tokens), slots)
    token_BT, *rest_B = (jnp.asarray(values, jnp.int32) for values in (tokens, *rest))
    return SlotTokens(token_BT, *rest_B)


def others_are_equal(after, before, changed):
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.delete(new, changed, axis=0), np.delete(old, changed, axis=0))


def counted(slots, slot):
    return np.flatnonzero(slots.counts.in_prompt_UV[slot]).tolist(), np.flatnonzero(slots.counts.output_UV[slot]).tolist()


def test_a_new_request_finds_nothing_of_the_one_before(slots):
    after = slots.updated(slot_update(SLOTS, 1, [2], [SamplingParams(temperature=0.0)], [5], [[8, 9]], V))
    others_are_equal(after, slots, [2])
    assert counted(slots, 2) == ([1, 2, 3], [9]) and counted(after, 2) == ([], [])
    assert (after.length_U[2], after.produced_U[2], bool(after.done_U[2])) == (0, 0, True)
    rows = after.settings(jnp.asarray([2, 0], jnp.int32))
    assert rows.temperature_B.tolist() == [0.0, 0.5] and rows.slot_B.tolist() == [2, 0]
    assert rows.stop_Bj[:, :2].tolist() == [[8, 9], [7, -1]] and rows.seed_B2[:, 1].tolist() == [5, 0]


def test_slots_are_numbered_over_all_data_ranks():
    """Slot 5 of six, on two ranks, is the third of the second rank; entries of other slots point past the last one."""
    update = slot_update(6, 2, [5, 0], [PARAMS] * 2, [1, 2], [[]] * 2, V)
    assert update.slot_B.tolist() == [0, 3, 3, 3, 3, 2]
    assert update.sampling.seed_B2[:, 1].tolist() == [2, 0, 0, 0, 0, 1]


def test_only_new_tokens_are_counted(slots):
    """A prompt in two pieces; what pads them, and rows that are padding, count nothing."""
    slots = slots.updated(slot_update(SLOTS, 1, [1], [PARAMS], [0], [[]], V))
    after = slots.counted(slot_tokens([1, SLOTS], [[4, 5, 0, 0], [6, 6, 6, 6]], new=[2, 0]), ONE)
    after = after.counted(slot_tokens([1, SLOTS], [[60, 4, 5, 0], [6, 6, 6, 6]], start=[2, 0], new=[1, 4]), ONE)
    others_are_equal(after, slots, [1])
    assert counted(after, 1) == ([4, 5, 60], [])


def test_tokens_after_the_prompt_are_counted_as_output(slots):
    """The prompt ends within the second piece; the token that is drawn after it is output number 3."""
    slots = slots.updated(slot_update(SLOTS, 1, [1], [SamplingParams(max_tokens=4)], [0], [[]], V))
    after = slots.counted(slot_tokens([1], [[4, 5, 6]], prompt_length=[4]), ONE)
    piece = slot_tokens([1], [[7, 8, 4, 8, 9]], start=[3], new=[4], prompt_length=[4])
    after = after.counted(piece, ONE)
    assert counted(after, 1) == ([4, 5, 6, 7], [4, 8]) and after.counts.output_UV[1, [4, 8]].tolist() == [1, 2]
    assert (piece.length_B.tolist(), piece.produced_B.tolist()) == ([7], [3])
    after, done = after.begun(piece, jnp.ones(1, bool), jnp.asarray([4], jnp.int32), None, ONE)
    assert (after.length_U[1], after.produced_U[1], after.counts.output_UV[1, 4], bool(done[0])) == (7, 4, 2, True)


def test_the_first_token_is_written_to_the_slots_whose_prompt_has_ended(slots):
    fresh = slots.updated(slot_update(SLOTS, 1, [0, 3], [PARAMS, SamplingParams(max_tokens=1)], [0, 0], [[7], [7]], V))
    pieces = slot_tokens([3, 1, 0], [[0] * 4] * 3, start=[1, 2, 4], prompt_length=[5, 9, 8])
    ends = jnp.asarray([True, False, True])
    after, done = fresh.begun(pieces, ends, jnp.asarray([11, 12, 7], jnp.int32), None, ONE)
    others_are_equal(after, fresh, [0, 3])
    assert after.token_U[jnp.asarray([3, 0])].tolist() == [11, 7] and after.length_U[jnp.asarray([3, 0])].tolist() == [5, 8]
    assert [bool(done[0]), bool(done[2])] == [True, True]  # max_tokens is 1; 7 is a stop token
    assert counted(after, 3) == ([], [11]) and counted(after, 0) == ([], [7]) and after.produced_U[jnp.asarray([3, 0])].tolist() == [1, 1]


def test_rows_come_in_any_order_and_padding_is_done_and_asks_for_nothing(slots):
    rows = jnp.asarray([3, SLOTS, 1], jnp.int32)
    state = slots.decoding(rows, (), ())
    assert state.token_B.tolist() == [9, 0, 9] and state.length_B.tolist() == [3, 0, 3] and state.done_B.tolist() == [False, True, False]
    settings = slots.settings(rows)
    assert settings.reported_B.tolist() == settings.adjusted_B.tolist() == (settings.temperature_B > 0).tolist() == [True, False, True]
    finished = slots.after(rows, slots.decoding(rows, (), ()))
    others_are_equal(finished, slots, [])
    finished = slots.updated(slot_update(SLOTS, 1, [3], [PARAMS], [0], [[]], V))
    asked = finished.active_settings(rows)
    assert asked.reported_B.tolist() == asked.adjusted_B.tolist() == (asked.temperature_B > 0).tolist() == [False, False, True]
