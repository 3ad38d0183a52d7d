"""``l4jax bench serve``: its figures, what it sends, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from l4jax import cli
from l4jax.bench import report
from l4jax.bench.answer import Answer, Reader, Usage, message_of
from l4jax.bench.client import Cancel, Server, stream
from l4jax.bench.load import Load, Measured, Pattern, Sent, arrivals
from l4jax.bench.requests import Content, Planned, Range, Requests, read_prompts

COMPLETIONS = "/v1/completions"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def framed(body: bytes) -> bytes:
    """A chunk of chunked encoding."""
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(fields: Any) -> bytes:
    return b"data: " + (fields if isinstance(fields, bytes) else json.dumps(fields, ensure_ascii=False).encode()) + b"\n\n"


def text(piece: str) -> bytes:
    return event({"choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": None}], "usage": None})


def usage(prompt: int, output: int, **more: Any) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, **more}})


DONE = event(b"[DONE]")
WHOLE = HEAD + framed(text("né")) + framed(b": a comment\n\n" + text("日本")) + framed(usage(5, 4) + DONE) + END


def read(pieces: list[tuple[float, bytes]]) -> Answer:
    """An answer whose request was sent at the time 10, and whose pieces were read at their times."""
    answer = Answer(10.0)
    reader = Reader(answer)
    for at, piece in pieces:
        reader.feed(piece, at)
    if not reader.is_over:
        reader.lost(None, pieces[-1][0])
    return answer


# What comes.


@hypothesis.given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
@hypothesis.example([HEAD.index(b"Transfer"), WHOLE.index("é".encode()) + 1, WHOLE.index("日".encode()) + 2, len(WHOLE) - 3])
@hypothesis.example(list(range(len(WHOLE))))
def test_an_answer_may_be_cut_anywhere(cuts):
    ends = sorted({*cuts, 0, len(WHOLE)})
    answer = read([(float(i), WHOLE[a:b]) for i, (a, b) in enumerate(itertools.pairwise(ends))])
    assert (answer.failure, answer.usage, answer.status) == (None, Usage(5, 4), 200)
    # A text has come when its event's last byte has; both may come in one read.
    first, second = (WHOLE.index(piece.encode() + b'"') for piece in ("né", "日本"))
    when = [next(i for i, end in enumerate(ends[1:]) if end >= WHOLE.index(b"\n\n", at) + 2) for at in (first, second)]
    assert answer.content_times == sorted({float(at) for at in when})


def test_figures_are_those_of_the_reads():
    pieces = [
        (10.2, HEAD),
        (10.25, framed(text(""))),  # no text yet
        (10.5, framed(text("one"))),
        (11.0, framed(text("two") + text("three"))),
        (11.5, framed(usage(7, 5, prompt_tokens_details={"cached_tokens": 2}))),
        (12.0, framed(DONE)),
    ]
    found = report.row(Sent(3, Planned(b"", 9, None, 0.0), read(pieces), due=9.75), began=8.0)
    assert found == {
        "number": 3,
        "status": "finished",
        "error": None,
        "max_tokens": 9,
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "output_tokens": 5,
        "sent_s": 2.0,
        "late_ms": 250.0,
        "ttft_ms": 500.0,
        "tpot_ms": 125.0,
        "itl_ms": [500.0],
        "e2e_ms": 2000.0,
    }


@pytest.mark.parametrize("delta", [{"content": "a"}, {"reasoning_content": "a"}, {"reasoning": "a"}])
def test_chat_and_reasoning_are_text_and_a_role_is_not(delta):
    chunks = [event({"choices": [{"delta": each, "finish_reason": None}]}) for each in ({"role": "assistant", "content": ""}, delta)]
    answer = read([(11.0, HEAD + framed(chunks[0])), (12.0, framed(chunks[1])), (13.0, framed(usage(1, 1) + DONE))])
    assert answer.failure is None and answer.content_times == [12.0]


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (HEAD + framed(text("a")) + framed(DONE), "no usage", "does not say how many tokens it has"),
        (HEAD + framed(text("a") + event({"error": {"message": "the engine\nstopped"}})), "stream", "the engine stopped"),
        (HEAD + framed(text("a") + event({"error": "x"}) + DONE), "stream", "x"),
        (HEAD + framed(text("a") + usage(1, 1)), "connection", "ended before the answer did"),
        (HEAD + framed(text("a") + usage(1, 1)) + END, "protocol", "without `data: [DONE]`"),
        (HEAD + framed(b"data: {\n\n"), "protocol", "not one of OpenAI's"),
        (HEAD + framed(b'data: "\xff"\n\n'), "protocol", "not one of OpenAI's"),
        (b"SSH-2.0-OpenSSH\r\n", "protocol", "not HTTP/1.1"),
        (b'HTTP/1.1 429 Too Many\r\nContent-Length: 30\r\n\r\n{"error": {"message": "later"}}', "status 429", "later"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "status 503", "no message"),
        (b"HTTP/1.0 500 Oh\r\n\r\nbroken", "status 500", "broken"),
    ],
)
def test_failures_have_a_kind_and_a_message(raw, kind, message):
    answer = read([(11.0, raw)])
    assert answer.failure is not None and not answer.finished
    assert answer.failure.kind == kind and message in answer.failure.message and answer.ended == 11.0
    assert report.row(Sent(0, Planned(b"", 1, None, 0.0), answer, None), 0.0)["status"] == "failed"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "a", "type": "b"}}', "a"),
        (b'{"object": "error", "message": "a"}', "a"),
        (b'{"detail": [1]}', "[1]"),
        (b"<html>", "<html>"),
        (b"[" * 100_000, "[" * 100_000),
    ],
)
def test_errors_are_found_in_the_forms_of_other_servers(body, message):
    assert message_of(body) == message


# Figures.


@hypothesis.given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_numpys(values, part):
    assert report.quantile(values, part) == pytest.approx(float(np.quantile(values, part)), rel=1e-12, abs=1e-6)
    assert report.quantile([], part) is None


def sent(number: int, first: float, last: float, end: float, tokens: int, **more: Any) -> Sent:
    """A request sent at the time ``number``; the other times are after that."""
    answer = Answer(float(number), [number + first, number + last], number + end, 200, Usage(10, tokens), **more)
    return Sent(number, Planned(b"", 8, None, 0.0), answer, None)


def test_only_finished_requests_count():
    failed = read([(11.0, HEAD + framed(text("a") + event({"error": "x"})))])
    requests = [
        sent(0, 0.1, 0.5, 0.6, 5),  # 100 ms to the first, 100 ms a token
        sent(1, 0.3, 0.5, 0.6, 3),  # 300 ms, 100 ms
        sent(2, 0.1, 1.9, 2.0, 4),  # 100 ms, 600 ms
        sent(3, 0.1, 0.2, 0.3, 1, cancelled=True),
        Sent(4, Planned(b"", 8, None, 0.0), failed, None),
    ]
    found = report.summary(Measured(requests, 0.0, 4.0, 1.0), {"ttft_ms": 200.0, "tpot_ms": 200.0})
    assert found["requests"] == {"sent": 5, "finished": 3, "cancelled": 1, "failed": 1}
    assert (found["output_tokens_per_s"], found["prompt_tokens_per_s"], found["requests_per_s"]) == (3.0, 7.5, 0.75)
    assert found["latency"]["ttft_ms"] == pytest.approx({"count": 3, "median": 100.0, "p90": 260.0, "p99": 296.0})
    assert found["latency"]["tpot_ms"]["median"] == pytest.approx(100.0)
    assert found["latency"]["itl_ms"]["count"] == 3
    # The failed request is not good, and the cancelled one is nothing.
    assert found["goodput"] == {"limits_ms": {"ttft_ms": 200.0, "tpot_ms": 200.0}, "share": 0.25, "requests_per_s": 0.25}
    assert found["errors"] == [{"kind": "stream", "message": "x", "count": 1}]
    assert found["client"] == {"busy_share": 0.25, "latest_ms": None}
    lines = report.table(found).splitlines()
    assert lines[0] == "5 requests in 4.0 s: 3 finished, 1 cancelled, 1 failed"
    assert lines[2:4] == [
        "latency, ms              median       p90       p99",
        "time to first token      100.00    260.00    296.00",
    ]
    assert lines[-1] == "1 failed, stream: x"


def test_one_token_has_no_time_per_token_and_an_answer_without_text_is_not_good():
    silent = Sent(0, Planned(b"", 8, None, 0.0), Answer(0.0, [], 1.0, 200, Usage(1, 1)), None)
    found = report.summary(Measured([silent, sent(1, 0.1, 0.1, 0.2, 1)], 0.0, 2.0, 0.0), {"tpot_ms": 1.0})
    assert found["latency"]["ttft_ms"]["count"] == 1 and found["latency"]["tpot_ms"]["median"] is None
    assert found["goodput"]["share"] == 0.5


def test_nothing_measured_is_a_table_too():
    found = report.summary(Measured([], 1.0, 1.0, 0.0), {"ttft_ms": 1.0})
    assert report.table(found).startswith("0 requests in 0.0 s")


# What is sent.


def test_the_same_seed_sends_the_same_requests():
    content = Content("completions", "m", 7, Range(10, 4000), Range(64, 512), shared_prefix=0.5, shared_prefix_tokens=100, cancel=0.3)
    one, same = ([Requests(content).planned("measured", i) for i in range(200)] for _ in range(2))
    assert one == same
    bodies = [json.loads(each.body) for each in one]
    prefix = next(body["prompt"][:100] for body in bodies if sum(body["prompt"][:100] == other["prompt"][:100] for other in bodies) > 1)
    shared = sum(body["prompt"][:100] == prefix for body in bodies)
    assert 70 < shared < 130
    assert 30 < sum(each.cancel_in_stream is not None for each in one) < 90
    assert {each.cancel_in_stream for each in one} == {None, False, True}
    assert all(1000 <= token <= 30_000 for body in bodies for token in body["prompt"])
    assert all(64 <= body["max_tokens"] <= 512 and 10 <= len(body["prompt"]) <= 4100 for body in bodies)
    assert len({tuple(body["prompt"][-10:]) for body in bodies}) == 200
    # Neither another phase nor another seed sends any of them.
    other = {Requests(content).planned("warm-up", 0).body, Requests(Content("completions", "m", 8)).planned("measured", 0).body}
    assert other.isdisjoint(each.body for each in one)


def test_the_longest_request_is_as_long_as_any():
    content = Content("completions", "m", 0, Range(10, 40), Range(6, 9), shared_prefix=0.5, shared_prefix_tokens=100)
    longest, shortest = json.loads(Requests(content).longest()), json.loads(Requests(content).shortest(3))
    assert (len(longest["prompt"]), longest["max_tokens"], len(shortest["prompt"]), shortest["max_tokens"]) == (140, 9, 10, 3)


def test_chat_prompts_are_words():
    body = json.loads(Requests(Content("chat", "m", 0, Range(20, 20), ignore_eos=True)).planned("measured", 0).body)
    (message,) = body["messages"]
    assert len(message["content"].split()) == 20 and message["role"] == "user"
    assert body["stream_options"] == {"include_usage": True} and body["ignore_eos"] is True


def test_lengths_are_log_uniform():
    drawn = [Range(8, 4095).draw(generator) for generator in [random.Random(0)] for _ in range(9000)]
    assert min(drawn) >= 8 and max(drawn) <= 4095
    # Nine doublings, each as likely as any other.
    counts = np.bincount([value.bit_length() - 4 for value in drawn])
    assert len(counts) == 9 and all(900 < count < 1100 for count in counts)
    assert {Range(3, 4).draw(random.Random(i)) for i in range(50)} == {3, 4} and Range(5, 5).draw(random.Random(0)) == 5


def test_arrivals_are_poisson_and_reproducible():
    def times(seed: int) -> list[float]:
        return list(itertools.islice(arrivals(seed, "measured", 4.0), 4000))

    assert times(1) == times(1) != times(2)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times(1))]
    assert min(gaps) > 0 and statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.1)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"messages": [{"role": "user", "content": "b"}], "other": 1}\n', encoding="utf-8")
    assert read_prompts(path, "chat") == [{"messages": [{"role": "user", "content": each}]} for each in ("a\u2028b", "b")]
    with pytest.raises(ValueError, match="line 3, has no prompt for --api completions"):
        read_prompts(path, "completions")
    path.write_text('{"prompt": [1, 2]}\n{"prompt": "x"}\n')
    prompts = read_prompts(path, "completions")
    requests = Requests(Content("completions", "m", prompts=prompts))
    assert [json.loads(requests.planned("measured", i).body)["prompt"] for i in range(3)] == [[1, 2], "x", [1, 2]]


# Against a server that does as it is told.

Parts = list[bytes | float | None]
"""What is written: bytes, pauses in seconds, and None for until the client leaves."""


def plain(fields: Any, status: int = 200) -> bytes:
    body = json.dumps(fields).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


MODELS = plain({"object": "list", "data": [{"id": "fake"}]})


class Fake:
    """A server in a thread. ``requests``: bodies that came; ``left``: of requests whose client went away before the answer's end."""

    def __init__(self, respond: Callable[[int, Any], Parts], models: bytes) -> None:
        """``respond``: from a request's number and body, what is written."""
        self.requests: list[Any] = []
        self.left: list[int] = []
        self.most_open = self._open = 0
        self._respond, self._models = respond, models
        self._clients: list[asyncio.Task[Any]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        await asyncio.sleep(0.01)  # connections that have just been opened are taken too, and end
        server.close()
        async with asyncio.timeout(20):
            await server.wait_closed()
            await asyncio.gather(*self._clients)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.append(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if head.startswith("GET"):
                    writer.write(self._models if " /v1/models " in head else plain({}, 404))
                else:
                    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
                    body = json.loads(await reader.readexactly(length))
                    number = len(self.requests)
                    self.requests.append(body)
                    self._open += 1
                    self.most_open = max(self.most_open, self._open)
                    try:
                        await self._write(number, self._respond(number, body), reader, writer)
                    finally:
                        self._open -= 1
                await writer.drain()
        finally:
            writer.close()

    async def _write(self, number: int, parts: Parts, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            if part is None:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                self.left.append(number)
            elif isinstance(part, bytes):
                writer.write(part)
            else:
                await asyncio.sleep(part)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Fake:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


def fake(respond: Callable[[int, Any], Parts] = lambda number, body: [WHOLE], models: bytes = MODELS) -> Fake:
    return Fake(respond, models)


def bench(url: str, *options: str) -> int:
    return cli.main(["bench", "serve", "--url", url, *options])


CHECKS = 2  # requests before any load


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "figures.json"


def test_a_closed_loop_measures_and_reports(out, capsys):
    with fake() as server:
        options = ["--clients", "4", "--requests", "20", "--warmup", "5", "--seed", "3", "--api-key", "secret", "--goodput", "e2e:60000"]
        assert bench(server.url, *options, "--out", str(out)) == 0
        assert len(server.requests) == CHECKS + 5 + 20
        assert server.most_open <= 4
    found = json.loads(out.read_text())
    assert "secret" not in out.read_text() and not list(out.parent.glob("*.partial"))
    assert found["requests"] == {"sent": 20, "finished": 20, "cancelled": 0, "failed": 0}
    assert (found["output_tokens"], found["prompt_tokens"], found["cached_tokens"]) == (80, 100, None)
    assert found["output_tokens_per_s"] == pytest.approx(80 / found["seconds"]) and found["goodput"]["share"] == 1.0
    assert [one["number"] for one in found["rows"]] == list(range(20))
    assert found["about"]["content"]["model"] == "fake" and found["about"]["pattern"]["clients"] == 4
    said = capsys.readouterr().out
    assert said.startswith(f"fake at {server.url}, completions, 4 clients, seed 3\n20 requests in ") and "goodput (e2e <= 60000 ms)" in said


def test_two_runs_send_the_same_and_warm_up_changes_nothing():
    sent = []
    for warmup in ("0", "3"):
        with fake() as server:
            assert bench(server.url, "--requests", "10", "--prompt-tokens", "3:30", "--warmup", warmup) == 0
            sent.append(server.requests[-10:])
    assert sent[0] == sent[1]


def test_an_open_loop_does_not_wait_for_answers(out):
    def slow(number: int, body: Any) -> Parts:
        return [WHOLE] if number < CHECKS else [0.3, WHOLE]

    with fake(slow) as server:
        assert bench(server.url, "--rate", "200", "--requests", "30", "--out", str(out)) == 0
        assert server.most_open > 5
    found = json.loads(out.read_text())
    assert found["requests"]["finished"] == 30
    # A server cannot be measured as faster than it is; timers may be a millisecond early.
    assert min(one["ttft_ms"] for one in found["rows"]) >= 299 and min(one["late_ms"] for one in found["rows"]) > -2
    due = [one["sent_s"] * 1e3 - one["late_ms"] for one in found["rows"]]
    assert due == pytest.approx([1e3 * at for at in itertools.islice(arrivals(0, "measured", 200.0), 30)], abs=1e-3)


def test_for_some_seconds(out):
    with fake(lambda number, body: [0.02, WHOLE]) as server:
        assert bench(server.url, "--clients", "2", "--seconds", "0.3", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert 1 <= found["requests"]["finished"] <= 2 * 16 and max(one["sent_s"] for one in found["rows"]) < 0.3 <= found["seconds"] + 0.03


@pytest.mark.parametrize("in_stream", [False, True])
def test_a_cancelled_request_closes_its_connection(in_stream):
    parts: Parts = [HEAD + framed(text("a")), None] if in_stream else [None]

    with fake(lambda number, body: parts) as server:
        target = Server.parse(server.url, None)
        answer = asyncio.run(stream(target, COMPLETIONS, b"{}", timeout_s=30, cancel=Cancel(in_stream, 0.05)))
    assert answer.cancelled and not answer.finished and answer.failure is None and answer.usage is None
    assert len(answer.content_times) == in_stream and answer.ended - answer.started >= 0.05
    assert server.left == [0]


def test_a_request_that_was_to_be_cancelled_before_its_first_text_is_cancelled_at_it():
    with fake(lambda number, body: [HEAD + framed(text("a")), None]) as server:
        answer = asyncio.run(stream(Server.parse(server.url, None), COMPLETIONS, b"{}", timeout_s=30, cancel=Cancel(False, 25)))
    assert answer.cancelled and len(answer.content_times) == 1 and server.left == [0]


def test_an_answer_that_came_before_its_cancellation_is_finished():
    with fake() as server:
        answer = asyncio.run(stream(Server.parse(server.url, None), COMPLETIONS, b"{}", timeout_s=30, cancel=Cancel(True, 25)))
    assert answer.finished and answer.usage == Usage(5, 4)


def test_a_share_of_the_requests_is_cancelled(out):
    def respond(number: int, body: Any) -> Parts:
        # After the checks, only a client that leaves gets on.
        return [WHOLE] if number < CHECKS else [HEAD + framed(text("a")), None]

    with fake(respond) as server:
        assert bench(server.url, "--clients", "8", "--requests", "40", "--cancel", "1", "--out", str(out)) == 0
        end = time.monotonic() + 20
        while len(server.left) < 40 and time.monotonic() < end:  # it may learn of the last ones later than the client
            time.sleep(0.02)
        assert len(server.requests) == 42
    assert sorted(server.left) == list(range(2, 42))
    found = json.loads(out.read_text())
    assert found["requests"] == {"sent": 40, "finished": 0, "cancelled": 40, "failed": 0}


def test_failures_are_counted_and_never_finished(out, capsys):
    answers = {
        0: [HEAD + framed(text("a") + event({"error": {"message": "the engine stopped"}})) + END],
        1: [HEAD + framed(text("a") + DONE) + END],
        2: [plain({"error": {"message": "the queue is full"}}, 429)],
        3: [HEAD + framed(text("a"))],
        4: [plain({"choices": []})],
        5: [WHOLE],
    }
    with fake(lambda number, body: [WHOLE] if number < CHECKS else answers[number % 6]) as server:
        assert bench(server.url, "--requests", "12", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["requests"] == {"sent": 12, "finished": 2, "cancelled": 0, "failed": 10}
    assert {one["kind"]: one["count"] for one in found["errors"]} == {
        "stream": 2,
        "no usage": 2,
        "status 429": 2,
        "connection": 2,
        "protocol": 2,
    }
    assert found["output_tokens"] == 8 and "2 failed, status 429: the queue is full" in capsys.readouterr().out


def test_only_failures_are_an_error_after_the_table(capsys):
    with fake(lambda number, body: [WHOLE] if number < CHECKS else [plain({"error": {"message": "no"}}, 500)]) as server:
        assert bench(server.url, "--requests", "3") == 2
    said, error = capsys.readouterr()
    assert "0 finished, 0 cancelled, 3 failed" in said and "every request failed" in error and error.count("\n") == 1


def test_a_server_that_says_nothing_is_a_timeout():
    with fake(lambda number, body: [None]) as server:
        answer = asyncio.run(stream(Server.parse(server.url, None), COMPLETIONS, b"{}", timeout_s=0.05))
    assert answer.failure is not None and answer.failure.kind == "timeout" and server.left == [0]


def test_a_server_that_goes_away_is_a_failure_of_each_request():
    with fake() as server:
        target, content = Server.parse(server.url, None), Content("completions", "fake")
    load = Load(target, content, Pattern(clients=2, requests=3), pace=Answer(0.0))
    measured = asyncio.run(load.run())
    assert [one.answer.failure.kind for one in measured.sent] == ["connection"] * 3
    assert "Connection refused" in measured.sent[0].answer.failure.message


# Options that cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clients", "2", "--rate", "3"], "not allowed with argument"),
        (["--requests", "2", "--seconds", "3"], "not allowed with argument"),
        (["--clients", "0"], "--clients is 0; expected 1 to"),
        (["--rate", "nan"], "--rate is nan; expected"),
        (["--cancel", "1.5"], "--cancel is 1.5; expected 0 to 1"),
        (["--prompt-tokens", "40:10"], "--prompt-tokens is '40:10'; expected"),
        (["--max-tokens", "0"], "--max-tokens is '0'; expected"),
        (["--max-tokens", "1:2:3"], "--max-tokens is '1:2:3'; expected"),
        (["--shared-prefix", "0.5"], "expected both or neither"),
        (["--token-ids", "1:2", "--api", "chat"], "leave it out"),
        (["--prompts", "absent.jsonl", "--prompt-tokens", "5"], "--prompts and --prompt-tokens are given"),
        (["--prompts", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--goodput", "ttft:fast"], "--goodput is 'ttft:fast'; expected limits in ms"),
        (["--goodput", "ttft:1,ttft:2"], "--goodput is 'ttft:1,ttft:2'"),
        (["--out", "absent/figures.json"], "--out absent/figures.json cannot be written"),
        (["--api-key", "a\nb"], "--api-key is empty"),
        (["--model", "other"], "has no model other; expected --model with one of: fake"),
    ],
)
def test_wrong_options_are_one_line_before_any_load(options, message, capsys):
    with fake() as server:
        assert bench(server.url, *options) == 2
        assert server.requests == []
    said, error = capsys.readouterr()
    assert said == "" and message in error and error.count("\n") == 1


@pytest.mark.parametrize("url", ["localhost:8000", "https://localhost", "http://", "http://a:b", "http://a b", "http://u:p@h", "ftp://x"])
def test_wrong_urls(url, capsys):
    assert bench(url) == 2
    assert "expected http://HOST:PORT" in capsys.readouterr().err


def test_urls_and_what_is_written():
    server = Server.parse("http://[::1]:81/proxy/v1/", "k")
    assert (server.host, server.port, server.base) == ("::1", 81, "/proxy")
    assert server.request("/v1/models").startswith(b"GET /proxy/v1/models HTTP/1.1\r\nhost: [::1]:81\r\n")
    posted = server.request(COMPLETIONS, b"{}")
    assert b"\r\nauthorization: Bearer k\r\n" in posted and posted.endswith(b"\r\ncontent-length: 2\r\n\r\n{}") and "k" not in repr(server)


def test_no_server_is_one_line(capsys):
    with fake() as server:
        url = server.url
    assert bench(url) == 2
    assert f"nothing listens at {url}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (plain({"data": [{"id": "a"}, {"id": "b"}]}), "serves several models; expected --model with one of: a, b"),
        (plain({"error": {"message": "wrong key"}}, 401), "status 401: wrong key); correct --url or --api-key"),
        (plain({"data": []}), "gives no list of models"),
        (plain([]), "gives no list of models"),
    ],
)
def test_a_server_without_its_model_is_one_line(models, message, capsys):
    with fake(models=models) as server:
        assert bench(server.url) == 2
        assert server.requests == []
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "message"), [(0, "cannot answer a short request"), (1, "cannot answer the longest request")])
def test_a_request_that_is_refused_is_one_line(number, message, capsys):
    refusal = plain({"error": {"message": "too long"}}, 400)
    with fake(lambda at, body: [refusal] if at == number else [WHOLE]) as server:
        assert bench(server.url) == 2
        assert len(server.requests) == number + 1
    error = capsys.readouterr().err
    assert message in error and "status 400: too long" in error and error.count("\n") == 1


def test_a_file_is_written_whole_or_not_at_all(out, monkeypatch):
    out.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match="No space left on device"):
        report.write(out, {"a": 1})
    assert out.read_text() == "before" and list(out.parent.iterdir()) == [out]


