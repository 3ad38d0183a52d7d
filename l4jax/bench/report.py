"""From times to figures: rows, quantiles, a table, and a file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from l4jax.bench.load import Measured, Sent
from sharding.words import counted

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
FIGURES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "between reads with text",
    "e2e_ms": "end to end",
}
LIMITS = ("ttft", "tpot", "e2e")
"""What a goodput may limit."""


def parse_goodput(text: str) -> dict[str, float]:
    """The limits of ``--goodput``, in ms, by their figures' names. Raises ValueError for any other text."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        with contextlib.suppress(ValueError):
            if name in LIMITS and f"{name}_ms" not in limits and 0 < float(value) < math.inf:
                limits[f"{name}_ms"] = float(value)
                continue
        raise ValueError(f"--goodput is {text!r}; expected limits in ms such as ttft:500,tpot:50, of {', '.join(LIMITS)}")
    return limits


def row(sent: Sent, began: float) -> dict[str, Any]:
    """A request's figures. Times are in ms, ``sent_s`` in seconds after ``began``; what a request does not have is None.

    ``tpot_ms``: from the first text to the last, for each token but the first, by the server's count; ``itl_ms``: between one read that
    brought text and the next; ``late_ms``: how much later than due it was sent.
    """
    answer, times, usage = sent.answer, sent.answer.content_times, sent.answer.usage
    tpot = None
    if answer.finished and usage is not None and usage.output > 1 and times:
        tpot = _ms(times[-1] - times[0]) / (usage.output - 1)
    return {
        "number": sent.number,
        "status": "finished" if answer.finished else "cancelled" if answer.cancelled else "failed",
        "error": None if answer.failure is None else dataclasses.asdict(answer.failure),
        "max_tokens": sent.planned.max_tokens,
        "prompt_tokens": None if usage is None else usage.prompt,
        "cached_tokens": None if usage is None else usage.cached,
        "output_tokens": None if usage is None else usage.output,
        "sent_s": answer.started - began,
        "late_ms": None if sent.due is None else _ms(answer.started - sent.due),
        "ttft_ms": _ms(times[0] - answer.started) if times else None,
        "tpot_ms": tpot,
        "itl_ms": [_ms(later - earlier) for earlier, later in itertools.pairwise(times)],
        "e2e_ms": _ms(answer.ended - answer.started),
    }


def _ms(seconds: float) -> float:
    return seconds * 1e3


