"""Predicts how long a step of decoding, or a round of speculation, takes on H100s.

What a compiled program launches is priced by a few rates: the data sheet's bandwidth, our own measurement of a large matrix product, and
for the rest what others have published for H100s. So the result is a prediction, not a measurement.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from l4jax.cache import is_local
from l4jax.config import ModelConfig
from l4jax.planning.compile import AbstractModel, CompiledProgram
from l4jax.planning.ledger import Collective, Launch
from pallas_kernels.cost import Load, kernel_bytes
from sharding.mesh import MeshSpec

BANDWIDTH = 3.35e12
"""Of an H100's memory, bytes/s (configs/hardware/h100-sxm.textproto)."""
MATRIX_FLOPS = 784e12
"""FLOP/s of a large bfloat16 matrix product (measured: benchmarks/results)."""
MATRIX_FRACTIONS = ((16e6, 0.38), (64e6, 0.63), (200e6, 0.78), (float("inf"), 0.84))
"""(Bytes, fraction of the bandwidth): how fast a product of few rows reads a matrix of up to that many bytes. Medians of three engines'
products (NVIDIA's aiconfigurator, h100_sxm)."""
LEAST_MATRIX_BYTES = 2**20
"""A kernel of XLA's that reads an operand of this size counts as a product: of one row XLA makes some products sums of multiplications."""
ATTENTION_FRACTION = 0.6
"""Of the bandwidth, at which decoding reads cached keys: FlashAttention-3 with pages reaches 0.54 to 0.62."""
GAP_SECONDS = 1.5e-6
"""From one kernel of a CUDA graph to the next that depends on it."""
COLLECTIVE_SECONDS = {
    "one-shot": ((1024, 3.5e-6), (8192, 3.8e-6), (16384, 4.1e-6), (65536, 6.4e-6), (262144, 10.6e-6), (2**20, 20.1e-6), (2**26, 576e-6)),
    "NCCL": ((1024, 15.7e-6), (8192, 19e-6), (65536, 19e-6), (262144, 20.1e-6), (2**20, 38.2e-6), (2**26, 576e-6)),
}
"""(Bytes, seconds) of an all-reduce over the eight GPUs of a host: by SGLang's kernel, which stands for XLA's one-shot and two-shot ones,
and by NCCL (aiconfigurator). Every collective is priced as an all-reduce of its bytes; over several hosts that is too little."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one iteration of a program's loop takes on each GPU.

    ``seconds``: of each part: "matrices", "attention", "collectives", "small kernels", and "gaps" between kernels. ``nbytes``: moved from
    and to the GPU's memory; ``least_bytes``: those that must be. ``launches``: kernels, copies and collectives. Branches that only some
    settings of sampling need are not in it.
    """

    seconds: dict[str, float]
    nbytes: float
    least_bytes: float
    launches: float

    @property
    def total_seconds(self) -> float:
        """All parts, one after the other."""
        return sum(self.seconds.values())

    @property
    def bound_seconds(self) -> float:
        """The least bytes at the memory's bandwidth."""
        return self.least_bytes / BANDWIDTH


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step, or a round of speculation, of ``rows`` rows over all devices, each with ``seen`` cached tokens.

    ``nodes``: tokens that a round verifies for each row. ``levels``: the drafter's passes in a round, 0 for decoding. ``drafter_seen``: the
    most cached tokens that the drafter sees.
    """

    rows: int
    seen: int
    nodes: int = 1
    levels: int = 0
    drafter_seen: int = 2048

    def load(self, config: ModelConfig, spec: MeshSpec, layer: int | None) -> Load:
        """What a device's kernels read in this layer; None: in a drafter's."""
        chunk = config.attention_chunk_size
        if layer is None:
            seen = min(self.seen, self.drafter_seen)
        elif chunk is not None and is_local(config, layer):
            seen = min(self.seen, chunk)  # a chunk is whole on one token rank: the busiest
        else:
            seen = -(-self.seen // spec.token_ranks.count)
        return Load(seen, self.rows // spec.data * self.nodes, config.moe.num_experts if config.moe else 0)


def estimate(program: CompiledProgram, first: ModelConfig, whole: AbstractModel, step: Step) -> Estimate:
    """What one iteration takes with all layers of ``whole``, read off a program of its first layers, whose configuration is ``first``.

    Raises ValueError for a program without a loop, and for a kernel of l4jax whose bytes are not known.
    """
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    nbytes = launches = 0.0
    times = _times(first, whole.placement.config)
    for launch in program.ledger.iteration:
        repeats = 1.0 if launch.layer is None else times[launch.layer]
        part, own_seconds, own_bytes = _priced(launch, step.load(first, whole.placement.spec, launch.layer))
        seconds[part] += repeats * own_seconds
        nbytes += repeats * own_bytes
        launches += repeats
        if part != "collectives":  # their seconds include the gap
            seconds["gaps"] += repeats * GAP_SECONDS
    return Estimate(dict(seconds), nbytes, step_bytes(whole, step), launches)


def step_bytes(model: AbstractModel, step: Step) -> float:
    """The least bytes that each GPU must read.

    Weights that are used, and keys and values that are seen, count once. Each pass of the drafter (of EAGLE-3) reads its weights and keys,
    but for the matrix that joins features, which a round reads once. An embedding counts only if it is the output head too.
    """
    config, spec = model.placement.config, model.placement.spec
    total = 0.0
    for name, leaf in zip(model.programs.model.names, model.weights.target, strict=True):
        part = float(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
        if ".experts_" in name:
            load = step.load(config, spec, 0)
            part *= load.chosen(load.experts) / load.experts
        total += part if name != "embed" or config.tie_word_embeddings else 0.0
    for name, leaf in zip(model.programs.drafter.names, model.weights.drafter, strict=True) if step.levels else ():
        part = float(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
        total += {"embed": 0, "fuse": 1}.get(name, step.levels) * part
    itemsize = model.weights.target[0].dtype.itemsize

    def key_bytes(decoder: ModelConfig, seen: int) -> float:
        return step.rows / spec.data * seen * 2 * decoder.num_kv_heads * decoder.head_dim * itemsize / spec.tensor

    total += sum(key_bytes(config, step.load(config, spec, layer).seen) for layer in range(config.num_layers))
    if model.draft_placement:
        total += step.levels * key_bytes(model.draft_placement.config, step.load(config, spec, None).seen)
    return total


def representatives(config: ModelConfig) -> dict[tuple[bool, bool], int]:
    """Of each kind of layer, (has RoPE, has experts), the last one's number.

    That is not the model's last layer, which is fused with the output, nor the first of its kind, which may compute what later ones share.
    """
    return {kind: layer for layer, kind in enumerate(_kinds(config)[:-1])}


def _kinds(config: ModelConfig) -> list[tuple[bool, bool]]:
    return [(config.rope_layers[i], bool(config.moe and config.moe.moe_layers[i])) for i in range(config.num_layers)]


def _times(first: ModelConfig, whole: ModelConfig) -> list[int]:
    """For how many layers of the whole model each compiled one stands; a representative stands for those that are not compiled too."""
    times = [1] * first.num_layers
    for kind, layer in representatives(first).items():
        times[layer] += _kinds(whole).count(kind) - _kinds(first).count(kind)
    return times


def _priced(launch: Launch, load: Load) -> tuple[str, float, float]:
    """The part that a launch belongs to, its seconds and its bytes."""
    if launch.collective is not None:
        return "collectives", _collective_seconds(launch.collective), 2.0 * sum(launch.collective.nbytes)
    if not launch.kernel:
        nbytes = float(sum(launch.operand_bytes) + launch.written_bytes)
        largest = max(launch.operand_bytes, default=0)
        if launch.flops or largest >= LEAST_MATRIX_BYTES:
            return "matrices", max(nbytes / _matrix_rate(largest), launch.flops / MATRIX_FLOPS), nbytes
        return "small kernels", nbytes / BANDWIDTH, nbytes
    nbytes = kernel_bytes(launch.kernel, launch.operand_shapes, launch.written_bytes, load)
    if launch.kernel.startswith("experts"):
        return "matrices", nbytes / _matrix_rate(nbytes), nbytes
    if launch.kernel == "tree_attention":
        return "attention", nbytes / (ATTENTION_FRACTION * BANDWIDTH), nbytes
    return "small kernels", nbytes / BANDWIDTH, nbytes


def _matrix_rate(nbytes: float) -> float:
    """Bytes/s at which a matrix of this size is read."""
    return BANDWIDTH * next(rate for most, rate in MATRIX_FRACTIONS if nbytes <= most)


def _collective_seconds(collective: Collective) -> float:
    """Interpolated between the table's sizes; above the largest, in proportion to the bytes."""
    points: Sequence[tuple[float, float]] = COLLECTIVE_SECONDS["NCCL" if collective.strategy == "NCCL" else "one-shot"]
    nbytes = sum(collective.nbytes)
    sizes, seconds = zip(*points, strict=True)
    return float(np.interp(nbytes, sizes, seconds)) * max(1.0, nbytes / sizes[-1])
