"""Evaluates PromQL on two scrapes of a server: enough of the language for our dashboard, and an error for what is not in it."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
"""The values of series by their labels."""

_OPERATORS: Mapping[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclasses.dataclass(frozen=True)
class Scrape:
    """What a server told Prometheus at one time, in seconds."""

    text: str
    at: float

    def series(self, name: str) -> Vector:
        """The series of this name."""
        samples = (sample for family in text_string_to_metric_families(self.text) for sample in family.samples)
        return {frozenset(sample.labels.items()): sample.value for sample in samples if sample.name == name}

    @property
    def names(self) -> set[str]:
        """The names of all series."""
        return {sample.name for family in text_string_to_metric_families(self.text) for sample in family.samples}


def evaluate(expression: str, before: Scrape, after: Scrape) -> Vector | float:
    """The value of an expression at the later scrape; ranges reach back to the earlier one."""
    return _value(promql.parse(expression), before, after)


def _value(node: object, before: Scrape, after: Scrape) -> Vector | float:
    match node:
        case promql.NumberLiteral():
            return float(node.val)
        case promql.ParenExpr():
            return _value(node.expr, before, after)
        case promql.VectorSelector():
            return _selected(node, after)
        case promql.Call():
            return _called(node, before, after)
        case promql.AggregateExpr():
            return _aggregated(node, _value(node.expr, before, after))
        case promql.BinaryExpr():
            return _combined(str(node.op), _value(node.lhs, before, after), _value(node.rhs, before, after))
    raise AssertionError(f"{node} is not known to this evaluator")


def _selected(selector: promql.VectorSelector, scrape: Scrape) -> Vector:
    wanted = [(each.name, each.value) for each in selector.matchers.matchers]
    assert all(each.op == promql.MatchOp.Equal for each in selector.matchers.matchers)
    found = scrape.series(selector.name)
    assert found, f"the server has no series {selector.name}"
    chosen = {labels: value for labels, value in found.items() if set(wanted) <= labels}
    assert chosen, f"no series {selector.name} has {wanted}"
    return chosen


def _called(call: promql.Call, before: Scrape, after: Scrape) -> Vector | float:
    name, arguments = call.func.name, call.args
    if name in ("rate", "increase"):
        selector = arguments[0].vector_selector
        start, end = _selected(selector, before), _selected(selector, after)
        assert all(end[labels] >= value for labels, value in start.items()), f"{selector.name} fell"
        seconds = after.at - before.at if name == "rate" else 1.0
        return {labels: (value - start.get(labels, 0.0)) / seconds for labels, value in end.items()}
    if name == "scalar":
        vector = _value(arguments[0], before, after)
        assert isinstance(vector, dict)
        return next(iter(vector.values())) if len(vector) == 1 else math.nan
    assert name == "histogram_quantile", f"{name} is not known to this evaluator"
    quantile, buckets = (_value(argument, before, after) for argument in arguments)
    assert isinstance(quantile, float) and isinstance(buckets, dict)
    return {frozenset(): _quantile(quantile, {float(dict(labels)["le"]): count for labels, count in buckets.items()})}


def _quantile(quantile: float, counts: Mapping[float, float]) -> float:
    """As Prometheus does: linear within a bucket, and the highest finite bound for what is beyond it."""
    bounds = sorted(counts)
    assert math.isinf(bounds[-1])
    rank, low, below = quantile * counts[bounds[-1]], 0.0, 0.0
    if counts[bounds[-1]] == 0:
        return math.nan
    for bound in bounds[:-1]:
        if counts[bound] >= rank:
            return low + (bound - low) * (rank - below) / (counts[bound] - below) if counts[bound] > below else bound
        low, below = bound, counts[bound]
    return low


def _aggregated(node: promql.AggregateExpr, vector: Vector | float) -> Vector:
    assert isinstance(vector, dict)
    kept = set(node.modifier.labels) if node.modifier else set()
    groups: dict[Labels, list[float]] = defaultdict(list)
    for labels, value in vector.items():
        groups[frozenset(pair for pair in labels if pair[0] in kept)].append(value)
    aggregate = {"sum": sum, "max": max}[str(node.op).split()[0]]
    return {labels: aggregate(values) for labels, values in groups.items()}


def _combined(symbol: str, left: Vector | float, right: Vector | float) -> Vector | float:
    def of(a: float, b: float) -> float:
        if symbol == "/":
            return a / b if b else math.nan
        return _OPERATORS[symbol](a, b)

    if isinstance(left, dict) and isinstance(right, dict):
        return {labels: of(value, right[labels]) for labels, value in left.items() if labels in right}
    if isinstance(left, dict):
        assert isinstance(right, float)
        return {labels: of(value, right) for labels, value in left.items()}
    if isinstance(right, dict):
        return {labels: of(left, value) for labels, value in right.items()}
    return of(left, right)
