"""Real models at full size, compiled for H100s that are not here: memory, donation, collectives, and no expansion of experts.

Run by ``make test-h100``, which fetches XLA's CUDA compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import jax.numpy as jnp
import pytest

from l4jax import SamplingParams
from l4jax.config import DrafterConfig
from l4jax.config_formats import config_from_hf
from l4jax.data import configs_path
from l4jax.decoding.plan import Speculation
from l4jax.planning.compile import AbstractModel, first_layers
from l4jax.planning.target import H100_MEMORY_BYTES, h100_devices
from sharding.mesh import MeshSpec

pytestmark = pytest.mark.h100

BF16 = jnp.dtype(jnp.bfloat16)
CASES = [
    ("llama-4-scout-17b-16e-instruct", "tensor=8"),
    ("llama-4-scout-17b-16e-instruct", "expert=8"),
    ("llama-3.1-405b", "tensor=16"),
]
ROWS, CAPACITY, PIECE = 8, 16384, 8192


@dataclasses.dataclass(frozen=True)
class Case:
    config: object
    mesh: MeshSpec
    model: AbstractModel


@functools.cache
def case(name, mesh):
    config = config_from_hf(json.loads((configs_path() / "models" / f"{name}.json").read_text()))
    spec = MeshSpec.parse(mesh)
    return Case(config, spec, AbstractModel(config, spec, h100_devices(spec.size), BF16))


@functools.cache
def decode(name, mesh):
    return case(name, mesh).model.decode(ROWS, CAPACITY, SamplingParams(temperature=0.0))


@functools.cache
def prefill(name, mesh):
    return case(name, mesh).model.prefill(PIECE, 0, CAPACITY, SamplingParams(temperature=0.0))


def largest_computed(text, scope):
    """Elements of the largest array that an instruction of this scope makes, parameters and views left out."""
    sizes = [1]
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]*)\]\S* (?!parameter|get-tuple-element|bitcast|while|tuple|optimization-barrier)[\w-]+\(", line)
        if match and f"/{scope}/" in line:
            sizes.append(math.prod(int(n) for n in match[1].split(",") if n))
    return max(sizes)


def largest_message(config, mesh):
    """Activations of a decode step, or float32 partial attentions of all ranks; the smallest weight matrix is many times that."""
    partials = mesh.token_ranks.count * ROWS * config.num_heads // mesh.tensor * (config.head_dim + 1) * 4
    return max(ROWS * config.hidden_size * BF16.itemsize, partials if mesh.token_ranks.count > 1 else 0)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_decode_fits_donates_its_cache_and_moves_activations_only(name, mesh, capsys):
    program, config = decode(name, mesh), case(name, mesh).config
    cache = case(name, mesh).model.cache_bytes(ROWS, CAPACITY)
    assert program.device_bytes < H100_MEMORY_BYTES
    assert program.donated_bytes >= cache
    assert program.temporary_bytes < 1e9
    # Not copied: the smallest of a layer's two pools would be that much.
    assert program.temporary_bytes < cache / config.num_layers
    assert max(max(collective.nbytes) for collective in program.collectives) <= largest_message(config, case(name, mesh).mesh)
    with capsys.disabled():
        print(f"\n{name} on {mesh}, one decode step of {ROWS} rows:\n{program.collective_table()}")


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_prefill_fits_and_moves_activations_only(name, mesh):
    program, config = prefill(name, mesh), case(name, mesh).config
    assert program.device_bytes < H100_MEMORY_BYTES
    assert program.donated_bytes >= case(name, mesh).model.cache_bytes(1, CAPACITY)
    assert max(max(collective.nbytes) for collective in program.collectives) <= PIECE * config.hidden_size * BF16.itemsize


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_one_sum_for_attention_and_one_for_the_feed_forward(name, mesh):
    """In each layer, beside the embedding's and the few numbers of sampling."""
    config, spec = case(name, mesh).config, case(name, mesh).mesh
    wide = ROWS * config.hidden_size * BF16.itemsize
    sums = sum(nbytes == wide for collective in decode(name, mesh).collectives for nbytes in collective.nbytes)
    assert sums == (2 * config.num_layers + 1 if spec.tensor > 1 else config.num_layers)


@pytest.mark.parametrize("mesh", ["tensor=8", "expert=8"])
@pytest.mark.parametrize(("program", "tokens"), [(decode, ROWS), (prefill, PIECE)], ids=["decode", "prefill"])
def test_routed_experts_do_the_work_of_the_chosen_ones_only(program, tokens, mesh):
    """Computed densely, every token meets every expert: an array of tokens x experts x width."""
    name = "llama-4-scout-17b-16e-instruct"
    config, spec = case(name, mesh).config, case(name, mesh).mesh
    gate_up = 2 * config.moe.intermediate_size // spec.tensor
    one_expert = config.hidden_size * gate_up
    largest = largest_computed(program(name, mesh).text, "routed_experts")
    assert largest <= max(2 * tokens * max(config.hidden_size, gate_up), one_expert)


