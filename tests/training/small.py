"""A tiny target, what it says, and a drafter in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import LLM, SamplingParams
from l4jax.config import ModelConfig
from l4jax.model.drafter import build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel, random_weights
from l4jax.training.batches import Rows
from l4jax.training.data import Example
from l4jax.training.drafters import Version, new_drafter
from l4jax.training.losses import Measured, TargetStates, learning, mean_loss
from l4jax.training.trainer import Trainer
from sharding.ranks import ONE
from tests import tiny

LENGTH = 32


def config(**changes: Any) -> ModelConfig:
    return tiny.llama3_like(**({"vocab_size": 24, "num_layers": 2, "rope_layers": (True,) * 2, "tie_word_embeddings": False} | changes))


def target(mesh: str = "data=1", **changes: Any) -> LLM:
    """Logits as far apart as a real model's: an untrained one's are all alike."""
    of = config(**changes)
    weights = tiny.weights(of)
    return LLM(of, weights | {"norm.scale": 4.0 * weights["norm.scale"]}, mesh=mesh)


def answered(llm: LLM, lengths: tuple[int, ...], tokens: int, temperature: float = 0.0) -> list[Example]:
    prompts = tiny.prompts(llm.config, lengths)
    params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=1)
    return [Example(f"{i:08x}", tuple(c.prompt_token_ids), tuple(c.token_ids)) for i, c in enumerate(llm.generate(prompts, params))]


def trainer(llm: LLM, version: Version, token_ids: np.ndarray, **changes: Any) -> Trainer:
    drafter = new_drafter(llm.config, version, layers=1, draft_vocab=len(token_ids), length=LENGTH)
    options: dict[str, Any] = {"passes": 2, "rate": 1e-2, "warmup": 2, "steps": 100, "seed": 0}
    return Trainer(drafter, llm, {"token_ids": token_ids}, **(options | changes))


def random_drafter(trainer: Trainer, seed: int = 3) -> dict[str, jax.Array]:
    """Random values for the trained weights, the norms' too, so that each of them matters."""
    module = build_drafter(trainer.config)
    weights = random_weights(module, jax.random.key(seed), jnp.dtype(jnp.float32))
    rng = np.random.default_rng(seed)
    norms = {name: jnp.asarray(rng.uniform(0.5, 1.5, w.shape), jnp.float32) for name, w in weights.items() if name.endswith(".scale")}
    return {name: weight for name, weight in (weights | norms).items() if name != "token_ids"}


def measure(llm: LLM, trainer: Trainer, rows: Rows, token_ids: np.ndarray, noise: jax.Array) -> Callable[[Mapping[str, jax.Array]], Any]:
    """Loss, measurements and gradient of a batch, as a function of the drafter's trained weights; compiled."""
    drafter, target = BoundModel(build_drafter(trainer.config)), BoundModel(Llama(llm.config, taps=trainer.config.aux_layers))
    model = target.bind(target.leaves(llm.weights))

    def of(weights: Mapping[str, jax.Array]) -> tuple[jax.Array, Measured]:
        bound = drafter.bind(drafter.leaves({**weights, "token_ids": jnp.asarray(token_ids)}))
        states = TargetStates(*model.packed(rows.token_BT, rows.first_BT))
        measured = learning(bound, model, rows, states, 3, noise)(bound)
        return mean_loss(measured, ONE), measured

    return jax.jit(jax.value_and_grad(of, has_aux=True))
