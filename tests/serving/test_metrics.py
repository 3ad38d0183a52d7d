"""What the server tells Prometheus, and the dashboard that shows it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from l4jax.answer import Rounds
from l4jax.engine.meter import EngineState
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.messages import Step
from l4jax.serving.metrics import Metrics
from tests.serving.promql import Scrape, evaluate

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "l4jax.json"
SPECULATION = "Tokens of a round"
MESSAGES = [{"role": "user", "content": "the dog"}]


def scrape(server) -> Scrape:
    connection, response = server.open("GET", "/metrics")
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return Scrape(response.read().decode(), time.monotonic())


def total(found: Scrape, name: str, **labels: str) -> float:
    series = found.series(name)
    return sum(value for own, value in series.items() if labels.items() <= dict(own).items())


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return total(after, name, **labels) - total(before, name, **labels)


def use(server) -> tuple[int, int]:
    """Some requests of every end; returns the tokens of their prompts and answers."""
    prompt = [token % 200 + 50 for token in range(600)]
    bodies = [
        (COMPLETIONS, {"prompt": prompt, "max_tokens": 3, "ignore_eos": True}),
        (COMPLETIONS, {"prompt": prompt, "max_tokens": 5, "ignore_eos": True}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 9, "ignore_eos": True, "n": 2}),
    ]
    prompts = outputs = 0
    for path, body in bodies:
        status, answer = server.answer(path, body)
        assert status == 200
        prompts += answer["usage"]["prompt_tokens"] * body.get("n", 1)
        outputs += answer["usage"]["completion_tokens"]
    return prompts, outputs


def wait_for(server, condition, seconds: float = 20.0) -> Scrape:
    """The first scrape of which a condition holds."""
    end = time.monotonic() + seconds
    while not condition(found := scrape(server)):
        assert time.monotonic() < end, found.text
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def scrapes(server):
    """Before and after some use; one answer ends by a stop token, and one client leaves."""
    server.answer(COMPLETIONS, {"prompt": "the dog", "max_tokens": 1})  # before the engine's first step it has no state
    before = scrape(server)
    used = use(server)
    _, free = server.answer(COMPLETIONS, {"prompt": "the", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True})
    end = free["choices"][0]["token_ids"][2]
    _, stopped = server.answer(COMPLETIONS, {"prompt": "the", "max_tokens": 4, "temperature": 0, "stop_token_ids": [end]})
    connection, response = server.open("POST", CHAT, {"messages": MESSAGES, "ignore_eos": True, "stream": True})
    response.fp.read(200)
    connection.close()
    server.answer(COMPLETIONS, {"prompt": ""})
    after = wait_for(server, lambda found: grown(before, found, "vllm:request_success_total", finished_reason="abort") == 1)
    return before, after, (used[0], used[1] + 4 + stopped["usage"]["completion_tokens"])


def test_answers_and_their_tokens_are_counted(scrapes):
    before, after, (prompts, outputs) = scrapes
    assert grown(before, after, "vllm:request_success_total", finished_reason="length") == 5
    assert grown(before, after, "vllm:request_success_total", finished_reason="stop") == 1
    # Those of `use`, two short prompts, and the one whose client has left.
    assert grown(before, after, "vllm:request_prompt_tokens_sum") >= prompts + 2
    assert grown(before, after, "vllm:request_prompt_tokens_count") == 6
    assert grown(before, after, "vllm:request_generation_tokens_sum") == outputs
    assert grown(before, after, "vllm:generation_tokens_total") > outputs
    assert grown(before, after, "vllm:prompt_tokens_cached_total") == grown(before, after, "vllm:prefix_cache_hits_total") >= 512
    assert grown(before, after, "vllm:prefix_cache_queries_total") == grown(before, after, "vllm:prompt_tokens_total")
    assert grown(before, after, "vllm:time_to_first_token_seconds_count") == 7
    assert grown(before, after, "vllm:request_params_n_sum") == 1 + 1 + 2 + 1 + 1 + 1
    assert grown(before, after, "vllm:request_params_max_tokens_sum") >= 3 + 5 + 9 + 9 + 4 + 4


def test_the_parts_of_a_request_s_time_are_its_time(scrapes):
    before, after, _ = scrapes
    whole = grown(before, after, "vllm:e2e_request_latency_seconds_sum")
    decode = grown(before, after, "vllm:request_decode_time_seconds_sum")
    assert 0 < decode < grown(before, after, "vllm:request_inference_time_seconds_sum") <= whole
    # The client that left counts where an answer begins, and not where it ends.
    assert whole <= decode + grown(before, after, "vllm:time_to_first_token_seconds_sum")


def test_the_engine_is_idle_at_the_end_and_compiled_nothing(server, scrapes):
    found = wait_for(server, lambda found: total(found, "vllm:num_requests_running") == 0)
    assert total(found, "vllm:num_requests_waiting") == total(found, "vllm:kv_cache_usage_perc") == 0
    assert total(found, "l4jax:compiled_after_start") == 0
    assert 0 < total(found, "l4jax:burst_rounds_count") <= total(found, "l4jax:burst_rounds_sum")
    assert total(found, "l4jax:burst_rounds_bucket", le="+Inf") == total(found, "l4jax:burst_rounds_count")
    assert total(found, "l4jax:host_seconds_total") > 0


def test_requests_under_way_and_waiting_are_seen(server):
    """Five requests in three slots; the last of them wait for a slot."""
    body = {"messages": MESSAGES, "ignore_eos": True, "n": 5}
    connection = server.send("POST", CHAT, body)
    with contextlib.closing(connection):
        found = wait_for(server, lambda found: total(found, "vllm:num_requests_waiting") > 0)
        assert total(found, "vllm:num_requests_running") == 3
        assert total(found, "vllm:num_requests_waiting_by_reason", reason="capacity") == total(found, "vllm:num_requests_waiting")
        assert 0 < total(found, "vllm:kv_cache_usage_perc") <= 1
        assert connection.getresponse().status == 200


def test_responses_are_counted_by_route_and_status(server):
    before = scrape(server)
    server.answer("/no/such/path")
    server.answer("/other/path")
    server.answer(COMPLETIONS, {"prompt": ""})
    server.answer(COMPLETIONS, {"prompt": "the", "max_tokens": 1, "n": 16})
    after = scrape(server)
    assert grown(before, after, "l4jax:http_responses_total", route="other", status="404") == 2
    assert grown(before, after, "l4jax:http_responses_total", route=COMPLETIONS, status="400") == 1
    assert grown(before, after, "l4jax:http_responses_total", route=COMPLETIONS, status="200") == 1
    assert "no/such" not in after.text


def panels() -> list[tuple[str, str]]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_expression_of_the_dashboard_has_a_value(scrapes):
    """Those of speculation are left to the next test: this server does not speculate."""
    before, after, _ = scrapes
    assert len({title for title, _ in panels()}) == 14
    for title, expression in panels():
        if title != SPECULATION:
            found = evaluate(expression.replace("$model_name", "tiny").replace("$__rate_interval", "1m"), before, after)
            assert isinstance(found, dict) and found
            assert all(value >= 0 for value in found.values()), expression


def test_the_dashboard_shows_how_drafts_are_accepted():
    client = EngineClient(None, max_waiting=1, stalled_seconds=1)
    metrics = Metrics(client, "tiny")
    scrapes = []
    for at, rounds in enumerate((Rounds(10, 30, (6, 2)), Rounds(110, 330, (86, 42, 10)))):
        state = EngineState(0, 0, False, 0, 8, 0, 0, 0, (), 0, 0.0, 0.0, rounds)
        client._take(Step([], state, 0))
        scrapes.append(Scrape(metrics.text().decode(), at))
    found = [
        evaluate(asked.replace("$model_name", "tiny").replace("$__rate_interval", "1m"), *scrapes)
        for title, asked in panels()
        if title == SPECULATION
    ]
    assert found[0] == {frozenset(): 1 + 130 / 100}
    assert found[1] == {frozenset({("position", str(depth))}): part for depth, part in enumerate((0.8, 0.4, 0.1))}


def test_quantiles_of_the_dashboard_are_those_of_what_was_measured(scrapes):
    """The median of the numbers of tokens is in the bucket in which it lies: an oracle for the test's own evaluator."""
    before, after, _ = scrapes
    expression = "histogram_quantile(0.5, sum by (le) (rate(vllm:request_generation_tokens_bucket[1m])))"
    found = evaluate(expression, before, after)
    assert isinstance(found, dict)
    (median,) = found.values()
    assert 2 < median <= 5  # of 3, 5, 9, 9, 4 and 3 tokens
