"""What the server tells Prometheus. Names that begin with ``vllm:`` are vLLM's, where they mean the same; ours begin with ``l4jax:``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from l4jax.request import FinishReason, Request
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.messages import ErrorKind, News

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
_ANSWERS = (1, 2, 5, 10, 20)

Reason = FinishReason | Literal["abort"]
"""Why an answer has ended; "abort": its client has gone, or another answer of its request has failed."""


class Metrics:
    """Counts what requests get. The figures of the engine are read when Prometheus asks."""

    def __init__(self, client: EngineClient, model: str) -> None:
        registry, self._model = CollectorRegistry(), model
        self._registry = registry

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", what, ["model_name"], registry=registry, buckets=buckets).labels(model)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ["model_name", *labels], registry=registry)

        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "Seconds from a request's arrival to its first token.", _FIRST_TOKEN_SECONDS
        )
        self.token_seconds = histogram(
            "inter_token_latency_seconds",
            "Seconds since a request's tokens before, for each token; once for those that came together.",
            _TOKEN_SECONDS,
        )
        self.mean_token_seconds = histogram(
            "request_time_per_output_token_seconds", "Seconds for each token after the first, of finished requests.", _TOKEN_SECONDS
        )
        self.request_seconds = histogram("e2e_request_latency_seconds", "Seconds of finished requests.", _REQUEST_SECONDS)
        self.queue_seconds = histogram("request_queue_time_seconds", "Seconds that requests waited to be computed.", _REQUEST_SECONDS)
        self.prefill_seconds = histogram(
            "request_prefill_time_seconds", "Seconds from when a request was no longer waiting to its first token.", _REQUEST_SECONDS
        )
        self.decode_seconds = histogram(
            "request_decode_time_seconds", "Seconds from a request's first token to its last.", _REQUEST_SECONDS
        )
        self.inference_seconds = histogram(
            "request_inference_time_seconds", "Seconds from when a request was no longer waiting to its last token.", _REQUEST_SECONDS
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Tokens of finished requests' prompts.", _TOKENS)
        self.request_output_tokens = histogram("request_generation_tokens", "Tokens of finished answers.", _TOKENS)
        self.request_answers = histogram("request_params_n", "Answers to one prompt that requests ask for.", _ANSWERS)
        self.request_max_tokens = histogram("request_params_max_tokens", "The most tokens that requests allow.", _TOKENS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model)
        self.cached_tokens = counter("vllm:prompt_tokens_cached", "Tokens of prompts that the prefix cache had.").labels(model)
        self.output_tokens = counter("vllm:generation_tokens", "Generated tokens.").labels(model)
        self._finished = counter("vllm:request_success", "Answers that have ended.", "finished_reason")
        self._corrupted = counter("vllm:corrupted_requests", "Requests whose logits were not finite.").labels(model)
        self._failed = counter("l4jax:request_errors", "Requests that ended with an error of the server's.", "kind")
        self._responses = counter("l4jax:http_responses", "HTTP responses by route and status.", "route", "status")
        self._rejections = counter("vllm:admission_rejections", "Requests refused because the queue was full.").labels(model)
        for reason in (*get_args(FinishReason), "abort"):
            self._finished.labels(model, reason)
        for kind in get_args(ErrorKind):
            self._failed.labels(model, kind)
        registry.register(_EngineCollector(client, model))

    def finished(self, reason: Reason) -> None:
        """An answer has ended."""
        self._finished.labels(self._model, reason).inc()

    def failed(self, kind: ErrorKind) -> None:
        """An answer has ended with an error."""
        if kind == "not_finite":
            self._corrupted.inc()
        self._failed.labels(self._model, kind).inc()

    def responded(self, route: str, status: int) -> None:
        """A response was begun. ``route``: a path of ours, or "other"."""
        self._responses.labels(self._model, route, str(status)).inc()
        if status == 429:
            self._rejections.inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class AnswerMetrics:
    """Measures one answer, from when its request is given to the engine."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._began = self._first = self._last = time.monotonic()
        self._queue_seconds = 0.0
        self._tokens = 0

    def came(self, news: News) -> None:
        """Tokens have come."""
        now, new, metrics = time.monotonic(), len(news.token_ids), self._metrics
        if new == 0:
            return
        if self._tokens == 0:
            self._first, self._queue_seconds = now, news.queue_seconds
            metrics.first_token_seconds.observe(now - self._began)
            metrics.queue_seconds.observe(self._queue_seconds)
            metrics.prefill_seconds.observe(now - self._began - self._queue_seconds)
            metrics.prompt_tokens.inc(len(self._request.token_ids))
            metrics.cached_tokens.inc(news.cached)
        else:
            metrics.token_seconds.observe((now - self._last) / new)
        metrics.output_tokens.inc(new)
        self._last, self._tokens = now, self._tokens + new

    def ended(self, reason: Reason) -> None:
        """The answer has ended."""
        metrics, decode_seconds = self._metrics, self._last - self._first
        metrics.finished(reason)
        if reason == "abort":
            return
        metrics.request_seconds.observe(self._last - self._began)
        metrics.decode_seconds.observe(decode_seconds)
        metrics.inference_seconds.observe(self._last - self._began - self._queue_seconds)
        if self._tokens > 1:
            metrics.mean_token_seconds.observe(decode_seconds / (self._tokens - 1))
        metrics.request_prompt_tokens.observe(len(self._request.token_ids))
        metrics.request_output_tokens.observe(self._tokens)
        metrics.request_max_tokens.observe(self._request.params.max_tokens)


