"""Predicts how long a step of decoding, or a round of speculation, takes on H100s.

What a compiled program launches is priced at rates that others have published for H100s. That is a prediction, not a measurement.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from l4jax.cache import is_local
from l4jax.config import ModelConfig
from l4jax.planning.compile import AbstractModel, CompiledProgram
from l4jax.planning.ledger import Collective, Launch
from pallas_kernels.cost import Load, kernel_bytes

BANDWIDTH = 3.35e12
"""Of an H100's memory, bytes/s (configs/hardware/h100-sxm.textproto)."""
FLOPS = 784e12
"""FLOP/s of a large bfloat16 matrix product (measured: benchmarks/results)."""
MATRIX_RATES = ((16e6, 0.40), (64e6, 0.65), (200e6, 0.78), (float("inf"), 0.85))
"""Up to how many bytes a matrix is read at which part of the bandwidth by few rows: medians of three engines' products (NVIDIA's
aiconfigurator, h100_sxm)."""
_LEAST_MATRIX_BYTES = 2**20
ATTENTION_RATE = 0.6
"""Part of the bandwidth at which decoding reads cached keys: FlashAttention-3 with pages reaches 0.54 to 0.62."""
LAUNCH_SECONDS = 1.5e-6
"""From one kernel of a CUDA graph to the next that depends on it."""
SUM_SECONDS = {
    "one-shot": ((1024, 3.5e-6), (8192, 3.8e-6), (16384, 4.1e-6), (65536, 6.4e-6), (262144, 10.6e-6), (2**20, 20.1e-6)),
    "NCCL": ((1024, 15.7e-6), (8192, 19e-6), (65536, 19e-6), (262144, 20.1e-6), (2**20, 38.2e-6)),
}
"""Seconds of a sum over eight GPUs of a host by its bytes: SGLang's kernel, and NCCL's (aiconfigurator). Two hosts take longer."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one turn of a program's loop takes on each GPU.

    ``seconds``: by part. ``nbytes``: moved from and to the GPU's memory; ``least_bytes``: those that must be. ``launches``: kernels, copies
    and collectives. Branches that only some settings of sampling need are not in it.
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


def estimate(program: CompiledProgram, compiled: ModelConfig, whole: AbstractModel, load: Load, least: float) -> Estimate:
    """Read off a program of a model's first layers, ``compiled``, what a turn takes with all layers of ``whole``; ``least``: its bytes."""
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    nbytes = launches = 0.0
    times = _times(compiled, whole.placement.config)
    for launch in program.ledger.turn:
        repeats = 1.0 if launch.layer is None else times[launch.layer]
        part, own_seconds, own_bytes = _priced(launch, load)
        seconds[part] += repeats * own_seconds
        nbytes += repeats * own_bytes
        launches += repeats
        if part != "sums":
            seconds["launches"] += repeats * LAUNCH_SECONDS
    return Estimate(dict(seconds), nbytes, least, launches)


def step_bytes(model: AbstractModel, rows: int, load: Load, *, levels: int = 0) -> float:
    """The least bytes of a decode step of ``rows`` rows, or of a round.

    The weights that it uses, and the keys and values that it sees, count once; the drafter's weights once for each of ``levels``, but once
    in all for the matrix that joins features, which accepted tokens meet. Embeddings that are no output heads do not count.
    """
    config, spec = model.placement.config, model.placement.spec
    total = 0.0
    for name, leaf in zip(model.programs.model.names, model.weights.target, strict=True):
        part = float(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
        if ".experts_" in name:
            part *= load.chosen(load.experts) / load.experts
        total += part if name != "embed" or config.tie_word_embeddings else 0.0
    for name, leaf in zip(model.programs.drafter.names, model.weights.drafter, strict=True) if levels else ():
        part = float(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)
        total += {"embed": 0, "fuse": 1}.get(name, levels) * part
    a_token = 2 * config.num_kv_heads * config.head_dim * model.weights.target[0].dtype.itemsize / spec.tensor
    for layer in range(config.num_layers):
        seen = min(load.seen, config.attention_chunk_size or load.seen) if is_local(config, layer) else load.seen
        total += rows / spec.data * seen * a_token / spec.token_ranks.count
    return total


def representatives(config: ModelConfig) -> dict[tuple[bool, bool], int]:
    """Of each kind of layer (RoPE or not, experts or not) the last one, without the model's last: the first of a kind may also compute what
    those after it need.
    """
    return {kind: layer for layer, kind in enumerate(_kinds(config)[:-1])}


def _kinds(config: ModelConfig) -> list[tuple[bool, bool]]:
    return [(config.rope_layers[i], bool(config.moe and config.moe.moe_layers[i])) for i in range(config.num_layers)]


def _times(compiled: ModelConfig, whole: ModelConfig) -> list[int]:
    """How often each compiled layer counts: once, and the representative of a kind also for the whole model's other layers of the kind."""
    times = [1] * compiled.num_layers
    for kind, layer in representatives(compiled).items():
        times[layer] += _kinds(whole).count(kind) - _kinds(compiled).count(kind)
    return times


def _priced(launch: Launch, load: Load) -> tuple[str, float, float]:
    """The part that a launch belongs to, its seconds and its bytes."""
    if launch.collective is not None:
        return "sums", _sum_seconds(launch.collective), 2.0 * sum(launch.collective.nbytes)
    if not launch.kernel:
        nbytes = float(sum(launch.operand_bytes) + launch.written_bytes)
        largest = max(launch.operand_bytes, default=0)
        # Of one row XLA makes some products sums of multiplications.
        if launch.flops or largest >= _LEAST_MATRIX_BYTES:
            return "matrices", max(nbytes / _matrix_rate(largest), launch.flops / FLOPS), nbytes
        return "small kernels", nbytes / BANDWIDTH, nbytes
    nbytes = kernel_bytes(launch.kernel, launch.operands, launch.written_bytes, load)
    if launch.kernel.startswith("experts"):
        return "matrices", nbytes / _matrix_rate(nbytes), nbytes
    if launch.kernel == "tree_attention":
        return "attention", nbytes / (ATTENTION_RATE * BANDWIDTH), nbytes
    return "small kernels", nbytes / BANDWIDTH, nbytes


def _matrix_rate(nbytes: float) -> float:
    """Bytes/s at which a matrix of this size is read."""
    return BANDWIDTH * next(rate for most, rate in MATRIX_RATES if nbytes <= most)


def _sum_seconds(collective: Collective) -> float:
    """Interpolated; above the largest size by its bandwidth."""
    points: Sequence[tuple[float, float]] = SUM_SECONDS["NCCL" if collective.strategy == "NCCL" else "one-shot"]
    nbytes = sum(collective.nbytes)
    if nbytes >= points[-1][0]:
        return points[-1][1] * nbytes / points[-1][0]
    if nbytes <= points[0][0]:
        return points[0][1]
    (low, at_low), (high, at_high) = next(pair for pair in itertools.pairwise(points) if nbytes <= pair[1][0])
    return at_low + (at_high - at_low) * (nbytes - low) / (high - low)
