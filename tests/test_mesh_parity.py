"""One model over many meshes: the logits and tokens of a single device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, load
from l4jax.config import MoEConfig
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs
from l4jax.parallel.placement import Placement
from sharding.mesh import MeshSpec
from sharding.select import RingHardware
from tests.tiny import llama3_like, maverick_like, prompts, scout_like, weights

# Two layers, one with RoPE and one without: programs of eight devices take long to compile.
SIZES = {"num_heads": 8, "num_kv_heads": 2, "num_layers": 2}
LLAMA4 = {**SIZES, "rope_layers": (True, False)}
CONFIGS = {
    "scout": scout_like(**LLAMA4, moe=MoEConfig(num_experts=4, intermediate_size=48, moe_layers=(True, True))),
    "maverick": maverick_like(**LLAMA4, moe=MoEConfig(num_experts=8, intermediate_size=48, moe_layers=(False, True))),
    "llama3": llama3_like(**SIZES, rope_layers=(True, True)),
}
MESHES = [
    "tensor=8",
    "tensor=2,expert=4",
    "sequence=8",
    "sequence=4,tensor=2",
    "sequence=2,expert=2,tensor=2",
    "data=2,sequence=2,tensor=2",
    "data=2,expert=2",
    "expert=2",
]
# Each case compiles for half a minute. The meshes below cover every axis and every pair of axes; `make test-all` runs the others too.
USUAL = {
    "scout": ("sequence=2,expert=2,tensor=2", "data=2,sequence=2,tensor=2"),
    "maverick": ("tensor=2,expert=4", "data=2,expert=2"),
    "llama3": ("sequence=4,tensor=2", "expert=2"),  # no experts to cut along that axis
}
LOGITS_TOO = {
    ("scout", "sequence=2,expert=2,tensor=2"),
    ("maverick", "tensor=2,expert=4"),
    ("llama3", "sequence=4,tensor=2"),
}


def cases(usual):
    """Every model on every mesh; those that are not ``usual`` run with `make test-all`."""
    return [
        pytest.param(name, mesh, marks=() if usual(name, mesh) else pytest.mark.more_meshes, id=f"{name}-{mesh}")
        for name in CONFIGS
        for mesh in MESHES
    ]


# Every prompt takes two pieces, so that programs are few. The first is long enough that on some meshes chunks of 8 stay whole, and on
# others not; the second is ragged, with fewer tokens than ranks in one row.
PIECES, LENGTHS = (32,), (64, 33, 50, 40)
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0, logprobs=20),
    SamplingParams(max_tokens=12, seed=3, logprobs=20),
    SamplingParams(
        max_tokens=12,
        seed=4,
        temperature=1.2,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        logprobs=3,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        logit_bias={7: 2.0, 60: -1.0},
    ),
    SamplingParams(max_tokens=9, seed=5),
]


@functools.cache
def model(name, mesh="tensor=1"):
    return LLM(CONFIGS[name], weights(CONFIGS[name]), mesh=mesh, prefill_lengths=PIECES)


@functools.cache
def on_one_device(name):
    return model(name).generate(prompts(CONFIGS[name], LENGTHS), PARAMS)


def assert_close(logits, expected):
    for got, one in zip(logits, expected, strict=True):
        assert np.abs(got - one).max() < 1e-5 * np.abs(one).max()


@pytest.mark.parametrize(("name", "mesh"), cases(lambda name, mesh: mesh in USUAL[name]))
def test_a_mesh_gives_the_tokens_of_one_device(name, mesh):
    found = model(name, mesh).generate(prompts(CONFIGS[name], LENGTHS), PARAMS)
    for got, expected in zip(found, on_one_device(name), strict=True):
        assert got.token_ids == expected.token_ids
        for a, b in zip(got.logprobs or [], expected.logprobs or [], strict=True):
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            # Of an unlikely token (-18) float32 has steps of 2e-6, and sums in another order differ by a few.
            np.testing.assert_allclose([a.logprob, *(p for _, p in a.top)], [b.logprob, *(p for _, p in b.top)], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("name", "mesh"), cases(lambda name, mesh: (name, mesh) in LOGITS_TOO))
def test_a_mesh_gives_the_logits_of_one_device(name, mesh):
    ragged = prompts(CONFIGS[name], LENGTHS)
    assert_close(model(name, mesh).logits(ragged), model(name).logits(ragged))


@pytest.mark.parametrize(("name", "mesh"), [("maverick", "tensor=2,expert=4"), ("scout", "sequence=2,expert=2,tensor=2")])
def test_every_token_may_choose_one_expert(name, mesh):
    """All on one rank, none on the others: among equal scores the first expert is chosen."""
    config = CONFIGS[name]
    values = {key: jnp.zeros_like(value) if key.endswith(".router") else value for key, value in weights(config).items()}
    ragged = prompts(config, LENGTHS)
    found, expected = (LLM(config, values, mesh=m, prefill_lengths=PIECES).logits(ragged) for m in (mesh, "tensor=1"))
    assert_close(found, expected)


@pytest.mark.parametrize("mesh", ["tensor=8", "tensor=4", "expert=2,tensor=4", "tensor=2"])
def test_weights_are_cut_and_kv_heads_repeated(mesh):
    config, spec = CONFIGS["scout"], MeshSpec.parse(mesh)
    placement = Placement.on(config, spec)
    values = weights(config)
    placed = placement.place_all(values)
    copies = max(1, spec.tensor // config.num_kv_heads)
    for name, spec_of in weight_specs(Llama(placement.config, spec)).items():
        assert placed[name].shape == spec_of.shape
        assert placed[name].sharding == placement.weight_sharding(name)
        again = placement.place(name, placed[name])
        assert again.sharding == placed[name].sharding
    G = config.num_heads // config.num_kv_heads // copies
    stored, ours = np.asarray(values["layers.0.attention.qkv"]), np.asarray(placed["layers.0.attention.qkv"])
    for head, group in enumerate(ours):
        source, copy = divmod(head, copies)
        np.testing.assert_array_equal(group[:G], stored[source, copy * G : (copy + 1) * G])
        np.testing.assert_array_equal(group[G:], stored[source, -2:])


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        (
            CONFIGS["scout"],
            "tensor=3",
            "has 8 query heads .* tensor=3 does not divide; tensor may be 1, 2, 4, 8$",
        ),
        (CONFIGS["maverick"], "expert=3", r"layers\.1\.feed_forward\.experts_down has 8 along expert, .* expert may be 1, 2, 4, 8$"),
        (
            dataclasses.replace(CONFIGS["llama3"], vocab_size=63),
            "tensor=2",
            r"embed has 63 along vocab, .* tensor may be 1, 3, 7",
        ),
        (CONFIGS["llama3"], "tensor=16", "mesh tensor=16 has 16 devices, and 8 cpu devices are present"),
        (CONFIGS["llama3"], "tensr=2", "did you mean tensor"),
        (CONFIGS["llama3"], 8, 'the mesh is 8; expected a description such as "sequence=4,tensor=2"'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(config, mesh, message):
    with pytest.raises(ValueError, match=message) as refused:
        LLM(config, weights(config), mesh=mesh)
    assert "\n" not in str(refused.value)


def test_a_smaller_batch_after_a_larger_one_has_slots_of_its_own_on_every_data_rank():
    """Eight prompts make four slots on each of two ranks; of three prompts, two go to the first rank and one to the second."""
    config = CONFIGS["llama3"]
    one, two = LLM(config, weights(config)), LLM(config, weights(config), mesh="data=2")
    params = [SamplingParams(max_tokens=8, temperature=t, seed=i, repetition_penalty=1.3) for i, t in enumerate((0.0, 0.9, 0.7))]
    few = prompts(config, (5, 19, 9))
    expected = [completion.token_ids for completion in one.generate(few, params)]
    two.generate(prompts(config, (4,) * 8, seed=3), SamplingParams(max_tokens=3, seed=1))
    assert [completion.token_ids for completion in two.generate(few, params)] == expected


def test_results_said_to_be_equal_on_every_device_are():
    """shard_map is told that some results are the same on every device, and does not check it: the copies must be equal to the bit."""
    llm = model("scout", "data=2,sequence=2,tensor=2")
    for prompt, params in zip(prompts(llm.config, LENGTHS), PARAMS, strict=True):
        llm.add(prompt, params)
    for _ in range(3):
        llm.step()
    assert_copies_are_equal(llm.engine.runner.resident)
    while llm.step():
        pass


def assert_copies_are_equal(tree):
    for leaf in jax.tree.leaves(tree):
        copies: dict[str, list[np.ndarray]] = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for first, *others in copies.values():
            for other in others:
                np.testing.assert_array_equal(first, other)


def test_ranks_that_round_differently_agree_on_every_token():
    """Two hosts' kernels may round differently; without an agreement they would choose different tokens and leave the loop apart."""
    config = dataclasses.replace(CONFIGS["llama3"], eos_token_ids=tuple(range(0, 64, 5)))
    placed = Placement.on(config, MeshSpec(sequence=2)).place_all(weights(config))
    scale = placed["norm.scale"]
    differing = [jax.device_put(shard.data * (1 + 0.05 * rank), shard.device) for rank, shard in enumerate(scale.addressable_shards)]
    placed["norm.scale"] = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, differing)
    llm = LLM(config, placed, mesh="sequence=2")
    for seed in range(4):
        for prompt in prompts(config, (3, 9)):
            llm.add(prompt, SamplingParams(max_tokens=40, seed=seed))
        while llm.step():
            assert_copies_are_equal(llm.engine.runner.resident.slots)


