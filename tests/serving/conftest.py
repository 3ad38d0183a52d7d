"""One server for the tests that leave it running."""

from __future__ import annotations

import pytest

import l4jax
from tests.serving.running import SLOTS, running, save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(checkpoint):
    with running(checkpoint) as found:
        yield found


@pytest.fixture(scope="session")
def llm(checkpoint):
    """The same model with the same options."""
    return l4jax.load(checkpoint, max_batch=SLOTS, deterministic=True)
