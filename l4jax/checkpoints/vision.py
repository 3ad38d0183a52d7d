"""The image encoder's tensors. They are kept as they are, under their Hugging Face names: nothing computes with them yet."""

from __future__ import annotations

from collections.abc import Mapping

from l4jax.config import VisionConfig

_MODEL = "vision_model."
_META_MODEL = "vision_embeddings.vision_encoder."


def vision_shapes(vision: VisionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the image encoder and its projection to the decoder's width, by its Hugging Face name."""
    W, F, adapter, out = vision.hidden_size, vision.intermediate_size, vision.projector_input_dim, vision.projector_output_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        f"{_MODEL}patch_embedding.linear.weight": (W, vision.num_channels * vision.patch_size**2),
        f"{_MODEL}class_embedding": (W,),
        f"{_MODEL}positional_embedding_vlm": (patches + 1, W),
    }
    norms = ["layernorm_pre.", "layernorm_post."]
    for i in range(vision.num_layers):
        at = f"model.layers.{i}."
        norms += [f"{at}input_layernorm.", f"{at}post_attention_layernorm."]
        for name, rows, columns in (*((f"self_attn.{x}_proj", W, W) for x in "qkvo"), ("mlp.fc1", F, W), ("mlp.fc2", W, F)):
            shapes |= {f"{_MODEL}{at}{name}.weight": (rows, columns), f"{_MODEL}{at}{name}.bias": (rows,)}
    shapes |= {f"{_MODEL}{norm}{part}": (W,) for norm in norms for part in ("weight", "bias")}
    shuffled = round(W / vision.pixel_shuffle_ratio**2)
    shapes |= {f"{_MODEL}vision_adapter.mlp.fc1.weight": (adapter, shuffled), f"{_MODEL}vision_adapter.mlp.fc2.weight": (out, adapter)}
    return shapes | {"multi_modal_projector.linear_1.weight": (hidden_size, vision.vision_output_dim)}


_META_PARTS: Mapping[str, str] = {
    "multi_modal_projector.linear_1": "vision_projection",
    f"{_MODEL}vision_adapter.mlp.fc1": "vision_embeddings.vision_adapter.mlp.c_fc",
    f"{_MODEL}vision_adapter.mlp.fc2": "vision_embeddings.vision_adapter.mlp.c_proj",
    f"{_MODEL}patch_embedding.linear": f"{_META_MODEL}conv1._linear",
    f"{_MODEL}layernorm_pre": f"{_META_MODEL}ln_pre",
    f"{_MODEL}layernorm_post": f"{_META_MODEL}ln_post",
    f"{_MODEL}model.layers": f"{_META_MODEL}transformer.resblocks",
    _MODEL.removesuffix("."): _META_MODEL.removesuffix("."),
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "post_attention_layernorm": "ln_2",
    "input_layernorm": "ln_1",
}


def meta_name(name: str) -> str:
    """Return the name in Meta's checkpoints of a tensor of :func:`vision_shapes`."""
    for ours, theirs in _META_PARTS.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name
