"""What callers of the Python interface give: a value of the wrong kind is refused in one line, before anything is done with it."""

from __future__ import annotations

import numbers
import operator
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import numpy as np

from l4jax.decoding.params import SamplingParams, is_whole
from sharding.select import RingHardware

Prompt = str | Sequence[int]
_TEXT_OR_BYTES = str | bytes | bytearray | memoryview
_repr = reprlib.Repr(maxstring=60, maxother=60)


def shown(value: object) -> str:
    """A value as error messages show it: on one line, cut short."""
    return " ".join(_repr.repr(value).split())


def check_kind(what: str, value: object, kind: type | types.UnionType, expected: str) -> None:
    """Raise ValueError unless a value is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {shown(value)}; expected {expected}")


def check_whole(name: str, value: object, expected: str, least: int, most: float = float("inf")) -> None:
    """Raise ValueError unless the argument of this name is a whole number in its range."""
    if not (is_whole(value) and least <= cast(int, value) <= most):
        raise ValueError(f"{name} is {shown(value)}; expected {expected}")


def check_sizes(max_batch: int | None, prefill_lengths: Sequence[int] | None, ring_hardware: RingHardware) -> None:
    """Raise ValueError for what a model cannot be loaded with, whatever the model is."""
    if max_batch is not None:
        check_max_batch(max_batch)
    if prefill_lengths is not None:
        listed = isinstance(prefill_lengths, Sequence | np.ndarray) and not isinstance(prefill_lengths, _TEXT_OR_BYTES)
        if not (listed and np.ndim(prefill_lengths) == 1 and len(prefill_lengths) and all(is_whole(n) and n >= 1 for n in prefill_lengths)):
            raise ValueError(
                f"prefill_lengths is {shown(prefill_lengths)}; expected at least one length, in a list of whole numbers of 1 or more"
            )
    check_kind("ring_hardware", ring_hardware, RingHardware, "a sharding.select.RingHardware")


def check_max_batch(max_batch: int) -> None:
    """Raise ValueError unless this many prompts can be decoded together."""
    check_whole("max_batch", max_batch, "a whole number of at least 1", 1)


def several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the prompts as a list. One may be given without a list around it."""
    if not isinstance(prompts, Sequence | np.ndarray) or (isinstance(prompts, np.ndarray) and prompts.ndim == 0):
        raise ValueError(f"the prompts are {shown(prompts)}; expected text, a list of token ids, or a list of these")
    if isinstance(prompts, _TEXT_OR_BYTES) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral | np.bool_)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Return a prompt's token ids as Python's own integers. Raises ValueError for anything but a list of whole numbers."""
    try:
        # Bytes and truth values are whole numbers to Python, and never meant as token ids. What is not a list may be a mapping, or can be
        # read only once.
        if isinstance(prompt, _TEXT_OR_BYTES) or not isinstance(prompt, Sequence | np.ndarray | jax.Array):
            raise TypeError
        if any(isinstance(token, bool | np.bool_) for token in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(f"a prompt is {shown(prompt)}; expected text or a list of token ids") from error


def one_sampling_params(params: object) -> SamplingParams:
    """Return the sampling params of one prompt, the default ones if none are given."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise ValueError(f"the sampling params are {shown(params)}; expected l4jax.SamplingParams")
    return params


def sampling_params_of_each(params: SamplingParams | Iterable[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """Return the sampling params of each of the prompts: the same for all, or those given for each."""
    # A mapping or a text can be iterated over too, and is not a list of anything that a request needs.
    if isinstance(params, Mapping | _TEXT_OR_BYTES) or not isinstance(params, Iterable):
        return [one_sampling_params(params)] * prompts
    each = [one_sampling_params(one) for one in params]
    if len(each) != prompts:
        raise ValueError(f"{prompts} prompts but {len(each)} sampling params; give one for all, or one for each")
    return each
