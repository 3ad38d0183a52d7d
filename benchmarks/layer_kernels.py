"""Prints the kernels that one layer of a decode step launches on an H100, read off the compiled program. No GPU is needed.

``python benchmarks/layer_kernels.py llama-3.1-8b --mesh tensor=1 --rows 1 32``; models are those of ``configs/models``.
"""

from __future__ import annotations

import argparse
import json
import re

import jax.numpy as jnp

from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.decoding.params import SamplingParams
from l4jax.planning.compile import AbstractModel, CompiledProgram, first_layers
from l4jax.planning.target import h100_devices
from sharding.mesh import MeshSpec

CAPACITY = 8320
"""Tokens that a row has room for: 8K and a page."""
OURS = ("add_norm", "heads", "tree_attention", "merge_splits", "experts_gate_up", "experts_down")


def layer_kernels(program: CompiledProgram, layer: int) -> list[str]:
    """The kernels of a layer in the order in which the device gets them: our kernel's name, or XLA's kind of fusion.

    A layer's first kernel is the norm before its attention.
    """
    launches = program.ledger.launches
    first, after = (
        next(i for i, (_, scope, _) in enumerate(launches) if f"/layer_{of}/attention/add_norm/" in scope) for of in (layer, layer + 1)
    )
    return [_said(*launch) for launch in launches[first:after]]


def _said(opcode: str, scope: str, name: str) -> str:
    if opcode == "custom-call":
        return next((own for own in OURS if f"/{own}/" in scope), "heads")
    kind = re.sub(r"[._\d]+$", "", name)
    return f"{kind} (sum over devices)" if scope.endswith("psum") else kind


def main() -> None:
    """Compile the first layers and print a list for each kind of layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mesh", default="tensor=1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    whole = config_from_hf(json.loads((configs_path() / "models" / f"{arguments.model}.json").read_text(encoding="utf-8")))
    spec = MeshSpec.parse(arguments.mesh)
    # The first layer has a norm of its own, and the last one gives the output: the kinds are read off those between them.
    config = first_layers(whole, min(whole.num_layers, 6))
    for rows in arguments.rows:
        model = AbstractModel(config, spec, h100_devices(spec.size), jnp.dtype(jnp.bfloat16))
        program = model.decode(rows, CAPACITY, SamplingParams())
        printed: set[tuple[bool, bool]] = set()
        for layer in range(1, config.num_layers - 1):
            kind = config.rope_layers[layer], bool(config.moe and config.moe.moe_layers[layer])
            if kind not in printed:
                printed.add(kind)
                kernels = layer_kernels(program, layer)
                said = f"{'RoPE' if kind[0] else 'NoPE'}, {'experts' if kind[1] else 'dense'}"
                print(f"{arguments.model} on {arguments.mesh}, rows: {rows}, {said}: {len(kernels)} kernels\n  {', '.join(kernels)}")


if __name__ == "__main__":
    main()
