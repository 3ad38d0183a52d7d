"""Runs Mosaic GPU kernels on a CPU, in JAX's simulator of a Hopper GPU, which also finds data races.

It finds no missing wait for a matrix product: it computes them at once.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import hopper as flash_attention
from pallas_kernels.mosaic import product
from pallas_kernels.tree_attention import hopper as tree_attention
from tests.pallas_kernels.programs import AN_H100

_wgmma = gpu_callbacks.wgmma


def simulated(function, *arguments) -> tuple[Any, int]:
    """The function's result, of a program for an H100, and the bytes that its kernels copy from and to the GPU's memory.

    Fails if the simulator finds a race.
    """
    copied: list[int] = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)))
        patches.enter_context(mock.patch.object(gpu_callbacks, "wgmma", _wgmma_of_registers))
        for module in (tree_attention, flash_attention):  # the simulator accumulates from zero only
            patches.enter_context(mock.patch.object(module, "add_product", lambda sums, a, b: sums + product(a, b, sums.shape[1])))
        for copy, in_memory in (("AsyncCopyGmemToSmemTask", "src"), ("AsyncCopySmemToGmemTask", "dst")):
            patches.enter_context(mock.patch.object(gpu_callbacks, copy, _counted(getattr(gpu_callbacks, copy), in_memory, copied)))
        with jax.sharding.use_abstract_mesh(AN_H100):
            jaxpr, form = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = jax.block_until_ready(jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr))(*jax.tree.leaves(arguments)))
    assert not gpu_callbacks.get_races().races_found
    return jax.tree.unflatten(jax.tree.structure(form), leaves), sum(copied)


def _counted(task, in_memory, copied):
    """Make the task of a copy, and note its bytes."""

    def make(**fields):
        about = gpu_callbacks._get_shared_memory().buffer_shape_and_dtype(fields[f"{in_memory}_allocation_key"])
        taken = np.broadcast_to(np.empty((), about.dtype), about.shape)[fields[f"{in_memory}_access"].range]
        copied.append(taken.size * taken.itemsize)
        return task(**fields)

    return make


def _wgmma_of_registers(*, a_allocation_key_as_array, **others):
    """The simulator's product takes no left operand from registers: it takes it for the name of one in shared memory."""
    a = np.asarray(a_allocation_key_as_array)
    if a.shape == gpu_callbacks.HostAllocationKey.shape_and_dtype().shape:
        return _wgmma(a_allocation_key_as_array=a_allocation_key_as_array, **others)
    memory, thread = gpu_callbacks._get_shared_memory(), others["thread"]
    about = gpu_callbacks.memory.GPULoggingInfo(others["mesh_location"], thread, others["source_info"])

    def place(name):
        key = gpu_callbacks.HostAllocationKey.from_array(others[f"{name}_allocation_key_as_array"])
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(others[f"{name}_transforms"]))
        return key, memory.access(key, transforms)

    b, _, _ = memory.get_buffer_content(*place("b"), thread, logging_info=about)
    sums, _, _ = memory.get_buffer_content(*place("acc"), thread, logging_info=about)
    product = np.matmul(a.astype(np.float32), np.asarray(b).astype(np.float32))
    memory.store_buffer_content(*place("acc"), sums + product.astype(sums.dtype), thread, logging_info=about)
    return others["token"]
