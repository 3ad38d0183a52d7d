"""The worker: measures some items one after the other, and writes each value as soon as it is known.

``python -m benchmarks.h100`` starts it, ends it when time is up, and starts another if it crashes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.h100 import source
from benchmarks.h100.errors import DeviceBroken, NotHere, TooLittleMemory
from benchmarks.h100.plan import Item, items
from benchmarks.h100.results import DONE, FAILED, SKIPPED, Results
from benchmarks.h100.sizes import SIZES, Sizes

REFUSED = "refused: "
"""The beginning of the line that says why nothing can be measured here."""
_PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "jax-cuda12-plugin")


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
    bench, kind = (_torch_bench if chosen[0].process == "torch" else _jax_bench)(sizes, arguments.device, arguments.results.parent)
    try:
        results.on(_machine(kind, arguments.device, sizes))
    except ValueError as error:
        _exit(str(error))
    if chosen[0].process == "jax":
        _keep_programs(arguments.results.parent / "compiled")
    results.await_items(arguments.items)
    code = source.digest()
    for item in chosen:
        _measure(item, bench, results, code)


def _measure(item: Item, bench: Any, results: Results, code: str) -> None:
    results.start(item.name, {"code": code} | source.versions(item.packages))
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
    except DeviceBroken as error:
        status, why, broken = FAILED, str(error), True
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


def _torch_bench(sizes: Sizes, device: str, folder: Path) -> tuple[Any, str | None]:
    """What PyTorch's items are given, and the device's name, which is None if PyTorch cannot say it."""
    from benchmarks.h100.rivals_torch import TorchBench, import_torch

    bench = TorchBench(sizes, "cuda" if device == "gpu" else "cpu")
    try:
        torch = import_torch(bench)
    except NotHere:
        return bench, None
    return bench, "cpu" if device == "cpu" else torch.cuda.get_device_name()


def _jax_bench(sizes: Sizes, device: str, folder: Path) -> tuple[Any, str]:
    """What JAX's items are given, and the device's name. Exits with one line if nothing can be measured here."""
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
    except (ImportError, AttributeError) as error:
        traceback.print_exc()
        _exit(f"this JAX ({jax.__version__}) or a package lacks what the programs need ({_first_line(error)}); expected JAX 0.11.2 or 0.12")
    jax.config.update("jax_enable_compilation_cache", False)  # whatever the environment says
    return Bench(sizes, found[0], folder), found[0].device_kind


def _keep_programs(folder: Path) -> None:
    """Take the programs that an earlier process compiled from this folder, without the entries that it left half-written."""
    import jax

    folder.mkdir(exist_ok=True)
    remove_damaged(folder)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def remove_damaged(folder: Path) -> None:
    """Remove the entries of JAX's cache that a killed process left half-written: JAX would warn of them and never replace them."""
    # JAX has no public way to read an entry.
    from jax._src.compilation_cache import decompress_executable

    for entry in folder.glob("*-cache"):
        try:
            decompress_executable(entry.read_bytes())
        except Exception:  # what it raises depends on the compressor
            entry.unlink()


def _machine(kind: str | None, device: str, sizes: Sizes) -> dict[str, Any]:
    """Everything that all results depend on: the device, its driver, the sizes, and versions of packages."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text(encoding="utf-8")) if device == "gpu" and driver.exists() else None
    return {
        "sizes": sizes.name,
        "device": kind,
        "driver": found[0] if found else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": source.versions(_PACKAGES),
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
