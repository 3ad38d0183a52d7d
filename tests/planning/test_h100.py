"""The first layers of real models, compiled for H100s that are not here: memory, donation, collectives, and no expansion of experts.

Run by ``make test-h100``, which fetches XLA's CUDA compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache
from jax._src import config as jax_config
from jax._src.lru_cache import LRUCache

from benchmarks.h100.bench import eagle3_head
from benchmarks.h100.launches import compiled
from benchmarks.step_costs import price
from l4jax import SamplingParams
from l4jax.cache import PageTables
from l4jax.compiled import Call
from l4jax.config import Eagle3Config
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.decoding.plan import Speculation
from l4jax.engine.pieces import default_lengths, piece_bytes
from l4jax.planning.compile import AbstractModel, CompiledProgram, first_layers
from l4jax.planning.target import H100_MEMORY_BYTES, h100_devices
from sharding.mesh import MeshSpec

pytestmark = pytest.mark.h100

BF16 = jnp.dtype(jnp.bfloat16)
GREEDY = SamplingParams(temperature=0.0)
SCOUT = "llama-4-scout-17b-16e-instruct"
# Layers repeat: one period of Scout's (three that are chunk-local, one that keeps everything), and as many of a dense model as have
# the temporaries of all (of its first two they are less).
CASES = [(SCOUT, "tensor=8", 4), (SCOUT, "expert=8", 4), ("llama-3.1-405b", "tensor=16", 3)]
ROWS, CAPACITY, PIECE = 8, 16384, 8192


def read_config(name):
    return config_from_hf(json.loads((configs_path() / "models" / f"{name}.json").read_text()))


def abstract_model(config, mesh, drafter=None):
    spec = MeshSpec.parse(mesh)
    return AbstractModel(config, spec, h100_devices(spec.size), BF16, drafter)


@dataclasses.dataclass(frozen=True)
class Case:
    """The first layers of a model, which are compiled, and all of it, whose arrays are counted."""

    config: object
    mesh: MeshSpec
    model: AbstractModel
    whole: AbstractModel


@functools.cache
def case(name, mesh, layers):
    config = first_layers(read_config(name), layers)
    return Case(config, MeshSpec.parse(mesh), abstract_model(config, mesh), abstract_model(read_config(name), mesh))


@functools.cache
def decode(name, mesh, layers):
    return case(name, mesh, layers).model.decode(ROWS, CAPACITY, GREEDY)


@functools.cache
def prefill(name, mesh, layers):
    return case(name, mesh, layers).model.prefill(PIECE, 0, CAPACITY)


def largest_computed(text, scope):
    """Elements of the largest array that an instruction of this scope computes; parameters and views do not count."""
    sizes = [1]
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]*)\]\S* (?!parameter|get-tuple-element|bitcast|while|tuple|optimization-barrier)[\w-]+\(", line)
        if match and f"/{scope}/" in line:
            sizes.append(math.prod(int(n) for n in match[1].split(",") if n))
    return max(sizes)


def one_of_each_kind(config):
    """Two layers, the first chunk-local with RoPE, the second without."""
    return dataclasses.replace(first_layers(config, 2), rope_layers=(True, False))


def largest_message(config, mesh):
    """Activations of a decode step, or float32 partial attentions of all ranks; the smallest weight matrix is many times that."""
    partials = mesh.token_ranks.count * ROWS * config.num_heads // mesh.tensor * (config.head_dim + 1) * 4
    return max(ROWS * config.hidden_size * BF16.itemsize, partials if mesh.token_ranks.count > 1 else 0)


@pytest.mark.parametrize(("name", "mesh", "layers"), CASES)
def test_decode_fits_donates_its_cache_and_moves_activations_only(name, mesh, layers, capsys):
    program, this = decode(name, mesh, layers), case(name, mesh, layers)
    cache = this.model.cache_bytes(ROWS, CAPACITY)
    arguments = this.whole.decode_call(ROWS, CAPACITY).device_bytes
    assert arguments + program.temporary_bytes < H100_MEMORY_BYTES
    assert program.donated_bytes >= cache
    assert program.temporary_bytes < 1e9
    # Not copied: the smallest of a layer's two pools would be that much.
    assert program.temporary_bytes < cache / this.config.num_layers
    assert max(max(collective.nbytes) for collective in program.collectives) <= largest_message(this.config, this.mesh)
    with capsys.disabled():
        print(f"\n{name} on {mesh}, one decode step of {ROWS} rows, first {layers} layers:\n{program.collective_table()}")
        print(f"arguments of all {this.whole.placement.config.num_layers} layers {arguments / 1e9:.1f} GB, ", end="")
        print(f"temporaries {program.temporary_bytes / 1e9:.3f} GB")


@pytest.mark.parametrize(
    ("name", "mesh", "kernels"),
    [
        ("llama-3.1-8b", "tensor=1", {"RoPE, dense": 13}),
        ("llama-3.1-70b", "tensor=8", {"RoPE, dense": 13}),
        (SCOUT, "tensor=8", {"RoPE, experts": 16, "NoPE, experts": 16}),
    ],
)
def test_kernels_and_bytes_of_a_step_of_one_row(name, mesh, kernels):
    """docs/h100.md has these counts, and says why they are above the aims."""
    found, of_layers = price(name, MeshSpec.parse(mesh), 1, None)
    assert {kind: len(names) for kind, names in of_layers.items()} == kernels
    assert found.least_bytes < found.nbytes < 1.1 * found.least_bytes


@pytest.mark.parametrize(("name", "mesh", "layers"), CASES)
def test_prefill_fits_and_moves_activations_only(name, mesh, layers):
    program, this = prefill(name, mesh, layers), case(name, mesh, layers)
    assert program.temporary_bytes < piece_bytes(this.config, None, this.mesh, BF16, PIECE // this.mesh.token_ranks.count)
    arguments = this.whole.prefill_call(PIECE, 0, CAPACITY).device_bytes
    assert arguments + program.temporary_bytes < H100_MEMORY_BYTES
    assert program.donated_bytes >= this.model.cache_bytes(1, CAPACITY)
    assert max(max(collective.nbytes) for collective in program.collectives) <= PIECE * this.config.hidden_size * BF16.itemsize


@pytest.mark.parametrize(("program", "tokens"), [(decode, ROWS), (prefill, PIECE)], ids=["decode", "prefill"])
def test_temporaries_do_not_grow_with_depth(program, tokens):
    """So those of a few layers tell what all need. Three layers more that kept anything would keep three times a layer's output; a part of
    one may be lost between arrays.
    """
    name, mesh, layers = CASES[-1]
    grown = program(name, mesh, layers + 3).temporary_bytes - program(name, mesh, layers).temporary_bytes
    assert grown < 2 * tokens * read_config(name).hidden_size * BF16.itemsize


def test_arguments_are_counted_as_the_compiler_counts_them():
    name, mesh, layers = CASES[0]
    program, model = decode(name, mesh, layers), case(name, mesh, layers).model
    counted = model.decode_call(ROWS, CAPACITY).device_bytes
    assert abs(program.argument_bytes - counted) <= 1e-4 * counted


@pytest.mark.parametrize(("name", "mesh", "layers"), CASES)
def test_one_sum_for_attention_and_one_for_the_feed_forward(name, mesh, layers):
    """With ``tensor`` each layer sums activations twice and the embedding once; without it, each layer once. Sampling sums few numbers."""
    config, spec = case(name, mesh, layers).config, case(name, mesh, layers).mesh
    wide = ROWS * config.hidden_size * BF16.itemsize
    sums = sum(nbytes == wide for collective in decode(name, mesh, layers).collectives for nbytes in collective.nbytes)
    assert sums == (2 * config.num_layers + 1 if spec.tensor > 1 else config.num_layers)


@pytest.mark.parametrize(
    ("name", "mesh", "layers", "strategy"),
    [(SCOUT, "tensor=8", 4, "one-shot"), ("llama-3.1-70b", "tensor=8", 1, "one-shot"), ("llama-3.1-70b", "tensor=16", 1, "NCCL")],
    ids=["scout", "70b", "70b-two-hosts"],
)
def test_every_sum_of_a_decode_step_within_a_host_is_a_one_shot_kernel(name, mesh, layers, strategy, capsys):
    """Within a host the kernels use NVLink, those of cuts, penalties and log-probabilities too. Between hosts NCCL adds up."""
    program = decode(name, mesh, layers)
    sums = [collective for collective in program.collectives if collective.kind == "all-reduce"]
    assert len(sums) >= 2 * layers + 3
    assert {(collective.strategy, len(collective.nbytes)) for collective in sums} == {(strategy, 1)}
    with capsys.disabled():
        print(f"\n{name} on {mesh}, one decode step of {ROWS} rows, first {layers} layers:\n{program.collective_table()}")


@pytest.mark.parametrize(("mesh", "drafting"), [("tensor=1", False), ("tensor=8", False), ("tensor=1", True)])
def test_a_decode_step_is_in_one_cuda_graph(mesh, drafting, tmp_path):
    """Its loops too: the host neither launches a kernel nor waits for a condition until the burst has ended."""
    config = first_layers(read_config("llama-3.1-8b"), 2)
    model = abstract_model(config, mesh, eagle3_head(config, 32000) if drafting else None)
    launches = compiled(model.decode_call(ROWS, CAPACITY, drafting=drafting), tmp_path)
    # Two loops find the cuts of sampling; attention has none.
    assert launches.kernels > 50 and launches.loops == 2
    assert launches.single == launches.graphs == launches.graphs_a_turn == 0  # so all is in a graph around the outermost loop


@pytest.mark.parametrize(("name", "mesh", "layers"), [("llama-3.1-8b", "tensor=1", 2), (SCOUT, "tensor=8", 4)], ids=["8b", "scout"])
def test_a_round_of_speculation_is_in_one_cuda_graph(name, mesh, layers, tmp_path):
    """So are the drafter's passes, the verification and the choice of what is accepted."""
    config, plan = first_layers(read_config(name), layers), Speculation.parse("chain:3")
    launches = compiled(abstract_model(config, mesh, eagle3_head(config, 32000)).speculate_call(1, CAPACITY, plan), tmp_path)
    assert launches.kernels > 100 and launches.loops == 1
    assert launches.single == launches.graphs == launches.graphs_a_turn == 0


