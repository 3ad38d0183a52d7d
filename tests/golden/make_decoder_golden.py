"""Make the decoder goldens in ``data/``: small random models as Hugging Face folders, with transformers' logits for them.

Run it in an environment of its own, because torch is no dependency of this project::

    python3.11 -m venv torchenv
    torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    torchenv/bin/python tests/golden/make_decoder_golden.py

Everything is float32 on the CPU. A golden folder is a complete checkpoint (``config.json``, safetensors) with
``golden.npz``: ``ids_0``, ``logits_0``, ``ids_1``, ... of sequences of unequal length, each run alone, without padding and
without a cache. A variant shares the weights: ``config_chunk16.json`` takes the place of ``config.json``, and its logits
are in ``golden_chunk16.npz``.

The script refuses to write a golden that would prove little: a router decision closer than ``MIN_ROUTER_GAP`` in any layer
of any token could flip with the order of a sum, and each feature of the architecture, done wrongly, must move the logits by
more than ``MIN_EFFECT`` of the largest one in every sequence. It prints how much each of them does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextAttention, Llama4TextL2Norm, Llama4TextMoe
from transformers.utils import logging

VOCAB = 96
LENGTHS = (70, 64, 41)
MIN_ROUTER_GAP = 1e-3
MIN_EFFECT = 1e-2

Config = dict[str, Any]
Logits = list[np.ndarray]

# At head_dim 8 and theta 500000 the wavelengths are 6.3, 167, 4443 and 118000 tokens. Only the first two turn visibly within
# one chunk, or for Llama 3 within one sequence. The original lengths below put the boundaries of scaling between these two, so
# that of the visible frequencies one is kept and one is scaled (with factors 8 / 1 / 4, also blended).
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def llama4_text(**overrides: Any) -> Config:
    """Scout in small: every layer has experts, QK-norm, scaled RoPE; the feed-forward widths follow Meta's rule for this width."""
    values: Config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "attn_scale": 0.1,
        "rope_parameters": SCOUT_ROPE,
        "tie_word_embeddings": False,
    }
    return {**values, **overrides}


def maverick_text(**overrides: Any) -> Config:
    """Maverick in small: experts in every second layer, no QK-norm, no RoPE scaling."""
    values: Config = {"num_key_value_heads": 1, "num_local_experts": 8, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    return llama4_text(**values, rope_parameters=PLAIN_ROPE, **overrides)


def llama3(**overrides: Any) -> Config:
    """Llama 3.1 in small."""
    values: Config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": False,
    }
    return {**values, **overrides}


def multimodal() -> Config:
    """Llama 4's wrapper around a text decoder and a vision encoder that sees one 28 x 28 image as one token."""
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "intermediate_size": 64,
        "vision_output_dim": 24,
        "image_size": 28,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 24,
        "projector_output_dim": 24,
    }
    text = llama4_text(num_hidden_layers=4, num_local_experts=3, interleave_moe_layer_step=2)
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": VOCAB - 1,
        "boi_token_index": VOCAB - 2,
        "eoi_token_index": VOCAB - 3,
    }


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Something that an implementation may get wrong: other config values, or other code, for the same weights."""

    what: str
    overrides: Callable[[PreTrainedModel], Config] = lambda model: {}
    patch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint to make. ``variants``: suffix -> config values that differ from the folder's own."""

    name: str
    architecture: str
    config: Config
    variants: dict[str, Config]
    mistakes: tuple[Mistake, ...]
    max_shard_size: str = "50GB"


def text_config(model: PreTrainedModel) -> Any:
    """The decoder's own config, also inside a multimodal wrapper."""
    return model.config.get_text_config()


def flipped_layer_types(model: PreTrainedModel) -> Config:
    """Chunked attention in the NoPE layers and full attention in the RoPE layers."""
    other = {"chunked_attention": "full_attention", "full_attention": "chunked_attention"}
    return {"layer_types": [other[kind] for kind in text_config(model).layer_types]}