class _EngineCollector:
    """Makes metrics of the engine's last state."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """The metrics; none before the engine has computed anything."""
        if (step := self._client.last_step) is None:
            return
        state = step.state
        deferred = state.waiting if state.deferred else 0
        yield self._gauge("vllm:num_requests_running", "Requests that are being computed.", state.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", state.waiting)
        reasons = {"capacity": state.waiting - deferred, "deferred": deferred}
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests that wait for a slot or memory (capacity), or for a prefix that another one computes (deferred).",
            labels=["model_name", "reason"],
        )
        for reason, count in reasons.items():
            waiting.add_metric([self._model, reason], count)
        yield waiting
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "The part of the cache's pages that is in use, 0 to 1.", state.used_pages / state.pages
        )
        yield self._counter("vllm:num_preemptions", "Times that a request had to give its memory back.", state.preemptions)
        yield self._counter("vllm:prefix_cache_queries", "Tokens that were looked up in the prefix cache.", state.prompt_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Tokens that the prefix cache had.", state.hit_tokens)
        rounds = state.speculation
        yield self._counter("vllm:spec_decode_num_drafts", "Rounds of speculation.", rounds.rounds)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", rounds.drafted)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", sum(rounds.accepted))
        by_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by depth in the draft.", labels=["model_name", "position"]
        )
        for position, count in enumerate(rounds.accepted):
            by_position.add_metric([self._model, str(position)], count)
        yield by_position
        yield self._bursts(state.bursts, state.burst_rounds)
        yield self._counter("l4jax:host_seconds", "Seconds in which the host worked and did not wait for the devices.", state.host_seconds)
        yield self._counter(
            "l4jax:device_idle_seconds",
            "Seconds, at least, in which the devices had nothing to do though requests were under way.",
            state.idle_seconds,
        )
        yield self._gauge("l4jax:compiled_after_start", "Programs compiled since the server was ready; expected 0.", step.compiled)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, what, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge

    def _counter(self, name: str, what: str, value: float) -> Metric:
        counter = CounterMetricFamily(name, what, labels=["model_name"])
        counter.add_metric([self._model], value)
        return counter

    def _bursts(self, bursts: Iterable[int], rounds: int) -> Metric:
        histogram = HistogramMetricFamily("l4jax:burst_rounds", "Rounds that a burst may run.", labels=["model_name"])
        cumulative = list(itertools.accumulate(bursts, initial=0))[1:]
        buckets = [(str(float(1 << power)), float(count)) for power, count in enumerate(cumulative)]
        histogram.add_metric([self._model], [*buckets, ("+Inf", float(cumulative[-1] if cumulative else 0))], rounds)
        return histogram
