"""What the devices keep of every sequence that is being generated: one slot for each, written and read by the programs alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from l4jax.cache import LayerCache
from l4jax.decoding.entries import DraftState
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
class SlotTokens:
    """Tokens of some slots' sequences, padded: ``new_B[b]`` tokens, of which the first is at position ``start_B[b]``.

    Those before position ``prompt_length_B[b]`` are the prompt's; later ones are output that was produced before. A slot number past the
    last one is padding.
    """

    token_BT: Int32[Array, "B T"]
    start_B: Int32[Array, "B"]
    new_B: Int32[Array, "B"]
    prompt_length_B: Int32[Array, "B"]
    slot_B: Int32[Array, "B"]

    @property
    def length_B(self) -> Int32[Array, "B"]:
        """Tokens of each sequence up to the last of these."""
        return self.start_B + self.new_B

    @property
    def produced_B(self) -> Int32[Array, "B"]:
        """Tokens of each output up to the last of these."""
        return jnp.maximum(self.length_B - self.prompt_length_B, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotMasks:
    """For some slots, whose requests have a guide, the tokens that may be next; see :class:`SamplingRows`.

    A slot number past the last one is padding.
    """

    slot_B: Int32[Array, "B"]
    allowed_BW: UInt32[Array, "B W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of every slot. ``token_U``, the last token, has been emitted but is not in the cache yet.

    ``length_U``: tokens in the cache. ``produced_U``: tokens emitted. ``done_U``: nothing is decoded; so it is until the prompt has been
    prefilled. ``guided_U``, ``allowed_UW``: as in :class:`SamplingRows`. ``hidden_UD``: the drafter's output at the last cached token; None
    without a drafter.
    """

    token_U: Int32[Array, "U"]
    length_U: Int32[Array, "U"]
    produced_U: Int32[Array, "U"]
    done_U: Bool[Array, "U"]
    sampling: SamplingSettings
    guided_U: Bool[Array, "U"]
    allowed_UW: UInt32[Array, "U W"]
    counts: TokenCounts
    hidden_UD: Float[Array, "U D"] | None

    def settings(self, slot_B: Int32[Array, "B"]) -> SamplingRows:
        """The settings of these slots, for rows in this order. Padding, whose slot number is past the last one, asks for nothing."""
        own = self.sampling, self.guided_U, self.allowed_UW
        settings, guided_B, allowed_BW = jax.tree.map(lambda of_slots: of_slots.at[slot_B].get(mode="fill", fill_value=0), own)
        rows = SamplingRows(**vars(settings), slot_B=slot_B, guided_B=guided_B, allowed_BW=allowed_BW)
        return dataclasses.replace(rows, adjusted_B=rows.adjusted_B | guided_B)

    def active_settings(self, slot_B: Int32[Array, "B"]) -> SamplingRows:
        """As :meth:`settings`; rows that are done ask for nothing either, so that no work is done for them."""
        rows, active_B = self.settings(slot_B), ~self.done_U.at[slot_B].get(mode="fill", fill_value=True)
        return dataclasses.replace(
            rows,
            adjusted_B=rows.adjusted_B & active_B,
            guided_B=rows.guided_B & active_B,
            reported_B=rows.reported_B & active_B,
            temperature_B=jnp.where(active_B, rows.temperature_B, 0.0),
        )

    def decoding(self, slot_B: Int32[Array, "B"], cache: tuple[LayerCache, ...], draft_cache: tuple[LayerCache, ...]) -> DecodeState:
        """These slots as rows to decode. A row whose slot number is past the last one is padding, and done."""

        def of(values_U: Array, otherwise: bool | int) -> Array:
            return values_U.at[slot_B].get(mode="fill", fill_value=otherwise)

        return DecodeState(
            cache,
            of(self.token_U, 0),
            of(self.length_U, 0),
            of(self.produced_U, 0),
            of(self.done_U, True),
            self.counts,
            None if self.hidden_UD is None else DraftState(draft_cache, self.hidden_UD.at[slot_B].get(mode="clip")),
        )

    def after(self, slot_B: Int32[Array, "B"], state: DecodeState) -> Slots:
        """The slots after these rows were decoded, or speculated for."""
        hidden_UD = self.hidden_UD
        if state.draft is not None:
            assert hidden_UD is not None
            hidden_UD = hidden_UD.at[slot_B].set(state.draft.hidden_BD, mode="drop")
        return dataclasses.replace(
            self,
            token_U=self.token_U.at[slot_B].set(state.token_B, mode="drop"),
            length_U=self.length_U.at[slot_B].set(state.length_B, mode="drop"),
            produced_U=self.produced_U.at[slot_B].set(state.produced_B, mode="drop"),
            done_U=self.done_U.at[slot_B].set(state.done_B, mode="drop"),
            counts=state.counts,
            hidden_UD=hidden_UD,
        )

    def masked(self, masks: SlotMasks) -> Slots:
        """The slots with these masks for their next tokens."""
        return dataclasses.replace(
            self,
            guided_U=self.guided_U.at[masks.slot_B].set(True, mode="drop"),
            allowed_UW=self.allowed_UW.at[masks.slot_B].set(masks.allowed_BW, mode="drop"),
        )

    def counted(self, tokens: SlotTokens, vocab_ranks: Ranks) -> Slots:
        """The slots with these tokens counted, as their prompts' or as their outputs'."""
        T, V = tokens.token_BT.shape[1], self.counts.in_prompt_UV.shape[1]
        index_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
        new_BT = index_1T < tokens.new_B[:, None]
        prompt_BT = tokens.start_B[:, None] + index_1T < tokens.prompt_length_B[:, None]
        token_BT, slot_B1 = local_index(tokens.token_BT, V, vocab_ranks), tokens.slot_B[:, None]
        asked_BT, drawn_BT = (jnp.where(new_BT & kind_BT, token_BT, V) for kind_BT in (prompt_BT, ~prompt_BT))
        in_prompt_UV = self.counts.in_prompt_UV.at[slot_B1, asked_BT].set(True, mode="drop")
        output_UV = self.counts.output_UV.at[slot_B1, drawn_BT].add(1, mode="drop")
        return dataclasses.replace(self, counts=TokenCounts(in_prompt_UV, output_UV))

    def begun(
        self,
        tokens: SlotTokens,
        ends_B: Bool[Array, "B"],
        token_B: Int32[Array, "B"],
        hidden_BD: Float[Array, "B D"] | None,
        vocab_ranks: Ranks,
    ) -> tuple[Slots, Bool[Array, "B"]]:
        """The slots of the rows in ``ends_B`` with the token that follows these tokens, which end their prefill; also which answers end."""
        slot_B = jnp.where(ends_B, tokens.slot_B, len(self.token_U))
        rows, produced_B = self.settings(slot_B), tokens.produced_B + 1
        done_B = is_final(token_B, produced_B, rows)
        counts = count_token(self.counts, token_B, ends_B, rows, vocab_ranks)
        draft = None if hidden_BD is None else DraftState((), hidden_BD)
        return self.after(slot_B, DecodeState((), token_B, tokens.length_B, produced_B, done_B, counts, draft)), done_B

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
            guided_U=cleared(self.guided_U, False),
            sampling=jax.tree.map(lambda old, new: old.at[slot_B].set(new, mode="drop"), self.sampling, update.sampling),
            counts=TokenCounts(cleared(self.counts.in_prompt_UV, False), cleared(self.counts.output_UV, 0)),
        )
