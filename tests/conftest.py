"""Strict JAX, and the one real model that tests share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before JAX is imported anywhere: what the tests check must not depend on the machine's accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Signatures are checked while the tests run. Constructors of dataclasses that are pytrees are not: JAX calls them too, with
# shardings, shapes or host arrays in the place of arrays.
register_dataclass = jax.tree_util.register_dataclass


def _register_unchecked(cls: type, *fields: object) -> type:
    register_dataclass(cls, *fields)
    cls.__no_type_check__ = True
    return cls


jax.tree_util.register_dataclass = _register_unchecked
install_import_hook(["l4jax", "sharding", "pallas_kernels"], "beartype.beartype")

# For tests of meshes; all others run on the first of them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests build the same small models again and again: what one test compiled, the next one loads, within this run only.
_compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _compiler_effort(request: pytest.FixtureRequest) -> None:
    """Compile without LLVM's optimisations, which takes half the time, unless the test is of the compiled program or runs a real model."""
    needed = any(request.node.get_closest_marker(name) for name in ("optimized", "h100"))
    optimized = needed or "smollm2_checkpoint" in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (98 MB, Q4_1), in the user's cache; downloaded the first time."""
    from l4jax.paths import cache_root
    from l4jax.smollm2 import fetch

    return fetch(cache_root())


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct converted, in the user's cache: what ``l4jax demo`` runs."""
    from l4jax.smollm2 import ensure_checkpoint

    return ensure_checkpoint()