def quantile(values: Sequence[float], part: float) -> float | None:
    """The value below which ``part`` of the values lie, linearly between two of them, as numpy's default; None without values."""
    if not values:
        return None
    ordered, at = sorted(values), part * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(measured: Measured, goodput: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a measurement.

    Latencies and throughput are those of finished requests alone: what a cancelled or failed one has got is in its row. Goodput is a
    share of the requests that were not cancelled.
    """
    rows = [row(sent, measured.began) for sent in measured.sent]
    finished = [one for one in rows if one["status"] == "finished"]
    counts = Counter(one["status"] for one in rows)
    seconds = measured.ended - measured.began
    latency = {}
    for name in FIGURES:
        found = [one[name] for one in finished if one[name] is not None]
        values = [value for own in found for value in own] if name == "itl_ms" else found
        latency[name] = {"count": len(values), **{label: quantile(values, part) for label, part in QUANTILES.items()}}
    cached = [one["cached_tokens"] for one in finished if one["cached_tokens"] is not None]
    lateness = [one["late_ms"] for one in rows if one["late_ms"] is not None]
    result: dict[str, Any] = {
        "seconds": seconds,
        "requests": {"sent": len(rows), **{status: counts[status] for status in ("finished", "cancelled", "failed")}},
        "latency": latency,
        "output_tokens_per_s": _rate(sum(one["output_tokens"] for one in finished), seconds),
        "prompt_tokens_per_s": _rate(sum(one["prompt_tokens"] for one in finished), seconds),
        "requests_per_s": _rate(len(finished), seconds),
        "prompt_tokens": sum(one["prompt_tokens"] for one in finished),
        "cached_tokens": sum(cached) if cached else None,
        "output_tokens": sum(one["output_tokens"] for one in finished),
        "goodput": None,
        "errors": _errors(rows),
        "client": {"busy_share": _rate(measured.busy, seconds), "latest_ms": max(lateness, default=None)},
        "rows": rows,
    }
    if goodput:
        good = sum(_meets(one, goodput) for one in finished)
        judged = len(finished) + counts["failed"]
        result["goodput"] = {"limits_ms": dict(goodput), "share": good / judged if judged else None, "requests_per_s": _rate(good, seconds)}
    return result


def _rate(number: float, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def _meets(one: Mapping[str, Any], limits: Mapping[str, float]) -> bool:
    """Whether a finished request is within all limits. An answer of one token has no time per token; one without text is not good."""
    values = {name: 0.0 if name == "tpot_ms" and one["output_tokens"] == 1 else one[name] for name in limits}
    return one["ttft_ms"] is not None and all(values[name] is not None and values[name] <= limit for name, limit in limits.items())


def _errors(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many requests failed in each way, the most frequent first."""
    counts = Counter((one["error"]["kind"], one["error"]["message"]) for one in rows if one["error"] is not None)
    return [{"kind": kind, "message": message, "count": count} for (kind, message), count in counts.most_common()]


_SHOWN_ERRORS = 5


def table(found: Mapping[str, Any]) -> str:
    """The figures for people: aligned, with units in the headings."""
    requests, client = found["requests"], found["client"]
    head = (
        f"{counted(requests['sent'], 'request')} in {found['seconds']:.1f} s: {requests['finished']:,} finished, "
        f"{requests['cancelled']:,} cancelled, {requests['failed']:,} failed"
    )
    latency = [["latency, ms", *QUANTILES]]
    latency += [[text, *(_number(found["latency"][name][label]) for label in QUANTILES)] for name, text in FIGURES.items()]
    rates = [
        ["throughput", "per second", "in all"],
        ["output tokens", _number(found["output_tokens_per_s"]), f"{found['output_tokens']:,}"],
        ["prompt tokens", _number(found["prompt_tokens_per_s"]), f"{found['prompt_tokens']:,}"],
        ["finished requests", _number(found["requests_per_s"]), f"{requests['finished']:,}"],
    ]
    lines = [head, "", *_aligned(latency), "", *_aligned(rates), ""]
    if found["goodput"] is not None:
        limits = ", ".join(f"{name.removesuffix('_ms')} <= {limit:g} ms" for name, limit in found["goodput"]["limits_ms"].items())
        share = found["goodput"]["share"]
        lines.append(f"goodput ({limits}): {_percent(share)} of requests, {_number(found['goodput']['requests_per_s'])} per second")
    if found["cached_tokens"] is not None:
        lines.append(f"{found['cached_tokens']:,} of the prompt tokens were cached")
    late = "" if client["latest_ms"] is None else f", and sent requests up to {client['latest_ms']:.1f} ms late"
    lines.append(f"the client was busy for {_percent(client['busy_share'])} of the time{late}")
    lines += [f"{one['count']:,} failed, {one['kind']}: {one['message']}" for one in found["errors"][:_SHOWN_ERRORS]]
    if more := found["errors"][_SHOWN_ERRORS:]:
        lines.append(f"{sum(one['count'] for one in more):,} failed in other ways")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def check_writable(path: Path) -> None:
    """Raise ValueError if a file cannot be written there: better before a measurement than after it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path} cannot be written; expected a file in a folder that exists and may be written to")


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON, the whole of it or nothing. Raises ValueError with the file's name if it cannot be written."""
    content = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ValueError(f"{path} cannot be written ({error.strerror}); free some space, or choose another --out") from error
