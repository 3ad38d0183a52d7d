"""Answers with a guide: what they are, and that they change nothing for others."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest

from l4jax import LLM, Guide, SamplingParams
from l4jax.decoding.sampling import mask_words
from l4jax.text.hf_tokenizer import load_hf_tokenizer
from tests import tiny
from tests.text import small

END = 1
PLANS = ("off", "chain:3", "tree:eagle26,sampled")
FORM = "[a-f]{2,5}(x|yz)[0-9]{3}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_hf_tokenizer(small.write(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def make(tokenizer):
    """Makes an LLM, once, with these options; in chunks of 16 tokens, so that answers cross their boundaries."""

    @functools.cache
    def made(speculation="off", mesh="tensor=1", deterministic=True, kv_tokens=None):
        config = tiny.shallow(tiny.scout_like(vocab_size=352, attention_chunk_size=16, max_position_embeddings=512, eos_token_ids=(END,)))
        drafter = None if speculation == "off" else tiny.loaded_drafter(tiny.drafter(config, aux_layers=(0, 1, 2)))
        options = {
            "drafter": drafter,
            "speculation": speculation,
            "deterministic": deterministic,
            "prefill_lengths": (128,),
            "kv_tokens": kv_tokens,
        }
        return LLM(config, tiny.weights(config), tokenizer=tokenizer, mesh=mesh, max_batch=4, **options)

    return made


def guided(seed=0, **changes):
    return SamplingParams(**{"max_tokens": 60, "temperature": 3.0, "seed": seed, "guide": Guide.regex(FORM), "logprobs": 0, **changes})


def free(seed=0, **changes):
    return dataclasses.replace(guided(seed, **changes), guide=None)


def essence(completion):
    return completion.token_ids, completion.logprobs, completion.finish_reason


@pytest.mark.parametrize("plan", PLANS)
def test_answers_have_the_form_and_are_the_same_whatever_runs_beside_them(make, plan):
    """In deterministic mode: to the last bit those of an engine without speculation, alone or beside others; so are the others'."""
    llm = make(plan)
    prompts = ["the dog", "the quick", "a", "fox", "jumps", "lazy dog"]
    params = [guided(1), free(2), guided(3), free(4, temperature=0.0), guided(5, temperature=0.0), free(6)]
    together = llm.generate(prompts, params)
    for prompt, asked, found in zip(prompts, params, together, strict=True):
        assert essence(llm.generate(prompt, asked)[0]) == essence(found)
        if asked.guide is not None:
            assert found.finish_reason == "stop" and re.fullmatch(FORM, found.text), found.text
    if plan != PLANS[-1]:
        plain = make("off").generate(prompts, params)
        assert [found.token_ids for found in together] == [found.token_ids for found in plain]
    assert sum(sum(found.stats.accepted) for found in together) > 0 or plan == "off"
    assert all(sum(found.stats.accepted) == 0 for found, asked in zip(together, params, strict=True) if asked.guide)


def test_the_highest_token_of_the_form_is_next(make, tokenizer):
    """At temperature 0, by the model's own logits after each token."""
    llm = make()
    prompt = tokenizer.encode("the dog")
    found = llm.generate([prompt], guided(temperature=0.0))[0]
    matcher = llm.requests.request(prompt, guided()).guide.start()
    written = []
    for token in found.token_ids:
        logits_V = llm.logits([[*prompt, *written]])[0][-1]
        words = matcher.allowed()
        may_be = np.array([bool(words[i // 32] >> np.uint32(i % 32) & np.uint32(1)) for i in range(len(logits_V))])
        assert token == np.argmax(np.where(may_be, logits_V, -np.inf))
        matcher.take([token])
        written.append(token)
    assert written[-1] == END and np.argmax(llm.logits([prompt])[0][-1]) != written[0]


def test_a_sharded_vocabulary_gives_the_same_answers(make):
    params = [guided(seed) for seed in range(3)]
    found, expected = (make(mesh=mesh).generate(["the dog", "a", "fox"], params) for mesh in ("tensor=2", "tensor=1"))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_preempted_answer_goes_on_where_it_was(make, deterministic):
    """In both modes: two of three answers need a second page, and there are four."""
    llm = make(deterministic=deterministic, kv_tokens=4 * 128)
    prompts = tiny.prompts(llm.config, (60, 61, 62))
    params = [guided(seed, max_tokens=190, guide=Guide.regex("[a-f]{120}x[0-9]{10}")) for seed in range(3)]
    alone = [llm.generate([prompt], asked)[0] for prompt, asked in zip(prompts, params, strict=True)]
    before = llm.engine.state.preemptions
    together = llm.generate(prompts, params)
    assert llm.engine.state.preemptions > before
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(one.finish_reason == "stop" and len(one.token_ids) > 70 for one in together)


def test_an_answer_that_is_cut_short_is_a_beginning_of_the_form(make):
    (found,) = make().generate("the dog", guided(max_tokens=2))
    assert found.finish_reason == "length" and len(found.token_ids) == 2


def test_an_answer_with_no_way_on_ends_with_an_error(make, monkeypatch):
    """Nobody else notices. Of a grammar that is too complex, llguidance finds that out only on the way."""
    llm = make()
    other = llm.generate("a", free(7))[0]
    stuck, beside = llm.add("the dog", guided()), llm.add("a", free(7))
    take, allowed = stuck._matcher.take, stuck._matcher.allowed
    taken = []
    monkeypatch.setattr(stuck._matcher, "take", lambda tokens: (taken.extend(tokens), take(tokens)))
    monkeypatch.setattr(stuck._matcher, "allowed", lambda: allowed() * (len(taken) < 2))
    while llm.step():
        pass
    assert isinstance(stuck.error, ValueError) and "allows no further token" in str(stuck.error)
    assert len(taken) == 2 and essence(beside.completion) == essence(other)


def test_a_form_that_the_vocabulary_cannot_begin_is_refused(make, monkeypatch):
    monkeypatch.setattr("l4jax.text.guiding.Matcher.allowed", lambda self: np.zeros_like(self._ordinary_W))
    with pytest.raises(ValueError, match="no token of the model's"):
        make().generate("the dog", guided())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ignore_eos": True}, "guide and ignore_eos"),
        ({"min_tokens": 3}, "guide and min_tokens"),
        ({"logit_bias": {3: -np.inf}}, "guide and logit_bias of -inf"),
        ({"guide": "[0-9]"}, "expected a Guide"),
        ({"guide": Guide.regex("(a")}, "regular expression is wrong"),
    ],
)
def test_what_cannot_be_followed_is_refused(make, changes, expected):
    with pytest.raises(ValueError, match=expected):
        make().generate("the dog", guided(**changes))


def test_without_a_tokenizer_or_an_end_token_there_is_no_guide(make, tokenizer):
    config = dataclasses.replace(make().config, eos_token_ids=())
    with pytest.raises(ValueError, match="guide needs a tokenizer"):
        LLM(config, tiny.weights(config)).generate([[1, 2]], guided())


def test_a_mask_costs_what_it_holds():
    assert [mask_words(size) for size in (1, 32, 33, 202_048)] == [1, 1, 2, 6314]