def test_the_client_imports_neither_jax_nor_numpy():
    program = "import l4jax.bench.serve, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "l4jax.bench.client" in loaded and {"jax", "jaxlib", "numpy"}.isdisjoint(name.split(".")[0] for name in loaded)


# Against the real server.


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_real_server(server, out, api):
    options = "--prompt-tokens 4:40 --max-tokens 2:12 --ignore-eos --clients 3 --requests 12 --cancel 0.2 --warmup 2"
    options += " --shared-prefix 0.5 --shared-prefix-tokens 20" + (" --token-ids 4:350" if api == "completions" else "")
    url = f"http://{server.host}:{server.port}"
    assert bench(url, "--api", api, *options.split(), "--out", str(out)) == 0
    found = json.loads(out.read_text())
    finished = [one for one in found["rows"] if one["status"] == "finished"]
    assert found["requests"]["failed"] == 0 and len(finished) >= 6
    assert all(one["output_tokens"] == one["max_tokens"] for one in finished)
    assert found["about"]["versions"]["server"] == found["about"]["versions"]["l4jax"]
    if api == "completions":
        content = Content(api, "tiny", 0, Range(4, 40), Range(2, 12), Range(4, 350), 0.5, 20)
        lengths = [len(json.loads(Requests(content).planned("measured", i).body)["prompt"]) for i in range(12)]
        assert all(one["prompt_tokens"] == lengths[one["number"]] for one in finished)
