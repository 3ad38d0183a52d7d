"""Strict JAX, and the one real model that tests share."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union
from weakref import WeakSet

# Before JAX is imported anywhere: what the tests check must not depend on the machine's accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests build the same small models again and again: what one compiled, the others load, within this run only. The folder serves all
# workers and the processes that tests start; with a largest size JAX locks it, so that nobody reads what is written in part.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**40)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from jaxtyping import install_import_hook

from tests.checked import jaxtyped_arrays

# Signatures are checked while the tests run. Constructors of dataclasses that are pytrees are not: JAX calls them too, with
# shardings, shapes or host arrays in the place of arrays.
register_dataclass = jax.tree_util.register_dataclass


def _register_unchecked(cls: type, *fields: Any, **named: Any) -> type:
    register_dataclass(cls, *fields, **named)
    cls.__no_type_check__ = True
    return cls


jax.tree_util.register_dataclass = _register_unchecked
# Host arrays are taken wherever arrays are, as by JAX's own functions.
jaxtyping.Array = Union[jax.Array, np.ndarray]  # noqa: UP007 - jaxtyping takes unions apart only in this form
jaxtyping.jaxtyped = jaxtyped_arrays
install_import_hook(["l4jax", "sharding", "pallas_kernels"], "tests.checked.arrays")

# For tests of meshes; all others run on the first of them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Also where a module's fixtures compile before its first test: the same run, compiled in two ways, differs in its last bits.
jax.config.update("jax_disable_most_optimizations", True)

# Tracing makes many objects that live long and few cycles: looking for cycles as often as Python does takes a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", type=int, default=200, help="prompts of each many_prompts test (default: 200)")


@pytest.fixture(scope="session")
def many_prompts(request: pytest.FixtureRequest) -> int:
    """How many prompts the ``many_prompts`` tests answer."""
    return request.config.getoption("--prompts")


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Forget a file's programs after its tests: on CPUs each takes some hundred memory mappings, and a process that reaches Linux's
    65,530 (``vm.max_map_count``) ends in a segmentation fault while it compiles.
    """
    from l4jax.compiled import Program

    made, initialise = WeakSet[Program](), Program.__init__

    def noted(self: Program, *arguments: Any) -> None:
        initialise(self, *arguments)
        made.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__init__", noted)
        yield
    for program in made:
        program._compiled.clear()
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _real_row_buckets() -> Iterator[Callable[[int], tuple[int, ...]]]:
    """Have programs for one number of rows, whatever is under way: most tests are of something else, and each number is compiled anew."""
    from l4jax.engine import build

    real = build.row_buckets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "row_buckets", lambda slots: (slots,))
        yield real


@pytest.fixture
def row_buckets(monkeypatch: pytest.MonkeyPatch, _real_row_buckets: Callable[[int], tuple[int, ...]]) -> None:
    """Have programs for as many numbers of rows as users do."""
    monkeypatch.setattr("l4jax.engine.build.row_buckets", _real_row_buckets)


@pytest.fixture(autouse=True)
def _compiler_effort(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile without LLVM's optimisations, which takes half the time, unless the test reads the compiled program or runs a real model."""
    if "smollm2_checkpoint" in request.fixturenames:
        request.getfixturevalue("row_buckets")
    needed = any(request.node.get_closest_marker(name) for name in ("optimized", "h100"))
    optimized = needed or "smollm2_checkpoint" in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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
