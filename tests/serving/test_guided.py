"""Structured output over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import time

import pytest

from l4jax import Guide, SamplingParams
from l4jax.serving import guide_checker
from l4jax.serving.errors import ApiError
from tests.serving.running import SLOTS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the dog"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 3, "maximum": 120}, "kind": {"enum": ["dog", "fox"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FORM = "[a-f]{2,5}x[0-9]{3}"


def as_format(schema, **also):
    return {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, **also}}


def test_an_answer_is_what_the_schema_describes(server):
    asked = {"messages": MESSAGES, "temperature": 2.0, "response_format": as_format(SCHEMA, strict=True, description="an animal")}
    _, answer = server.answer(CHAT, {**asked, "n": 4, "seed": 1})
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text, choice in zip(texts, answer["choices"], strict=True):
        found = json.loads(text)
        assert set(found) == {"age", "kind"} and 3 <= found["age"] <= 120 and found["kind"] in ("dog", "fox")
        assert choice["finish_reason"] == "stop"
    streamed = server.stream(CHAT, {**asked, "seed": 1})
    assert "".join(item["choices"][0]["delta"].get("content", "") for item in streamed[:-1]) == texts[0]


@pytest.mark.parametrize(
    ("asked", "guide"),
    [
        ({"regex": FORM}, Guide.regex(FORM)),
        ({"choice": ["yes", "no", "日本"]}, Guide.choice(["yes", "no", "日本"])),
        ({"grammar": 'start: "a" start "b" | "c"'}, Guide.grammar('start: "a" start "b" | "c"')),
        ({"json": SCHEMA}, Guide.json(SCHEMA)),
        ({"json": json.dumps(SCHEMA)}, Guide.json(SCHEMA)),
    ],
    ids=str,
)
def test_answers_are_those_of_scripts(server, llm, asked, guide):
    body = {"prompt": "the dog", "temperature": 2.0, "seed": 5, "max_tokens": 200, "return_token_ids": True}
    _, answer = server.answer(COMPLETIONS, {**body, "structured_outputs": asked})
    expected = llm.generate("the dog", SamplingParams(temperature=2.0, seed=5, max_tokens=200, guide=guide))[0]
    assert answer["choices"][0]["token_ids"] == expected.token_ids
    _, free = server.answer(COMPLETIONS, body)
    assert free["choices"][0]["token_ids"] != expected.token_ids


def test_answers_without_a_guide_are_the_same_beside_one_with(server):
    body = {"prompt": "the dog", "temperature": 2.0, "seed": 5, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    _, alone = server.answer(COMPLETIONS, body)
    connection = server.send("POST", CHAT, {"messages": MESSAGES, "n": 2, "structured_outputs": {"regex": "[a-f]{300}"}})
    with contextlib.closing(connection):
        time.sleep(0.3)
        _, beside = server.answer(COMPLETIONS, body)
        connection.getresponse().read()
    assert beside["choices"] == alone["choices"]


def test_any_object(server):
    _, answer = server.answer(CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 40})
    assert answer["choices"][0]["message"]["content"].startswith("{")
    _, answer = server.answer(CHAT, {"messages": MESSAGES, "response_format": {"type": "text"}, "max_tokens": 4})
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_client_that_leaves_while_its_guide_is_compiled_takes_nothing_with_it(server):
    for _ in range(3):
        connection = server.send("POST", CHAT, {"messages": MESSAGES, "response_format": as_format(slow_schema(100))})
        time.sleep(0.05)
        connection.close()
    status, _ = server.answer(CHAT, {"messages": MESSAGES, "structured_outputs": {"regex": FORM}, "n": SLOTS})
    assert status == 200
    assert server.answer("/ready")[0] == 200


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        ({"response_format": as_format({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
        ({"response_format": as_format({"$ref": "http://example.com/x"})}, "response_format", "cannot be enforced"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name", "is missing"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "regular expression"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "has 2 of"),
        ({"structured_outputs": {}}, "structured_outputs", "has 0 of"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs", "non-empty strings"),
        ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs", "make it simpler"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag", "not a parameter"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "given together"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs", "ignore_eos"),
    ],
    ids=lambda value: re.sub("a{9,}", "aa..", str(value))[:60],
)
def test_what_cannot_be_followed_is_refused(server, body, param, expected):
    status, answer = server.answer(CHAT, {"messages": MESSAGES, "max_tokens": 4, **body})
    assert status == 400
    assert answer["error"]["param"] == param and expected in answer["error"]["message"]


EXPLODING = [
    {"regex": "(a+)+$"},
    {"regex": "((a|b)*c){500}"},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"choice": [f"choice {number}" for number in range(20_000)]},
    {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}},
    {"json": {"type": "object", "properties": {f"property {number}": {"type": "string"} for number in range(3000)}}},
    {"grammar": "start: start start | start"},
    {"grammar": "start: " + " ".join(f"r{i}" for i in range(50)) + "\n" + "\n".join(f'r{i}: "a" | "b"' for i in range(50))},
]


@pytest.mark.parametrize("asked", EXPLODING, ids=lambda asked: str(asked)[:40])
def test_guides_made_to_explode_stop_nobody_else(server, asked):
    """Another client's stream goes on; the request ends with an answer or a 400."""
    connection, response = server.open("POST", CHAT, {"messages": MESSAGES, "ignore_eos": True, "stream": True, "max_tokens": 400})
    with contextlib.closing(connection):
        attack = server.send("POST", COMPLETIONS, {"prompt": "a", "max_tokens": 3, "structured_outputs": asked})
        longest, last = 0.0, time.monotonic()
        while response.readline():
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        with contextlib.closing(attack):
            assert attack.getresponse().status in (200, 400)
    assert longest < 5


