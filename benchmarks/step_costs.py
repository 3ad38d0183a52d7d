"""What a step of decoding, or a round of speculation, launches and moves on H100s, and how long that is predicted to take.

    python benchmarks/step_costs.py MODEL [--mesh tensor=8] [--rows 1 32] [--speculation chain:3] [--list]

``MODEL``: a name of ``configs/models``. Needs XLA's CUDA compiler (``pip install 'l4jax[plan]'``), no GPU; nothing is run. A model's first
layers are compiled in bfloat16 for rows of 8K cached tokens, and every kernel is read off the program. Layers of one kind repeat, so each
compiled layer stands for several. Rounds have an EAGLE-3 head with a vocabulary of 32,000.

"HBM bytes / least" are the bytes that kernels move, over the least that must be moved. The predicted milliseconds are the sum of five
parts, priced by ``l4jax/planning/estimate.py``: a prediction, not a measurement. ``--list`` prints each layer's kernels.
"""

from __future__ import annotations

import argparse
import json
import re

import jax.numpy as jnp

from benchmarks.h100.bench import eagle3_head
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation
from l4jax.planning.compile import AbstractModel, CompiledProgram, first_layers
from l4jax.planning.estimate import Estimate, Step, estimate, representatives
from l4jax.planning.ledger import Launch
from l4jax.planning.target import h100_devices
from sharding.mesh import MeshSpec

SEEN, CAPACITY = 8192, 8320
"""Cached tokens of each row, and tokens that it has room for."""
PARTS = ("matrices", "attention", "collectives", "small kernels", "gaps")
DRAFT_VOCABULARY = 32000


def layer_kernels(program: CompiledProgram, config: ModelConfig) -> dict[str, list[str]]:
    """Of one layer of each kind, its kernels in the order in which the device gets them: our kernel's name, or XLA's kind of fusion."""
    return {
        f"{'RoPE' if rope else 'NoPE'}, {'experts' if experts else 'dense'}": [
            _name(launch) for launch in program.ledger.iteration if launch.layer == layer
        ]
        for (rope, experts), layer in representatives(config).items()
    }


def _name(launch: Launch) -> str:
    kind = launch.kernel or re.sub(r"[._\d]+$", "", launch.name)
    return f"{kind} ({launch.collective.strategy} {launch.collective.kind})" if launch.collective else kind


def price(name: str, spec: MeshSpec, rows: int, plan: Speculation | None) -> tuple[Estimate, dict[str, list[str]]]:
    """Compile a program of ``rows`` rows over all devices (``plan``: None for decoding), and price it; also :func:`layer_kernels`."""
    whole_config = config_from_hf(json.loads((configs_path() / "models" / f"{name}.json").read_text(encoding="utf-8")))
    # At least two layers of each kind, and one more: Llama 4's kinds repeat after four layers.
    config = first_layers(whole_config, min(whole_config.num_layers, 9 if whole_config.moe else 3))

    def abstract(config: ModelConfig) -> AbstractModel:
        drafter = eagle3_head(config, DRAFT_VOCABULARY) if plan else None
        return AbstractModel(config, spec, h100_devices(spec.size), jnp.dtype(jnp.bfloat16), drafter)

    model, whole = abstract(config), abstract(whole_config)
    program = model.speculate(rows, CAPACITY, plan) if plan else model.decode(rows, CAPACITY, SamplingParams())
    nodes, levels = (plan.tree.size, plan.tree.depth) if plan else (1, 0)
    return estimate(program, config, whole, Step(rows, SEEN, nodes, levels)), layer_kernels(program, config)


def main() -> None:
    """Parse the command line, compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(file.stem for file in (configs_path() / "models").glob("*.json")), metavar="MODEL")
    parser.add_argument("--mesh", default="tensor=1")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--speculation", help="a plan such as chain:3; without it, decoding")
    parser.add_argument("--list", action="store_true", help="print the kernels of a layer of each kind")
    arguments = parser.parse_args()
    try:
        print_costs(arguments)
    except ValueError as error:
        parser.error(str(error))


def print_costs(arguments: argparse.Namespace) -> None:
    """Print the table. Raises ValueError for a mesh or a plan that the model cannot have, and without XLA's CUDA compiler."""
    spec, plan = MeshSpec.parse(arguments.mesh), arguments.speculation and Speculation.parse(arguments.speculation)
    if unfit := [rows for rows in arguments.rows if rows < 1 or rows % spec.data]:
        raise ValueError(f"rows are {unfit[0]}; expected a multiple of {spec.data}, the ranks along data, and at least 1")
    of = f"{arguments.model}, `{arguments.mesh}`, {arguments.speculation or 'decoding'}"
    columns = ["rows", "kernels a layer", "HBM bytes / least", "predicted ms", f"ms of {', '.join(PARTS)}", "HBM bound / predicted"]
    print(f"| {SEEN} cached tokens a row | {' | '.join(columns)} |")
    print("|---" * 7 + "|")
    for rows in arguments.rows:
        found, kernels = price(arguments.model, spec, rows, plan)
        counts = ", ".join(f"{len(names)} ({kind})" for kind, names in kernels.items())
        parts = ", ".join(f"{1e3 * found.seconds.get(part, 0.0):.2f}" for part in PARTS)
        ratio, fraction = found.nbytes / found.least_bytes, found.bound_seconds / found.total_seconds
        print(
            f"| {of} | {rows} | {counts} | {ratio:.2f} | {1e3 * found.total_seconds:.2f} | {parts} | {100 * fraction:.0f} % |", flush=True
        )
        for kind, names in kernels.items() if arguments.list else ():
            print(f"\n{kind}: {', '.join(names)}\n")


if __name__ == "__main__":
    main()
