"""Decides whether the ring passes keys and values, or queries.

Both are exact. The paper's Algorithm 5 ("Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, appendix C)
chooses the cheaper from the step's token counts, the attention's shape and one property of the machine: how many FLOPs of
attention a rank does while one byte crosses a ring link.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from sharding.kinds import is_number, is_whole, shown

Variant = Literal["pass_kv", "pass_q"]


@dataclasses.dataclass(frozen=True)
class RingHardware:
    """A rank's attention rate and its link to the next rank, as measured, not as advertised.

    ``attention_flops``: FLOP/s. ``ring_bandwidth``: bytes/s in one direction. Only their ratio matters to the choice.
    """

    attention_flops: float
    ring_bandwidth: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {shown(value)}; expected a positive number")

    @property
    def flops_per_byte(self) -> float:
        """FLOPs of attention in the time that one byte takes to reach the next rank."""
        return self.attention_flops / self.ring_bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingStep:
    """One forward step. In each sequence, ``new_tokens``, whose keys are not cached yet, follow ``cached_tokens``.

    ``bytes_per_element``: of queries, keys and values. ``output_bytes_per_element``: of the partial outputs that pass-Q sends back.
    """

    new_tokens: int
    cached_tokens: int
    ranks: int
    num_heads: int
    num_kv_heads: int
    bytes_per_element: int = 2
    output_bytes_per_element: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, lowest = getattr(self, field.name), 0 if field.name == "cached_tokens" else 1
            if not is_whole(value) or value < lowest:
                raise ValueError(f"{field.name} is {shown(value)}; expected a whole number of at least {lowest}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a multiple of num_kv_heads, {self.num_kv_heads}")

    @property
    def miss_rate(self) -> float:
        """Share of the tokens that have no cached keys: T / (T + P) in the paper's letters."""
        return self.new_tokens / (self.new_tokens + self.cached_tokens)

    @property
    def message_ratio(self) -> float:
        """Miss rate at which messages of queries, and of keys and values, have the same size: 2 NKV / NH (equation 1)."""
        return 2 * self.num_kv_heads / self.num_heads


@dataclasses.dataclass(frozen=True)
class RingChoice:
    """The variant, and the reasons: one line for each comparison made."""

    variant: Variant
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RingMeasurement:
    """Times of the same step by both variants, in the same unit."""

    step: RingStep
    pass_kv: float
    pass_q: float

    def time(self, variant: Variant) -> float:
        """The time of one variant."""
        return self.pass_kv if variant == "pass_kv" else self.pass_q


def choose_ring(step: RingStep, hardware: RingHardware) -> RingChoice:
    """Algorithm 5: pass keys and values if attention hides their transfer, or if the exposed part costs less than pass-Q's last exchange.

    Passing queries ends with an all-to-all of partial outputs, which nothing hides (equation 5).
    """
    if step.ranks == 1:
        return RingChoice("pass_kv", ("one rank: nothing is passed",))
    hidden_from = _tokens_that_hide(step, hardware.flops_per_byte)
    hidden = step.new_tokens >= hidden_from
    reasons = [
        f"attention of {step.new_tokens} new tokens {'hides' if hidden else 'does not hide'} the transfer of keys and values; "
        f"{hidden_from:.0f} are needed to hide it (equation 2)"
    ]
    if hidden:
        return RingChoice("pass_kv", tuple(reasons))
    miss_from = _miss_rate_that_pays(step, hardware.flops_per_byte)
    pays = step.miss_rate >= miss_from
    reasons.append(
        f"{step.miss_rate:.2%} of all tokens are new, {'not below' if pays else 'below'} {miss_from:.2%}: the exposed part of passing keys "
        f"and values costs {'no more' if pays else 'more'} than pass-Q's final exchange of outputs (equation 5)"
    )
    return RingChoice("pass_kv" if pays else "pass_q", tuple(reasons))


def fit(measurements: Sequence[RingMeasurement]) -> float:
    """Find the FLOPs per byte with which :func:`choose_ring` loses the least time on steps measured by both variants.

    The lower the ratio, the more steps pass keys and values. Each step switches at one ratio, so the lost time is a step function
    and is minimised exactly. The best ratios are often an interval; its geometric middle is returned. Raises ValueError if no
    measurement was made on several ranks, or if every step passes keys and values at any ratio.
    """
    usable = [m for m in measurements if m.step.ranks > 1]
    if not usable:
        raise ValueError(f"{len(usable)} of {len(measurements)} measurements are of several ranks; expected at least one")
    switches = sorted({ratio for m in usable if math.isfinite(ratio := _switching_ratio(m.step))})
    if not switches:
        raise ValueError("every measured step passes keys and values on any machine; measure steps with more cached tokens")

    def lost(ratio: float) -> float:
        hardware = RingHardware(ratio, 1.0)
        return sum(m.time(choose_ring(m.step, hardware).variant) - min(m.pass_kv, m.pass_q) for m in usable)

    return min(_between(switches), key=lost)


def _between(switches: Sequence[float]) -> Iterator[float]:
    """A ratio from each of the intervals that the switches divide the positive numbers into."""
    yield switches[0] / 2
    for low, high in itertools.pairwise(switches):
        yield math.sqrt(low * high)
    yield switches[-1] * 2


def _tokens_that_hide(step: RingStep, flops_per_byte: float) -> float:
    """Equation 2: N C NKV e / (2 NH BW)."""
    return step.ranks * flops_per_byte * step.bytes_per_element * step.num_kv_heads / (2 * step.num_heads)


def _miss_rate_that_pays(step: RingStep, flops_per_byte: float) -> float:
    """Equation 5: 2 NKV / NH - 4 T BW / (N C e), for outputs of e bytes; wider outputs cost proportionally more to send back."""
    of_equal_bytes = step.message_ratio - 4 * step.new_tokens / (step.ranks * flops_per_byte * step.bytes_per_element)
    return of_equal_bytes * step.bytes_per_element / step.output_bytes_per_element


def _switching_ratio(step: RingStep) -> float:
    """The FLOPs per byte up to which a step passes keys and values: the larger of those at which equations 2 and 5 are equalities."""
    per_byte = step.ranks * step.bytes_per_element
    hidden_up_to = 2 * step.new_tokens * step.num_heads / (step.num_kv_heads * per_byte)
    shortfall = step.message_ratio - step.miss_rate * step.output_bytes_per_element / step.bytes_per_element
    pays_up_to = 4 * step.new_tokens / (shortfall * per_byte) if shortfall > 0 else math.inf
    return max(hidden_up_to, pays_up_to)
