"""The worker: measures some items one after the other, and writes each value as soon as it is known.

``python -m benchmarks.h100`` starts it, ends it when time is up, and starts another if it crashes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.h100.errors import NotHere, TooLittleMemory
from benchmarks.h100.plan import items
from benchmarks.h100.results import DONE, FAILED, SKIPPED, Results
from benchmarks.h100.sizes import SIZES, Sizes

REFUSED = "refused: "
"""The beginning of the line that says why nothing can be measured here."""
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jaxtyping", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "tokamax", "transformers")


def main() -> None:
    """Measure the given items, in their order."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--sizes", choices=SIZES, required=True)
    parser.add_argument("--device", choices=("gpu", "cpu"), required=True)
    parser.add_argument("--items", nargs="+", required=True)
    arguments = parser.parse_args()
    _end_with_parent()
    sizes, results = SIZES[arguments.sizes], Results(arguments.results)
    by_name = {item.name: item for item in items(sizes)}
    chosen = [by_name[name] for name in arguments.items]
    if chosen[0].process == "torch":
        from benchmarks.h100.rivals_torch import TorchBench

        bench: Any = TorchBench(sizes, "cuda" if arguments.device == "gpu" else "cpu")
    else:
        bench = _jax_bench(sizes, arguments.device, results, caching=chosen[0].process != "dump")
    results.await_items(arguments.items)
    for item in chosen:
        _measure(item, bench, results)


def _measure(item: Any, bench: Any, results: Results) -> None:
    results.start(item.name)
    started = time.monotonic()

    def record(key: str, values: dict[str, Any]) -> None:
        results.record(item.name, key, values)

    broken = False
    try:
        module = importlib.import_module(f"benchmarks.h100.{item.module}")
        module.measure(bench, record, **item.arguments)
        status, why = DONE, None
    except NotHere as error:
        status, why = SKIPPED, str(error)
    except TooLittleMemory as error:
        status, why = FAILED, str(error)
    except Exception as error:
        traceback.print_exc()
        status, why = FAILED, f"{type(error).__name__}: {error}"
        # Memory is free again once the arrays are gone; after any other error of the device it may not respond any more.
        broken = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" not in str(error)
    results.items[item.name]["seconds"] = time.monotonic() - started
    results.finish(item.name, status, why)
    print(
        f"{item.name}: {status} in {time.monotonic() - started:.1f} s{f' ({results.items[item.name]["why"]})' if why else ''}", flush=True
    )
    if broken:
        sys.exit(1)


def _jax_bench(sizes: Sizes, device: str, results: Results, *, caching: bool) -> Any:
    """A bench on the device, and its description in the results. Exits with one line if nothing can be measured here."""
    try:
        import jax

        found = jax.devices("cpu" if device == "cpu" else "cuda")
    except ImportError as error:
        _exit(
            f"a package is missing ({error}); expected jax with CUDA, flax, numpy and jaxtyping: pip install 'jax[cuda13]' flax jaxtyping"
        )
    except RuntimeError as error:
        _exit(f"JAX finds no NVIDIA GPU ({_first_line(error)}); expected one and jax[cuda13]; --device cpu runs everything at toy sizes")
    try:
        from benchmarks.h100.bench import Bench
        from l4jax.compiled import remove_damaged
    except (ImportError, AttributeError) as error:
        traceback.print_exc()
        _exit(f"this JAX ({jax.__version__}) or a package lacks what the programs need ({_first_line(error)}); expected JAX 0.11.2 or 0.12")
    bench = Bench(sizes, found[0])
    if not caching:
        return bench
    # Programs that an earlier process compiled are kept; entries that it left half-written are removed.
    folder = results.path.parent / "compiled"
    folder.mkdir(exist_ok=True)
    remove_damaged(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        results.on(_machine(found[0], sizes))
    except ValueError as error:
        _exit(str(error))
    return bench


def _machine(device: Any, sizes: Sizes) -> dict[str, Any]:
    """Everything that results depend on: the device, its driver, and versions of packages."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text(encoding="utf-8")) if device.platform != "cpu" and driver.exists() else None
    return {
        "device": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
        "driver": found[0] if found else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "sizes": sizes.name,
        "versions": versions,
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _exit(message: str) -> None:
    print(REFUSED + " ".join(message.split()), flush=True)
    sys.exit(1)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, even in the middle of a compilation."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
