"""What can be compiled for, and what is said when it cannot."""

from __future__ import annotations

import logging
import types

import pytest
from jax._src import compilation_cache

from l4jax.planning import target


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs XLA's CUDA compiler; install it with: pip install 'l4jax\[plan\]'"):
        target.h100_devices(8)


def test_hosts_are_full(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="12 H100s; expected up to 8, or full hosts of 8"):
        target.h100_devices(12)


def test_every_host_is_an_nvlink_partition_of_its_own(monkeypatch):
    topologies = []

    def describe(*, topology, **_):
        topologies.append(topology)
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(target.topologies, "get_topology_desc", describe)
    for count in (1, 8, 16):
        target.h100_devices(count)
    assert topologies == ["1x1x1", "1x1x8", "2x1x8"]


def test_memory_can_be_as_much_as_a_program_needs(monkeypatch):
    targets = []

    def describe(*, target_config, **_):
        targets.append(target_config)
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(target.topologies, "get_topology_desc", describe)
    target.h100_devices(8)
    target.h100_devices(8, memory_bytes=10**15)
    assert "device_memory_size: 84929347584\n" in targets[0]
    assert targets[1] == targets[0].replace("84929347584", "1000000000000000")


def test_programs_for_absent_devices_are_not_kept_and_jax_does_not_warn_of_it(monkeypatch, caplog):
    """JAX warns where a folder for its cache is set, at each look-up and each program that it would keep."""
    absent, other = (types.SimpleNamespace(runtime_type=name) for name in ("of_absent_devices", "of_others"))
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        target.topologies, "get_topology_desc", lambda **_: types.SimpleNamespace(devices=[types.SimpleNamespace(client=absent)])
    )
    monkeypatch.setattr(compilation_cache, "_UNSUPPORTED_RUNTIMES", {"of_others"})
    monkeypatch.setattr(compilation_cache, "is_persistent_cache_enabled", lambda: True)
    monkeypatch.setattr(compilation_cache.logger, "filters", [])
    for _ in range(2):
        target.h100_devices(1)
    compilation_cache.logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, compilation_cache.logger.name):
            assert compilation_cache._get_cache(absent) is None and compilation_cache._get_cache(other) is None
    finally:
        compilation_cache.logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"_get_cache: Unsupported runtime: of_others"}
