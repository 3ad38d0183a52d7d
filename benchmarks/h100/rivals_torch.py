"""PyTorch's SDPA, flex attention and products, in CUDA graphs, so that the host's work does not affect the times.

Its attention reads contiguous keys, where ours reads the pages of a cache.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.h100.errors import DeviceBroken, NotHere
from benchmarks.h100.shapes import SHAPES
from benchmarks.h100.sizes import Sizes
from pallas_kernels.shapes import Attention, Linear, Mixture


@dataclasses.dataclass(frozen=True)
class TorchBench:
    """The sizes, and the device: "cuda" or "cpu"."""

    sizes: Sizes
    device: str


def import_torch(bench: TorchBench) -> Any:
    """Import PyTorch. Raises NotHere if it is missing, or if it finds no GPU and one is wanted."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        raise NotHere(f"PyTorch is not installed ({error})") from error
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("PyTorch sees no GPU")
    return torch


def measure(bench: TorchBench, record: Callable[[str, dict[str, Any]], None], *, op: str) -> None:
    """Milliseconds a call of each implementation, for every shape."""
    torch = import_torch(bench)
    for shape in SHAPES[bench.sizes.name][op]:
        make, implementations, flops = _CASES[type(shape)](torch, bench, op, shape)
        sets = [make() for _ in range(bench.sizes.copies(shape.nbytes))]
        for name, function in implementations.items():
            try:
                values = _timed(torch, bench, function, sets)
            except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                values = {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            record(f"{shape.label} | {name}", values | {"bytes": shape.nbytes, "flops": flops})
            if "why" in values:
                _check(torch, bench)


def _check(torch: Any, bench: TorchBench) -> None:
    """Raise DeviceBroken if the device does not compute any more."""
    try:
        (torch.zeros(8, device=bench.device) + 1).cpu()
    except RuntimeError as error:
        raise DeviceBroken(f"the device does not respond after that ({error})") from error


Implementations = tuple[Callable[[], tuple[Any, ...]], dict[str, Callable[..., Any]], int]


def _attention(torch: Any, bench: TorchBench, op: str, shape: Attention) -> Implementations:
    H, S, causal, tree = shape.K * shape.G, shape.S, op == "flash_attention", op == "tree_attention"
    keys = S + shape.T if tree else S
    mask = None
    if tree and shape.T > 1:
        mask = torch.ones(shape.T, keys, dtype=torch.bool, device=bench.device)
        mask[:, S:] = torch.tril(mask[:, S:])
    elif causal and S > shape.T:
        mask = torch.tril(torch.ones(shape.T, S, dtype=torch.bool, device=bench.device), S - shape.T)

    def make() -> tuple[Any, ...]:
        sizes = ((shape.B, H, shape.T, shape.h), *[(shape.B, shape.K, keys, shape.h)] * 2)
        return tuple(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in sizes)

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True)

    def flex() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
            return query + S - shape.T >= key if causal else (key < S) | (key - S <= query)

        blocks = create_block_mask(visible, None, None, shape.T, keys, device=bench.device) if causal or mask is not None else None
        compiled = torch.compile(flex_attention) if bench.device == "cuda" else flex_attention
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    made: list[Callable[..., Any]] = []

    def flex_once(q: Any, k: Any, v: Any) -> Any:
        if not made:
            made.append(flex())
        return made[0](q, k, v)

    scores = shape.T * (S - shape.T) + shape.T * (shape.T + 1) // 2 if causal else shape.T * keys
    where = "" if causal else ", keys contiguous"
    return make, {f"PyTorch: SDPA{where}": sdpa, f"PyTorch: flex attention{where}": flex_once}, shape.flops(scores)


def _linear(torch: Any, bench: TorchBench, op: str, shape: Linear) -> Implementations:
    def make() -> tuple[Any, ...]:
        return tuple(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in ((shape.M, shape.i), (shape.o, shape.i)))

    return make, {"PyTorch: linear": torch.nn.functional.linear}, shape.flops


def _experts(torch: Any, bench: TorchBench, op: str, shape: Mixture) -> Implementations:
    ends = torch.tensor(shape.sizes, device=bench.device).cumsum(0).to(torch.int32)

    def make() -> tuple[Any, ...]:
        sizes = ((shape.M, shape.D), (shape.E, shape.D, 2 * shape.F), (shape.E, shape.F, shape.D))
        return tuple(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in sizes)

    def grouped(x: Any, gate_up: Any, down: Any) -> Any:
        function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        gate, up = function(x, gate_up, offs=ends).chunk(2, dim=-1)
        return function(torch.nn.functional.silu(gate) * up, down, offs=ends)

    return make, {"PyTorch: grouped_mm, twice": grouped}, shape.flops


_CASES: dict[type, Callable[..., Implementations]] = {Attention: _attention, Linear: _linear, Mixture: _experts}


def _timed(torch: Any, bench: TorchBench, function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Milliseconds a call, over all sets of arrays; replayed from a CUDA graph if the calls can be captured."""

    def every() -> None:
        for arrays in sets:
            function(*arrays)

    def wait() -> None:
        if bench.device == "cuda":
            torch.cuda.synchronize()

    every()
    every()
    wait()
    run, captured = every, False
    if bench.device == "cuda":
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(8):
                    every()
            run, captured = graph.replay, True
        except RuntimeError:
            wait()
    calls = len(sets) * (8 if captured else 1)
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < bench.sizes.seconds / 3):
        started = time.perf_counter()
        for _ in range(4):
            run()
        wait()
        seconds.append((time.perf_counter() - started) / (4 * calls))
    times = {"ms": statistics.median(seconds) * 1e3, "least_ms": min(seconds) * 1e3, "most_ms": max(seconds) * 1e3}
    return times | {"repetitions": len(seconds), "in_a_graph": captured}
