"""PyTorch's SDPA, flex attention and grouped products, in CUDA graphs, so that the host's work does not affect the times."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.h100.errors import NotHere
from benchmarks.h100.shapes import SHAPES, Attention, Grouped
from benchmarks.h100.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class TorchBench:
    """The sizes, and the device: "cuda" or "cpu"."""

    sizes: Sizes
    device: str


def import_torch(bench: TorchBench) -> Any:
    """Import PyTorch. Raises NotHere if it is missing, or if it finds no GPU and one is wanted."""
    try:
        import torch
    except ImportError as error:
        raise NotHere(f"PyTorch is not installed ({error})") from error
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise NotHere("PyTorch sees no GPU")
    return torch


def measure(bench: TorchBench, record: Callable[[str, dict[str, Any]], None], *, op: str) -> None:
    """Milliseconds a call of each implementation, for every shape."""
    torch = import_torch(bench)
    for shape in SHAPES[bench.sizes.name][op]:
        make, implementations, flops = (_grouped if op == "grouped_matmul" else _attention)(torch, bench, op, shape)
        copies = max(1, min(8, -(-bench.sizes.rotated_bytes // shape.nbytes)))
        sets = [make() for _ in range(copies)]
        for name, function in implementations.items():
            try:
                values = _timed(torch, bench, function, sets)
            except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                values = {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            record(f"{shape.label} | {name}", values | {"bytes": shape.nbytes, "flops": flops})


Implementations = tuple[Callable[[], tuple[Any, ...]], dict[str, Callable[..., Any]], int]


def _attention(torch: Any, bench: TorchBench, op: str, shape: Attention) -> Implementations:
    H, S, causal, tree = shape.K * shape.G, shape.S, op == "attend", op == "tree_attention"
    keys = S + shape.T if tree else S
    mask = None
    if tree:
        mask = torch.ones(shape.T, keys, dtype=torch.bool, device=bench.device)
        mask[:, S:] = torch.tril(mask[:, S:])

    def make() -> tuple[Any, ...]:
        sizes = ((shape.B, H, shape.T, shape.h), *[(shape.B, shape.K, keys, shape.h)] * 2)
        return tuple(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in sizes)

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)

    def flex() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
            return query >= key if causal else (key < S) | (key - S <= query)

        blocks = create_block_mask(visible, None, None, shape.T, keys, device=bench.device) if causal or tree else None
        compiled = torch.compile(flex_attention) if bench.device == "cuda" else flex_attention
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    made: list[Callable[..., Any]] = []

    def flex_once(q: Any, k: Any, v: Any) -> Any:
        if not made:
            made.append(flex())
        return made[0](q, k, v)

    scores = shape.T * (shape.T + 1) // 2 if causal else shape.T * keys
    return make, {"PyTorch: SDPA": sdpa, "PyTorch: flex attention": flex_once}, shape.flops(scores)


def _grouped(torch: Any, bench: TorchBench, op: str, shape: Grouped) -> Implementations:
    ends = torch.tensor(shape.sizes, device=bench.device).cumsum(0).to(torch.int32)

    def make() -> tuple[Any, ...]:
        sizes = ((shape.M, shape.D), (shape.E, shape.D, shape.F))
        return tuple(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for size in sizes)

    def grouped(x: Any, w: Any) -> Any:
        function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        return function(x, w, offs=ends)

    return make, {"PyTorch: grouped_mm": grouped}, shape.flops


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
