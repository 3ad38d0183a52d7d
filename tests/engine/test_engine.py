"""The oracle: whatever else a real engine runs, each request gets the tokens that it gets alone.

In deterministic mode they are equal, and its log-probabilities are, to the last bit; otherwise the first that differs nearly tied.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from l4jax import Completion, SamplingParams
from l4jax.engine.handle import Handle
from l4jax.engine.sequence import State
from l4jax.engine.step import Step
from l4jax.stream import Stream
from tests.engine.families import (
    CONTEXT,
    DETERMINISTIC,
    FAMILIES,
    NEAR,
    SLOTS,
    VOCABULARY,
    Deterministic,
    Family,
    assert_whole,
    parts,
    watched,
)

EVENTS = ("hit", "several rows", "two deep", "zeroed")
OF_DRAFTERS = ("drafted", "accepted")
OTHERWISE = (
    "preempted",
    "output computed again",
    "cancelled while it waited",
    "cancelled under way",
    "closed stream",
    "logits beside others",
)
OF_DRAFTERS_OTHERWISE = ("plain", "drafted and plain")
DETERMINISTIC_ONLY = ("saved", "loaded", "cancelled while saved")
"""What each family must have come by, or the test would show nothing."""
LENGTHS = (1, 15, 16, 17, 33, 90, 100, 110, 110, 127, 128, 129, 143, 145, 210, 230, 230, 255, 256, 257, 271, 384, 385)
"""Tokens that prompts share: at pages' and chunks' ends, just before, just after; and where the answer comes to the next page."""


class World:
    """Some callers of a real model, from the first request to the last one's end."""

    def __init__(self, family: Family | Deterministic, dice: random.Random, seen: Counter[str]) -> None:
        self.family, self.dice, self.seen = family, dice, seen
        self.chunk = family.config.attention_chunk_size
        options = family.llm.engine.options
        tree = options.plans[0][1]
        plans = [((1, tree), (2, None)), ((1, None), (2, tree)), ((1, tree), (2, None), (3, tree))] if tree else [((1, None),)]
        self.llm = watched(
            family.llm,
            self.see,
            full_pages=dice.choice([4, 4, 4, 5]),
            local_pages=0 if self.chunk is None else dice.choice([2, 3, 4, options.local_pages]),
            slots=SLOTS,
            short_steps=dice.choice([1, 2, 4]),
            long_steps=dice.choice([2, 4] if family.deterministic else [2, 4, 8, 32]),
            plans=options.plans if family.deterministic else dice.choice(plans),
        )
        self.stems = [[dice.randrange(VOCABULARY) for _ in range(max(LENGTHS))] for _ in range(2)]
        self.steps = 0
        self.begun: set[int] = set()
        self.loaded: set[int] = set()
        self.ways: defaultdict[int, set[bool]] = defaultdict(set)
        self.asked: list[tuple[list[int], SamplingParams, Handle | Completion]] = []
        self.alive: list[Handle] = []
        self.streams: list[Stream] = []

    def see(self, step: Step) -> None:
        self.steps += 1
        seen, chunk = self.seen, self.chunk
        for row in filter(None, step.pieces):
            again = row.first and row.request in self.begun
            self.begun.add(row.request)
            seen["preempted"] += again
            seen["hit"] += row.first and row.start > 0
            seen["hit in a chunk"] += row.first and chunk is not None and row.start % chunk > 0
            seen["output computed again"] += row.start + len(row.tokens) > row.prompt_length
            seen["logits beside others"] += step.prefill.scores and len(self.llm.engine._handles) > 1
        for row in filter(None, step.rows):
            self.ways[row.request].add(step.burst.plan is not None)
            seen["drafted" if step.burst.plan else "plain"] += 1
        seen["several rows"] += sum(row is not None for row in step.rows) > 1
        seen["zeroed"] += len(step.zero_full)
        seen["saved"] += len(step.saves)
        seen["loaded"] += len(step.loads)
        self.loaded |= {load.request for load in step.loads}
        seen["two deep"] += len(self.llm.engine._in_flight)

    def prompt(self) -> list[int]:
        dice = self.dice
        tail = [dice.randrange(VOCABULARY) for _ in range(dice.choice([1, 1, dice.randint(1, 30)]))]
        return dice.choice(self.stems)[: dice.choice([0, *LENGTHS])] + tail

    def params(self) -> SamplingParams:
        dice = self.dice

        def sometimes[Value](usual: Value, other: Value) -> Value:
            return other if dice.random() < 0.2 else usual

        return SamplingParams(
            max_tokens=dice.choice([1, dice.randint(1, 40), dice.randint(20, 90)]),
            temperature=dice.choice([0.0, 0.8, 1.3]),
            seed=dice.getrandbits(64),
            top_k=sometimes(0, 5),
            min_p=sometimes(0.0, 0.05),
            repetition_penalty=sometimes(1.0, 1.4),
            presence_penalty=sometimes(0.0, 0.6),
            frequency_penalty=sometimes(0.0, 0.3),
            logit_bias=sometimes({}, {dice.randrange(VOCABULARY): dice.choice([-5.0, 2.0])}),
            stop_token_ids=sometimes([], [dice.randrange(VOCABULARY)]),
            stop=sometimes([], ["#"]),
            logprobs=dice.choice([None, 0, 3]),
        )

    def turn(self) -> None:
        dice = self.dice
        if len(self.alive) < 6 and dice.random() < 0.5:
            self.add()
        action = dice.random()
        if action < 0.08:
            self.cancel(self.alive)
        elif action < 0.12:
            self.read()
        elif action < 0.14:
            self.generate()
        elif action < 0.16:
            self.logits()
        else:
            self.llm.step()
        self.alive = [handle for handle in self.alive if not handle.over]
        self.check_pages()

    def check_pages(self) -> None:
        """None is lost, and what a burst did not need is back."""
        scheduler = self.llm.engine._scheduler
        scheduler.check()
        for sequence in scheduler._active():
            # One that comes back from host memory has pages for a burst until its first results.
            if sequence.state is State.RUNNING and sequence.committed >= sequence.target and sequence.request not in self.loaded:
                assert len(sequence.full) <= scheduler.options.shape.full_pages(sequence.high)

    def add(self, prompt: list[int] | None = None) -> None:
        prompt, params = prompt or self.prompt(), self.params()
        if self.dice.random() < 0.3:
            stream = self.llm.stream(prompt, params)
            self.streams.append(stream)
            handle = stream._handle
        else:
            handle = self.llm.add(prompt, params)
        self.asked.append((prompt, params, handle))
        self.alive.append(handle)

    def cancel(self, handles: list[Handle]) -> None:
        if handles:
            handle = self.dice.choice(handles)
            streams = [stream for stream in self.streams if stream._handle is handle]
            waits, saved = handle._sequence.slot == -1, handle._sequence.saved
            handle.cancel() if not streams else streams[0].close()
            self.seen["closed stream" if streams else "cancelled while it waited" if waits else "cancelled under way"] += 1
            self.seen["cancelled while saved"] += saved
            self.llm.step()
            assert handle.over

    def read(self) -> None:
        """Some pieces of a stream, or all that is left."""
        streams = [stream for stream in self.streams if stream._handle.error is None]
        if streams:
            stream, text = self.dice.choice(streams), ""
            for _, piece in zip(range(self.dice.choice([1, 5, 1000])), stream, strict=False):
                assert piece
                text += piece
            if stream.completion is not None:
                assert stream.completion.text is not None and stream.completion.text.endswith(text)

    def generate(self) -> None:
        several = [(self.prompt(), self.params()) for _ in range(self.dice.randint(1, 4))]
        completions = self.llm.generate([prompt for prompt, _ in several], [params for _, params in several])
        self.asked += [(*asked, completion) for asked, completion in zip(several, completions, strict=True)]

    def logits(self) -> None:
        prompt = self.prompt()
        found, expected = (llm.logits([prompt])[0] for llm in (self.llm, self.family.plain))
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if self.family.deterministic else NEAR)

    def crowd(self) -> None:
        """As many requests as there are slots come to their second page at about the same time; together they need more than there are."""
        for seed in range(SLOTS):
            least = 98 if self.family.deterministic else 105  # a burst of 16 tokens still fits in the first page
            prompt = [self.dice.randrange(VOCABULARY) for _ in range(least + self.dice.randint(0, 10))]
            settings = {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 2}
            params = SamplingParams(max_tokens=90, seed=seed, **(settings if self.family.deterministic else {}))
            handle = self.llm.add(prompt, params)
            self.asked.append((prompt, params, handle))
            if self.family.deterministic:
                self.alive.append(handle)
        waiting = self.llm.add([1], SamplingParams(seed=0))
        self.llm.step()
        self.seen["cancelled while it waited"] += waiting._sequence.slot == -1
        waiting.cancel()

    def run(self, steps: int) -> None:
        self.crowd()
        while self.steps < steps:
            self.turn()
        if self.family.deterministic:
            for prompt, _, _ in self.dice.sample(self.asked, 4):
                self.add(prompt)
                self.llm.step()
            self.crowd()
            while self.llm.step() and not any(handle._sequence.saved for handle in self.alive):
                pass
            self.cancel([handle for handle in self.alive if handle._sequence.saved])
        while self.llm.step():
            pass
        assert_whole(self.llm)

    def check(self) -> int:
        """How many answers part from what the request gets alone."""
        return sum(self.parts(*asked) for asked in self.asked)

    def parts(self, prompt: list[int], params: SamplingParams, answer: Handle | Completion) -> bool:
        completion = answer.completion if isinstance(answer, Handle) else answer
        expected = self.family.expected(prompt, params)
        if completion is None:
            assert isinstance(answer, Handle) and answer.over and str(answer.error) == answer._cancelled
            assert len(answer.tokens) <= len(expected.token_ids)
            if self.family.deterministic:
                assert answer.tokens == expected.token_ids[: len(answer.tokens)]
                return False
            return parts(self.family, prompt, params, expected, answer.tokens)
        self.seen["accepted"] += sum(completion.stats.accepted)
        if self.family.deterministic:
            for name in ("token_ids", "logprobs", "text", "finish_reason"):
                assert getattr(completion, name) == getattr(expected, name), f"{name}, {params}, a prompt of {len(prompt)} tokens"
            rounds = [(one.stats.rounds, one.stats.drafted, one.stats.accepted) for one in (completion, expected)]
            # How many rounds are computed after a stop string depends on how long the burst is.
            assert params.stop or rounds[0] == rounds[1], f"{params}, a prompt of {len(prompt)} tokens"
            return False
        parted = parts(self.family, prompt, params, expected, completion.token_ids)
        assert parted or (completion.token_ids, completion.text) == (expected.token_ids, expected.text)
        self.check_logprobs(expected, completion)
        return parted

    @staticmethod
    def check_logprobs(expected: Completion, found: Completion) -> None:
        """As far as the tokens are the same."""
        assert (expected.logprobs is None) == (found.logprobs is None)
        if expected.logprobs is None or found.logprobs is None:
            return
        assert len(found.logprobs) == len(found.token_ids)
        for token, other, a, b in zip(expected.token_ids, found.token_ids, expected.logprobs, found.logprobs, strict=False):
            if token != other:
                break
            values = [[one.logprob, *(value for _, value in one.top)] for one in (a, b)]
            np.testing.assert_allclose(*values, atol=NEAR)


