"""Tiny real models with small pools, for tests of the engine; what a request gets alone, and how near two answers must be."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from l4jax import LLM, Completion, SamplingParams
from l4jax.config import ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.engine.step import Step
from l4jax.text.hf_tokenizer import HfTokenizer
from tests.decoding.noise import token_noise
from tests.text import small
from tests.tiny import drafter, llama3_like, loaded_drafter, scout_like, shallow, weights, with_options

TOKENIZER = HfTokenizer(small.backend(), {})
CONTEXT, VOCABULARY, SLOTS = 512, 16, 3
NEAR = 1e-4
"""Sums in float32 are taken in another order for other rows, pieces and trees: two tokens whose scores are nearer than this tie."""
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
CHAIN = Speculation.parse("chain:3")


class Expected:
    """What a request gets alone, in ``plain``."""

    plain: LLM

    @functools.cached_property
    def known(self) -> dict[str, Completion]:
        return {}

    def expected(self, prompt: list[int], params: SamplingParams) -> Completion:
        """What the request gets alone, nothing being cached. It is computed once: while a failure is shrunk, it is asked for often."""
        asked = repr((prompt, params))
        if asked not in self.known:
            handle = self.plain.add(prompt, params)
            handle._sequence.scope = None
            while not handle.over:
                self.plain.step()
            assert handle.completion is not None
            self.known[asked] = handle.completion
        return self.known[asked]


@dataclasses.dataclass(frozen=True)
class Family(Expected):
    """A model, perhaps with a drafter. In chunks of 256 tokens a prefix can end inside one, at a page's end; in shorter ones it cannot."""

    config: ModelConfig
    drafts: bool
    row_buckets: tuple[int, ...] = (SLOTS,)

    deterministic = False

    @functools.cached_property
    def llm(self) -> LLM:
        """Three slots, and pages for two and a half requests of the longest context; pieces are of two rows, and of 32 or 128 tokens."""
        table = SpeculationTable(((1, CHAIN), (2, None), (3, CHAIN)))
        made = dataclasses.replace(loaded_drafter(drafter(self.config, aux_layers=(0, 1, 2))), table=table) if self.drafts else None
        size = {"max_batch": SLOTS, "kv_tokens": 10 * 128, "prefill_lengths": (32, 128)}
        llm = LLM(self.config, weights(self.config), drafter=made, tokenizer=TOKENIZER, **size)
        return with_options(llm, row_buckets=self.row_buckets, piece_rows=(2,))

    @functools.cached_property
    def plain(self) -> LLM:
        """An engine for one request at a time, that drafts nothing. Its pieces are all short, so most end where no others do."""
        return watched(self.llm, lambda _: None, plans=((1, None),), piece_lengths=(32,))


@dataclasses.dataclass(frozen=True)
class Deterministic(Expected):
    """A model in deterministic mode, in this dtype, that always speculates so."""

    config: ModelConfig
    dtype: str
    speculation: str

    deterministic = True

    @property
    def drafts(self) -> bool:
        """Whether it has a drafter."""
        return self.speculation != "off"

    @functools.cached_property
    def llm(self) -> LLM:
        """Slots and pages as of a :class:`Family`; pieces of one row and 128 tokens."""
        dtype = jnp.dtype(self.dtype)
        made = loaded_drafter(drafter(self.config, aux_layers=(0, 1, 2)), dtype=dtype) if self.drafts else None
        size = {"max_batch": SLOTS, "kv_tokens": 10 * 128, "prefill_lengths": (128,)}
        options = {"drafter": made, "speculation": self.speculation, "tokenizer": TOKENIZER, "deterministic": True, **size}
        return LLM(self.config, weights(self.config, dtype=dtype), **options)

    @functools.cached_property
    def plain(self) -> LLM:
        """An engine with the same options and programs, for one request at a time."""
        return watched(self.llm, lambda _: None)


