"""Requests with a guide: which tokens may be next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from l4jax.engine.handle import Handle
from l4jax.engine.step import Step


class GuideError(ValueError):
    """The guide allows no further token, and the answer is not complete."""

    def __init__(self) -> None:
        super().__init__(
            "the guide allows no further token, and the answer is not complete: the guide is too complex, or no tokens write what it asks "
            "for; change it"
        )


def next_masks(step: Step, handles: Mapping[int, Handle]) -> dict[int, np.ndarray]:
    """By slot, the tokens that may be next (:meth:`l4jax.text.guiding.Matcher.allowed`), for guided requests that get one in the step."""
    rows = [row for row in step.pieces if row is not None and row.last] + [row for row in step.rows if row is not None]
    matchers = {row.slot: handle._matcher for row in rows if (handle := handles.get(row.request)) is not None}
    return {slot: matcher.allowed() for slot, matcher in matchers.items() if matcher is not None}
