"""What the devices keep of every sequence that is being generated: one slot for each, written and read by the programs alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from l4jax.cache import LayerCache
from l4jax.decoding.generate import DecodeState, count_token, is_final
from l4jax.decoding.sampling import SamplingRows, SamplingSettings, TokenCounts
from sharding.ranks import Ranks, local_index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotUpdate:
    """New requests for some slots: ``slot_B`` with their settings. A slot number past the last one changes nothing.

    A slot is not decoded until a prefill has written its first token, so an update also frees it.
    """

    slot_B: Int32[Array, "B"]
    sampling: SamplingSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of every slot. ``token_U``, the last token, has been emitted but is not in the cache yet.

    ``length_U``: tokens in the cache. ``produced_U``: tokens emitted. ``done_U``: nothing is decoded; so it is until the prompt has been
    prefilled. ``hidden_UD``: the drafter's output at the last cached token; None without a drafter.
    """

    token_U: Int32[Array, "U"]
    length_U: Int32[Array, "U"]
    produced_U: Int32[Array, "U"]
    done_U: Bool[Array, "U"]
    sampling: SamplingSettings
    counts: TokenCounts
    hidden_UD: Float[Array, "U D"] | None

    def settings(self, slot_B: Int32[Array, "B"]) -> SamplingRows:
        """The settings of these slots, for rows in this order. Padding, whose slot number is past the last one, asks for nothing."""
        rows = jax.tree.map(lambda of_slots: of_slots.at[slot_B].get(mode="fill", fill_value=0), self.sampling)
        return SamplingRows(**vars(rows), slot_B=slot_B)

    def active_settings(self, slot_B: Int32[Array, "B"]) -> SamplingRows:
        """As :meth:`settings`; rows that are done ask for nothing either, so that no work is done for them."""
        rows, active_B = self.settings(slot_B), ~self.done_U.at[slot_B].get(mode="fill", fill_value=True)
        return dataclasses.replace(
            rows,
            adjusted_B=rows.adjusted_B & active_B,
            reported_B=rows.reported_B & active_B,
            temperature_B=jnp.where(active_B, rows.temperature_B, 0.0),
        )

    def decoding(self, slot_B: Int32[Array, "B"], cache: tuple[LayerCache, ...]) -> DecodeState:
        """These slots as rows to decode. A row whose slot number is past the last one is padding, and done."""

        def of(values_U: Array, otherwise: bool | int) -> Array:
            return values_U.at[slot_B].get(mode="fill", fill_value=otherwise)

        return DecodeState(cache, of(self.token_U, 0), of(self.length_U, 0), of(self.produced_U, 0), of(self.done_U, True), self.counts)

    def after(self, slot_B: Int32[Array, "B"], state: DecodeState, hidden_BD: Float[Array, "B D"] | None = None) -> Slots:
        """The slots after these rows were decoded, or speculated for."""
        hidden_UD = self.hidden_UD
        if hidden_BD is not None:
            assert hidden_UD is not None
            hidden_UD = hidden_UD.at[slot_B].set(hidden_BD, mode="drop")
        return dataclasses.replace(
            self,
            token_U=self.token_U.at[slot_B].set(state.token_B, mode="drop"),
            length_U=self.length_U.at[slot_B].set(state.length_B, mode="drop"),
            produced_U=self.produced_U.at[slot_B].set(state.produced_B, mode="drop"),
            done_U=self.done_U.at[slot_B].set(state.done_B, mode="drop"),
            counts=state.counts,
            hidden_UD=hidden_UD,
        )

    def prompted(self, slot_B: Int32[Array, "B"], token_BT: Int32[Array, "B T"], new_B: Int32[Array, "B"], vocab_ranks: Ranks) -> Slots:
        """The slots with the first ``new_B`` of these tokens counted as their prompts'."""
        T, V = token_BT.shape[1], self.counts.in_prompt_UV.shape[1]
        new_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < new_B[:, None]
        index_BT = jnp.where(new_BT, local_index(token_BT, V, vocab_ranks), V)
        in_prompt_UV = self.counts.in_prompt_UV.at[slot_B[:, None], index_BT].set(True, mode="drop")
        return dataclasses.replace(self, counts=dataclasses.replace(self.counts, in_prompt_UV=in_prompt_UV))

    def begun(
        self,
        slot_B: Int32[Array, "B"],
        token_B: Int32[Array, "B"],
        length_B: Int32[Array, "B"],
        hidden_BD: Float[Array, "B D"] | None,
        vocab_ranks: Ranks,
    ) -> tuple[Slots, Bool[Array, "B"]]:
        """The slots with the first token of their answers, after a prompt of ``length_B`` tokens; also which answers end with it."""
        rows, before = self.settings(slot_B), self.decoding(slot_B, ())
        produced_B = before.produced_B + 1
        done_B = is_final(token_B, produced_B, rows)
        counts = count_token(self.counts, token_B, jnp.ones_like(done_B), rows, vocab_ranks)
        return self.after(slot_B, DecodeState((), token_B, length_B, produced_B, done_B, counts), hidden_BD), done_B

    def updated(self, update: SlotUpdate) -> Slots:
        """The slots with new requests, none of which has been prefilled."""
        slot_B = update.slot_B

        def cleared(values_U: Array, value: bool | int) -> Array:
            return values_U.at[slot_B].set(value, mode="drop")

        return dataclasses.replace(
            self,
            length_U=cleared(self.length_U, 0),
            produced_U=cleared(self.produced_U, 0),
            done_U=cleared(self.done_U, True),
            sampling=jax.tree.map(lambda old, new: old.at[slot_B].set(new, mode="drop"), self.sampling, update.sampling),
            counts=TokenCounts(cleared(self.counts.in_prompt_UV, False), cleared(self.counts.output_UV, 0)),
        )
