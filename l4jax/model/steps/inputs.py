"""What all layers of one step share."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from l4jax.config import ModelConfig
from l4jax.model.rotary import rotary_angles
from pallas_kernels.heads import Heads
from sharding.ranks import Ranks


class Keys(abc.ABC):
    """The keys that each new token attends in one kind of layer."""

    @abc.abstractmethod
    def attend(
        self,
        heads: Heads,
        cache: Any,
        ranks: Ranks,
        *,
        scale: float,
    ) -> tuple[Float[Array, "B T K G h"], Any]:
        """Attention of the new tokens, in the heads' dtype, and the cache, of the kind given, with their keys and values in it.

        ``ranks``: the token ranks. Scores are multiplied by ``scale``.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Rotation angles and query temperature of this rank's tokens, and the keys that they attend in each kind of layer.

    ``valid_BT`` is False for padding. ``spread``: the tokens are spread over the token ranks.
    """

    angles: tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]]
    temperature_BT: Float32[Array, "B T"]
    valid_BT: Bool[Array, "B T"]
    full: Keys
    local: Keys
    spread: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def at(
        cls,
        config: ModelConfig,
        position_BT: Int32[Array, "B T"],
        valid_BT: Bool[Array, "B T"],
        full: Keys,
        local: Keys,
        *,
        spread: bool = False,
    ) -> StepInputs:
        """Of tokens at these positions."""
        return cls(rotary_angles(config, position_BT), attention_temperature(config, position_BT), valid_BT, full, local, spread)


def attention_temperature(config: ModelConfig, position_BT: Int32[Array, "B T"]) -> Float32[Array, "B T"]:
    """Query scale of the NoPE layers: ``1 + attn_scale * ln(floor((position + 1) / floor_scale) + 1)``.

    The floor is an integer division: computed in bfloat16 it is wrong from position 8176 on. (Scalable-Softmax, arXiv 2501.19399.)
    """
    bucket = (position_BT + 1) // config.floor_scale
    return 1.0 + config.attn_scale * jnp.log(bucket.astype(jnp.float32) + 1.0)
