"""Context-parallel prefill, read off programs compiled for hosts of eight H100s, beside the paper's measurements.

    python benchmarks/context_parallel.py [--models NAME ...] [--tokens T ...] [--hosts N ...]

Needs XLA's CUDA compiler (``pip install 'l4jax[plan]'``), no GPU; nothing is run. One piece of T tokens, from position 0, is
compiled for the mesh ``sequence=N,tensor=8``. Layers repeat, so only two models are compiled for each row, of one period of layers
(Llama 3: one layer; Scout: three of chunk-local attention and one that sees everything) and of two; their difference is what each
further period costs.

Read off the programs, for each GPU: the FLOPs of matrix products; the collectives between hosts (those along ``sequence``; those along
``tensor`` are left out); the work that XLA's schedule has between the start and the end of each; and the temporaries. A transfer along the
ring, or the exchange that sends new keys to the ranks that cache them, is exposed for the time by which it takes longer than that work, at
the rates below. Two things are not read off the programs. Routed experts' FLOPs are worked out, because the router decides how many rows an
expert gets. And the GPUs are described with as much memory as is needed, because a whole model does not fit on one host.

Attention's FLOPs are worked out too, for the layouts that the ring uses: those that the kernel computes and, in parentheses, the useful
ones (of scores that are not masked). The predicted time to the first token is the useful FLOPs and those of matrices at the paper's rate,
plus the exposed transfers; a ring step's attention takes the time of its useful FLOPs. A second table has the last piece of each prompt, if
it is computed in pieces of the default length. A third has one layer's ring after cached tokens, by either variant, as the paper's table 5.
The paper is "Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np

from l4jax.cache import PAGE_SIZE, is_local
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.engine.pieces import LONG_LENGTHS
from l4jax.parallel.spread import H100_RING, aligned_layouts
from l4jax.planning.compile import AbstractModel, CompiledProgram, first_layers
from l4jax.planning.ledger import Collective
from l4jax.planning.target import GPUS_PER_HOST, h100_devices
from pallas_kernels.flash_attention.cost import computed_scores, scores
from sharding.layout import balanced
from sharding.mesh import MeshSpec
from sharding.ring import PARTIAL_BYTES
from sharding.select import RingStep, Variant, choose_ring

LLAMA_405B = "llama-3.1-405b"
MEMORY_BYTES = 10**15
MEMORY_BANDWIDTH = 3.35e12
"""An H100's, bytes/s (configs/hardware/h100-sxm.textproto)."""
PREFILL_FLOPS = 502e12
"""FLOP/s of each GPU over a whole prefill of a million tokens (the paper's appendix A)."""
PAPER_SECONDS = {131072: {1: 42.01, 2: 21.04, 4: 10.95, 8: 5.85, 16: 3.8}, 1048576: {16: 77.0}}
"""Time to the first token of Llama 3 405B by tokens and hosts (tables 6 and 7, figures 6 and 8; its 1M is 10^6)."""
PAPER_STEPS: dict[int, dict[Variant, tuple[int, int, int | None]]] = {
    3200: {"pass_kv": (627, 414, None), "pass_q": (166, 414, 424)},
    12800: {"pass_kv": (631, 1608, None), "pass_q": (544, 1608, 1023)},
}
"""Microseconds of SendRecv, attention and All2All on 4 hosts, by new tokens of 128000 (table 5)."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a prefill costs each GPU, and its transfers between hosts."""

    attention_flops: float
    matrix_flops: float
    ring_transfers: float
    ring_bytes: float
    exchange_bytes: float
    exposed_transfers: float
    exposed_ring_seconds: float
    exposed_seconds: float

    @classmethod
    def of(cls, program: CompiledProgram, computed_fraction: float = 1.0) -> Cost:
        """Read off one program. ``computed_fraction``: of all scores, those that the kernel computes."""
        between_hosts = [collective for collective in program.collectives if "sequence" in collective.axes]
        ring = [collective for collective in between_hosts if collective.kind == "collective-permute"]

        def exposed(collective: Collective) -> float:
            return exposed_seconds(collective, computed_fraction)

        exchange_bytes = sum(collective.sent_bytes for collective in between_hosts if collective.kind != "collective-permute")
        return cls(
            attention_flops=attention_flops(program),
            matrix_flops=program.ledger.flops() - attention_flops(program) - program.ledger.flops("/experts_"),
            ring_transfers=len(ring),
            ring_bytes=sum(collective.sent_bytes for collective in ring),
            exchange_bytes=exchange_bytes,
            exposed_transfers=sum(exposed(collective) > 0 for collective in ring),
            exposed_ring_seconds=sum(map(exposed, ring)),
            exposed_seconds=sum(map(exposed, between_hosts)),
        )

    def repeated(self, twice: Cost, periods: int) -> Cost:
        """The cost for a model of ``periods`` periods of layers, if this is the cost for one period and ``twice`` for two."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(twice), strict=True)
        return Cost(*(one + (periods - 1) * (two - one) for one, two in pairs))


def exposed_seconds(collective: Collective, computed_fraction: float) -> float:
    """How much longer a collective takes than the work that is scheduled beside it.

    Beside the ring's transfers that is attention. The ledger counts it as if every query saw all keys, so it is multiplied by the fraction
    that the kernel computes.
    """
    flops = collective.flops_meanwhile * (computed_fraction if collective.kind == "collective-permute" else 1.0)
    hidden = flops / H100_RING.attention_flops + collective.bytes_meanwhile / MEMORY_BANDWIDTH
    return max(0.0, collective.sent_bytes / H100_RING.ring_bandwidth - hidden)


def attention_flops(program: CompiledProgram) -> int:
    """FLOPs of scores and of their product with the values in l4jax's kernel, as if every query saw all keys."""
    return program.ledger.flops("/flash_attention/")


