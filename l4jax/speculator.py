"""From a drafter's folder to what a runner speculates with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from l4jax.checkpoints.store import Checkpoint, DrafterCheckpoint, open_drafter
from l4jax.config import ConfigError, DrafterConfig, ModelConfig, check_fits
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.speculate import BeyondTraining
from l4jax.placement import DrafterPlacement, Placement
from l4jax.runner import Speculator


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter's configuration, its weights by name, and how best to speculate with it at each batch size."""

    config: DrafterConfig
    weights: Mapping[str, jax.Array]
    table: SpeculationTable

    @classmethod
    def restored(cls, checkpoint: DrafterCheckpoint, target: Placement, dtype: jnp.dtype) -> LoadedDrafter:
        """From its folder, on its target's mesh."""
        weights = checkpoint.restore(DrafterPlacement(checkpoint.config, target.mesh), dtype)
        return cls(checkpoint.config, weights, SpeculationTable.from_json(checkpoint.speculation, dtype.name))


def open_fitting_drafter(path: str | os.PathLike[str] | None, target: Checkpoint) -> DrafterCheckpoint | None:
    """The drafter in this folder, if one is given. Raises ValueError, naming what differs, if it was made for another model."""
    if path is None:
        return None
    drafter = open_drafter(path)
    check_fits(drafter.config, target.config)
    if drafter.config.target_tokenizer not in (None, target.tokenizer_digest):
        raise ConfigError(f"the drafter in {drafter.directory} is for a model with another tokenizer; give this model's own drafter")
    return drafter


def speculator_for(
    config: ModelConfig, placement: Placement, drafter: LoadedDrafter | None, speculation: str, beyond: BeyondTraining
) -> Speculator | None:
    """What the runner speculates with. Raises ValueError if the drafter is another model's, or if there is none and one is asked for."""
    if beyond not in ("window", "stop"):
        raise ValueError(f'beyond_training is {beyond!r}; expected "window" or "stop"')
    plan = None if speculation == "auto" else Speculation.parse(speculation)
    if speculation == "off":
        return None
    if drafter is None:
        if plan is None:
            return None
        raise ValueError(f'speculation is {speculation!r}, but no drafter is given; load with drafter="path", or speculation="off"')
    check_fits(drafter.config, config)
    table = SpeculationTable.always(plan) if plan else drafter.table
    table.check_fits(config)
    return Speculator(DrafterPlacement(drafter.config, placement.mesh), drafter.weights, table, beyond, asked_for=plan is not None)
