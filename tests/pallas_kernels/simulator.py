"""Runs Mosaic GPU kernels on a CPU, in JAX's simulator of a Hopper GPU, which also finds data races.

It finds no missing wait for a matrix product: it computes them at once.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.programs import AN_H100

_wgmma = gpu_callbacks.wgmma


def simulated(function, *arguments) -> Any:
    """The function's result, of a program for an H100. Fails if the simulator finds a race."""
    mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    with mode, mock.patch.object(gpu_callbacks, "wgmma", _wgmma_of_registers):
        with jax.sharding.use_abstract_mesh(AN_H100):
            jaxpr, form = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = jax.block_until_ready(jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr))(*jax.tree.leaves(arguments)))
    assert not gpu_callbacks.get_races().races_found
    return jax.tree.unflatten(jax.tree.structure(form), leaves)


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
