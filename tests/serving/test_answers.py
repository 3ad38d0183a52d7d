"""A server's answers are those of ``LLM``, in OpenAI's form."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import pytest

from l4jax import SamplingParams
from tests.serving.running import CONTEXT, SLOTS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the quick brown dog"}]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


def test_a_chat_is_what_the_llm_says(server, llm):
    expected = llm.chat(MESSAGES, SamplingParams(max_tokens=20, logprobs=2, **SAMPLED))
    body = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 2, **SAMPLED}
    status, answer = server.answer(CHAT, body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason and choice["seed"] == 7
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    listed = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in listed] == [each.logprob for each in expected.logprobs]
    assert [bytes(entry["bytes"]) for entry in listed] == [llm.tokenizer.token_bytes(token) for token in expected.token_ids]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in listed] == [
        [value for _, value in each.top] for each in expected.logprobs
    ]


@pytest.mark.parametrize("n", [1, 2])
def test_a_streams_chunks_join_to_the_whole_answer(server, n):
    body = {"messages": MESSAGES, "max_tokens": 24, "n": n, "return_token_ids": True, "logprobs": True, **SAMPLED}
    _, whole = server.answer(CHAT, body)
    *chunks, last, done = server.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in [*chunks, last]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    for expected in whole["choices"]:
        first, *rest = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in rest) == expected["message"]["content"]
        assert [token for choice in rest for token in choice.get("token_ids", [])] == expected["token_ids"]
        assert [x for choice in rest if choice["logprobs"] for x in choice["logprobs"]["content"]] == expected["logprobs"]["content"]
        assert [choice["finish_reason"] for choice in rest if choice["finish_reason"]] == [expected["finish_reason"]]
        assert rest[-1]["finish_reason"] == expected["finish_reason"]
        assert first["seed"] == expected["seed"] == 7 + expected["index"]


def test_prompts_may_be_texts_or_tokens(server, llm):
    text = "the lazy dog"
    ids = llm.requests.encode(text)
    expected = llm.generate(text, SamplingParams(max_tokens=9, temperature=0.0))[0]
    for prompt in (text, ids, [text, text], [ids, ids]):
        _, answer = server.answer(COMPLETIONS, {"prompt": prompt, "max_tokens": 9, "temperature": 0})
        count = 2 if len(prompt) == 2 else 1
        assert [choice["text"] for choice in answer["choices"]] == [expected.text] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["prompt_tokens"] == count * len(ids)


def test_an_echo_has_the_prompts_log_probabilities(server, llm):
    prompts = [llm.requests.encode(text) for text in ("the quick brown fox", "add(a, b)")]
    scores = llm.score(prompts, top=1)
    _, answer = server.answer(COMPLETIONS, {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True})
    for prompt, expected, choice in zip(prompts, scores, answer["choices"], strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(prompt)] == pytest.approx([each.logprob for each in expected], abs=1e-6)
        assert choice["text"].startswith(llm.tokenizer.decode(prompt))
        assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt) + 1
    _, only = server.answer(COMPLETIONS, {"prompt": prompts, "max_tokens": 0, "logprobs": 1, "echo": True})
    assert [len(choice["logprobs"]["tokens"]) for choice in only["choices"]] == list(map(len, prompts))
    assert only["usage"]["completion_tokens"] == 0


def test_a_stop_string_ends_an_answer_and_is_left_out(server):
    _, free = server.answer(COMPLETIONS, {"prompt": "the dog", "max_tokens": 60, "temperature": 0, "ignore_eos": True})
    text = free["choices"][0]["text"]
    stop = text[10:14]
    _, stopped = server.answer(COMPLETIONS, {"prompt": "the dog", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stop": stop})
    assert stopped["choices"][0] | {"seed": 0} == free["choices"][0] | {
        "text": text[: text.index(stop)],
        "finish_reason": "stop",
        "seed": 0,
    }


def test_left_out_max_tokens_fill_the_context(server):
    _, answer = server.answer(CHAT, {"messages": MESSAGES, "ignore_eos": True})
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_repeated_prompt_is_cached_within_its_salt_only(server):
    prompt = {"prompt": [token % 200 + 50 for token in range(600)], "max_tokens": 1, "cache_salt": "one"}
    cached = [
        server.answer(COMPLETIONS, {**prompt, **other})[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for other in ({}, {}, {"cache_salt": "two"})
    ]
    assert cached[0] == cached[2] == 0 and cached[1] == 512  # a prefill piece


def test_text_becomes_tokens_and_back(server, llm):
    status, found = server.answer("/tokenize", {"prompt": "naïve café", "return_token_strs": True})
    assert status == 200 and found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["tokens"] == llm.tokenizer.encode("naïve café") and found["max_model_len"] == CONTEXT
    assert server.answer("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": "naïve café"})
    _, chat = server.answer("/tokenize", {"messages": MESSAGES})
    assert chat["tokens"] == llm.chat_format.encode(MESSAGES)


@pytest.mark.parametrize("kind", ["stream", "whole", "pipelined"])
def test_what_a_client_leaves_is_not_computed(server, kind):
    """Clients that go away free their slots: the next one does not wait for theirs, which would take 20 times as long as one answer."""
    long = {"messages": MESSAGES, "ignore_eos": True, "stream": kind == "stream"}
    began = time.monotonic()
    server.answer(CHAT, {**long, "stream": False})
    alone = time.monotonic() - began
    for _ in range(20 * SLOTS):
        connection = server.send("POST", CHAT, long)
        if kind == "stream":
            connection.getresponse().read(20)
        elif kind == "pipelined":
            raw = json.dumps(long).encode()
            time.sleep(0.02)  # the first is being computed
            connection.sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(raw)) + raw)
        connection.close()
    began = time.monotonic()
    status, _ = server.answer(CHAT, {"messages": MESSAGES, "max_tokens": 4})
    assert status == 200 and time.monotonic() - began < max(5.0, 5 * alone)


def test_every_sampling_parameter_reaches_the_engine(server, llm):
    """Each changes the answer as it changes the LLM's."""
    plain = {"temperature": 10.0, "seed": 3}  # a tiny model is very sure
    settings = [
        {"top_k": 2},
        {"min_p": 0.2},
        {"top_p": 0.2},
        {"repetition_penalty": 1.8},
        {"presence_penalty": 200.0},
        {"frequency_penalty": 200.0},
        {"logit_bias": {200: 50.0}},
        {"temperature": 0.0},
    ]
    text = "the quick brown fox"
    for changed in [{}, *settings]:
        expected = llm.generate(text, SamplingParams(max_tokens=24, ignore_eos=True, **{**plain, **changed}))[0]
        body = {"prompt": text, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, **plain, **changed}
        _, answer = server.answer(COMPLETIONS, body)
        assert answer["choices"][0]["token_ids"] == expected.token_ids, changed
        if not changed:
            unchanged = expected.token_ids
        else:
            assert expected.token_ids != unchanged, changed
    stop = unchanged[5]
    _, answer = server.answer(COMPLETIONS, {**body, **plain, "stop_token_ids": [stop]})
    assert answer["choices"][0]["token_ids"] == unchanged[: unchanged.index(stop) + 1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    _, answer = server.answer(COMPLETIONS, {**body, **plain, "stop_token_ids": [stop], "min_tokens": 9})
    assert stop not in answer["choices"][0]["token_ids"][:9] and len(answer["choices"][0]["token_ids"]) >= 9


def test_a_streamed_completion_joins_to_the_whole(server):
    body = {"prompt": ["the dog", "a fox"], "n": 2, "max_tokens": 12, "echo": True, "logprobs": 1, "return_token_ids": True, **SAMPLED}
    _, whole = server.answer(COMPLETIONS, body)
    *chunks, last, done = server.stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    assert done == "[DONE]" and last["choices"] == [] and last["usage"] == chunks[-1]["usage"] == whole["usage"]
    assert len(whole["choices"]) == 4
    for expected in whole["choices"]:
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [token for part in parts for token in part["token_ids"]] == expected["token_ids"]
        assert [value for part in parts for value in part["logprobs"]["token_logprobs"]] == expected["logprobs"]["token_logprobs"]
        assert [value for part in parts for value in part["logprobs"]["text_offset"]] == expected["logprobs"]["text_offset"]
        assert ["prompt_token_ids" in part for part in parts] == [True] + [False] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
    without = server.stream(COMPLETIONS, body)
    assert all("usage" not in chunk for chunk in without[:-1])


def test_requests_that_run_together_are_answered_as_alone(server):
    """More clients than slots: all are answered, each as it would be alone."""
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 1.0}
    expected = [server.answer(CHAT, {**body, "seed": seed})[1]["choices"] for seed in range(8)]
    found = {}

    def ask(seed):
        found[seed] = server.answer(CHAT, {**body, "seed": seed})[1]["choices"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == expected


def test_the_model_is_listed(server):
    status, found = server.answer("/v1/models")
    assert status == 200 and [(model["id"], model["max_model_len"]) for model in found["data"]] == [("tiny", CONTEXT)]
    assert server.answer("/health")[0] == server.answer("/ready")[0] == server.answer("/version")[0] == 200


def test_a_request_keeps_its_id(server):
    connection, response = server.open("POST", CHAT, {"messages": []}, {"x-request-id": "abc-1"})
    with contextlib.closing(connection):
        assert response.status == 400 and response.headers["x-request-id"] == "abc-1"
