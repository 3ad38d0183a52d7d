"""The compiled programs of training: the target's pass, the learning step and the measurement.

The rows of a batch are divided among a mesh's devices along ``data``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from l4jax.config import DrafterConfig
from l4jax.llm import LLM
from l4jax.model.drafter import Drafter, build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import BoundModel, weight_specs
from l4jax.parallel.arrays import global_array, to_host
from l4jax.training.batches import Rows
from l4jax.training.losses import Measured, TargetStates, accepted, learning, mean_loss
from l4jax.training.seeds import key_of
from sharding.rules import partition

WEIGHT_DECAY = 0.01
CLIPPED_NORM = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: the trained weights by name, float32, and the optimiser's state."""

    weights: dict[str, Array]
    optimizer: Any


class Trainer:
    """Trains one drafter for one loaded target, which does not change.

    AdamW (beta 0.9 and 0.95) with a clipped gradient norm; the learning rate rises over ``warmup`` steps and falls by half a cosine to 0
    at ``steps``.
    """

    def __init__(
        self,
        config: DrafterConfig,
        llm: LLM,
        weights: Mapping[str, Any],
        *,
        passes: int,
        rate: float,
        warmup: int,
        steps: int,
        seed: int,
    ) -> None:
        """``weights`` provides those that are not trained: the draft vocabulary, the drafter's own embedding, the target's output head.

        ``passes``: an EAGLE-3 drafter's training passes, and the depth to which both kinds are measured."""
        placement = llm.placement
        self.config = config
        self._passes, self._seed = passes, seed
        self._mesh, self._data = placement.mesh, placement.spec.along("data")
        self._target = BoundModel(Llama(llm.config, taps=config.aux_layers))
        self._leaves = self._target.leaves(llm.weights)
        module = build_drafter(config)
        self._drafter = BoundModel(module)
        self._specs = weight_specs(module)
        # A drafter's own embedding began as a copy of its target's; published recipes do not train it either.
        kept = {"embed"} | ({"head"} if config.target_head else set())
        self._trained = [name for name, spec in self._specs.items() if spec.init != "numbers" and name not in kept]
        fixed = self._specs.keys() - set(self._trained)
        self._fixed = {name: global_array(weights[name], placement.array_sharding()) for name in sorted(fixed)}
        self.schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(warmup, steps - 1), steps)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(CLIPPED_NORM), optax.adamw(self.schedule, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY)
        )
        everywhere, row = PartitionSpec(), partition(placement.spec, "batch")
        # Unchecked, as in the programs of inference: a test shows that all devices have equal sums.
        step = jax.shard_map(
            self._step,
            mesh=self._mesh,
            in_specs=(everywhere, everywhere, everywhere, row, row, everywhere),
            out_specs=(everywhere, everywhere),
            check_vma=False,
        )
        self._step_program = jax.jit(step, donate_argnums=0)
        measure = jax.shard_map(
            self._measure, mesh=self._mesh, in_specs=(everywhere, everywhere, everywhere, row, row), out_specs=row, check_vma=False
        )
        target = jax.shard_map(self._target_states, mesh=self._mesh, in_specs=(everywhere, row), out_specs=row, check_vma=False)
        self._target_program = jax.jit(target)
        self._measure_program = jax.jit(measure)
        self._everywhere, self._by_row = placement.array_sharding(), placement.array_sharding("batch")

    def first_state(self, weights: Mapping[str, Array]) -> TrainState:
        """The first state, from all of a drafter's weights."""
        trained = {name: weights[name] for name in self._trained}
        return self._placed(TrainState(trained, self._optimizer.init(trained)))

    def weights(self, state: TrainState) -> dict[str, np.ndarray]:
        """All of the drafter's weights."""
        return {name: to_host((state.weights | self._fixed)[name]) for name in self._drafter.names}

    def to_arrays(self, state: TrainState) -> dict[str, np.ndarray]:
        """The state as named arrays, to be stored."""
        leaves = jax.tree.leaves(state.optimizer)
        named = {f"weights.{name}": weight for name, weight in state.weights.items()}
        return {name: to_host(leaf) for name, leaf in (named | {f"optimizer.{i}": leaf for i, leaf in enumerate(leaves)}).items()}

    @property
    def array_names(self) -> list[str]:
        """Names of the arrays that :meth:`to_arrays` returns."""
        abstract = {name: jax.ShapeDtypeStruct(self._specs[name].shape, jnp.float32) for name in self._trained}
        count = len(jax.tree.leaves(jax.eval_shape(self._optimizer.init, abstract)))
        return [*(f"weights.{name}" for name in self._trained), *(f"optimizer.{i}" for i in range(count))]

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> TrainState:
        """The inverse of :meth:`to_arrays`."""
        weights: dict[str, Any] = {name: arrays[f"weights.{name}"] for name in self._trained}
        optimizer = jax.eval_shape(self._optimizer.init, weights)
        leaves = [arrays[f"optimizer.{i}"] for i in range(len(jax.tree.leaves(optimizer)))]
        return self._placed(TrainState(weights, jax.tree.unflatten(jax.tree.structure(optimizer), leaves)))

    def target_states(self, rows: Rows) -> TargetStates:
        """The target's pass over a batch."""
        return self._target_program(self._leaves, self._on_devices(rows))

    def step(self, state: TrainState, rows: Rows, states: TargetStates, number: int) -> tuple[TrainState, tuple[Array, Measured]]:
        """Run one step on a batch: the new state, the loss and the measurements. The given state is donated."""
        return self._step_program(state, self._leaves, self._fixed, self._on_devices(rows), self._on_devices(states), np.int32(number))

    def accepted(self, state: TrainState, rows: Rows) -> np.ndarray:
        """For each position, how many tokens of a chain whose root is the next token are accepted: int32 [B, T]."""
        rows = self._on_devices(rows)
        return to_host(self._measure_program(state.weights, self._leaves, self._fixed, rows, self.target_states(rows)))

    def _on_devices[Batch](self, batch: Batch) -> Batch:
        return cast(Batch, jax.tree.map(lambda leaf: global_array(leaf, self._by_row), batch))

    def _placed(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda leaf: global_array(leaf, self._everywhere), state)

    def _bind(self, trained: Mapping[str, Array], fixed: Mapping[str, Array]) -> Drafter:
        return self._drafter.bind(self._drafter.leaves({**trained, **fixed}))

    def _target_states(self, leaves: tuple[Array, ...], rows: Rows) -> TargetStates:
        return TargetStates(*self._target.bind(leaves).packed(rows.token_BT, rows.first_BT))

    def _step(
        self,
        state: TrainState,
        leaves: tuple[Array, ...],
        fixed: dict[str, Array],
        rows: Rows,
        states: TargetStates,
        number: Int32[Array, ""],
    ) -> tuple[TrainState, tuple[Array, Measured]]:
        noise = jax.random.fold_in(key_of(self._seed), number)
        drafter = self._bind(state.weights, fixed)
        measure = learning(drafter, self._target.bind(leaves), rows, states, self._passes, noise)

        def loss(weights: dict[str, Array]) -> tuple[Array, Measured]:
            measured = measure(self._bind(weights, fixed))
            return mean_loss(measured, self._data), measured

        (value, measured), gradient = jax.value_and_grad(loss, has_aux=True)(state.weights)
        value, measured, gradient = jax.tree.map(self._data.sum, (value, measured, gradient))
        # Optax multiplies numbers of different types.
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.weights)
            weights = optax.apply_updates(state.weights, updates)
        return TrainState(weights, optimizer), (value, measured)

    def _measure(
        self, weights: dict[str, Array], leaves: tuple[Array, ...], fixed: dict[str, Array], rows: Rows, states: TargetStates
    ) -> Array:
        return accepted(self._bind(weights, fixed), self._target.bind(leaves), rows, states, self._passes)
