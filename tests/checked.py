"""What the tests check signatures with: ``tests/conftest.py`` gives it to jaxtyping's import hook."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_ARRAY = re.compile(r"\b(Shaped|Float|Int|UInt|Bool|Key)\d*\[")
_jaxtyped = jaxtyping.jaxtyped

arrays = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Checks a call's arrays, their dtypes and their dimensions."""


def _hints(function: Callable[..., Any]) -> Iterator[object]:
    for hint in getattr(function, "__annotations__", {}).values():
        try:
            yield eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except (NameError, TypeError):  # what mypy alone knows
            yield hint


def jaxtyped_arrays(*, typechecker: Any) -> Callable[[Any], Any]:
    """Decorate as jaxtyping does, but only what names an array in its signature: the decorator takes long, called or not.

    Other signatures are left to mypy. Bad values that users pass there must reach l4jax's own checks, whose messages have tests.
    """

    def decorate(decorated: Any) -> Any:
        if inspect.isclass(decorated):
            function = decorated.__init__
        else:
            function = getattr(decorated, "__func__", getattr(decorated, "fget", decorated))
        return _jaxtyped(decorated, typechecker=typechecker) if any(_ARRAY.search(str(hint)) for hint in _hints(function)) else decorated

    return decorate