def test_over_two_hosts_each_sum_of_a_layer_cuts_the_graph(tmp_path):
    """NCCL's sums are launched by the host; all kernels between two sums are in one graph."""

    def launches(layers):
        config = first_layers(read_config("llama-3.1-405b"), layers)
        return compiled(abstract_model(config, "tensor=16").decode_call(1, CAPACITY), tmp_path)

    a_layer = launches(3) - launches(2)
    assert (a_layer.single, a_layer.graphs, a_layer.loops) == (2, 2, 0)


@pytest.mark.parametrize(
    ("name", "mesh", "layers"),
    [("llama-3.1-8b", "tensor=1", 2), ("llama-3.1-405b", "tensor=16", 2), ("llama-4-maverick-17b-128e", "expert=2,tensor=8", 4)],
)
def test_the_longest_default_piece_takes_little_memory(name, mesh, layers):
    """8,192 tokens a rank: attention's kernels store no scores. Those of one layer of 8B would take 8.6 GB."""
    this = case(name, mesh, layers)
    ranks = this.mesh.token_ranks.count
    left = H100_MEMORY_BYTES - this.whole.prefill_call(8192 * ranks, 0, CAPACITY * ranks).device_bytes
    lengths = default_lengths(this.config, None, this.mesh, this.model.placement.mesh.local_devices[0], BF16, left)
    assert lengths[-1] == 8192
    temporary_bytes = this.model.prefill(8192 * ranks, 0, CAPACITY * ranks).temporary_bytes
    assert temporary_bytes < min(3e9, piece_bytes(this.config, None, this.mesh, BF16, 8192))


