"""Drafters: open a folder, decide how to speculate, and build the Speculator that a runner uses."""

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
from l4jax.engine.speculator import Speculator
from l4jax.parallel.placement import DrafterPlacement, Placement
from sharding.kinds import shown


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter's configuration, its weights by name, and how best to speculate with it at each batch size."""

    config: DrafterConfig
    weights: Mapping[str, jax.Array]
    table: SpeculationTable

    @classmethod
    def restored(cls, checkpoint: DrafterCheckpoint, target: Placement, dtype: jnp.dtype) -> LoadedDrafter:
        """Restore a drafter from its folder onto its target's mesh."""
        weights = checkpoint.restore(DrafterPlacement(checkpoint.config, target.mesh), dtype)
        return cls(checkpoint.config, weights, SpeculationTable.from_json(checkpoint.speculation, dtype.name))


def open_fitting_drafter(path: str | os.PathLike[str] | None, target: Checkpoint) -> DrafterCheckpoint | None:
    """Open the drafter in this folder; None if no folder is given. Raises ValueError, naming the difference, if it is another model's."""
    if path is None:
        return None
    drafter = open_drafter(path)
    check_fits(drafter.config, target.config)
    if drafter.config.target_tokenizer not in (None, target.tokenizer_digest):
        raise ConfigError(f"the drafter in {drafter.directory} is for a model with another tokenizer; give this model's own drafter")
    return drafter


@dataclasses.dataclass(frozen=True)
class SpeculationChoice:
    """How to speculate at each batch size, and what the drafter does in texts longer than it was trained on.

    ``asked_for``: the user has said how; then a prompt that cannot be speculated for is an error.
    """

    table: SpeculationTable
    beyond: BeyondTraining
    asked_for: bool

    def speculator(self, placement: DrafterPlacement, weights: Mapping[str, jax.Array]) -> Speculator:
        """The Speculator with this drafter."""
        return Speculator(placement, weights, self.table, self.beyond, self.asked_for)


def choose_speculation(
    config: ModelConfig, drafter: DrafterConfig | None, own: SpeculationTable | None, speculation: str, beyond: BeyondTraining
) -> SpeculationChoice | None:
    """How to speculate, from the arguments of ``load``; None to never speculate. ``own``: the drafter's own table.

    Raises ValueError if the drafter is another model's, if ``speculation`` needs a drafter and none is given, or if the drafter
    cannot draft the tree that ``speculation`` asks for.
    """
    if not isinstance(beyond, str) or beyond not in ("window", "stop"):
        raise ValueError(f'beyond_training is {shown(beyond)}; expected "window" or "stop"')
    plan = None if isinstance(speculation, str) and speculation == "auto" else Speculation.parse(speculation)
    if speculation == "off" or (drafter is None and plan is None):
        return None
    if drafter is None or own is None:
        raise ValueError(f'speculation is {shown(speculation)}, but no drafter is given; load with drafter="path", or speculation="off"')
    check_fits(drafter, config)
    table = SpeculationTable.always(plan) if plan else own
    table.check_fits(config, drafter.draft_vocab_size)
    return SpeculationChoice(table, beyond, asked_for=plan is not None) if table.speculates else None
