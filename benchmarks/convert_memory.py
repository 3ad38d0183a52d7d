"""Peak memory of a conversion, on a synthetic Llama 4 checkpoint.

    python benchmarks/convert_memory.py [--gigabytes 5] [--dtype float32] [--directory DIR]

Writes a random bfloat16 Hugging Face folder of about that size in shards of 1 GB and converts it in a process of its own. Prints
that process's peak anonymous memory (what it allocated), its peak resident memory (with the mapped pages of files, which the kernel can
drop), and the bound: twice the largest tensor, of the source or the result, plus 1 GB.
Ends with status 1 if the resident memory exceeded the bound. The disk needs room for twice the size; the folder is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, WIDTH, HEADS, EXPERTS, VOCABULARY = 4096, 8192, 32, 20, 65536
CONVERT = "import sys; from l4jax.checkpoints.convert import convert; convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None)"


def write_source(folder: Path, gigabytes: float) -> int:
    """Write a Llama 4 folder of about this size; returns the bytes of its largest tensor, one layer's fused gate and up experts."""
    layer = {f"self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
    layer |= {"feed_forward.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH), "feed_forward.experts.down_proj": (EXPERTS, WIDTH, HIDDEN)}
    layer |= {"feed_forward.router.weight": (EXPERTS, HIDDEN)}
    layer |= {f"feed_forward.shared_expert.{x}_proj.weight": (WIDTH, HIDDEN) for x in ("gate", "up")}
    layer |= {"feed_forward.shared_expert.down_proj.weight": (HIDDEN, WIDTH)}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    outside = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}

    def nbytes(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(2 * int(np.prod(shape)) for shape in shapes.values())

    layers = max(1, round((gigabytes * 1e9 - nbytes(outside)) / nbytes(layer)))
    shapes = outside | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "intermediate_size_mlp": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in shapes.items():
        shard[key] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        if sum(array.nbytes for array in shard.values()) > 1e9:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(2 * int(np.prod(shape)) for shape in shapes.values())


def peak_memory(command: list[str]) -> dict[str, float]:
    """Run a command; returns its highest RssAnon and VmHWM in GB, read from /proc ten times a second, and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            field, _, value = line.partition(":")
            if field in peaks:
                peaks[field] = max(peaks[field], int(value.split()[0]) * 1024)
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit(f"the conversion ended with status {process.returncode}")
    return {name: value / 1e9 for name, value in peaks.items()} | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--dtype", choices=["float32"], help="convert to this dtype")
    parser.add_argument("--directory", help="where to put the temporary folder (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        largest = write_source(source, arguments.gigabytes)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        measured = peak_memory([sys.executable, "-c", CONVERT, str(source), str(Path(temporary) / "converted"), arguments.dtype or ""])
    if arguments.dtype == "float32":
        largest *= 2
    bound = 2 * largest / 1e9 + 1
    print(f"source {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, bound 2 x largest + 1 GB = {bound:.2f} GB")
    print(f"peak anonymous {measured['RssAnon']:.2f} GB, peak resident {measured['VmHWM']:.2f} GB, {measured['seconds']:.0f} s")
    if measured["VmHWM"] > bound:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
