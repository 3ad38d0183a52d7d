"""The programs, called as an engine calls them: bursts that limits cut, prefills of output, counts, and pages that are zeroed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import SamplingParams
from l4jax.cache import CacheShape, PageTables, is_local
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import NOT_FINITE
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import Spreader
from l4jax.program_inputs import Burst, Piece, Resident, Weights, slot_update
from l4jax.programs import Programs
from tests.tiny import drafter, few_tokens, llama3_like, loaded_drafter, prompts, scout_like, weights

ROWS, CAPACITY, PIECE = 2, 128, 64
PROMPTS = (3, 17)
PARAMS = [
    SamplingParams(max_tokens=50, temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
    SamplingParams(max_tokens=45, temperature=1.0, top_p=0.9, frequency_penalty=0.4),
]


def ints(*values):
    return np.asarray(values, np.int32)


class Device:
    """Two slots, the pages of two rows, and what the rows have produced."""

    def __init__(self, make, version="eagle3", mesh="tensor=1", damage=None):
        self.config = few_tokens(make)
        taps = {} if version == "eagle1" else {"aux_layers": (0, 1, 2)}
        placement, loaded = Placement.on(self.config, mesh), loaded_drafter(drafter(self.config, version, **taps))
        draft_placement = DrafterPlacement(loaded.config, placement.mesh)
        self.programs = Programs(placement, draft_placement)
        made = weights(self.config)
        if damage is not None:
            made["embed"] = made["embed"].at[damage].set(jnp.nan)
        self.weights = Weights(
            self.programs.model.leaves(placement.place_all(made)),
            self.programs.drafter.leaves(draft_placement.place_all(loaded.weights)),
        )
        shape = CacheShape.for_rows(self.config, ROWS, CAPACITY, placement.spec)
        self._abstract = Resident.abstract(placement, draft_placement, shape, jnp.dtype(jnp.float32))
        self.spec = placement.spec
        self._numbers = ints(*range(ROWS)) % shape.slots
        self._tables = shape.identity_tables(self._numbers)
        self._spreader = Spreader(placement, jnp.dtype(jnp.float32))

    def start(self):
        """Empty everything, and give the slots to two requests."""
        self.resident = Resident.empty(self._abstract)
        update = slot_update(ROWS, self.spec.data, range(ROWS), PARAMS, range(ROWS), [[]] * ROWS, self.config.vocab_size)
        self.resident = dataclasses.replace(self.resident, slots=self.programs.update_slots(self.resident.slots, update))
        self.tokens = [[], []]
        return self

    @property
    def slots(self):
        return self.resident.slots

    def piece(self, texts, *, start=(0, 0), prompt_lengths=PROMPTS, following=(-1, -1)):
        token_BT = np.zeros((ROWS, PIECE), np.int32)
        for row, text in zip(token_BT, texts, strict=True):
            row[: len(text)] = text
        new_B = ints(*map(len, texts))
        tokens = (token_BT, ints(*start), new_B, ints(*prompt_lengths), np.asarray(following) < 0, ints(*following))
        layout, spread = self._spreader.spread(ints(*start), new_B, PIECE, self._tables)
        return Piece(*tokens, self._numbers, self._tables, self._tables, layout), spread

    def prefill(self, *texts, **of_piece):
        piece, spread = self.piece(*texts, **of_piece)
        self.resident, first = self.programs.prefill(self.weights, self.resident, piece, spread=spread, beyond="window")
        for own, token in zip(self.tokens, first.token_B.tolist(), strict=True):
            own.append(token)
        return first

    def burst(self, steps, limits=(CAPACITY, CAPACITY), plan=None):
        """Returns what the program does besides the state; the tokens are kept."""
        burst = Burst(self._numbers, ints(*limits), self._tables, self._tables, np.int32(steps))
        if plan is None:
            self.resident, *out = self.programs.decode(self.weights, self.resident, burst, beyond="window")
        else:
            self.resident, *out = self.programs.speculate(self.weights, self.resident, burst, plan=Speculation.parse(plan), beyond="window")
        for own, new in zip(self.tokens, np.asarray(out[0].token_sB)[: out[0].steps].T, strict=True):
            count = int((new >= 0).sum())
            assert (new[count:] == -1).all()
            own += new[:count].tolist()
        return out

    def finish(self, plan=None):
        accepted = 0
        while not self.slots.done_U.all():
            _, *counted = self.burst(32, plan=plan)
            accepted = accepted + np.asarray(counted[0].accepted_Bd) if counted else 0
        return accepted


@functools.cache
def device(make, version="eagle3", mesh="tensor=1"):
    return Device(make, version, mesh)


def texts(on):
    return prompts(on.config, PROMPTS)


@functools.cache
def expected(make, version="eagle3"):
    """What both rows produce, by plain decoding without limits."""
    on = device(make, version).start()
    on.prefill(texts(on))
    on.finish()
    return [list(own) for own in on.tokens]


@pytest.mark.parametrize("plan", [None, "chain:3", "tree:eagle26"])
def test_a_row_at_its_limit_is_idle_and_goes_on_in_a_later_burst(plan):
    """Limits that fall anywhere in the chunks of 8."""
    on = device(scout_like).start()
    on.prefill(texts(on))
    lengths, dice = np.asarray(PROMPTS), np.random.default_rng(0)
    while not on.slots.done_U.all():
        before, limits = np.asarray(on.slots.length_U), lengths + dice.integers(0, 7, ROWS)
        out, *counted = on.burst(32, limits, plan)
        lengths, done = np.asarray(on.slots.length_U), np.asarray(on.slots.done_U)
        np.testing.assert_array_equal(out.done_B, done)
        assert ((lengths == limits) | (done & (lengths <= limits))).all()
        if plan is None:
            assert out.steps == (lengths - before).max()
        else:  # each draft that is accepted saves a round
            assert (np.asarray(counted[0].rounds_B) + np.asarray(counted[0].accepted_Bd).sum(axis=1) >= lengths - before).all()
    assert on.tokens == expected(scout_like)
    assert [len(own) for own in on.tokens] == [p.max_tokens for p in PARAMS]


def test_a_burst_of_rounds_ends_after_as_many():
    """However much is accepted: each row gets a token a round, and those of its accepted drafts."""
    on = device(llama3_like, "eagle1").start()
    on.prefill(texts(on))
    out, counted = on.burst(5, plan="chain:3")
    accepted_B = np.asarray(counted.accepted_Bd).sum(axis=1)
    assert counted.rounds_B.tolist() == [5, 5] and accepted_B.max() > 0
    assert [len(own) - 1 for own in on.tokens] == (5 + accepted_B).tolist() and out.steps == 5 + accepted_B.max()


@pytest.mark.parametrize(
    ("make", "version", "mesh"),
    [(scout_like, "eagle3", "tensor=1"), (llama3_like, "eagle1", "tensor=1"), (scout_like, "eagle3", "data=2,sequence=2")],
)
def test_output_that_is_prefilled_again_leaves_what_decoding_it_left(make, version, mesh):
    """Counts, the number of tokens produced, the drafter's entries: so both go on with the same tokens, drafted by the same rounds."""
    on, steps = device(make, version, mesh).start(), 4
    on.prefill(texts(on))
    on.burst(steps)
    decoded, produced = on.resident, [own[:steps] for own in on.tokens]
    decoded = jax.tree.map(np.asarray, decoded)
    accepted = on.finish("chain:3")
    assert on.tokens == expected(make, version) and accepted.sum() > 3
    again = on.start()
    again.prefill([text + own for text, own in zip(texts(on), produced, strict=True)])
    for found, wanted in zip(jax.tree.leaves(again.slots), jax.tree.leaves(decoded.slots), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Each row has one page on each rank, of which the first rank's has its first tokens: the drafter's layer has no chunks.
    for found, wanted in zip(jax.tree.leaves(again.resident.draft_cache), jax.tree.leaves(decoded.draft_cache), strict=True):
        for row, length in zip((0, on.spec.token_ranks.count), PROMPTS, strict=True):
            np.testing.assert_allclose(found[row, :, : length + steps], wanted[row, :, : length + steps], atol=1e-5)
    np.testing.assert_array_equal(again.finish("chain:3"), accepted)
    assert [own + rest for own, rest in zip(produced, again.tokens, strict=True)] == expected(make, version)


def test_counting_tokens_leaves_the_counts_of_prefilling_them():
    """A prompt that ends within what is counted; another that does not."""
    on, lengths = device(scout_like).start(), (2, 30)
    made = prompts(on.config, (5, 20), seed=1)
    on.prefill(made, prompt_lengths=lengths, following=(1, 1))
    prefilled = jax.tree.map(np.asarray, on.slots.counts)
    tokens = on.start().piece(made, prompt_lengths=lengths)[0].tokens
    counted = on.programs.count(on.slots, tokens)
    jax.tree.map(np.testing.assert_array_equal, counted.counts, prefilled)
    assert counted.counts.output_UV.sum(axis=1).tolist() == [3, 0] and counted.counts.in_prompt_UV.any(axis=1).all()
    assert counted.length_U.tolist() == [0, 0] and counted.done_U.all()


def test_a_piece_says_that_it_is_not_finite_before_its_prefill_ends():
    on = Device(llama3_like, damage=7).start()
    first = on.prefill([[1, 2, 7], [3, 4, 5]], prompt_lengths=(9, 9), following=(1, 1))
    assert first.token_B[0] == NOT_FINITE and first.token_B[1] >= 0
    assert on.slots.done_U.all()  # and nothing is decoded


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2,sequence=2"])
def test_pages_are_zeroed_in_both_caches_and_no_others(mesh):
    config = few_tokens(scout_like)
    placement = Placement.on(config, mesh)
    decoder = dataclasses.replace(config, architecture="llama", moe=None, use_qk_norm=False)
    draft_placement = DrafterPlacement(drafter(config, "eagle1", decoder=decoder), placement.mesh)
    full_pages, local_pages, data = 5, 3, placement.spec.data
    resident = Resident.empty(Resident.abstract(placement, draft_placement, CacheShape(2, full_pages, local_pages), jnp.dtype(jnp.float32)))
    resident = jax.tree.map(lambda leaf: jnp.ones_like(leaf, device=leaf.sharding), resident)
    pages = PageTables(ints([1, 4], [full_pages] * 2)[:data], ints([local_pages] * 2, [0, local_pages])[:data])
    slots = jax.tree.map(np.asarray, resident.slots)
    after = Programs(placement, draft_placement).zero_pages(resident, pages)
    jax.tree.map(np.testing.assert_array_equal, after.slots, slots)
    for cache, of in ((after.cache, config), (after.draft_cache, decoder)):
        for i, layer in enumerate(cache):
            expected = np.ones((data, placement.spec.token_ranks.count, local_pages if is_local(of, i) else full_pages))
            if not is_local(of, i):
                expected[0, :, [1, 4]] = 0
            elif data > 1:
                expected[1, :, 0] = 0
            for pool_PKph in (layer.k_PKph, layer.v_PKph):
                of_pages = np.asarray(pool_PKph).reshape(*expected.shape, -1)
                np.testing.assert_array_equal(of_pages, np.broadcast_to(expected[..., None], of_pages.shape))