def test_bfloat16_is_as_exact_on_a_mesh():
    """Sums in another order are rounded differently, so tokens may differ; the distance to float32 may not grow."""
    config = CONFIGS["scout"]
    values = weights(config, dtype=jnp.dtype(jnp.bfloat16))
    wide = LLM(config, {name: value.astype(jnp.float32) for name, value in values.items()}, prefill_lengths=PIECES)
    exact = wide.logits(prompts(config, LENGTHS))
    errors = []
    for mesh in ("tensor=1", "sequence=2,tensor=2"):
        logits = LLM(config, values, mesh=mesh, prefill_lengths=PIECES).logits(prompts(config, LENGTHS))
        errors.append(np.median(np.concatenate([np.abs(a - b).ravel() for a, b in zip(logits, exact, strict=True)])))
    assert errors[1] < 1.25 * errors[0]


RINGS = {("scout", "pass_kv", 632), ("scout", "pass_q", 632), ("llama3", "pass_q", 640)}


@pytest.mark.parametrize(
    ("name", "variant", "piece"),
    [
        pytest.param(*case, marks=() if case in RINGS else pytest.mark.more_meshes)
        for case in itertools.product(("scout", "llama3"), ("pass_kv", "pass_q"), (640, 632))
    ],
)
def test_either_ring_continues_a_long_prompt(name, variant, piece):
    """Two pages of cached tokens on each rank, and after them a piece that chunks of 16 do or do not divide."""
    config = dataclasses.replace(CONFIGS[name], max_position_embeddings=2048)
    if config.attention_chunk_size is not None:
        config = dataclasses.replace(config, attention_chunk_size=16)
    values, long = weights(config), prompts(config, (1100, 1000))
    # Hardware on which one or the other always pays.
    ring = RingHardware(1e-3 if variant == "pass_kv" else 1e30, 1.0)
    llm = LLM(config, values, mesh="sequence=4", prefill_lengths=(piece,), ring_hardware=ring)
    assert_close(llm.logits(long), LLM(config, values, prefill_lengths=(640,)).logits(long))


@pytest.mark.more_meshes
def test_smollm2_over_four_ranks(smollm2_checkpoint):
    prompt = "The history of the lighthouse begins with fires on hilltops. " * 12
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    one, four = (load(smollm2_checkpoint, mesh=mesh).generate(prompt, params)[0] for mesh in ("tensor=1", "sequence=4"))
    assert four.token_ids == one.token_ids