def moe_with(score: Callable[[torch.Tensor], torch.Tensor], *, on_input: bool) -> contextlib.AbstractContextManager[Any]:
    """Routed experts whose score is another function of the router's logits [M, E], or multiplies their output."""

    def forward(self: Llama4TextMoe, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_MD = hidden_states.reshape(-1, self.hidden_dim)
        _, logits_ME = self.router(x_MD)
        chosen_ME = torch.zeros_like(logits_ME).scatter_(1, logits_ME.argmax(1, keepdim=True), 1.0)
        scores_EM1 = (score(logits_ME) * chosen_ME).T[..., None]
        x_EMD = x_MD[None].expand(self.num_experts, -1, -1)
        if on_input:
            routed_EMD = self.experts((x_EMD * scores_EM1).reshape(-1, self.hidden_dim)).reshape(x_EMD.shape)
        else:
            routed_EMD = scores_EM1 * self.experts(x_EMD.reshape(-1, self.hidden_dim)).reshape(x_EMD.shape)
        return self.shared_expert(x_MD) + routed_EMD.sum(0), logits_ME

    return mock.patch.object(Llama4TextMoe, "forward", forward)


def norm_with(norm: Callable[[Llama4TextL2Norm, torch.Tensor], torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
    """QK-norm by another function of [..., head_dim]."""
    return mock.patch.object(Llama4TextL2Norm, "forward", norm)


def norm_everywhere() -> contextlib.AbstractContextManager[Any]:
    """QK-norm in the NoPE layers too."""
    init = Llama4TextAttention.__init__

    def init_with_norm(self: Llama4TextAttention, config: Llama4TextConfig, layer_idx: int) -> None:
        init(self, config, layer_idx)
        self.qk_norm = Llama4TextL2Norm(config.rms_norm_eps)

    return mock.patch.object(Llama4TextAttention, "__init__", init_with_norm)


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE that pairs dimension i with i + head_dim / 2, which is right for Llama 3's HF weights and wrong for Llama 4's."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.real[:, :, None], angles.imag[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def half_split_rope() -> contextlib.AbstractContextManager[Any]:
    """Llama 4 with the wrong pairing of dimensions."""
    return mock.patch(
        "transformers.models.llama4.modeling_llama4.apply_rotary_emb",
        lambda q, k, angles: (rotate_halves(q, angles), rotate_halves(k, angles)),
    )


CHUNKS = (
    Mistake("no chunks: RoPE layers attend to everything", lambda m: {"attention_chunk_size": 4096}),
    Mistake("chunks in the NoPE layers instead", flipped_layer_types),
    Mistake("chunks of twice the size", lambda m: {"attention_chunk_size": 2 * text_config(m).attention_chunk_size}),
)
LLAMA4 = (
    *CHUNKS,
    Mistake("no NoPE: RoPE in every layer", lambda m: {"no_rope_layers": [1] * text_config(m).num_hidden_layers}),
    Mistake("RoPE pairs dimensions i and i + head_dim / 2", patch=half_split_rope),
    Mistake("no attention temperature", lambda m: {"attn_temperature_tuning": False}),
    Mistake("expert scores multiply the output", patch=lambda: moe_with(torch.sigmoid, on_input=False)),
    Mistake("expert scores by softmax", patch=lambda: moe_with(lambda logits: logits.softmax(-1), on_input=True)),
    Mistake("no expert scores", patch=lambda: moe_with(torch.ones_like, on_input=True)),
)
SCOUT = (
    *LLAMA4,
    Mistake("no QK-norm", lambda m: {"use_qk_norm": False}),
    Mistake("QK-norm in the NoPE layers too", patch=norm_everywhere),
    Mistake("QK-norm to unit length, not unit mean square", patch=lambda: norm_with(lambda _, x: torch.nn.functional.normalize(x, dim=-1))),
    Mistake(
        "QK-norm over all heads together",
        patch=lambda: norm_with(lambda s, x: x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + s.eps)),
    ),
    Mistake("no RoPE scaling", lambda m: {"rope_parameters": PLAIN_ROPE}),
    Mistake("Llama 3's RoPE scaling, 8 / 1 / 4", lambda m: {"rope_parameters": {**SCOUT_ROPE, "factor": 8.0, "high_freq_factor": 4.0}}),
)
MAVERICK = (
    *LLAMA4,
    Mistake("with QK-norm", lambda m: {"use_qk_norm": True}),
    Mistake("with Scout's RoPE scaling", lambda m: {"rope_parameters": SCOUT_ROPE}),
)
LLAMA3 = (
    Mistake("no RoPE scaling", lambda m: {"rope_parameters": PLAIN_ROPE}),
    Mistake("RoPE scaling without the blended zone", lambda m: {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}),
)

GOLDENS = (
    Golden("scout", "llama4_text", llama4_text(), {"chunk16": {"attention_chunk_size": 16}}, SCOUT),
    Golden("maverick", "llama4_text", maverick_text(), {"chunk16": {"attention_chunk_size": 16}}, MAVERICK),
    Golden("multimodal", "llama4", multimodal(), {}, SCOUT),
    # Two shards with an index, as large checkpoints have.
    Golden("llama3", "llama", llama3(), {}, LLAMA3, max_shard_size="150KB"),
    # Heads that are together wider than the model.
    Golden("llama3_tied", "llama", llama3(num_attention_heads=8, tie_word_embeddings=True), {}, LLAMA3),
)


def build(architecture: str, config: Config) -> PreTrainedModel:
    """A model of transformers with its own random weights."""
    config = copy.deepcopy(config)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**config)).eval()
    if architecture == "llama4_text":
        return Llama4ForCausalLM(Llama4TextConfig(**config)).eval()
    text, vision = Llama4TextConfig(**config.pop("text_config")), Llama4VisionConfig(**config.pop("vision_config"))
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, **config)).eval()


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Lively weights everywhere. (transformers leaves the experts at zero.)

    Queries and keys are drawn larger, so that attention is far from uniform and what changes its scores shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            is_norm_scale = "norm" in name and name.endswith("weight")
            weight.copy_(1 + 0.25 * noise if is_norm_scale else 0.1 * noise)
        elif "embed_tokens" in name or "positional_embedding" in name:
            weight.copy_(noise)
        else:
            # Experts are stored [expert, in, out], everything else [out, in].
            fan_in = weight.shape[1] if weight.ndim == 3 else weight.shape[-1]
            gain = 2.0 if "q_proj" in name or "k_proj" in name or "router" in name else 1.0
            weight.copy_(gain * noise / math.sqrt(fan_in))