def test_two_sums_that_xla_combines_lose_their_kernels():
    """The reason why programs are compiled with combining turned off. Once this test fails, combining can be left on."""
    spec = MeshSpec(tensor=8)
    axes = jax.sharding.PartitionSpec("tensor")
    sums = jax.shard_map(
        lambda a, b: (jax.lax.psum(a, "tensor"), jax.lax.pmax(a, "tensor"), jax.lax.psum(b, "tensor")),
        mesh=spec.build(h100_devices(8)),
        in_specs=(axes, axes),
        out_specs=jax.sharding.PartitionSpec(),
    )
    arrays = (jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((64, 96), jnp.float32))
    lowered = jax.jit(sums).lower(*arrays)
    combined, apart = (
        [collective.strategy for collective in CompiledProgram.of(lowered.compile(options), spec).collectives]
        for options in (None, {"xla_gpu_all_reduce_combine_threshold_bytes": 0})
    )
    assert sorted(combined) == ["NCCL", "one-shot"]
    assert apart == ["one-shot"] * 3


@pytest.mark.parametrize(("mesh", "layers"), [case[1:] for case in CASES if case[0] == SCOUT])
@pytest.mark.parametrize(("program", "tokens"), [(decode, ROWS), (prefill, PIECE)], ids=["decode", "prefill"])
def test_routed_experts_do_the_work_of_the_chosen_ones_only(program, tokens, mesh, layers):
    """Computed densely, every token meets every expert: an array of tokens x experts x width."""
    config, spec = case(SCOUT, mesh, layers).config, case(SCOUT, mesh, layers).mesh
    gate_up = 2 * config.moe.intermediate_size // spec.tensor
    one_expert = config.hidden_size * gate_up
    text = program(SCOUT, mesh, layers).text
    assert "/routed_experts/experts_down/" in text
    largest = largest_computed(text, "routed_experts")
    assert largest <= max(2 * tokens * max(config.hidden_size, gate_up), one_expert)


