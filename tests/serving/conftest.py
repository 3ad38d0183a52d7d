"""One server for the tests that leave it running, and a front without an engine process."""

from __future__ import annotations

import socket

import pytest

import l4jax
from l4jax.config import ModelConfig
from l4jax.serving.api.served import Defaults, Served
from l4jax.serving.engine_client import EngineClient
from l4jax.serving.metrics import Metrics
from l4jax.text.hf_tokenizer import load_hf_tokenizer
from l4jax.text.load import Text
from tests import tiny
from tests.serving.running import SLOTS, running, save_checkpoint
from tests.text import small


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


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """What the front knows of a model that no engine process computes."""
    tokenizer = load_hf_tokenizer(small.write(tmp_path_factory.mktemp("tokenizer")))
    config: ModelConfig = tiny.llama3_like(vocab_size=tokenizer.vocab_size)
    one, other = socket.socketpair()
    client = EngineClient(one, max_waiting=4, stalled_seconds=30)
    with one, other:
        yield Served("tiny", config, Text(tokenizer, None), Defaults(), client, Metrics(client, "tiny"), 0, False, "/nowhere", 16)
