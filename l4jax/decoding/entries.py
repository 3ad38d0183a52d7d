"""The drafter's cache: it has an entry for each token in the target's cache, whichever program added the token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from l4jax.cache import LayerCache, PageTables
from l4jax.model.drafter import Drafter
from l4jax.model.llama import Llama
from l4jax.model.steps.replicated import replicated_step
from l4jax.model.steps.spread import PieceLayout, Spread, last_state, spread_step, tokens_at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
    """What a drafter carries from step to step: its cache, and its output at the last cached token, which predicts the root's children."""

    cache: tuple[LayerCache, ...]
    hidden_BD: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True)
class Entries:
    """What making a drafter's entries needs. ``window``: how many tokens it looks back; None if it sees all."""

    drafter: Drafter
    target: Llama
    tables: PageTables
    window: int | None

    def add(
        self,
        cache: tuple[LayerCache, ...],
        token_BT: Int32[Array, "B T"],
        following_B: Int32[Array, "B"],
        feature_Btf: Float[Array, "B t f"],
        start_B: Int32[Array, "B"],
        new_B: Int32[Array, "B"],
        layout: PieceLayout | None = None,
        spread: Spread | None = None,
    ) -> DraftState:
        """Add the entries of ``new_B[b]`` tokens after the ``start_B[b]`` cached ones, given the target's features at them.

        ``following_B``: the token after the last of them. With a ``layout``, each rank has the features of its own tokens.
        """
        with jax.named_scope("draft_entries"):
            drafter, T = self.drafter, token_BT.shape[1]
            config = drafter.config.decoder
            last_BT = jnp.arange(T, dtype=jnp.int32)[None, :] == new_B[:, None] - 1
            next_BT = jnp.where(last_BT, following_B[:, None], jnp.roll(token_BT, -1, axis=1))
            if layout is None:
                step = replicated_step(config, start_B, new_B, T, self.tables, drafter.ranks, window=self.window)
            else:
                assert spread is not None
                step = spread_step(config, layout, spread, start_B, self.tables, drafter.ranks, window=self.window)
                next_BT = tokens_at(next_BT, layout.position_RBT[drafter.ranks.index()], start_B)
            # NOT_FINITE is negative and ends its row, so any embedding will do.
            hidden_BTD, cache = drafter(self.target, jnp.maximum(next_BT, 0), drafter.read(feature_Btf), step, cache)
            return DraftState(cache, last_state(hidden_BTD, start_B, new_B, layout, drafter.ranks))
