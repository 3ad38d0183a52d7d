"""What a step is predicted to take: each launch once, layers as often as the whole model has them, each at its part's rate."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.decoding.params import SamplingParams
from l4jax.planning import estimate as module
from l4jax.planning.compile import AbstractModel, first_layers
from l4jax.planning.estimate import BANDWIDTH, GAP_SECONDS, Step, estimate, representatives, step_bytes
from l4jax.planning.ledger import Collective, Launch
from pallas_kernels.cost import Load, kernel_bytes
from pallas_kernels.experts.cost import experts_cost
from sharding.mesh import ONE_DEVICE, MeshSpec
from tests.tiny import drafter, llama3_like, scout_like

LAUNCH = Launch("fusion", "p/layer_0/x", "fusion.1", "", (), (), 0, 0, None)
ROWS = 4


def abstract(config, head=None):
    return AbstractModel(config, ONE_DEVICE, jax.devices("cpu")[:1], jnp.dtype(jnp.float32), head)


def test_layers_count_as_often_as_the_whole_model_has_their_kind():
    """A program of its first three layers gives the same estimate of a model of five as a program of all five."""
    config = dataclasses.replace(llama3_like(), num_layers=5, rope_layers=(True,) * 5)
    whole, step = abstract(config), Step(ROWS, 100)
    few, all_five = (
        estimate(abstract(part).decode(ROWS, 128, SamplingParams()), part, whole, step) for part in (first_layers(config, 3), config)
    )
    # XLA fuses the first and the last layer with what is around them. Without the layers that are not compiled it would be 40 % less.
    assert few.launches == pytest.approx(all_five.launches, rel=0.05)
    assert few.nbytes == pytest.approx(all_five.nbytes, rel=0.01)
    assert few.seconds["gaps"] == pytest.approx(GAP_SECONDS * few.launches)
    assert few.total_seconds == pytest.approx(sum(few.seconds.values()))
    assert few.least_bytes == step_bytes(whole, step)
    assert few.bound_seconds == few.least_bytes / BANDWIDTH


def test_the_last_layer_of_a_kind_stands_for_the_others():
    config = scout_like()
    kinds = list(zip(config.rope_layers, config.moe.moe_layers, strict=True))
    for kind, layer in representatives(config).items():
        assert kinds[layer] == kind and kind not in kinds[layer + 1 : -1]


def test_least_bytes_are_weights_and_seen_keys():
    config = llama3_like()
    model, embedding = abstract(config, drafter(config)), config.vocab_size * config.hidden_size * 4
    weights = sum(leaf.size * 4 for leaf in model.weights.target) - (0 if config.tie_word_embeddings else embedding)
    keys = ROWS * 10 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert step_bytes(model, Step(ROWS, 10)) == weights + keys
    names = model.programs.drafter.names
    nbytes = {name: leaf.size * 4 for name, leaf in zip(names, model.weights.drafter, strict=True)}
    decoder = model.draft_placement.config
    drafted = ROWS * 7 * 2 * decoder.num_kv_heads * decoder.head_dim * 4
    head = 3 * (sum(nbytes.values()) + drafted) - 2 * nbytes["fuse"]
    assert step_bytes(model, Step(ROWS, 10, nodes=4, levels=3, drafter_seen=7)) == weights + keys + head


def test_chunk_local_layers_see_a_chunk_and_experts_count_if_they_are_chosen():
    config = scout_like()
    model, chunk, E = abstract(config), config.attention_chunk_size, config.moe.num_experts
    a_layer = 2 * config.num_kv_heads * config.head_dim * 4
    local = sum(config.rope_layers)
    keys = a_layer * (local * chunk + (config.num_layers - local) * 3 * chunk)
    assert step_bytes(model, Step(1, 3 * chunk)) - step_bytes(model, Step(1, 0)) == keys
    one_expert = 3 * config.hidden_size * config.moe.intermediate_size * 4 * sum(config.moe.moe_layers)
    # A million nodes choose all experts.
    difference = step_bytes(model, Step(1, 0, nodes=10**6)) - step_bytes(model, Step(1, 0))
    assert difference == pytest.approx((E - 1) * one_expert)


def test_what_a_device_reads_depends_on_the_layer():
    """Of 4 token ranks each has a quarter of the keys; a chunk is on one of them. A drafter looks back as far as it was trained."""
    config, spec = scout_like(), MeshSpec(sequence=4, data=2)
    step, chunk = Step(8, 1000, nodes=3, levels=2, drafter_seen=300), config.attention_chunk_size
    local, full = config.rope_layers.index(True), config.rope_layers.index(False)
    seen = [step.load(config, spec, layer).seen for layer in (local, full, None)]
    assert seen == [min(chunk, 1000), 250, 300]
    load = step.load(config, spec, full)
    assert (load.tokens, load.experts) == (8 // 2 * 3, config.moe.num_experts)
    assert Step(8, 100).load(config, spec, None).seen == 100


def test_parts_have_rates_of_their_own():
    load = Load(1000, 1, 16)
    matrix = dataclasses.replace(LAUNCH, operand_bytes=(50_000_000, 100), written_bytes=10, flops=1)
    assert module._priced(matrix, load) == ("matrices", 50_000_110 / (0.63 * BANDWIDTH), 50_000_110)
    # A product of one row that XLA made a sum of multiplications has no FLOPs of products.
    assert module._priced(dataclasses.replace(matrix, flops=0), load)[0] == "matrices"
    many_rows = dataclasses.replace(matrix, flops=10**12)
    assert module._priced(many_rows, load)[1] == 10**12 / module.MATRIX_FLOPS
    small = dataclasses.replace(LAUNCH, operand_bytes=(1000,), written_bytes=10)
    assert module._priced(small, load) == ("small kernels", 1010 / BANDWIDTH, 1010)
    attention = dataclasses.replace(
        LAUNCH, kernel="tree_attention", operand_shapes=((1, 8, 4, 128), (65, 8, 128, 128), (65, 8, 128, 128), (1, 2, 64), (1, 4), (1, 65))
    )
    nbytes = 1 * 8 * 4 * 128 * 2 + 2 * 64 * 4 + 2 * 8 * 1000 * 128 * 2
    assert module._priced(attention, load) == ("attention", nbytes / (0.6 * BANDWIDTH), nbytes)


@pytest.mark.parametrize(
    ("strategy", "nbytes", "seconds"),
    [
        ("one-shot", 16384, 4.1e-6),
        ("one-shot", 12288, 3.95e-6),
        ("two-shot", 2**19, 13.7667e-6),
        ("NCCL", 2**27, 1152e-6),
        ("NCCL", 1, 15.7e-6),
    ],
)
def test_collectives_take_what_their_size_and_strategy_take(strategy, nbytes, seconds):
    collective = Collective("all-reduce", "", ("tensor",), 8, (nbytes,), strategy)
    part, found, moved = module._priced(dataclasses.replace(LAUNCH, collective=collective), Load(1, 1))
    assert (part, moved) == ("collectives", 2 * nbytes)
    assert found == pytest.approx(seconds, rel=1e-4)


def test_bytes_of_experts_are_those_of_the_chosen_ones():
    """32 rows of 128 experts choose 28.4 of them; with the shared one, and 28 chosen, that is what the op's own cost says."""
    M, E, D, F = 32, 128, 5120, 512
    load = Load(0, M, E)
    assert load.chosen(E) == pytest.approx(28.4, abs=0.05)
    rows, routed, shared = (2, 64), (E, 2, F, D), (1, 2, F, D)
    found = kernel_bytes("experts_gate_up", [(M, D), routed, shared, rows], 0, load) + kernel_bytes(
        "experts_down", [(2, M, F), (E, 2, D // 2, F), (1, 2, D // 2, F), rows], 0, load
    )
    least = experts_cost(np.arange(M) % 28, E, D, F, shared=True).least_bytes
    assert found == pytest.approx(least * 29.4 / 29, rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "operands", "nbytes"),
    [
        # Three rows of 5 query rows: queries, bounds of 64 rows, and keys and values of 100 cached tokens and 16 of the tree.
        (
            "tree_attention",
            [(3, 2, 5, 64), (9, 2, 128, 64), (9, 2, 128, 64), (3, 4, 64), (3, 4), (3, 2), (3, 2, 16, 64), (3, 2, 16, 64)],
            3 * 2 * 5 * 64 * 2 + 3 * 4 * 64 * 4 + 2 * 3 * 2 * 116 * 64 * 2,
        ),
        # Pages for fewer tokens than are seen elsewhere.
        ("tree_attention", [(1, 1, 1, 64), (9, 1, 64, 64), (9, 1, 64, 64), (1, 2, 64), (1, 4), (1, 1)], 128 + 512 + 2 * 64 * 64 * 2),
        (
            "flash_attention",
            [(1, 64, 2, 3, 64), (1, 64, 2, 64), (1, 64, 2, 64), (1, 4, 64), (1, 1, 8), (9, 2, 128, 64), (9, 2, 128, 64), (1, 2)],
            64 * 6 * 64 * 2 + 4 * 64 * 4 + 8 * 4 + 2 * 2 * (64 + 100) * 64 * 2,
        ),
        ("flash_attention", [(1, 64, 1, 1, 64), (1, 64, 1, 64), (1, 64, 1, 64), (1, 2, 64), (1, 1, 4)], 3 * 64 * 64 * 2 + 512 + 16),
        ("merge_splits", [(1, 2, 3, 8, 128), (1, 2, 3, 8)], 4 * 48 * 129),
        ("add_norm", [(2, 256), (2, 256), (256,)], 2 * (2 * 512 + 256)),
    ],
)
def test_bytes_of_kernels_are_read_off_their_operands(kernel, operands, nbytes):
    assert kernel_bytes(kernel, operands, 1000, Load(100, 1)) == 1000 + nbytes


def test_heads_are_read_and_written_once():
    """Their queries are results; keys and values go to the pools, in place."""
    pools = [(9, 2, 128, 64)] * 2
    queries = 3 * 2 * 4 * 64 * 2
    assert kernel_bytes("heads", [(3, 1, 2, 6, 64), (3, 1), (3, 1), *pools], queries, Load(100, 1)) == 2 * 3 * 2 * 6 * 64 * 2


def test_a_kernel_that_is_not_known_has_no_bytes():
    with pytest.raises(ValueError, match="the bytes of kernel 'mystery' with operands"):
        kernel_bytes("mystery", [(1, 2)], 3, Load(1, 1))
