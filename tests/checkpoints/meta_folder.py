"""Writes Meta folders: the goldens' weights under Meta's names, cut into model-parallel shards, as ``torch.save`` files.

No torch is needed: pickle writes a global by its module and name, so stand-ins under torch's names give the same bytes.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

_STORAGE_NAMES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def _stand_ins() -> dict[str, types.ModuleType]:
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGE_NAMES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*args): ...", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    return {"torch": torch, "torch._utils": utils}


class _Tensor:
    def __init__(self, key: str, array: np.ndarray, modules: dict[str, types.ModuleType]) -> None:
        self.key, self.array, self.modules = key, array, modules

    def __reduce__(self):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        storage = _Storage(self.key, self.array)
        return self.modules["torch._utils"]._rebuild_tensor_v2, (storage, 0, self.array.shape, strides, False, collections.OrderedDict())


class _Storage:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


def write_torch_file(path: Path, tensors: dict[str, object], *, name: str = "archive", byteorder: str = "little") -> None:
    """What ``torch.save(tensors, path)`` writes; values that are not arrays are pickled as they are."""
    modules = _stand_ins()
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items() if isinstance(value, np.ndarray)}
    storages = {str(i): array for i, array in enumerate(arrays.values())}
    state = {key: _Tensor(str(list(arrays).index(key)), arrays[key], modules) if key in arrays else value for key, value in tensors.items()}
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, _Storage):
                kind = getattr(modules["torch"], _STORAGE_NAMES[value.array.dtype])
                return "storage", kind, value.key, "cpu", value.array.size
            return None

    before = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)
    try:
        Pickler(stream, protocol=2).dump(collections.OrderedDict(state))
    finally:
        for module, old in before.items():
            sys.modules.pop(module) if old is None else sys.modules.update({module: old})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", stream.getvalue())
        archive.writestr(f"{name}/byteorder", byteorder)
        for key, array in storages.items():
            archive.writestr(f"{name}/data/{key}", array.tobytes())
        archive.writestr(f"{name}/version", "3\n")


def write_meta_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int) -> None:
    """A Hugging Face model (its ``config.json`` and tensors) as Meta would have published it."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(_params(config)))
    (folder / "USE_POLICY.md").write_text("not read by the converter")
    is_llama4 = "text_config" in config or config["model_type"] == "llama4_text"
    text = config.get("text_config", config)
    tensors = {key.removeprefix("language_model."): value for key, value in tensors.items()}
    for shard in range(shards):
        cut = _llama4(tensors, text, shard, shards) if is_llama4 else _llama3(tensors, text, shard, shards)
        write_torch_file(folder / f"consolidated.{shard:02}.pth", cut)


def _params(config: dict) -> dict:
    text = config.get("text_config", config)
    common = {"dim": text["hidden_size"], "n_layers": text["num_hidden_layers"], "n_heads": text["num_attention_heads"]}
    common |= {"n_kv_heads": text["num_key_value_heads"], "vocab_size": -1, "norm_eps": text["rms_norm_eps"], "rope_theta": 500000.0}
    if "num_local_experts" not in text:
        return common | {"multiple_of": 16, "ffn_dim_multiplier": 0.94, "use_scaled_rope": True, "rope_scaling_factor": 8.0}
    step = 2 if text.get("interleave_moe_layer_step") == 2 else 1
    common |= {"head_dim": text["head_dim"], "multiple_of": 48, "ffn_dim_multiplier": 1.0, "ffn_exp": 4.0, "nope_layer_interval": 4}
    common |= {"attention_chunk_size": text["attention_chunk_size"], "use_qk_norm": text["use_qk_norm"], "attn_temperature_tuning": True}
    common["moe_args"] = {"num_experts": text["num_local_experts"], "interleave_moe_layer_step": step, "top_k": 1}
    if "vision_config" in config:
        vision = config["vision_config"]
        square = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
        common["vision_args"] = {
            **{key: {"height": size, "width": size} for key, size in square.items()},
            "dim": vision["hidden_size"],
            "n_layers": vision["num_hidden_layers"],
            "n_heads": vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "output_dim": vision["vision_output_dim"],
            "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
        }
    return common


