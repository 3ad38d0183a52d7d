"""What a request may ask of the sampler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

MAX_LOGPROBS = 20
"""Most alternatives that can be reported beside each token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    The logits go through, in this order: ``logit_bias`` (added), ``repetition_penalty`` (tokens of prompt and output:
    positive logits divided, negative ones multiplied), ``presence_penalty`` and ``frequency_penalty`` (tokens of the
    output: subtracted once, and once per occurrence), ``temperature``, ``min_p`` (drop tokens less likely than this
    fraction of the likeliest), ``top_k`` (0: off), ``top_p``. Tokens that tie at a cut are all kept. At temperature 0 the
    highest adjusted logit wins and the cuts do not matter.

    ``seed`` and the position in the output decide the random number of a token, whatever else is in the batch; None
    draws a seed. ``logprobs=n`` reports the log-probability of each chosen token and of the n likeliest, under the
    model's own distribution (before everything above). Generation ends at ``max_tokens``, at a model end token (unless
    ``ignore_eos``) or one of ``stop_token_ids`` (kept in ``token_ids``, not in the text), or before one of the ``stop``
    strings.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        finite = math.isfinite
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer of at least 1")
        _require(finite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or a positive number")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive integer")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0, at most 1 (off)")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "a number from 0 (off) to below 1")
        _require(
            finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a positive number (1: off)",
        )
        _require(finite(self.presence_penalty), "presence_penalty", self.presence_penalty, "a finite number")
        _require(finite(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "a finite number")
        _require(
            all(not math.isnan(v) and v < math.inf for v in self.logit_bias.values()),
            "logit_bias",
            dict(self.logit_bias),
            "numbers, or -inf to forbid a token",
        )
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed",
            self.seed,
            "an integer from 0 to 2**64 - 1, or None",
        )
        _require(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "logprobs",
            self.logprobs,
            f"None or an integer from 0 to {MAX_LOGPROBS}",
        )

    @property
    def adjusts_logits(self) -> bool:
        """True if a bias or penalty changes the logits before the temperature."""
        return bool(self.logit_bias) or self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