CONFIGS = {
    "llama3": shallow(llama3_like(**SIZES)),
    "llama4 in chunks of 16": shallow(scout_like(attention_chunk_size=16, **SIZES)),
    "llama4 in chunks of 256": shallow(scout_like(attention_chunk_size=256, **SIZES)),
}
FAMILIES = {
    "llama3": Family(CONFIGS["llama3"], drafts=False),
    "llama3, with a drafter": Family(CONFIGS["llama3"], drafts=True, row_buckets=(1, SLOTS)),
    "llama4 in chunks of 16": Family(CONFIGS["llama4 in chunks of 16"], drafts=False),
    "llama4 in chunks of 16, with a drafter": Family(CONFIGS["llama4 in chunks of 16"], drafts=True),
    "llama4 in chunks of 256, with a drafter": Family(CONFIGS["llama4 in chunks of 256"], drafts=True),
}
_16, _256 = CONFIGS["llama4 in chunks of 16"], CONFIGS["llama4 in chunks of 256"]
DETERMINISTIC = {
    "llama3, float32, a chain": Deterministic(CONFIGS["llama3"], "float32", "chain:3"),
    "llama3, bfloat16": Deterministic(CONFIGS["llama3"], "bfloat16", "off"),
    "llama4 in chunks of 16, float32, a dynamic tree": Deterministic(_16, "float32", "dynamic:steps=2,topk=2,nodes=4"),
    "llama4 in chunks of 16, bfloat16, a chain": Deterministic(_16, "bfloat16", "chain:3"),
    "llama4 in chunks of 256, float32": Deterministic(_256, "float32", "off"),
    "llama4 in chunks of 256, bfloat16, a sampled chain": Deterministic(_256, "bfloat16", "chain:3,sampled"),
}


class Unmeasured:
    """In the place of a BurstClock: no burst is too long, so that the same calls make the same steps on any machine."""

    most_steps = BURST

    def measure(self, *of: object, **how: object) -> None:
        pass


def watched(llm: LLM, see: Callable[[Step], None], **options: Any) -> LLM:
    """The same model and programs with other options, as if nothing had run; ``see`` is called with each step before it is dispatched."""
    other = with_options(llm, **options)
    other.engine._clock = Unmeasured()
    runner = other.engine.runner = copy.copy(llm.engine.runner)
    runner._ready, runner._resident = set(), None
    vars(runner).pop("dispatch", None)  # that of an LLM that is watched itself
    dispatch = runner.dispatch

    def seen(step: Step, *rest: Any) -> Any:
        see(step)
        return dispatch(step, *rest)

    runner.dispatch = seen  # type: ignore[method-assign]  # of this copy alone
    return other


def parts(family: Family, prompt: list[int], params: SamplingParams, expected: Completion, found: Sequence[int]) -> bool:
    """Whether tokens differ from those that were expected; AssertionError unless the first that does is nearly as good."""
    at = next((i for i, (a, b) in enumerate(zip(expected.token_ids, found, strict=False)) if a != b), None)
    if at is None:
        return False
    produced = expected.token_ids[:at]
    logits_V = family.plain.logits([[*prompt, *produced]])[0][-1].astype(np.float64)
    score_V = scores(logits_V, prompt, produced, params)
    score_V[~allowed(family.plain, prompt, produced, params)] = -np.inf
    apart = score_V.max() - score_V[[expected.token_ids[at], found[at]]].min()
    assert apart < NEAR, f"{params}: {expected.token_ids} and {found} part at {at}, where scores are {apart:.1e} apart"
    return True


def scores(logits_V: np.ndarray, prompt: list[int], produced: list[int], params: SamplingParams) -> np.ndarray:
    """What the next token is the highest of, apart from the cuts."""
    for token, bias in params.logit_bias.items():
        logits_V[token] += bias
    count_V = np.bincount(produced, minlength=len(logits_V))
    repeated_V = np.bincount([*prompt, *produced], minlength=len(logits_V)) > 0
    penalty_V = np.where(repeated_V, params.repetition_penalty, 1.0)
    logits_V = np.where(logits_V > 0, logits_V / penalty_V, logits_V * penalty_V)
    logits_V -= params.presence_penalty * (count_V > 0) + params.frequency_penalty * count_V
    if params.temperature == 0:
        return logits_V
    assert params.seed is not None
    return logits_V / params.temperature + token_noise(params.seed, len(produced), len(logits_V))


def allowed(llm: LLM, prompt: list[int], produced: list[int], params: SamplingParams) -> np.ndarray:
    """Which tokens may be next, by the guide and ``min_tokens``."""
    request = llm.requests.request(prompt, params)
    allowed_V = np.ones(VOCABULARY, bool)
    if request.guide is not None:
        matcher = request.guide.start()
        matcher.take(produced)
        allowed_V = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[:VOCABULARY].astype(bool)
    if len(produced) < params.min_tokens:
        allowed_V[list(request.stop_ids)] = False
    return allowed_V


def assert_whole(llm: LLM) -> None:
    """Nothing is left of the requests that ended: every slot is free, and every page is, or is cached."""
    engine = llm.engine
    scheduler, options = engine._scheduler, engine.options
    scheduler.check()
    assert scheduler.idle and not scheduler.in_flight
    held = engine._handles, engine._calls, engine._in_flight, scheduler._by_request, scheduler.waiting
    assert [len(each) for each in held] == [0] * len(held)
    for rank in scheduler.ranks:
        assert len(rank._slots) == options.slots
        assert (rank.pool.full.available, rank.pool.local.available) == (options.full_pages, options.local_pages)
