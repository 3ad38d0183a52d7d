"""What the tests check signatures with: ``tests/conftest.py`` gives it to jaxtyping's import hook."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_ARRAY = re.compile(r"\b(Shaped|Float|Int|UInt|Bool|Key)\d*\[")
_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))


def arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a call's arrays, their dtypes and their dimensions, if the signature names any.

    Other signatures are left to mypy. Bad values that users pass there must reach l4jax's own checks, whose messages have tests.
    """
    hints = getattr(function, "__annotations__", {}).values()
    return _CHECKED(function) if any(_ARRAY.search(str(hint)) for hint in hints) else function
