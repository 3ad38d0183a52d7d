"""A request that fails or is dropped does not affect the others, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from l4jax import LLM, SamplingParams
from l4jax.engine.handle import Handle
from l4jax.engine.step import News, Plan, Results, Step
from tests.engine.families import CHAIN, FAMILIES, SLOTS, TOKENIZER, Family, assert_whole, watched
from tests.tiny import prompts, weights, with_options

BAD = 7
"""A token whose embedding is NaN."""
NAMES = ("llama3", "llama4 in chunks of 16", "llama4 in chunks of 256, with a drafter")


def damaged(llm: LLM) -> LLM:
    """The same model and programs, but a row that runs the bad token has logits that are not finite. No drafts, for they would run it."""
    llm = watched(llm, lambda _: None, plans=((1, None),))
    runner = llm.engine.runner
    at, leaves = runner.programs.model.names.index("embed"), list(runner._weights.target)
    leaves[at] = leaves[at].at[BAD].set(math.nan)
    runner._weights = dataclasses.replace(runner._weights, target=tuple(leaves))
    return llm


def params(seed: int, **changes: object) -> SamplingParams:
    """Parameters with which a request never draws the bad token."""
    return SamplingParams(
        **{"max_tokens": 30, "temperature": 0.8, "seed": seed, "logit_bias": {BAD: -math.inf}, "ignore_eos": True, **changes}
    )


def good_prompts(family: Family, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    return [[token if token != BAD else 1 for token in prompt] for prompt in prompts(family.config, lengths, seed)]


def run(llm: LLM, handles: list[Handle]) -> list[list[int]]:
    while llm.step():
        pass
    assert all(handle.over for handle in handles)
    return [handle.tokens for handle in handles]


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.more_meshes), *NAMES[1:]])
def test_a_row_whose_logits_are_not_finite_ends_alone(name: str) -> None:
    """It fails in its first piece, in a later one, or in decoding. Requests that get its slot and pages next get their own tokens."""
    family = FAMILIES[name]
    llm = damaged(family.llm)
    good = good_prompts(family, (40, 129, 250, 3, 60, 200))
    expected = [family.expected(prompt, params(i)).token_ids for i, prompt in enumerate(good)]
    bad = [
        ([1, 2, BAD, 3], params(0)),
        ([*good[2][:140], BAD, *good[2][141:]], params(1)),
        # This one draws it as its first token.
        (good[1][:90], params(2, logit_bias={BAD: 100.0})),
        # This one draws it later; the seed decides when.
        (good[3], params(5, logit_bias={BAD: 0.5})),
    ]
    for prompt, its_params in bad:
        for _ in range(2):  # the second time round all slots and pages have been used
            begun = [llm.add(good[i], params(i)) for i in (0, 1)]
            llm.step()
            failing = llm.add(prompt, its_params)
            after = [llm.add(good[i], params(i)) for i in range(2, 6)]
            found = run(llm, [*begun, failing, *after])
            assert found[:2] + found[3:] == expected
            assert failing.completion is None and isinstance(failing.error, ValueError)
            assert str(failing.error).startswith("the model's logits are not finite; expected numbers, not NaN or infinity")
            assert len(failing.tokens) < 30
            assert_whole(llm)
    with pytest.raises(ValueError, match=r"^prompt 1 of 3, counted from 0: the model's logits are not finite"):
        llm.generate([good[0], [BAD], good[3]], params(0))
    with pytest.raises(ValueError, match=r"^the model's logits are not finite"):
        llm.logits([[1, BAD]])
    assert llm.generate([good[0]], params(0))[0].token_ids == expected[0]
    assert_whole(llm)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_pool_serves_many_requests(name: str) -> None:
    """32 requests, each of which may grow to three pages; the pool has five."""
    family, again = FAMILIES[name], Counter[int]()

    def see(step: Step) -> None:
        again.update(row.request for row in step.pieces if row is not None and row.first)

    llm = watched(family.llm, see, full_pages=5, long_steps=4)
    asked = good_prompts(family, tuple(range(120, 312, 12)) * 2)
    each = [params(i, max_tokens=70) for i in range(len(asked))]
    found = llm.generate(asked, each)
    assert max(again.values()) > 1, "nobody was preempted"
    assert [c.token_ids for c in found] == [family.expected(*request).token_ids for request in zip(asked, each, strict=True)]
    assert_whole(llm)


def sizes(llm: LLM) -> list[int]:
    """The sizes of everything in engine, scheduler and ranks that could grow; cached pages count as free."""
    engine = llm.engine
    owners = [engine, engine._scheduler, *engine._scheduler.ranks]
    held = [value for owner in owners for value in vars(owner).values() if hasattr(value, "__len__")]
    pools = [pages for rank in engine._scheduler.ranks for pages in (rank.pool.full, rank.pool.local)]
    named = [len(pages._by_key) - len(pages._cached) for pages in pools]
    return [*map(len, held), *named, *(len(pages._free) + len(pages._cached) for pages in pools)]


def memory() -> tuple[int, int]:
    """This process's bytes in memory, and its objects."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much memory a process has")