def slow_schema(patterns):
    """llguidance compares each of these patterns with each other one."""
    patterns = {f"^a{{{number}}}b*$": {"type": "string"} for number in range(1, patterns)}
    return {"type": "object", "patternProperties": patterns, "additionalProperties": False}


@pytest.fixture
def checking(monkeypatch):
    """Runs a function with a checker that gives up soon, and stops its processes."""

    def run(act):
        async def acting():
            checker = guide_checker.GuideChecker()
            try:
                await act(checker)
            finally:
                for worker in checker._idle:
                    worker.kill()
                    await worker.wait()

        asyncio.run(acting())

    monkeypatch.setattr(guide_checker, "CHECK_SECONDS", 1.0)
    return run


def test_a_guide_may_not_take_long_and_the_next_ones_are_not_kept_waiting(checking):
    async def act(checker):
        began = time.monotonic()
        for _ in range(2):  # it is tried again: the machine may have been busy
            with pytest.raises(ApiError, match="response_format: it takes more than 1 s to prepare; make it simpler"):
                await checker.check(Guide.json(slow_schema(300)), "response_format")
        await checker.check(Guide.regex("a"), "structured_outputs")
        assert time.monotonic() - began < 60

    checking(act)


def test_a_client_that_leaves_gets_no_other_one_its_answer(checking):
    async def act(checker):
        leaving = asyncio.create_task(checker.check(Guide.json(slow_schema(60)), "response_format"))
        await asyncio.sleep(1.0)
        leaving.cancel()
        with pytest.raises(ApiError, match="regular expression"):
            await checker.check(Guide.regex("(a"), "structured_outputs")
        await checker.check(Guide.regex("a"), "structured_outputs")

    checking(act)


def test_a_checker_that_dies_is_replaced(checking):
    async def act(checker):
        await checker.check(Guide.regex("a"), "structured_outputs")
        (worker,) = checker._idle
        worker.kill()
        await worker.wait()
        await checker.check(Guide.regex("b"), "structured_outputs")
        assert checker._idle != [worker]

    checking(act)


def test_a_checker_that_runs_out_of_memory_is_one_request_s_own_trouble(checking):
    async def act(checker):
        await checker.check(Guide.regex("a"), "structured_outputs")
        (worker,) = checker._idle
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
        with pytest.raises(ApiError, match="too much memory"):
            await checker.check(Guide.choice([f"choice {number}" for number in range(10_000)]), "structured_outputs")
        await checker.check(Guide.regex("b"), "structured_outputs")

    checking(act)


def test_the_queue_for_checks_is_bounded(checking, monkeypatch):
    monkeypatch.setattr(guide_checker, "_MOST_WAITING", 2)

    async def act(checker):
        for number in range(4):  # one after the other there is room
            await checker.check(Guide.regex(f"a{number}"), "structured_outputs")
        found = await asyncio.gather(*(checker.check(Guide.regex(f"b{n}"), "x") for n in range(4)), return_exceptions=True)
        assert [getattr(one, "status", None) for one in found] == [None, None, 429, 429]

    checking(act)


def test_what_is_known_of_guides_is_bounded(checking, monkeypatch):
    monkeypatch.setattr(guide_checker, "_KEPT_CHARACTERS", 5)

    async def act(checker):
        for pattern in ("aa", "bb", "aa", "cc"):
            await checker.check(Guide.regex(pattern), "structured_outputs")
        assert [guide.text for guide in checker._known] == ["aa", "cc"]

    checking(act)
