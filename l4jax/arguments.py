"""Checks the arguments of the Python interface: a value of the wrong kind is refused in one line, before anything is done with it."""

from __future__ import annotations

import math
import numbers
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from l4jax.decoding.params import SamplingParams
from sharding.kinds import is_whole, shown
from sharding.words import counted

Prompt = str | Sequence[int]
_TEXT_OR_BYTES = str | bytes | bytearray | memoryview
_DTYPES = ("float32", "bfloat16", "float16")
_MOST = 10**15  # bytes are computed of it, in floating-point numbers
_COUNT = "a whole number of at least 1, at most 10**15"


def check_kind(what: str, value: object, kind: type | types.UnionType, expected: str) -> None:
    """Raise ValueError unless a value is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {shown(value)}; expected {expected}")


def check_words(dtype: object, speculation: object) -> None:
    """Raise ValueError for an unknown dtype, and unless ``speculation`` is text."""
    # Kinds are checked first, because an array would be compared item by item.
    check_kind("speculation", speculation, str, '"auto", "off", or a description such as "chain:5"')
    if dtype is not None and not (isinstance(dtype, str | np.dtype) and str(dtype) in _DTYPES):
        raise ValueError(f"dtype is {shown(dtype)}; expected float32, bfloat16, float16 or None (as stored)")


def truth(name: str, value: object) -> bool:
    """Return the argument of this name. Raises ValueError unless it is True or False."""
    check_kind(name, value, bool, "True or False")
    return bool(value)


def whole(name: str, value: object, expected: str, least: int, most: float = math.inf) -> int:
    """Return the argument of this name as Python's own integer. Raises ValueError unless it is a whole number in its range."""
    if not (is_whole(value) and least <= cast(int, value) <= most):
        raise ValueError(f"{name} is {shown(value)}; expected {expected}")
    return operator.index(cast(int, value))


def batch_size(max_batch: object) -> int:
    """Return how many prompts are decoded together. Raises ValueError unless it is a whole number of at least 1."""
    return whole("max_batch", max_batch, _COUNT, 1, _MOST)


def cache_tokens(kv_tokens: object) -> int:
    """Return how many tokens the KV cache is to hold. Raises ValueError unless it is a whole number of at least 1."""
    return whole("kv_tokens", kv_tokens, _COUNT, 1, _MOST)


def piece_lengths(lengths: object) -> tuple[int, ...]:
    """Return the lengths that pieces of prompts are padded to. Raises ValueError unless there is one, and all are 1 or more."""
    items = _items(lengths)
    if not items or not all(is_whole(n) and cast(int, n) >= 1 for n in items):
        raise ValueError(f"prefill_lengths is {shown(lengths)}; expected at least one length, in a list of whole numbers of 1 or more")
    return tuple(operator.index(cast(int, n)) for n in items)


def several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the prompts as a list. One may be given without a list around it."""
    if isinstance(prompts, _TEXT_OR_BYTES):
        return [cast(Prompt, prompts)]
    items = _items(prompts)
    if items is None:
        raise ValueError(f"the prompts are {shown(prompts)}; expected text, a list of token ids, or a list of these")
    if items and isinstance(items[0], numbers.Integral | np.bool_):
        return [cast(Prompt, prompts)]
    return cast(list[Prompt], items)


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Return a prompt's token ids as Python's own integers. Raises ValueError for anything but a list of whole numbers."""
    items = _items(prompt)
    try:
        # Truth values are whole numbers to Python, and never meant as token ids.
        if items is None or any(isinstance(token, bool | np.bool_) for token in items):
            raise TypeError
        return [operator.index(cast(int, token)) for token in items]
    except TypeError as error:
        advice = (
            "; use chat, or stream_chat, for a conversation"
            if isinstance(prompt, Mapping) and "role" in cast(Mapping[str, object], prompt)
            else ""
        )
        raise ValueError(f"a prompt is {shown(prompt)}; expected text or a list of token ids{advice}") from error


def sampling_params(params: object) -> SamplingParams:
    """Return the sampling params that are given. Raises ValueError for anything else."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"the sampling params are {shown(params)}; expected l4jax.SamplingParams")
    return params


def one_sampling_params(params: object) -> SamplingParams:
    """Return the sampling params of one prompt, the default ones if none are given."""
    return SamplingParams() if params is None else sampling_params(params)


def sampling_params_of_each(params: SamplingParams | Iterable[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """Return the sampling params of each of the prompts: the same for all, or those given for each."""
    # Mappings and text can be iterated over too, but are no lists of sampling params.
    if isinstance(params, Mapping | _TEXT_OR_BYTES) or not isinstance(params, Iterable):
        return [one_sampling_params(params)] * prompts
    each = list(params)
    if len(each) != prompts:
        raise ValueError(f"{counted(prompts, 'prompt')} but {len(each)} sampling params; give one for all, or one for each")
    return of_each_prompt(sampling_params, each)


def of_each_prompt[R](make: Callable[..., R], *each: Sequence[Any]) -> list[R]:
    """What ``make`` makes of each prompt, or of what belongs to each; if there are several, its ValueErrors say of which.

    The lists have one entry a prompt.
    """
    found = []
    for number, given in enumerate(zip(*each, strict=True)):
        try:
            found.append(make(*given))
        except ValueError as error:
            if len(each[0]) == 1:
                raise
            raise ValueError(f"prompt {number} of {len(each[0])}, counted from 0: {error}") from error
    return found


def _items(value: object) -> list[object] | None:
    """Return the items of a list or an array, an array's as numpy numbers; None for anything else.

    Mappings, text and bytes can be iterated over too, but are no lists of numbers; an iterator could be read only once.
    """
    if _is_jaxs(value):
        value = np.asarray(value)
    is_list = isinstance(value, Sequence) and not isinstance(value, _TEXT_OR_BYTES)
    if not (is_list or (isinstance(value, np.ndarray) and value.ndim > 0)):
        return None
    return [np.asarray(item)[()] if _is_jaxs(item) else item for item in cast(Sequence[object], value)]


def _is_jaxs(value: object) -> bool:
    """Whether a value is a JAX array. Does not import JAX, because a process that only takes requests never does."""
    return isinstance(value, getattr(sys.modules.get("jax"), "Array", ()))