def sequences(seed: int) -> list[np.ndarray]:
    """Token ids; the special ones at either end of the vocabulary are left out."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB - 4, n).astype(np.int32) for n in LENGTHS]


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[np.ndarray]) -> Logits:
    """Logits of each sequence, run alone: float32 [T, vocab]."""
    return [model(input_ids=torch.from_numpy(s.astype(np.int64))[None], use_cache=False).logits[0].numpy() for s in ids]


@contextlib.contextmanager
def router_gaps(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collects, while the model runs, each router's smallest distance between its best and second-best logit."""
    gaps: list[float] = []

    def record(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        best = outputs[1].topk(2, dim=-1).values
        gaps.append(float((best[:, 0] - best[:, 1]).min()))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, Llama4Router)]
    yield gaps
    for hook in hooks:
        hook.remove()


def with_text_values(architecture: str, config: Config, values: Config) -> Config:
    """``config`` with other values for the text decoder."""
    if architecture == "llama4":
        return {**config, "text_config": {**config["text_config"], **values}}
    return {**config, **values}


def variant_models(golden: Golden, seed: int) -> dict[str, PreTrainedModel]:
    """The folder's own model under "", and each variant, all with the weights of this seed."""
    base = build(golden.architecture, golden.config)
    draw_weights(base, seed)
    models = {"": base}
    for suffix, values in golden.variants.items():
        models[suffix] = build(golden.architecture, with_text_values(golden.architecture, golden.config, values))
        models[suffix].load_state_dict(base.state_dict())
    return models


