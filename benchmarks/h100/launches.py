"""What a decode step launches: kernels, CUDA graphs, and inner loops in which the host waits for the device at every turn.

This is read off the lists of thunks that XLA dumps for a program of two layers and one of three: the difference is one layer.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
from pathlib import Path

import jax.numpy as jnp

from benchmarks.h100.bench import Bench, Record, eagle3_head, llama_and_head
from benchmarks.h100.errors import NotHere
from l4jax.compiled import Call
from l4jax.decoding.plan import Speculation
from l4jax.planning.compile import AbstractModel, first_layers
from sharding.mesh import MeshSpec

# XLA writes the second only if its passes change the first, by gathering thunks into CUDA graphs.
THUNKS = "*thunk_sequence.txt"
CHANGED = "*thunk_sequence_after_thunk_passes.txt"
ROWS, CAPACITY = 1, 8320


def measure(bench: Bench, record: Record) -> None:
    """Launches of a decode step, and of a round of speculation by the tree ``eagle26``, of one row of Llama 3.1 8B."""
    if bench.device.platform == "cpu":
        raise NotHere("a CPU has no kernels to launch; expected a GPU")
    config, _ = llama_and_head(bench.sizes)
    counted: dict[str, list[Launches]] = {"decode": [], "eagle26": []}
    for layers in (2, 3):
        short = first_layers(config, layers)
        head = eagle3_head(short, bench.sizes.draft_vocab_size, **bench.sizes.head)
        model = AbstractModel(short, MeshSpec(), [bench.device], jnp.dtype(bench.sizes.dtype), head)
        plan = Speculation.parse("tree:eagle26")
        assert plan is not None
        calls = {"decode": model.decode_call(ROWS, CAPACITY), "eagle26": model.speculate_call(ROWS, CAPACITY, plan)}
        for name, call in calls.items():
            counted[name].append(compiled(call, bench.folder / "thunks" / f"{name}-{layers}"))
    for name, (two, three) in counted.items():
        record(name, {"two_layers": dataclasses.asdict(two), "a_layer": dataclasses.asdict(three - two), "layers": config.num_layers})


@dataclasses.dataclass(frozen=True)
class Launches:
    """The launches of one turn of a program's outermost loop: of a decode step, or a round. Every branch of a conditional counts.

    ``kernels``: kernels and copies, ``graphs``: CUDA graphs that hold them, ``single``: those that are launched one by one;
    ``loops``: inner loops whose length the device decides. ``kernels_a_turn`` and ``graphs_a_turn``: of one turn of every inner loop.
    """

    kernels: int
    graphs: int
    single: int
    loops: int
    kernels_a_turn: int
    graphs_a_turn: int

    def __sub__(self, other: Launches) -> Launches:
        return Launches(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @classmethod
    def of(cls, text: str) -> Launches:
        """Count the thunks of one program: one on each line, indented below the loop, graph or branch that it belongs to."""
        counts: collections.Counter[tuple[str, int]] = collections.Counter()
        above: list[tuple[int, str]] = []
        for indent, kind in re.findall(r"^( *)\d+: k(\w+)", text, re.MULTILINE):
            while above and above[-1][0] >= len(indent):
                above.pop()
            loops = sum(outer == "While" for _, outer in above)
            if kind in ("While", "CommandBuffer", "Conditional", "Sequential"):
                above.append((len(indent), kind))
                counts[kind, loops] += 1
            else:
                counts["kernel", loops] += 1
                counts["single", loops] += not any(outer == "CommandBuffer" for _, outer in above)
        deeper = {name: sum(n for (kind, loops), n in counts.items() if kind == name and loops > 1) for name in ("kernel", "CommandBuffer")}
        return cls(
            kernels=counts["kernel", 1],
            graphs=counts["CommandBuffer", 1],
            single=counts["single", 1],
            loops=counts["While", 1],
            kernels_a_turn=deeper["kernel"],
            graphs_a_turn=deeper["CommandBuffer"],
        )


def compiled(call: Call, folder: Path) -> Launches:
    """Compile a program, let XLA dump it into the folder, which is emptied first, and count its launches."""
    shutil.rmtree(folder, ignore_errors=True)
    call.lower().compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    # Small programs that XLA compiles on the way are dumped too.
    dumped = list(folder.glob(CHANGED)) or list(folder.glob(THUNKS))
    if not dumped:
        raise NotImplementedError(f"this version of JAX does not dump {THUNKS}; expected 0.11.2 or 0.12")
    return Launches.of(max(dumped, key=lambda file: file.stat().st_size).read_text(encoding="utf-8"))
