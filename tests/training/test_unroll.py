"""What a drafter computes in training is what it computes when it drafts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from l4jax.cache import CacheShape
from l4jax.config import ModelConfig
from l4jax.decoding.draft import Drafting
from l4jax.decoding.entries import Entries
from l4jax.model.drafter import Drafter, build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel, random_weights
from l4jax.training.batches import Rows
from l4jax.training.drafters import Version, new_drafter
from l4jax.training.losses import unroll
from tests import tiny

PASSES = 3


def bound(target: ModelConfig, version: Version, seed: int = 1) -> tuple[Drafter, Llama]:
    config = new_drafter(target, version, layers=1 if version == "eagle3" else 2, draft_vocab=target.vocab_size, length=64)
    drafter, model = BoundModel(build_drafter(config)), BoundModel(Llama(target, taps=config.aux_layers))
    weights = random_weights(build_drafter(config), jax.random.key(seed), jnp.dtype(jnp.float32))
    return drafter.bind(drafter.leaves(weights)), model.bind(model.leaves(tiny.weights(target)))


def drafted(drafter: Drafter, target: Llama, token_1T: jax.Array, root: jax.Array) -> list[jax.Array]:
    """Logits at each depth of the chain after token ``root``, by the modules and cache that inference uses; the chain is the text's."""
    shape = CacheShape(1, 1, 1)
    start_B, new_B = jnp.zeros(1, jnp.int32), root[None]
    config = drafter.config.decoder
    tables = jax.tree.map(jnp.asarray, shape.identity_tables([0]))
    cache, draft_cache = (tiny.empty_cache(shape, c) for c in (target.config, config))
    _, feature_BTf, _ = target(token_1T, start_B, new_B, cache, tables)
    piece = (token_1T, token_1T[:, root], feature_BTf, start_B, new_B)
    state = Entries(drafter, target, tables, config.max_position_embeddings).add(draft_cache, *piece)
    drafting = Drafting(drafter, target, state, new_B, tables, config.max_position_embeddings)
    logits = [drafting.logits(state.hidden_BD)[0]]
    nodes, hidden_BMD = drafting.start(), state.hidden_BD[:, None]
    for depth in range(1, PASSES):
        token_11 = jnp.take(token_1T, root[None] + depth, axis=1, mode="clip")
        hidden_BMD, nodes = drafting.run(token_11, hidden_BMD, depth, jnp.ones((1, 1, depth), bool), nodes)
        logits.append(drafting.logits(hidden_BMD)[0, 0])
    return logits


@pytest.mark.parametrize(("make", "version"), [(tiny.llama3_like, "eagle3"), (tiny.llama3_like, "eagle1"), (tiny.scout_like, "eagle3")])
def test_every_pass_is_what_drafting_computes_from_every_position(make: type[ModelConfig], version: Version) -> None:
    config = tiny.shallow(make())
    drafter, target = bound(config, version)
    # Two sequences in one row: what is packed before must not be seen.
    first, second = tiny.prompts(config, (7, 14))
    token_BT = jnp.asarray([first + second], jnp.int32)
    first_BT = jnp.asarray([[0] * 7 + [7] * 14], jnp.int32)
    rows = Rows(token_BT, first_BT, jnp.ones_like(token_BT, bool), jnp.zeros(1, jnp.int32))

    @jax.jit
    def unrolled() -> list[jax.Array]:
        _, feature_BTf = target.packed(token_BT, first_BT)
        return [drafter.logits(target, x_BTD)[0] for x_BTD in unroll(drafter, target, rows, drafter.read(feature_BTf), PASSES)]

    passes = unrolled()
    chain = jax.jit(lambda token_1T, root: drafted(drafter, target, token_1T, root))
    for start, tokens in ((0, first), (7, second)):
        token_1T = jnp.asarray([tokens + [0] * (14 - len(tokens))], jnp.int32)
        for root in range(1, len(tokens)):
            for depth, expected_V in enumerate(chain(token_1T, jnp.int32(root))[: len(tokens) - root]):
                found_V = passes[depth][start + root - 1 + depth]
                assert jnp.linalg.norm(found_V - expected_V) < 1e-5 * jnp.linalg.norm(expected_V), (start, root, depth)
