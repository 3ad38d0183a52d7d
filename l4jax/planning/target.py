"""Descriptions of devices that this machine does not have, for which programs can be compiled all the same."""

from __future__ import annotations

import importlib.util
import logging
import os
import re

import jax

# JAX has no public way to keep the programs of one kind of device out of its cache.
from jax._src import compilation_cache
from jax.experimental import topologies

from l4jax.data import configs_path

H100_MEMORY_BYTES = 80_000_000_000
"""The part of an H100's memory that a program may use: 80 GB of 84.9 GB."""
GPUS_PER_HOST = 8

_kept_out: set[str] = set()
"""Runtimes of absent devices, whose programs are not kept."""


def h100_devices(count: int, *, memory_bytes: int | None = None) -> list[jax.Device]:
    """Descriptions of ``count`` H100s, eight to a host, that programs are compiled for. NVLink joins those of one host.

    ``memory_bytes``: the memory of each, if not an H100's. If a program does not fit in an H100, XLA computes (and sends) things twice
    to save memory.

    This needs XLA's CUDA compiler (``pip install 'l4jax[plan]'``), but no GPU and no driver. Raises ValueError without the compiler,
    or if ``count`` is more than one host's GPUs and does not fill all hosts.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError("compiling for H100s needs XLA's CUDA compiler; install it with: pip install 'l4jax[plan]'")
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise ValueError(f"{count} H100s; expected up to {GPUS_PER_HOST}, or full hosts of {GPUS_PER_HOST}")
    hosts, gpus = max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST)
    # The plugin asks for libraries that only running programs needs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = (configs_path() / "hardware" / "h100-sxm.textproto").read_text(encoding="utf-8")
    if memory_bytes is not None:
        target = re.sub(r"device_memory_size: \d+", f"device_memory_size: {memory_bytes}", target)
    devices: list[jax.Device] = list(
        topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"{hosts}x1x{gpus}").devices
    )
    # A program for absent devices can be written to JAX's cache, but not read from it. JAX warns of an entry that it cannot read, and
    # wherever it compiles for a runtime that it is told to keep no programs of.
    runtimes = {device.client.runtime_type for device in devices}
    compilation_cache._UNSUPPORTED_RUNTIMES.update(runtimes)
    _kept_out.update(runtimes)
    compilation_cache.logger.addFilter(_is_not_of_kept_out)
    return devices


def _is_not_of_kept_out(record: logging.LogRecord) -> bool:
    return not any(record.getMessage() == f"_get_cache: Unsupported runtime: {runtime}" for runtime in _kept_out)