def test_nothing_is_left_of_a_thousand_cancelled_streams() -> None:
    """Streams are closed, dropped, or left by an error in their reader; some before anything is computed for them."""
    family = FAMILIES["llama3"]
    llm = watched(family.llm, lambda _: None, short_steps=4, long_steps=4)
    asked = good_prompts(family, (3, 130, 20))
    llm.generate(asked, params(0))

    def cancelled(i: int) -> None:
        stream = llm.stream(asked[i % 3], params(i, max_tokens=100))
        for _ in range(i % 4):
            next(stream)
        if i % 5 == 0:
            stream.close()
        elif i % 5 == 1:
            with contextlib.suppress(KeyError):
                for _ in stream:
                    raise KeyError

    before = sizes(llm)
    for i in range(200):
        cancelled(i)
    nbytes, objects = memory()
    for i in range(1000):
        cancelled(i)
    nbytes_after, objects_after = memory()
    assert nbytes_after < nbytes * 1.01 and objects_after < objects + 500
    while llm.step():
        pass
    assert sizes(llm) == before
    assert_whole(llm)


def test_the_others_numbers_are_those_of_a_run_without_a_bad_row() -> None:
    """Seven of eight rows have the same tokens and bit-equal log-probabilities."""
    family = FAMILIES["llama3"]
    sizes = {"max_batch": 8, "kv_tokens": 8 * 128, "prefill_lengths": (32,)}
    llm = with_options(LLM(family.config, weights(family.config), **sizes), row_buckets=(8,), piece_rows=(8,), piece_tokens=8 * 32)
    asked = good_prompts(family, (20,) * 8)
    each = [params(i, logprobs=3) for i in range(8)]

    def numbers(bad: list[int] | None) -> list[object]:
        hurt = damaged(llm)
        handles = [hurt.add(bad if bad and i == 3 else asked[i], each[i]) for i in range(8)]
        run(hurt, handles)
        assert (handles[3].error is not None) == (bad is not None)
        return [(h.completion.token_ids, h.completion.logprobs) for i, h in enumerate(handles) if i != 3 and h.completion is not None]

    without = numbers(None)
    assert len(without) == 7
    for bad in ([BAD, *asked[3][1:]], [*asked[3][:-1], BAD]):
        assert numbers(bad) == without


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_in_the_consumer_of_a_stream_is_its_own(error: type[BaseException]) -> None:
    family = FAMILIES["llama3"]
    llm = watched(family.llm, lambda _: None)
    prompt, other = good_prompts(family, (140, 30))
    beside = llm.add(other, params(1))
    pieces = []

    def consume() -> None:
        for piece in llm.stream(prompt, params(0, max_tokens=100)):
            pieces.append(piece)
            if len(pieces) == 2:
                raise error

    with pytest.raises(error):
        consume()
    again = llm.stream(prompt, params(0))
    assert "".join(again) == family.expected(prompt, params(0)).text
    assert run(llm, [beside]) == [family.expected(other, params(1)).token_ids]
    assert_whole(llm)


def many_rows(family: Family) -> LLM:
    """The same model with nine slots, and a context of 2,048 tokens."""
    config = dataclasses.replace(family.config, max_position_embeddings=2048)
    return LLM(config, weights(config), max_batch=9, kv_tokens=30 * 128, prefill_lengths=(32, 128), tokenizer=TOKENIZER)


