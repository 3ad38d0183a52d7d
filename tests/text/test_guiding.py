"""Guides, followed token by token, against regular expressions and JSON's own libraries."""

from __future__ import annotations

import json
import random
import re
import time

import numpy as np
import pytest

from l4jax.decoding.guide import MAX_GUIDE_CHARACTERS, Guide
from l4jax.text.guiding import Guiding, Matcher
from l4jax.text.hf_tokenizer import load_hf_tokenizer
from tests.text import small

END = 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 3, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_hf_tokenizer(small.write(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def guiding(tokenizer):
    """Of a model with some tokens more than the tokenizer."""
    return Guiding(tokenizer, tokenizer.vocab_size + 7)


def allowed(matcher: Matcher) -> list[int]:
    words = matcher.allowed()
    return [token for token in range(32 * len(words)) if words[token // 32] >> np.uint32(token % 32) & 1]


def walk(guiding, tokenizer, guide: Guide, seed: int, most: int = 400) -> str:
    """A random answer: each token is one of those that are allowed, an end token if it may be."""
    matcher, tokens, dice = guiding.compiled(guide, [END]).start(), [], random.Random(seed)
    for _ in range(most):
        following = allowed(matcher)
        assert following and max(following) < tokenizer.vocab_size
        token = END if END in following and dice.random() < 0.5 else dice.choice(following)
        if token == END:
            return tokenizer.decode(tokens)
        tokens.append(token)
        matcher.take([token])
    return ""


PATTERNS = ["[0-9]{3}x", "(ab|a)*c", "the (quick|lazy) [a-z]+", "é?日+", r"-?(0|[1-9][0-9]*)(\.[0-9]+)?"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_answers_match_their_regular_expression(guiding, tokenizer, pattern):
    found = [text for seed in range(20) if (text := walk(guiding, tokenizer, Guide.regex(pattern), seed))]
    assert len(found) > 10
    assert all(re.fullmatch(pattern, text) for text in found)


def test_every_token_that_keeps_to_a_form_is_allowed(guiding, tokenizer):
    """By enumeration: a token may be next if some text of the form begins with what there is then."""
    form = {f"{a}{b}c" for a in "xy" for b in ("", "d", "do", "dog", "ab")}
    guide = Guide.choice(sorted(form))
    for written in ("", "x", "xd", "yab", "xdo", "ydogc"):
        matcher = guiding.compiled(guide, [END]).start()
        matcher.take(tokenizer.encode_ordinary(written))
        expected = [
            token
            for token in range(tokenizer.vocab_size)
            if not tokenizer.is_special(token)
            and any(text.encode().startswith(written.encode() + tokenizer.token_bytes(token)) for text in form)
        ]
        assert allowed(matcher) == sorted(expected + ([END] if written in form else []))


def test_random_answers_are_what_the_schema_describes(guiding, tokenizer):
    answers = [json.loads(text) for seed in range(30) if (text := walk(guiding, tokenizer, Guide.json(SCHEMA), seed))]
    assert len(answers) > 10
    for answer in answers:
        assert set(answer) == {"name", "age"} and 3 <= answer["age"] <= 120 and isinstance(answer["age"], int)
        assert len(answer["name"]) <= 5


def test_any_object_choices_and_grammars(guiding, tokenizer):
    texts = [walk(guiding, tokenizer, Guide.json(), seed) for seed in range(20)]
    assert all(isinstance(json.loads(text), dict) for text in texts if text) and any(texts)
    choices = ["yes", 'no\n"é"', "\\n"]
    assert {walk(guiding, tokenizer, Guide.choice(choices), seed) for seed in range(20)} == set(choices)
    for seed in range(5):
        text = walk(guiding, tokenizer, Guide.grammar('start: "a" start "b" | "c"'), seed)
        assert text == "a" * text.count("a") + "c" + "b" * text.count("a")


def test_an_end_token_is_allowed_only_at_an_end_and_special_tokens_never(guiding, tokenizer):
    special = {token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)}
    matcher = guiding.compiled(Guide.regex(".*"), [END, 3]).start()
    assert set(allowed(matcher)) & special == {END, 3}
    matcher = guiding.compiled(Guide.regex(".+"), [END, 3]).start()
    assert not set(allowed(matcher)) & special


def test_a_token_of_the_text_that_ends_answers_is_no_part_of_the_form(guiding, tokenizer):
    """It ends the answer, so before the form is complete it is not allowed, even where the text may go on with it."""
    (x,) = tokenizer.encode_ordinary("x")
    matcher = guiding.compiled(Guide.regex("[0-9](x[0-9])?"), [x, END]).start()
    assert x not in allowed(matcher)
    matcher.take(tokenizer.encode_ordinary("4"))
    assert set(allowed(matcher)) == {x, END}
    assert allowed(guiding.compiled(Guide.regex("x|y"), [x, END]).start()) == tokenizer.encode_ordinary("y")


def test_end_tokens_that_the_model_does_not_have_are_left_out(guiding, tokenizer):
    matcher = guiding.compiled(Guide.regex("a*"), [END, 10_000]).start()
    assert END in allowed(matcher)
    with pytest.raises(ValueError, match="end token"):
        guiding.compiled(Guide.regex("a*"), [10_000])


def test_without_special_tokens_no_token_is_taken_for_an_end(tokenizer):
    """llguidance needs an end token, and gets the first; it is an ordinary one."""

    class Plain:
        vocab_size = 200
        is_special = staticmethod(lambda token: False)
        token_bytes = staticmethod(lambda token: bytes([token + 32]) if token < 90 else bytes([token]))
        encode_ordinary = staticmethod(lambda text: [ord(character) - 32 for character in text])

    matcher = Guiding(Plain(), 200).compiled(Guide.regex("ab*"), [5]).start()
    matcher.take([ord("a") - 32])
    assert allowed(matcher) == [5, ord("b") - 32, ord("b")]


def test_a_grammar_that_is_too_ambiguous_ends_instead_of_stopping_everybody(guiding, tokenizer):
    matcher = guiding.compiled(Guide.grammar("start: s\ns: s s | c\nc: /[a-z ]/"), [END]).start()
    began = time.monotonic()
    for _ in range(200):
        if not matcher.allowed().any():
            break
        matcher.take(tokenizer.encode_ordinary("a"))
    assert not matcher.allowed().any()
    assert time.monotonic() - began < 30


def test_answers_with_one_guide_do_not_disturb_each_other(guiding, tokenizer):
    guide = guiding.compiled(Guide.regex("ab"), [END])
    one, other = guide.start(), guide.start()
    one.take(tokenizer.encode_ordinary("a"))
    assert allowed(one) == tokenizer.encode_ordinary("b")
    assert tokenizer.encode_ordinary("a")[0] in allowed(other)


def test_a_form_that_was_left_has_no_way_on(guiding, tokenizer):
    matcher = guiding.compiled(Guide.regex("ab"), [END]).start()
    matcher.take(tokenizer.encode_ordinary("x"))
    assert allowed(matcher) == []


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (Guide.regex("(a"), "regular expression"),
        (Guide.json("{"), "JSON schema"),
        (Guide.json({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Guide.json({"$ref": "http://example.com/schema"}), "JSON schema"),
        (Guide.json({"type": "nothing"}), "JSON schema"),
        (Guide.grammar("start: missing"), "missing"),
        (Guide.grammar("other: /a/"), "start"),
    ],
)
def test_what_cannot_be_followed_is_refused(guiding, guide, expected):
    with pytest.raises(ValueError, match=expected) as refused:
        guiding.compiled(guide, [END])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_without_an_end_token_no_answer_could_be_complete(guiding):
    with pytest.raises(ValueError, match="end token"):
        guiding.compiled(Guide.regex("a"), [])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Guide.choice([]), "expected a list"),
        (lambda: Guide.choice("yes"), "expected a list"),
        (lambda: Guide.choice([""]), "expected a list"),
        (lambda: Guide.json({"a": {1, 2}}), "JSON schema"),
        (lambda: Guide.json({"a": float("nan")}), "JSON schema"),
        (lambda: Guide.regex(3), "a guide's regex is 3; expected a text"),
        (lambda: Guide("xml", "a"), "Guide.json"),
        (lambda: Guide.regex("a" * (MAX_GUIDE_CHARACTERS + 1)), "simpler"),
    ],
)
def test_a_wrong_guide_is_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
