"""What can be compiled for, and what is said when it cannot."""

from __future__ import annotations

import pytest

from l4jax.planning import target


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs XLA's CUDA compiler; install it with: pip install 'l4jax\[plan\]'"):
        target.h100_devices(8)


def test_hosts_are_full(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="12 H100s; expected up to 8, or full hosts of 8"):
        target.h100_devices(12)
