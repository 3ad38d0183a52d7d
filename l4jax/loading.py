"""Loads a checkpoint: opens it, decides how to speculate, agrees with other processes, and places the weights."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from l4jax import arguments
from l4jax.checkpoints.store import open_checkpoint
from l4jax.compiled import Folder
from l4jax.decoding.plan import SpeculationTable
from l4jax.decoding.speculate import BeyondTraining
from l4jax.engine.build import Parts, Settings
from l4jax.engine.memory import CacheMemory
from l4jax.llm import LLM
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import H100_RING
from l4jax.speculator import choose_speculation, open_fitting_drafter
from l4jax.text.load import load_text
from sharding import hosts
from sharding.mesh import ONE_DEVICE, MeshSpec
from sharding.select import RingHardware

DType = Literal["float32", "bfloat16", "float16"]


def load(
    path: str | os.PathLike[str],
    *,
    mesh: str | MeshSpec = ONE_DEVICE,
    dtype: DType | None = None,
    drafter: str | os.PathLike[str] | None = None,
    speculation: str = "auto",
    beyond_training: BeyondTraining = "window",
    max_batch: int | None = None,
    kv_tokens: int | None = None,
    prefill_lengths: Sequence[int] | None = None,
    deterministic: bool = False,
    ring_hardware: RingHardware = H100_RING,
) -> LLM:
    """Load a checkpoint made by ``l4jax convert``.

    ``mesh``: the devices to run on, such as "tensor=4,expert=2" or a file of ``configs/meshes``; one device by default. Every
    device reads only its part of the weights. ``dtype``: that of weights and cache; None takes the one in which most of the
    checkpoint's bytes are stored.

    ``drafter``: the folder of a drafter that was trained for this model (default: ``drafter`` in the checkpoint's folder, if it is there).
    ``speculation``: "auto" (what the drafter's table says for the rows that decode), "off", "chain:5", "tree:eagle26" (both may end in
    ",sampled") or "dynamic:steps=5,topk=4,nodes=16". ``beyond_training``: what the drafter does when a text gets longer than its trained
    length, "window" (look back that far) or "stop".

    ``max_batch``: the most prompts that are decoded together (default: 8 for each rank along ``data``); others wait. ``kv_tokens``: tokens
    that the KV cache holds, of all requests together (default: ``max_batch`` times the context, but no more than fits in a quarter of a
    machine's free memory, rounded down, or in what weights and programs leave of a GPU's). ``prefill_lengths``: prompts are computed in
    pieces, padded to one of these lengths (default: 32, 128 and 512 for each rank that shares their tokens; in bfloat16 or float16 on
    Hopper GPUs also 2,048 and 8,192, if a piece's temporaries take at most a tenth of the memory that weights leave free).

    ``deterministic``: a request's tokens and log-probabilities are the same to the last bit whatever else runs: those that it gets alone
    in a model loaded with the same arguments. Then bursts always have ``max_batch`` rows, "auto" means what the drafter's table says for
    that many, pieces have one length (default: 512), and a request that is preempted after its first token is kept in host memory.

    ``ring_hardware``: how fast devices compute and send, which decides between the rings (``sharding.select``). Compiled programs are
    kept in the user's cache from one process to the next, unless JAX's own compilation cache is configured.
    """
    arguments.check_words(dtype, speculation)
    arguments.check_kind("the checkpoint", path, str | os.PathLike, "the path of a folder that l4jax convert made")
    arguments.check_kind("the drafter", drafter, str | os.PathLike | None, "the path of a drafter's folder")
    settings = Settings.checked(max_batch, kv_tokens, prefill_lengths, deterministic, ring_hardware)
    folder = Folder.of_user()
    checkpoint = open_checkpoint(path)
    placement = Placement.on(checkpoint.config, mesh)
    settings.piece_lengths(placement.spec, checkpoint.config.max_position_embeddings)  # raises now, not after the weights are read
    held_in = jnp.dtype(dtype or checkpoint.dtype)
    opened = None if speculation == "off" else open_fitting_drafter(checkpoint.drafter if drafter is None else drafter, checkpoint)
    own = None if opened is None else SpeculationTable.from_json(opened.speculation, held_in.name)
    # Also before any weight is read: this refuses a speculation that drafter and model cannot do.
    choice = choose_speculation(checkpoint.config, None if opened is None else opened.config, own, speculation, beyond_training)
    hosts.check_same(
        {
            "the checkpoint's digest": checkpoint.digest,
            "the drafter's digest": "none" if choice is None or opened is None else opened.digest,
            "speculation": f"{None if choice is None else choice.table}, {beyond_training}",
            "the mesh": str(placement.spec),
            "dtype": str(dtype),
            **{name: str(value) for name, value in vars(settings).items()},
            "l4jax": importlib.metadata.version("l4jax"),
            "jax": jax.__version__,
        },
        "start every process with the same checkpoint, arguments and versions",
    )
    memory = CacheMemory(placement, None, held_in, settings.slots(placement.spec))
    memory.check(settings.kv_tokens, placement.abstract_weights(held_in).values())
    text = load_text(checkpoint.directory, checkpoint.config)
    weights = checkpoint.restore(placement, held_in)
    speculator = None
    if choice is not None and opened is not None:
        drafter_placement = DrafterPlacement(opened.config, placement.mesh)
        speculator = choice.speculator(drafter_placement, opened.restore(drafter_placement, held_in))
    return LLM.of(Parts(checkpoint.config, placement, weights, speculator, text, settings, folder))
