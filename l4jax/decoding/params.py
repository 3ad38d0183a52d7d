"""A request's sampling parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from l4jax.decoding.guide import Guide
from sharding.kinds import is_number, is_whole, shown

MAX_LOGPROBS = 20
"""The most alternatives that can be reported for each token."""
MAX_BIASES = 1024
"""The most tokens that a request may bias. Programs hold this many for every row, so that none is compiled for a longer list."""
MAX_STOP_IDS = 64
"""The most tokens that may end an answer, the model's own included."""
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
    or one of ``stop_token_ids`` (kept in ``token_ids``, not in the text), or before one of the ``stop`` strings. The first
    ``min_tokens`` tokens are no end tokens (their logits become -inf, after bias and penalties), and stop strings are
    looked for after them. With a ``guide``, tokens that would leave its form get -inf too.
    """

    max_tokens: int = 256
    min_tokens: int = 0
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
    guide: Guide | None = None

    def __post_init__(self) -> None:
        """Keep Python's own numbers and tuples of what is given. Raises ValueError for a value that is out of range or no number."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        # Copied, because the caller may change them later, or they may be iterators that can be read only once.
        for name in ("stop", "stop_token_ids"):
            # A mapping would be read as the list of its keys, and bytes as whole numbers.
            if not isinstance(getattr(self, name), Mapping | bytes | bytearray | memoryview):
                with contextlib.suppress(TypeError):
                    object.__setattr__(self, name, tuple(getattr(self, name)))

        def keep(name: str, valid: Callable[[Any], bool], expected: str, of: Callable[[Any], object]) -> None:
            value = getattr(self, name)
            if not valid(value):
                raise ValueError(f"{name} is {shown(value)}; expected {expected}")
            object.__setattr__(self, name, of(value))

        def whole(name: str, least: int, most: float, expected: str) -> None:
            keep(name, lambda n: is_whole(n) and least <= n <= most, expected, operator.index)

        def number(name: str, valid: Callable[[Any], bool], expected: str) -> None:
            keep(name, lambda x: is_number(x) and valid(x), expected, float)

        whole("max_tokens", 1, math.inf, "an integer of at least 1")
        whole("min_tokens", 0, self.max_tokens, f"an integer from 0 to max_tokens ({self.max_tokens})")
        number("temperature", lambda x: 0 <= x <= _LARGEST, "0 (greedy) or a positive number")
        whole("top_k", 0, 2**31 - 1, "0 (off) or a positive integer")
        number("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1 (off)")
        number("min_p", lambda x: 0 <= x < 1, "a number from 0 (off) to below 1")
        number("repetition_penalty", lambda x: 1 / _LARGEST <= x <= _LARGEST, "a positive number (1: off)")
        number("presence_penalty", lambda x: abs(x) <= _LARGEST, "a finite number")
        number("frequency_penalty", lambda x: abs(x) <= _LARGEST, "a finite number")
        keep(
            "logit_bias",
            lambda bias: (
                isinstance(bias, Mapping)
                and all(is_whole(token) and is_number(x) and (x == -math.inf or abs(x) <= _LARGEST) for token, x in bias.items())
            ),
            "a mapping from token ids to numbers, or -inf to forbid a token ({} for none)",
            lambda bias: {operator.index(token): float(x) for token, x in bias.items()},
        )
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} tokens; expected at most {MAX_BIASES}; leave out those that matter least"
            )
        keep(
            "stop",
            lambda texts: isinstance(texts, tuple) and all(isinstance(s, str) and s for s in texts),
            "a list of non-empty strings ([] for none)",
            tuple,
        )
        keep(
            "stop_token_ids",
            lambda ids: isinstance(ids, tuple) and all(map(is_whole, ids)),
            "a list of token ids ([] for none)",
            lambda ids: tuple(map(operator.index, ids)),
        )
        keep("ignore_eos", lambda ignored: isinstance(ignored, bool | np.bool_), "True or False", bool)
        if self.seed is not None:
            whole("seed", 0, 2**64 - 1, "an integer from 0 to 2**64 - 1, or None")
        if self.logprobs is not None:
            whole("logprobs", 0, MAX_LOGPROBS, f"None or an integer from 0 to {MAX_LOGPROBS}")
        if self.guide is not None:
            self._check_guide()

    def _check_guide(self) -> None:
        if not isinstance(self.guide, Guide):
            raise ValueError(f"guide is {shown(self.guide)}; expected a Guide, such as Guide.json(schema), or None")
        others = {
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens > 0,
            "logit_bias of -inf": any(bias == -math.inf for bias in self.logit_bias.values()),
        }
        for name, given in others.items():
            if given:
                raise ValueError(f"guide and {name} are both given, and could forbid every token; leave one of them out")

    def limited_to(self, room: int) -> SamplingParams:
        """These params for an answer that has room for this many tokens."""
        most = min(self.max_tokens, room)
        return dataclasses.replace(self, max_tokens=most, min_tokens=min(self.min_tokens, most))

    @property
    def adjusts_logits(self) -> bool:
        """True if a bias, a penalty or ``min_tokens`` changes the logits before the temperature."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return bool(self.logit_bias) or penalties or self.min_tokens > 0