def _heads(weight: np.ndarray, heads: int, shard: int, shards: int) -> np.ndarray:
    """A shard's rows of a projection by heads; with more shards than heads, neighbours have the same head."""
    rows = weight.reshape(heads, -1, weight.shape[1])
    mine = np.array_split(rows, shards)[shard] if heads >= shards else rows[shard * heads // shards][None]
    return mine.reshape(-1, weight.shape[1])


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows from Hugging Face's half-split RoPE order to pairs, one head after another."""
    order = np.arange(head_dim).reshape(2, -1).T.reshape(-1)
    return weight.reshape(-1, head_dim, weight.shape[1])[:, order].reshape(weight.shape)


def _llama3(hf: dict[str, np.ndarray], text: dict, shard: int, shards: int) -> dict[str, object]:
    def cut(weight: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.split(weight, shards, axis)[shard]

    H, K, h = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    state: dict[str, object] = {"tok_embeddings.weight": cut(hf["model.embed_tokens.weight"]), "norm.weight": hf["model.norm.weight"]}
    state |= {"output.weight": cut(hf["lm_head.weight"]), "rope.freqs": np.ones(3, np.float32)}
    for i in range(text["num_hidden_layers"]):
        p, q = f"model.layers.{i}.", f"layers.{i}."
        state[f"{q}attention.wq.weight"] = _heads(_interleaved(hf[f"{p}self_attn.q_proj.weight"], h), H, shard, shards)
        state[f"{q}attention.wk.weight"] = _heads(_interleaved(hf[f"{p}self_attn.k_proj.weight"], h), K, shard, shards)
        state[f"{q}attention.wv.weight"] = _heads(hf[f"{p}self_attn.v_proj.weight"], K, shard, shards)
        state[f"{q}attention.wo.weight"] = cut(hf[f"{p}self_attn.o_proj.weight"], 1)
        state[f"{q}feed_forward.w1.weight"] = cut(hf[f"{p}mlp.gate_proj.weight"])
        state[f"{q}feed_forward.w3.weight"] = cut(hf[f"{p}mlp.up_proj.weight"])
        state[f"{q}feed_forward.w2.weight"] = cut(hf[f"{p}mlp.down_proj.weight"], 1)
        state[f"{q}attention_norm.weight"] = hf[f"{p}input_layernorm.weight"]
        state[f"{q}ffn_norm.weight"] = hf[f"{p}post_attention_layernorm.weight"]
    return state


def _llama4(hf: dict[str, np.ndarray], text: dict, shard: int, shards: int) -> dict[str, object]:
    def cut(weight: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.split(weight, shards, axis)[shard]

    H, K = text["num_attention_heads"], text["num_key_value_heads"]
    state: dict[str, object] = {"tok_embeddings.weight": cut(hf["model.embed_tokens.weight"]), "norm.weight": hf["model.norm.weight"]}
    state["output.weight"] = cut(hf["lm_head.weight"])
    for i in range(text["num_hidden_layers"]):
        p, q = f"model.layers.{i}.", f"layers.{i}."
        projections = [_heads(hf[f"{p}self_attn.{x}_proj.weight"], n, shard, shards) for x, n in (("q", H), ("k", K), ("v", K))]
        state[f"{q}attention.wqkv.weight"] = np.concatenate(projections)
        state[f"{q}attention.wqkv.layer_norm_weight"] = hf[f"{p}input_layernorm.weight"]
        state[f"{q}attention.wqkv._extra_state"] = io.BytesIO(b"opaque")
        state[f"{q}attention.wo.weight"] = cut(hf[f"{p}self_attn.o_proj.weight"], 1)
        norm, f, g = hf[f"{p}post_attention_layernorm.weight"], f"{q}feed_forward.", f"{p}feed_forward."
        if f"{g}router.weight" not in hf:
            state[f"{f}mlp.layer_norm_weight"] = norm
            state[f"{f}mlp.fc1_weight"] = np.concatenate([cut(hf[f"{g}gate_proj.weight"]), cut(hf[f"{g}up_proj.weight"])])
            state[f"{f}mlp.fc2_weight"] = cut(hf[f"{g}down_proj.weight"], 1)
            continue
        gate, up = np.split(hf[f"{g}experts.gate_up_proj"], 2, -1)
        E, D, F = gate.shape
        state[f"{f}norm.weight"] = norm
        state[f"{f}router_DE"] = hf[f"{g}router.weight"].T
        state[f"{f}experts.moe_w_in_eD_F"] = cut(gate.reshape(E * D, F), 1)
        state[f"{f}experts.moe_w_swiglu_eD_F"] = cut(up.reshape(E * D, F), 1)
        state[f"{f}experts.moe_w_out_eF_D"] = cut(hf[f"{g}experts.down_proj"], 1).reshape(-1, D)
        state[f"{f}w_in_shared_FD.weight"] = cut(hf[f"{g}shared_expert.gate_proj.weight"])
        state[f"{f}w_swiglu_FD.weight"] = cut(hf[f"{g}shared_expert.up_proj.weight"])
        state[f"{f}w_out_shared_DF.weight"] = cut(hf[f"{g}shared_expert.down_proj.weight"], 1)
        state[f"{f}global_gate_stats_3E"] = np.zeros((3, E), np.float32)
    return state | _vision(hf, cut)


def _vision(hf: dict[str, np.ndarray], cut) -> dict[str, object]:
    names = {
        "vision_model.patch_embedding.linear.weight": ("vision_embeddings.vision_encoder.conv1._linear.weight", 0),
        "vision_model.class_embedding": ("vision_embeddings.vision_encoder.class_embedding", None),
        "vision_model.positional_embedding_vlm": ("vision_embeddings.vision_encoder.positional_embedding_vlm", None),
        "vision_model.vision_adapter.mlp.fc1.weight": ("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
        "vision_model.vision_adapter.mlp.fc2.weight": ("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
        "multi_modal_projector.linear_1.weight": ("vision_projection.weight", 0),
    }
    for hf_name, name in (("layernorm_pre", "ln_pre"), ("layernorm_post", "ln_post")):
        for part in ("weight", "bias"):
            names[f"vision_model.{hf_name}.{part}"] = (f"vision_embeddings.vision_encoder.{name}.{part}", None)
    blocks = {f"self_attn.{x}_proj": (f"attn.w{x}", 0) for x in "qkv"} | {"self_attn.o_proj": ("attn.wo", 1)}
    blocks |= {"mlp.fc1": ("mlp.c_fc", 0), "mlp.fc2": ("mlp.c_proj", 1), "input_layernorm": ("ln_1", None)}
    blocks["post_attention_layernorm"] = ("ln_2", None)
    state: dict[str, object] = {}
    for key, weight in hf.items():
        if key.startswith("vision_model.model.layers."):
            layer, _, rest = key.removeprefix("vision_model.model.layers.").partition(".")
            block, _, part = rest.rpartition(".")
            name, axis = blocks[block]
            target = f"vision_embeddings.vision_encoder.transformer.resblocks.{layer}.{name}.{part}"
            # The bias of a layer that is cut by its inputs is whole in every shard.
            axis = None if part == "bias" and axis == 1 else axis
        elif key in names:
            target, axis = names[key]
        else:
            continue
        state[target] = weight if axis is None else cut(weight, axis)
    return state