@functools.cache
def attended_scores(local_chunk: int | None, tokens: int, hosts: int) -> tuple[int, int, int]:
    """Of one query head, over all hosts: the scores that are not masked, those that the kernel computes, and all. ``local_chunk``: of a
    chunk-local layer.
    """
    chunk = local_chunk or tokens
    layout = balanced(tokens, hosts)
    chunks = [] if local_chunk is None else aligned_layouts([(0, tokens)], hosts, chunk, -(-tokens // hosts))
    useful = computed = every = 0
    for rank, query in enumerate(chunks[0] if chunks else layout):
        for other, key in enumerate(chunks[0] if chunks else layout):
            if chunks and other != rank:  # chunk-local layers pass nothing
                continue
            query_T, key_S = query[query >= 0], key[key >= 0]
            bounds = np.searchsorted(key_S, query_T // chunk * chunk)[None], np.searchsorted(key_S, query_T + 1)[None]
            useful, computed, every = useful + scores(bounds), computed + computed_scores(bounds), every + len(query_T) * len(key_S)
    return useful, computed, every


def attention_flops_of_layers(config: ModelConfig, tokens: int, hosts: int) -> list[tuple[float, float, float]]:
    """Of each layer, over all GPUs: attention's useful FLOPs, those that are computed, and those of all scores."""
    a_score = 4 * config.num_heads * config.head_dim
    found = []
    for layer in range(config.num_layers):
        useful, computed, every = attended_scores(config.attention_chunk_size if is_local(config, layer) else None, tokens, hosts)
        found.append((float(a_score * useful), float(a_score * computed), float(a_score * every)))
    return found


def matrix_flops(config: ModelConfig, layer: int, tokens: int) -> tuple[float, float]:
    """FLOPs of one layer's weight matrices over all GPUs: matrices that every token uses, and one routed expert for each token."""
    D, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    attention = 2 * D * heads * config.head_dim
    if config.moe is None or not config.moe.moe_layers[layer]:
        return 2 * tokens * (attention + 3 * D * config.intermediate_size), 0.0
    expert = 3 * D * config.moe.intermediate_size
    return 2 * tokens * (attention + expert + D * config.moe.num_experts), 2 * tokens * expert


def period(config: ModelConfig) -> int:
    """Layers after which the kinds of layer repeat."""
    moe_layers = config.moe.moe_layers if config.moe else (False,) * config.num_layers
    kinds = list(zip(config.rope_layers, moe_layers, strict=True))
    return next(n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds[:n] * (len(kinds) // n) == kinds)


def read_config(name: str) -> ModelConfig:
    return config_from_hf(json.loads((configs_path() / "models" / f"{name}.json").read_text(encoding="utf-8")))


def compile_prefill(config: ModelConfig, hosts: int, tokens: int, cached: int = 0, variant: Variant | None = None) -> CompiledProgram:
    mesh = MeshSpec(sequence=hosts, tensor=GPUS_PER_HOST)
    model = AbstractModel(config, mesh, h100_devices(mesh.size, memory_bytes=MEMORY_BYTES), jnp.dtype(jnp.bfloat16))
    return model.prefill(tokens, cached, cached + tokens, variant)


def print_prefill(name: str, tokens: int, hosts: list[int]) -> None:
    """Print a row for each number of hosts: a full prefill."""
    config = read_config(name)
    layers = range(config.num_layers)
    every, routed = (sum(flops) for flops in zip(*(matrix_flops(config, i, tokens) for i in layers), strict=True))
    global_layer = next(i for i in layers if not is_local(config, i))
    print(f"\n{name}, {tokens} tokens: each GPU's share\n")
    print(
        "| hosts | attention TFLOP (useful) | matrices + routed TFLOP | ring transfers | GB sent around the ring ",
        end="",
    )
    print(
        "| µs of one transfer, of a step's attention ",
        end="",
    )
    print("| GB to caching ranks | exposed transfers, total s | temporaries GB | predicted s | paper s |")
    print("|" + "---|" * 11)
    for N in hosts:
        gpus = N * GPUS_PER_HOST
        attention = attention_flops_of_layers(config, tokens, N)
        useful, computed = (sum(flops[i] for flops in attention) for i in range(2))
        _, in_ring, all_in_ring = attention[global_layer]
        one, two = (compile_prefill(first_layers(config, times * period(config)), N, tokens) for times in (1, 2))
        costs = [Cost.of(program, in_ring / all_in_ring) for program in (one, two)]
        cost = costs[0].repeated(costs[1], config.num_layers // period(config))
        seconds = (useful + every + routed) / gpus / PREFILL_FLOPS + cost.exposed_seconds
        each = "–"
        if N > 1:
            transfer = cost.ring_bytes / cost.ring_transfers / H100_RING.ring_bandwidth
            hop = attention[global_layer][0] / gpus / N / H100_RING.attention_flops
            each = f"{microseconds(transfer)}, {microseconds(hop)}"
        paper = PAPER_SECONDS.get(tokens, {}).get(N, "–") if name == LLAMA_405B else "–"
        columns = [
            N,
            f"{computed / gpus / 1e12:.1f} ({useful / gpus / 1e12:.1f})",
            f"{cost.matrix_flops / 1e12:.0f} + {routed / gpus / 1e12:.0f}",
            f"{cost.ring_transfers:.0f}",
            f"{cost.ring_bytes / 1e9:.2f}",
            each,
            f"{cost.exchange_bytes / 1e9:.2f}",
            f"{cost.exposed_transfers:.0f}, {cost.exposed_seconds:.2f}",
            f"{two.temporary_bytes / 1e9:.1f}",
            f"{seconds:.2f}",
            paper,
        ]
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


def print_pieces(name: str, tokens: int, hosts: list[int]) -> None:
    """Print a row for each number of hosts: the last piece of a prompt that is computed in pieces of the default length."""
    config = read_config(name)
    times = config.num_layers // period(config)
    print(f"\n{name}, the last piece of {tokens} tokens, in pieces of {LONG_LENGTHS[-1]} for each host: each GPU's share\n")
    print("| hosts | tokens of the piece | ring transfers | µs of one transfer | exposed transfers, total ms | temporaries GB |")
    print("|" + "---|" * 6)
    for N in hosts:
        piece = min(tokens, LONG_LENGTHS[-1] * N)
        one, two = (compile_prefill(first_layers(config, n * period(config)), N, piece, tokens - piece) for n in (1, 2))
        # All cached keys are seen, and about half of the scores between the piece's own tokens are masked. The ring passes room for a power
        # of two of pages, and empty slots are skipped.
        pages = -(-(tokens - piece) // (PAGE_SIZE * N))
        passed = (1 << (pages - 1).bit_length() if pages else 0) * PAGE_SIZE * N + piece
        computed_fraction = (tokens - piece / 2) / passed
        cost = Cost.of(one, computed_fraction).repeated(Cost.of(two, computed_fraction), times)
        transfer = microseconds(cost.ring_bytes / cost.ring_transfers / H100_RING.ring_bandwidth) if cost.ring_transfers else "–"
        exposed = f"{cost.exposed_transfers:.0f}, {1e3 * cost.exposed_seconds:.1f}"
        columns = [N, piece, f"{cost.ring_transfers:.0f}", transfer, exposed, f"{two.temporary_bytes / 1e9:.2f}"]
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


def print_ring_steps(total: int = 128000, hosts: int = 4) -> None:
    """Print one layer's ring after cached tokens, by either variant, beside table 5."""
    config = first_layers(read_config(LLAMA_405B), 1)
    print(f"\n{LLAMA_405B}, {hosts} hosts, some of {total} tokens new: one step of the ring in µs, predicted (the paper's)\n")
    print("| new tokens | variant | MB sent | transfer | attention | exposed transfers, µs | MB sent back | back |")
    print("|" + "---|" * 8)
    for tokens, paper in PAPER_STEPS.items():
        step = RingStep(
            new_tokens=tokens,
            cached_tokens=total - tokens,
            ranks=hosts,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            output_bytes_per_element=PARTIAL_BYTES,
        )
        exchange_bytes = 0.0
        for variant, (paper_transfer, paper_attention, paper_back) in paper.items():
            program = compile_prefill(config, hosts, tokens, total - tokens, variant)
            cost = Cost.of(program)
            chosen = " (Algorithm 5)" if choose_ring(step, H100_RING).variant == variant else ""
            transfer_bytes = cost.ring_bytes / cost.ring_transfers
            attention = cost.attention_flops / hosts / H100_RING.attention_flops
            back = ["–", "–"]
            if variant == "pass_kv":
                exchange_bytes = cost.exchange_bytes
            else:  # both variants send new keys to the ranks that cache them
                back_bytes = cost.exchange_bytes - exchange_bytes
                back = [f"{back_bytes / 1e6:.1f}", f"{microseconds(back_bytes / H100_RING.ring_bandwidth)} ({paper_back})"]
            columns = [
                tokens,
                variant + chosen,
                f"{transfer_bytes / 1e6:.1f}",
                f"{microseconds(transfer_bytes / H100_RING.ring_bandwidth)} ({paper_transfer})",
                f"{microseconds(attention)} ({paper_attention})",
                f"{cost.exposed_transfers:.0f} of {cost.ring_transfers:.0f}, {microseconds(cost.exposed_ring_seconds)}",
                *back,
            ]
            print(f"| {' | '.join(map(str, columns))} |", flush=True)


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def main() -> None:
    """Parse the command line, compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(file.stem for file in (configs_path() / "models").glob("*.json"))
    parser.add_argument("--models", nargs="+", choices=names, default=[LLAMA_405B, "llama-4-scout-17b-16e-instruct"], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=[131072, 1048576])
    parser.add_argument("--hosts", nargs="+", type=int, default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    try:
        h100_devices(GPUS_PER_HOST)
    except ValueError as error:
        parser.error(str(error))
    for name in arguments.models:
        for tokens in arguments.tokens:
            print_prefill(name, tokens, arguments.hosts)
            print_pieces(name, tokens, arguments.hosts)
    if LLAMA_405B in arguments.models:
        print_ring_steps()


if __name__ == "__main__":
    main()
