"""The configuration of Llama 4's image encoder."""

from __future__ import annotations

import dataclasses

from l4jax.config.checks import check, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Llama 4's image encoder and adapter."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    rope_theta: float
    norm_eps: float
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int
    image_token_id: int
    begin_image_token_id: int
    end_image_token_id: int

    def __post_init__(self) -> None:
        check_positive(
            self,
            *("hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size", "num_channels", "rope_theta"),
            *("norm_eps", "pixel_shuffle_ratio", "projector_input_dim", "projector_output_dim", "vision_output_dim"),
        )
        for whole, part in (("hidden_size", "num_heads"), ("image_size", "patch_size")):
            a, b = getattr(self, whole), getattr(self, part)
            check(a % b == 0, f"vision {whole} is {a}; expected a multiple of {part}, which is {b}")
