"""Compares the device with the CPU, on small models in float32 at highest precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.h100.bench import Bench, Model, Record, eagle3_head, llama_and_head, rows_at
from benchmarks.h100.sizes import TOY
from l4jax.compiled import Call
from l4jax.config import ModelConfig, MoEConfig
from l4jax.decoding.generate import BURST
from l4jax.decoding.plan import Speculation

ROWS, CACHED, CAPACITY, PIECE = 3, 150, 384, 24
TOLERANCE = 1e-4
"""Logits agree if they differ by at most this part of the largest logit."""


def measure(bench: Bench, record: Record, *, family: str) -> None:
    """Compare the logits of a piece of a prompt, the tokens of decoding, and the tokens of speculation (which must be decoding's)."""
    config = family_config(family)
    drafter = eagle3_head(config, config.vocab_size, intermediate_size=TOY.head["intermediate_size"])
    devices = {"cpu": jax.devices("cpu")[0], "device": bench.device}
    with jax.default_matmul_precision("highest"):
        models = {name: Model.random(config, drafter, device, jnp.dtype(jnp.float32), devices["cpu"]) for name, device in devices.items()}
        seen = {name: _run(model) for name, model in models.items()}
    expected, found = seen["cpu"], seen["device"]
    largest = float(np.abs(expected["logits"]).max())
    difference = float(np.abs(expected["logits"] - found["logits"]).max()) / largest
    record("logits", {"largest_difference": difference, "agree": difference <= TOLERANCE})
    for name in ("decode", "chain:3", "tree:eagle26"):
        same = found[name] == expected["decode"]
        record(name, {"tokens": int(same.size), "agree": bool(same.all()), "differing": int((~same).sum())})
    if not (difference <= TOLERANCE and all((found[name] == expected["decode"]).all() for name in ("decode", "chain:3", "tree:eagle26"))):
        raise RuntimeError("the device's logits or tokens are not the CPU's")


def family_config(family: str) -> ModelConfig:
    """A model like Llama 3, or with everything that Llama 4 adds; its vocabulary is so small that a random head guesses some tokens."""
    config = dataclasses.replace(llama_and_head(TOY)[0], vocab_size=16, max_position_embeddings=4096)
    if family == "llama":
        return config
    return dataclasses.replace(
        config,
        architecture="llama4",
        rope_layers=(True, False),
        attention_chunk_size=128,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        floor_scale=64,
        attn_scale=0.1,
        moe=MoEConfig(num_experts=4, intermediate_size=48, moe_layers=(False, True)),
    )


def _run(model: Model) -> dict[str, np.ndarray]:
    """Compute everything that is compared, from the same random cache of ``CACHED`` tokens."""
    abstract = model.abstract
    call = abstract.score_call(PIECE, CACHED, CAPACITY)
    tokens_1T = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PIECE)).astype(np.int32)
    _, cache, piece, _ = call.arguments
    of_one = {"start_B": CACHED, "new_B": PIECE, "prompt_length_B": CACHED + PIECE, "following_B": -1, "slot_B": 0}
    given = {name: np.full(1, value, np.int32) for name, value in of_one.items()}
    piece = dataclasses.replace(piece, token_BT=tokens_1T, ends_B=np.ones(1, bool), **given)
    _, logits, _ = call.lower().compile()(model.weights, _host_drawn(cache), piece, np.zeros(1, bool))
    seen = {"logits": np.asarray(logits)}

    call = abstract.decode_call(ROWS, CAPACITY)
    state = rows_at(_host_drawn(call.arguments[1]), CACHED)
    seen["decode"] = np.asarray(call.lower().compile()(model.weights, state, call.arguments[2])[1].token_sB)[:BURST]
    for plan in ("chain:3", "tree:eagle26"):
        speculation = Speculation.parse(plan)
        assert speculation is not None
        seen[plan] = _speculated(model, abstract.speculate_call(ROWS, CAPACITY, speculation))
    return seen


def _speculated(model: Model, call: Call) -> np.ndarray:
    """The first BURST tokens of every row, of as many rounds."""
    state = rows_at(_host_drawn(call.arguments[1]), CACHED)
    return np.asarray(call.lower().compile()(model.weights, state, call.arguments[2])[1].token_sB)[:BURST]


def _host_drawn(tree: Any) -> Any:
    """Replace abstract arrays by device arrays that numpy has drawn: the same numbers for every device."""
    rng = np.random.default_rng(1)

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(make, tree)