def test_programs_for_absent_devices_are_not_kept(tmp_path, monkeypatch):
    """JAX could write them to its cache, and would warn whenever it fails to read them."""
    monkeypatch.setattr(compilation_cache, "_cache", LRUCache(str(tmp_path), max_size=-1))
    h100 = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    with jax_config.persistent_cache_min_compile_time_secs(0.0):
        for _ in range(2):
            lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=h100))
            lowered.compile()
    assert list(tmp_path.iterdir()) == []


def test_scout_caches_a_million_tokens_on_eight_ranks():
    """12 NoPE layers keep everything, spread; 36 RoPE layers one attention chunk each, on every rank: 4096 bytes a token and layer."""
    tokens = 2**20
    spread = abstract_model(read_config(SCOUT), "sequence=8").cache_bytes(1, tokens)
    expected = 12 * 4096 * tokens // 8 + 36 * 4096 * 8192
    assert abs(spread - expected) <= 0.03 * expected


def with_a_head():
    """Two layers of Scout, one of each kind, with an EAGLE-3 head of the size of the public ones, on eight devices."""
    config = one_of_each_kind(read_config(SCOUT))
    one_dense_layer = {"num_layers": 1, "rope_layers": (True,), "moe": None, "attention_chunk_size": None, "use_qk_norm": False}
    own = {"intermediate_size": 32768, "rope_scaling": None, "max_position_embeddings": 2048, "attn_temperature_tuning": False}
    decoder = dataclasses.replace(config, **one_dense_layer, **own)
    drafter = Eagle3Config(
        decoder=decoder,
        draft_vocab_size=32000,
        target_layers=2,
        target_hidden_size=config.hidden_size,
        aux_layers=(0, 1, 2),
    )
    return config, abstract_model(config, "tensor=8", drafter)