def clear_routing(golden: Golden) -> tuple[int, float, dict[str, PreTrainedModel], dict[str, Logits]]:
    """The first seed whose router decisions are all clear, the smallest gap, and the models and logits of that seed."""
    for seed in itertools.count():
        models = variant_models(golden, seed)
        logits, smallest = {}, math.inf
        for suffix, model in models.items():
            with router_gaps(model) as gaps:
                logits[suffix] = logits_of(model, sequences(seed))
            smallest = min([smallest, *gaps])
        if smallest > MIN_ROUTER_GAP:
            return seed, smallest, models, logits
    raise AssertionError


def effect(right: Logits, wrong: Logits) -> float:
    """Largest change relative to the largest logit, in the sequence where it is smallest."""
    return min(float(np.abs(w - r).max() / np.abs(r).max()) for r, w in zip(right, wrong, strict=True))


def check_mistakes(golden: Golden, model: PreTrainedModel, ids: list[np.ndarray], right: Logits) -> None:
    """Print what each mistake does to the logits, and refuse a golden that would not notice one."""
    for mistake in golden.mistakes:
        config = model.config.to_dict()
        text = config["text_config"] if golden.architecture == "llama4" else config
        text.update(mistake.overrides(model))
        with mistake.patch():
            wrong = type(model)(type(model.config).from_dict(config)).eval()
            wrong.load_state_dict(model.state_dict())
            moved = effect(right, logits_of(wrong, ids))
        print(f"    {moved:8.4f}  {mistake.what}")
        if moved <= MIN_EFFECT:
            raise SystemExit(
                f"{golden.name}: '{mistake.what}' moves the logits by {moved:.2e} of the largest; expected more than {MIN_EFFECT}"
            )


def published_spelling(config: Config) -> Config:
    """The same values as checkpoints of 2024 and 2025 spell them: rope_theta and rope_scaling, torch_dtype, derived lists left out."""
    config = {k: v for k, v in config.items() if k not in ("layer_types", "moe_layers")}
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if "no_rope_layers" in config:
        config["no_rope_layers"] = []
    return config


def save(golden: Golden, folder: Path, models: dict[str, PreTrainedModel], ids: list[np.ndarray], logits: dict[str, Logits]) -> None:
    """Write the folder, then read every variant back with transformers and compare its logits to the bit."""
    shutil.rmtree(folder, ignore_errors=True)
    models[""].save_pretrained(folder, max_shard_size=golden.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for suffix in models:
        tail = f"_{suffix}" if suffix else ""
        arrays = {f"ids_{i}": s for i, s in enumerate(ids)} | {f"logits_{i}": x for i, x in enumerate(logits[suffix])}
        np.savez_compressed(folder / f"golden{tail}.npz", **arrays)
        if suffix:
            config = json.loads((folder / "config.json").read_text()) | golden.variants[suffix]
            (folder / f"config{tail}.json").write_text(json.dumps(published_spelling(config), indent=2, sort_keys=True) + "\n")
        with tempfile.TemporaryDirectory() as copied:
            for file in folder.glob("model*"):
                shutil.copy(file, copied)
            shutil.copy(folder / f"config{tail}.json", Path(copied, "config.json"))
            auto = AutoModelForImageTextToText if AutoConfig.from_pretrained(copied).model_type == "llama4" else AutoModelForCausalLM
            read = logits_of(auto.from_pretrained(copied, dtype=torch.float32).eval(), ids)
        assert all(np.array_equal(a, b) for a, b in zip(read, logits[suffix], strict=True)), (golden.name, suffix)


def main() -> None:
    """Make every golden, or stop at the first that would prove little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write to (default: %(default)s)")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    # transformers warns that low and high frequency factor are equal, as they are in Scout.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for golden in GOLDENS:
        seed, gap, models, logits = clear_routing(golden)
        ids = sequences(seed)
        routing = f", smallest router gap {gap:.2e}" if math.isfinite(gap) else ""
        print(f"{golden.name}: seed {seed}, {models[''].num_parameters()} parameters{routing}")
        for suffix, model in models.items():
            largest = max(float(np.abs(x).max()) for x in logits[suffix])
            print(f"  {suffix or 'config.json'}: largest logit {largest:.2f}; each mistake moves the logits, relative to it, by")
            check_mistakes(golden, model, ids, logits[suffix])
        save(golden, out / golden.name, models, ids, logits)


if __name__ == "__main__":
    main()
