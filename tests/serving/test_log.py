"""The log of requests."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from l4jax.serving.app import build_app
from l4jax.serving.log import RequestLog
from tests.serving.running import call, running

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


def lines(path, count):
    """The log, once it has this many lines."""
    end = time.monotonic() + 20
    while len(found := path.read_text().splitlines()) < count:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return [json.loads(line) for line in found]


@pytest.mark.parametrize("texts", [False, True])
def test_each_request_has_a_line(checkpoint, tmp_path, texts):
    path = tmp_path / "requests.log"
    with running(checkpoint, "--log", str(path), *(["--log-texts"] if texts else [])) as server:
        _, answer = server.answer(
            CHAT, {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True, "seed": 5, "n": 2}, {"x-request-id": "mine"}
        )
        server.answer("/ready")
        server.answer("/nowhere")
        server.answer("/v1/completions", {"prompt": "", "max_tokens": 1})
        connection, response = server.open("POST", CHAT, {"messages": MESSAGES, "ignore_eos": True, "stream": True})
        response.fp.read(100)
        connection.close()
        own, unknown, wrong, left = lines(path, 4)
    assert own.pop("seconds") > 0 and own.pop("time").endswith("+00:00")
    usage = answer["usage"]
    written = {}
    if texts:
        assert "the quick brown fox" in own["prompts"][0]
        written = {"prompts": own["prompts"], "answers": [choice["message"]["content"] for choice in answer["choices"]]}
    assert own == {
        "id": "mine",
        "path": CHAT,
        "status": 200,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": 8,
        "seeds": [5, 6],
        "ends": ["length", "length"],
        **written,
    }
    assert (unknown["path"], unknown["status"]) == ("/nowhere", 404)
    assert (wrong["path"], wrong["status"]) == ("/v1/completions", 400)
    assert (left["status"], left["ends"]) == (200, ["abort"])
    assert texts or "quick" not in path.read_text()


def test_a_full_disk_takes_no_request_with_it(served, caplog):
    log = RequestLog("/dev/full", texts=True)
    with contextlib.closing(log):
        app = build_app(served, [], log)
        for _ in range(3):
            assert call(app, "/v1/models")[0] == 200
    assert [record.getMessage() for record in caplog.records] == [
        "requests are not logged to /dev/full: No space left on device; they are answered all the same"
    ]


def test_lines_that_come_too_fast_are_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("l4jax.serving.log._MOST_WAITING", 100)
    monkeypatch.setattr("l4jax.serving.log.os.write", lambda descriptor, line: time.sleep(0.2) or len(line))
    log = RequestLog(str(tmp_path / "log"), texts=False)
    began = time.monotonic()
    for number in range(20):
        log.write({"number": number})
    assert time.monotonic() - began < 0.2
    log.close()
    assert "faster than they can be written" in caplog.text


def test_a_log_continues_where_it_was(tmp_path):
    path = tmp_path / "log"
    for number in range(2):
        log = RequestLog(str(path), texts=False)
        log.write({"number": number})
        log.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1]
    assert path.stat().st_mode & 0o777 == 0o600
