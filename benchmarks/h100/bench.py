"""What the items share: the device, the model with its random weights, and compiling for it."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.h100.errors import DeviceBroken, TooLittleMemory
from benchmarks.h100.sizes import Sizes
from l4jax.compiled import Call
from l4jax.config import DrafterConfig, Eagle3Config, ModelConfig
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import sampling_settings
from l4jax.model.weights import random_weights
from l4jax.planning.compile import AbstractModel
from l4jax.program_inputs import Resident, Weights
from sharding.mesh import MeshSpec

Record = Callable[[str, dict[str, Any]], None]
"""Records values of the running item under a name."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its drafter on one device, with random weights."""

    abstract: AbstractModel
    weights: Weights

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.abstract.placement.config

    @classmethod
    def random(
        cls, config: ModelConfig, drafter: DrafterConfig, device: jax.Device, dtype: jnp.dtype, drawn_on: jax.Device | None = None
    ) -> Model:
        """Draw weights on the device, or on ``drawn_on``: two kinds of device may round the same draws differently."""
        abstract = AbstractModel(config, MeshSpec(), [device], dtype, drafter)
        assert abstract.draft_placement is not None
        parts = []
        for placement, bound in ((abstract.placement, abstract.programs.model), (abstract.draft_placement, abstract.programs.drafter)):
            with jax.default_device(drawn_on or device):
                weights = random_weights(placement.build(placement.config), jax.random.key(len(parts)), dtype)
            parts.append(bound.leaves(placement.place_all(weights)))
        return cls(abstract, Weights(*parts))


class Bench:
    """A device and what is measured on it; ``folder``: where the results are, and what XLA dumps."""

    def __init__(self, sizes: Sizes, device: jax.Device, folder: Path) -> None:
        self.sizes = sizes
        self.device = device
        self.folder = folder

    @functools.cached_property
    def model(self) -> Model:
        """Llama 3.1 8B (or the toy of it) with an EAGLE-3 head, made on first use."""
        config, drafter = llama_and_head(self.sizes)
        return Model.random(config, drafter, self.device, jnp.dtype(self.sizes.dtype))

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the device's memory that JAX may use; None if the device does not say."""
        return (self.device.memory_stats() or {}).get("bytes_limit")

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes that the process has used at one time; None if the device does not say."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def check(self) -> None:
        """Raise DeviceBroken if the device does not compute any more, as after a bad memory access."""
        try:
            with jax.default_device(self.device):
                jax.block_until_ready(jnp.zeros(8) + 1)
        except jax.errors.JaxRuntimeError as error:
            raise DeviceBroken(f"the device does not respond after that ({error})") from error

    def compiled(self, call: Call, record: Record) -> jax.stages.Compiled:
        """Compile the call's program, and record the time. Raises TooLittleMemory if it cannot run even alone on the device."""
        started = time.perf_counter()
        lowered = call.lower()
        traced = time.perf_counter()
        program = lowered.compile()
        seconds = {"trace_seconds": traced - started, "compile_seconds": time.perf_counter() - traced}
        memory = program.memory_analysis()
        needed = 0
        if memory is not None:
            needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
            sizes = {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
            seconds |= sizes | {"device_bytes": needed}
        record("compile", seconds)
        if self.memory_bytes is not None and needed > self.memory_bytes:
            raise TooLittleMemory(
                f"the program needs {needed / 1e9:.1f} GB, and JAX may use {self.memory_bytes / 1e9:.1f} GB of this device; "
                "expected an H100's 80 GB with nothing else on it"
            )
        return program


def llama_and_head(sizes: Sizes) -> tuple[ModelConfig, DrafterConfig]:
    """Llama 3.1 8B and a drafter as large as the public EAGLE-3 heads for it, with the replacements in ``sizes``."""
    values = json.loads((configs_path() / "models" / "llama-3.1-8b.json").read_text(encoding="utf-8"))
    config = dataclasses.replace(config_from_hf(values), **sizes.model)
    return config, eagle3_head(config, sizes.draft_vocab_size, **sizes.head)


def eagle3_head(config: ModelConfig, draft_vocab_size: int, **layer: Any) -> DrafterConfig:
    """An EAGLE-3 drafter for a model. Its one layer is like the model's dense layers, except for the fields in ``layer``."""
    dense: dict[str, Any] = {
        "architecture": "llama",
        "num_layers": 1,
        "rope_layers": (True,),
        "rope_scaling": None,
        "moe": None,
        "attention_chunk_size": None,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": min(2048, config.max_position_embeddings),
    }
    decoder = dataclasses.replace(config, **dense | layer)
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=draft_vocab_size,
        target_layers=config.num_layers,
        target_hidden_size=config.hidden_size,
        aux_layers=(0, config.num_layers // 2, config.num_layers),
    )


def random_arrays(tree: Any, seed: int = 0) -> Any:
    """Replace abstract arrays by device arrays: floats are drawn from a normal distribution, the rest is zero. Other leaves stay."""

    def make(index: int, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return _normal(leaf.shape, leaf.dtype, leaf.sharding)(jax.random.key_data(jax.random.key(seed + index)))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [make(index, leaf) for index, leaf in enumerate(leaves)])


@functools.lru_cache(maxsize=64)
def _normal(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    def draw(key_2: Array) -> Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        return jax.random.normal(jax.random.wrap_key_data(key_2), shape, jnp.float32).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def rows_at(resident: Resident, length: int) -> Resident:
    """The state with every slot decoding after ``length`` cached tokens, none produced; every row is greedy and never ends."""
    slots = resident.slots
    U, V = slots.counts.in_prompt_UV.shape
    never_ends = SamplingParams(temperature=0.0, max_tokens=2**30)
    whole: dict[str, Any] = {
        "token_U": np.arange(1, U + 1, dtype=np.int32),
        "length_U": np.full(U, length, np.int32),
        "produced_U": np.zeros(U, np.int32),
        "done_U": np.zeros(U, bool),
        "sampling": sampling_settings([never_ends] * U, [0] * U, [[]] * U, V),
    }
    return dataclasses.replace(resident, slots=dataclasses.replace(slots, **whole))