@pytest.mark.parametrize(("name", "count", "length"), [("llama3", 8, 1500), ("llama4 in chunks of 16, with a drafter", 2, 400)])
def test_a_long_prompt_holds_up_nobody(name: str, count: int, length: int) -> None:
    """Between two of a row's tokens there are at most one piece and two bursts, each of them short while a request is prefilled."""
    family = FAMILIES[name]
    llm = watched(family.llm if count < SLOTS else many_rows(family), lambda _: None, short_steps=4, long_steps=4)
    runner, scheduler = llm.engine.runner, llm.engine._scheduler
    pieces, bursts, gaps = Counter[Handle](), Counter[Handle](), list[tuple[int, int]]()
    rows = [llm.add(prompt, params(i, max_tokens=120)) for i, prompt in enumerate(good_prompts(family, tuple(range(5, 5 + count))))]
    got = dict.fromkeys(rows, 0)
    steps: list[Step] = []
    dispatch, finish = runner.dispatch, scheduler.finish

    def dispatched(step: Step, *rest: object) -> object:
        steps.append(step)
        return dispatch(step, *rest)

    def finished(step: Step, results: Results) -> list[News]:
        """The steps that the devices ran since each row's last token, this one included."""
        news = finish(step, results)
        tokens = {one.sequence.request: one.tokens for one in news}
        for row in rows:
            pieces[row] += step.prefill is not None
            bursts[row] += step.burst is not None
            if tokens.get(row._number):
                if got[row]:
                    gaps.append((pieces[row], bursts[row]))
                got[row] += len(tokens[row._number])
                pieces[row] = bursts[row] = 0
        return news

    runner.dispatch, scheduler.finish = dispatched, finished  # type: ignore[method-assign]  # of this object alone
    while min(got.values()) < 10:
        llm.step()
    gaps.clear()
    long = llm.add(good_prompts(family, (length,))[0], params(5))
    while not long.tokens:
        llm.step()
    assert sum(step.prefill is not None for step in steps) >= 1 + length // 128
    assert len(gaps) >= 3 * count and max(p for p, _ in gaps) == 1 and max(b for _, b in gaps) <= 2
    assert not any(row.over for row in rows), "they decoded all the while"
    run(llm, [*rows, long])
    assert_whole(llm)


@pytest.mark.parametrize(
    "name", ["llama3, with a drafter", "llama4 in chunks of 16, with a drafter", "llama4 in chunks of 256, with a drafter"]
)
def test_what_is_drafted_does_not_depend_on_how_the_text_before_was_computed(name: str) -> None:
    """Bursts that do not speculate, and prefill, write the drafter's entries: later bursts draft and accept the same tokens."""
    family = FAMILIES[name]
    tree = family.llm.engine.options.plans[0][1]
    assert isinstance(tree, Plan) and CHAIN is not None and tree.depth == CHAIN.tree.depth
    llm = watched(family.llm, lambda _: None, plans=((1, tree), (2, None)), short_steps=4, long_steps=4)
    scheduler, plain = llm.engine._scheduler, defaultdict[int, int](int)
    finish = scheduler.finish

    def finished(step: Step, results: Results) -> list[News]:
        news = finish(step, results)
        speculated = {row.request for row in step.rows if row is not None and step.burst and step.burst.plan}
        for one in news:
            if one.sequence.request not in speculated:
                plain[one.sequence.request] += len(one.tokens)
        return news

    scheduler.finish = finished  # type: ignore[method-assign]  # of this object alone
    drafted, accepted = 0, 0
    for seed, length in enumerate((10, 100, 125, 250)):
        prompt, other = good_prompts(family, (length, 4), seed)
        most = 120
        greedy = params(seed, temperature=0.0, max_tokens=most)
        beside = llm.add(other, params(seed, max_tokens=60))
        joined = llm.add(prompt, greedy)
        _, tokens = run(llm, [beside, joined])
        count = plain[joined._number]
        assert 10 < count < most - 20
        fresh = watched(llm, lambda _: None)
        again = fresh.generate([[*prompt, *tokens[: count - 1]]], dataclasses.replace(greedy, max_tokens=most - count + 1))[0]
        assert again.token_ids == tokens[count - 1 :]
        assert joined.completion is not None
        one, two = joined.completion.stats, again.stats
        assert (one.rounds, one.drafted, one.accepted) == (two.rounds, two.drafted, two.accepted)
        drafted, accepted = drafted + one.drafted, accepted + sum(one.accepted)
    assert accepted > 5