def test_rounds_of_speculation_keep_the_cache_in_place_and_gather_no_logits():
    """A tree of 26 nodes, top-p on."""
    config, model = with_a_head()
    plan = Speculation.parse("tree:eagle26")
    program = model.speculate(ROWS, 8 * CAPACITY, plan)
    assert program.donated_bytes >= model.cache_bytes(ROWS, 8 * CAPACITY)
    # The nodes' logits and their like; a second copy of the keys of the layer that keeps everything would be more.
    logits = ROWS * plan.tree.size * config.vocab_size // 8 * 4
    assert program.temporary_bytes < 4 * logits < ROWS * 8 * CAPACITY * config.head_dim * BF16.itemsize
    assert {collective.strategy for collective in program.collectives if collective.kind == "all-reduce"} <= {"one-shot", "two-shot"}
    # What every node of the tree sums up is the largest message: logits of the nodes, or their candidates, are not sent.
    assert max(max(collective.nbytes) for collective in program.collectives) <= ROWS * plan.tree.size * config.hidden_size * BF16.itemsize


def test_plain_steps_of_a_model_with_a_drafter_and_zeroing_keep_both_caches_in_place():
    _, model = with_a_head()
    call = model.decode_call(ROWS, 8 * CAPACITY, drafting=True)
    resident = call.arguments[1]
    pages = np.zeros((1, 64), np.int32)
    zero = Call(model.programs.zero_pages, (resident, PageTables(pages, pages)), {})
    caches = Call(None, (resident.cache, resident.draft_cache), {}).device_bytes
    pool = min(leaf.size * BF16.itemsize for leaf in jax.tree.leaves((resident.cache, resident.draft_cache))) // 8
    for program in (CompiledProgram.of(each.lower().compile(), MeshSpec(tensor=8)) for each in (call, zero)):
        assert program.donated_bytes >= caches
        assert program.temporary_bytes < pool


@pytest.mark.parametrize("variant", ["pass_kv", "pass_q"])
def test_a_long_prompt_passes_keys_or_queries_in_the_layers_without_rope_only(variant):
    """Two layers of Scout, one of each kind, with shorter chunks, over four ranks: 3 transfers in the NoPE layer, each under way
    during at least one of the two products of its step's attention, and none in the RoPE layer, whose chunks are whole."""
    small = dataclasses.replace(one_of_each_kind(read_config(SCOUT)), attention_chunk_size=1024)
    tokens, cached = 8192, 8192
    program = abstract_model(small, "sequence=4").prefill(tokens, cached, 16384, variant)
    in_attention = [collective for collective in program.collectives if "/attention/" in collective.scope]
    assert all("/layer_1/" in collective.scope for collective in in_attention)
    transfers = [collective for collective in in_attention if collective.kind == "collective-permute"]
    assert len(transfers) == 3
    T, D, attended = tokens // 4, small.hidden_size, small.num_heads * small.head_dim
    # max_i P_i + ceil(T / N) tokens of keys and values; or ceil(T / N) queries.
    message = 2 * (cached // 4 + T) * small.num_kv_heads * small.head_dim if variant == "pass_kv" else T * attended
    assert all(transfer.nbytes == (message * BF16.itemsize,) for transfer in transfers)
    one_product = 2 * T * attended * (cached // 4 + T)
    assert all(transfer.flops_meanwhile >= one_product for transfer in transfers)
    # Every rank's tokens meet their own keys in one layer and all ranks' in the other, masked ones too.
    assert program.ledger.flops("flash_attention") == 4 * T * attended * (T + cached + tokens)
    attention = 2 * D * (attended + small.num_kv_heads * small.head_dim)
    feed_forward = D * (3 * small.moe.intermediate_size + small.moe.num_experts)
    head = 2 * small.vocab_size * D
    # Each expert's rows begin at a multiple of 8, and the last one's block may be almost empty.
    places = T + 7 * small.moe.num_experts + 128
    routed = 2 * 6 * places * D * small.moe.intermediate_size
    assert program.ledger.flops() - program.ledger.flops("flash_attention") == 2 * 2 * T * (attention + feed_forward) + head + routed
