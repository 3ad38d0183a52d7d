"""A request's sampling parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_LOGPROBS = 20
"""The most alternatives that can be reported for each token."""
_LARGEST = 1e12  # logits are multiplied by one such number and added to another; float32 holds the result


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    These apply to the logits, in this order: ``logit_bias`` (added), ``repetition_penalty`` (tokens of prompt and output:
    positive logits divided, negative ones multiplied), ``presence_penalty`` and ``frequency_penalty`` (tokens of the
    output: subtracted once, and once per occurrence), ``temperature``, ``min_p`` (drop tokens less likely than this
    fraction of the likeliest), ``top_k`` (0: off), ``top_p``. Tokens that tie at a cut are all kept. At temperature 0 the
    highest adjusted logit wins and the cuts have no effect.

    A token is the highest of logit / temperature + Gumbel noise. The noise is a function of (``seed``, position in the
    output, token id), so the same seed gives the same tokens whatever else is in the batch, up to rounding; None draws a
    seed. ``logprobs=n`` reports the log-probability of each chosen token and of the n likeliest, under the model's own
    distribution (before everything above). Generation ends at ``max_tokens``, at a model end token (unless ``ignore_eos``)
    or one of ``stop_token_ids`` (kept in ``token_ids``, not in the text), or before one of the ``stop`` strings.
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
        # Copied, because the caller may change them later, or they may be iterators that can be read only once.
        for name in ("stop", "stop_token_ids"):
            # A mapping would be read as the list of its keys.
            if not isinstance(getattr(self, name), Mapping):
                with contextlib.suppress(TypeError):
                    object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

        def check(name: str, valid: Callable[[Any], bool], expected: str) -> None:
            value = getattr(self, name)
            try:
                good = valid(value)
            except (AttributeError, TypeError, ValueError):
                good = False
            if not good:
                raise ValueError(f"{name} is {value!r}; expected {expected}")

        check("max_tokens", lambda n: is_whole(n) and n >= 1, "an integer of at least 1")
        check("temperature", lambda x: 0 <= x <= _LARGEST, "0 (greedy) or a positive number")
        check("top_k", lambda n: is_whole(n) and 0 <= n < 2**31, "0 (off) or a positive integer")
        check("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1 (off)")
        check("min_p", lambda x: 0 <= x < 1, "a number from 0 (off) to below 1")
        check("repetition_penalty", lambda x: 1 / _LARGEST <= x <= _LARGEST, "a positive number (1: off)")
        check("presence_penalty", lambda x: abs(x) <= _LARGEST, "a finite number")
        check("frequency_penalty", lambda x: abs(x) <= _LARGEST, "a finite number")
        check(
            "logit_bias",
            lambda bias: all(is_whole(token) and (x == -math.inf or abs(x) <= _LARGEST) for token, x in bias.items()),
            "token ids with numbers, or -inf to forbid a token",
        )
        check("stop", lambda texts: isinstance(texts, tuple) and all(isinstance(s, str) and s for s in texts), "non-empty strings")
        check("stop_token_ids", lambda ids: isinstance(ids, tuple) and all(map(is_whole, ids)), "token ids")
        check("ignore_eos", lambda ignored: isinstance(ignored, bool), "True or False")
        check("seed", lambda n: n is None or (is_whole(n) and 0 <= n < 2**64), "an integer from 0 to 2**64 - 1, or None")
        check("logprobs", lambda n: n is None or (is_whole(n) and 0 <= n <= MAX_LOGPROBS), f"None or an integer from 0 to {MAX_LOGPROBS}")

    @property
    def adjusts_logits(self) -> bool:
        """True if a bias or penalty changes the logits before the temperature."""
        return bool(self.logit_bias) or self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; truth values are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