def check_family(family: Family | Deterministic, name: str, steps: int, seeds: Sequence[int]) -> None:
    """``steps`` of the engine, in worlds with options of their own."""
    seen, ran, answers, parted = Counter[str](), 0, 0, 0
    for seed in seeds:
        world = World(family, random.Random(f"{name}, {seed}"), seen)
        world.run(steps // len(seeds))
        parted += world.check()
        seen["drafted and plain"] += sum(len(ways) == 2 for ways in world.ways.values())
        ran, answers = ran + world.steps, answers + len(world.asked)
    print(f"{name}: {ran} steps, {answers} requests, {parted} part; {dict(seen)}")
    wanted = [*EVENTS, *(DETERMINISTIC_ONLY if family.deterministic else OTHERWISE), *(OF_DRAFTERS if family.drafts else ())]
    wanted += OF_DRAFTERS_OTHERWISE if family.drafts and not family.deterministic else ()
    wanted += ["hit in a chunk"] if family.config.attention_chunk_size == 256 and not family.deterministic else []
    assert [event for event in wanted if not seen[event]] == []
    assert parted <= max(1, answers / 50)
    assert ran >= steps and max(len(prompt) + params.max_tokens for prompt, params, _ in world.asked) < CONTEXT


WITH_DRAFTERS = [name for name, family in FAMILIES.items() if family.drafts]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in WITH_DRAFTERS else pytest.mark.more_meshes) for name in FAMILIES])
def test_requests_get_what_they_get_alone(name: str) -> None:
    check_family(FAMILIES[name], name, 600, range(6))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_requests_get_to_the_last_bit_what_they_get_alone(name: str) -> None:
    check_family(DETERMINISTIC[name], name, 90, range(3))


@pytest.mark.long
@pytest.mark.parametrize("name", [*WITH_DRAFTERS, *DETERMINISTIC])
def test_requests_get_what_they_get_alone_for_long(name: str) -> None:
    """20,000 steps in all."""
    check_family((FAMILIES | DETERMINISTIC)[name], name, 2240, range(1000, 1014))