def test_scout_caches_a_million_tokens_on_eight_ranks():
    """12 NoPE layers keep everything, spread; 36 RoPE layers one attention chunk each, on every rank: 4096 bytes a token and layer."""
    config, tokens = case("llama-4-scout-17b-16e-instruct", "tensor=8").config, 2**20
    spread = AbstractModel(config, MeshSpec(sequence=8), h100_devices(8), BF16).cache_bytes(1, tokens)
    expected = 12 * 4096 * tokens // 8 + 36 * 4096 * 8192
    assert abs(spread - expected) <= 0.03 * expected


def test_rounds_of_speculation_keep_the_cache_in_place_and_gather_no_logits():
    """The first layers of Scout with an EAGLE-3 head of the size of the public ones, a tree of 26 nodes, top-p on."""
    config = first_layers(case("llama-4-scout-17b-16e-instruct", "tensor=8").config, 4)
    one_dense_layer = {"num_layers": 1, "rope_layers": (True,), "moe": None, "attention_chunk_size": None, "use_qk_norm": False}
    own = {"intermediate_size": 32768, "rope_scaling": None, "max_position_embeddings": 2048, "attn_temperature_tuning": False}
    decoder = dataclasses.replace(config, **one_dense_layer, **own)
    flags = ("own_embedding", "fuse_bias", "first_layer_normed", "final_normed")
    flags += ("norm_before_residual", "norm_before_fuse", "norm_each_aux", "norm_fed_back", "target_head")
    drafter = DrafterConfig(
        version="eagle3",
        decoder=decoder,
        draft_vocab_size=32000,
        target_layers=4,
        target_hidden_size=config.hidden_size,
        target_tokenizer=None,
        aux_layers=(1, 2, 3),
        **dict.fromkeys(flags, False),
    )
    plan = Speculation.parse("tree:eagle26")
    model = AbstractModel(config, MeshSpec(tensor=8), h100_devices(8), BF16, drafter)
    program = model.speculate(ROWS, 8 * CAPACITY, SamplingParams(top_p=0.9), plan)
    assert program.donated_bytes >= model.cache_bytes(ROWS, 8 * CAPACITY)
    # The nodes' logits and their like; a second copy of the keys of the layer that keeps everything would be more.
    logits = ROWS * plan.tree.size * config.vocab_size // 8 * 4
    assert program.temporary_bytes < 4 * logits < ROWS * 8 * CAPACITY * config.head_dim * BF16.itemsize
    # What every node of the tree sums up is the largest message: logits of the nodes, or their candidates, are not sent.
    assert max(max(collective.nbytes) for collective in program.collectives) <= ROWS * plan.tree.size * config.hidden_size * BF16.itemsize


@pytest.mark.parametrize("variant", ["pass_kv", "pass_q"])
def test_a_long_prompt_passes_keys_or_queries_in_the_layers_without_rope_only(variant):
    """Scout, with shorter chunks, over four ranks: 3 transfers in the NoPE layer, each under way during at least one of the two
    products of its step's attention, and none in a RoPE layer, whose chunks are whole."""
    config = case("llama-4-scout-17b-16e-instruct", "tensor=8").config
    small = dataclasses.replace(first_layers(config, 4), attention_chunk_size=1024)
    tokens, cached = 8192, 8192
    model = AbstractModel(small, MeshSpec(sequence=4), h100_devices(4), BF16)
    program = model.prefill(tokens, cached, 16384, SamplingParams(temperature=0.0), variant)
    in_attention = [collective for collective in program.collectives if "/attention/" in collective.scope]
    assert all("/layer_3/" in collective.scope for collective in in_attention)
    transfers = [collective for collective in in_attention if collective.kind == "collective-permute"]
    assert len(transfers) == 3
    T, D, attended = tokens // 4, small.hidden_size, small.num_heads * small.head_dim
    # max_i P_i + ceil(T / N) tokens of keys and values; or ceil(T / N) queries.
    message = 2 * (cached // 4 + T) * small.num_kv_heads * small.head_dim if variant == "pass_kv" else T * attended
    assert all(transfer.nbytes == (message * BF16.itemsize,) for transfer in transfers)
    one_product = 2 * T * attended * (cached // 4 + T)
    assert all(transfer.flops_meanwhile >= one_product for transfer in transfers)
    # Every rank's tokens meet their own keys in three layers and all ranks' in the fourth, masked ones too.
    assert program.ledger.flops("bktgs") == 4 * T * attended * (3 * T + cached + tokens)
    attention = 2 * D * (attended + small.num_kv_heads * small.head_dim)
    feed_forward = D * (3 * small.moe.intermediate_size + small.moe.num_experts)
    head = 2 * small.vocab_size * D
    # Routed experts are loops as long as the router says.
    assert program.ledger.flops() - program.ledger.flops("bktgs") == 4 * 2 * T * (attention + feed_forward) + head
