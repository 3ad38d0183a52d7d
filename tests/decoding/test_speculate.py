"""Speculation changes nothing: the same tokens, on every mesh; and a tree's logits are those of its paths taken one by one."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from l4jax import LLM, SamplingParams
from l4jax.cache import CACHE_AXES, CacheShape
from l4jax.decoding.generate import BURST
from l4jax.decoding.plan import Speculation
from l4jax.decoding.sampling import TokenCounts, probabilities
from l4jax.decoding.tree import StaticTree, tree_tables
from l4jax.model.weights import BoundModel
from l4jax.parallel.placement import Placement
from tests.decoding.limits import chi_square_limit
from tests.decoding.rows import sampling_rows
from tests.tiny import drafter, empty_cache, few_tokens, llama3_like, loaded_drafter, maverick_like, prompts, scout_like, weights

PLANS = ["chain:3", "tree:eagle26", "dynamic:steps=4,topk=3,nodes=12"]


LENGTHS = (3, 17, 29, 7)  # all prefilled by one program
PARAMS = [
    SamplingParams(max_tokens=30, temperature=0.0, logprobs=2),
    SamplingParams(max_tokens=40, seed=3),
    SamplingParams(max_tokens=33, seed=4, top_k=4, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2),
    SamplingParams(max_tokens=25, seed=5, top_p=0.8, min_p=0.05, logit_bias={3: 1.0}, stop_token_ids=[6]),
]


@functools.cache
def model(config, plan, version="eagle3", mesh="tensor=1", max_batch=4):
    taps = {} if version == "eagle1" else {"aux_layers": (0, 1, 2)}
    made = loaded_drafter(drafter(config, version, **taps))
    return LLM(config, weights(config), mesh=mesh, drafter=made, speculation=plan, max_batch=max_batch)


@functools.cache
def generate(*of_model, **options):
    llm = model(*of_model, **options)
    return llm.generate(prompts(llm.config, LENGTHS), PARAMS)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert (a.logprobs is None) == (b.logprobs is None)
        for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
            assert abs(x.logprob - y.logprob) < 1e-5
            assert [token for token, _ in x.top] == [token for token, _ in y.top]


# Every model, version and kind of tree; `make test-all` runs the others too.
USUAL = {
    (scout_like, "eagle1", PLANS[1]),
    (scout_like, "eagle3", PLANS[1]),
    (maverick_like, "eagle3", PLANS[2]),
    (llama3_like, "eagle3", PLANS[0]),
}


@pytest.mark.parametrize(
    ("make", "version", "plan"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.more_meshes)
        for case in itertools.product((scout_like, maverick_like, llama3_like), ("eagle1", "eagle3"), PLANS)
    ],
)
def test_tokens_are_those_of_decoding_one_by_one(make, version, plan):
    """In one batch of four unequal rows; chunks of 8 make many short trees in the Llama 4 models."""
    config = few_tokens(make)
    found = generate(config, plan, version=version)
    assert_same(found, generate(config, "off"))
    assert sum(sum(c.stats.accepted) for c in found) > 7


@pytest.mark.parametrize("mesh", ["tensor=1", *(pytest.param(m, marks=pytest.mark.more_meshes) for m in ("expert=2,tensor=2", "data=2"))])
def test_sampled_drafts_keep_what_is_certain(mesh):
    """Rows at a temperature get other tokens; a greedy row keeps those of decoding one by one, and limits and stops still hold."""
    config = few_tokens(scout_like)
    found, plain = generate(config, "tree:eagle26,sampled", mesh=mesh), generate(config, "off")
    assert_same(found[:1], plain[:1])
    assert found[1].token_ids != plain[1].token_ids
    assert sum(sum(c.stats.accepted) for c in found) > 5
    for completion, params in zip(found, PARAMS, strict=True):
        assert len(completion.token_ids) == params.max_tokens or completion.token_ids[-1] in (*params.stop_token_ids, *config.eos_token_ids)
    assert [c.token_ids for c in found] == [c.token_ids for c in generate(config, "tree:eagle26,sampled", mesh="tensor=1")]


def test_the_first_tokens_are_no_end_tokens():
    """With half of the vocabulary as end tokens, of rows at and above temperature 0, with drafts of every kind."""
    config = few_tokens(scout_like)
    stops = set(range(0, config.vocab_size, 2)) | set(config.eos_token_ids)
    common = {"max_tokens": 40, "stop_token_ids": sorted(stops)}
    params = [
        SamplingParams(**common, seed=9, min_tokens=17),
        SamplingParams(**common, seed=9),
        SamplingParams(**common, seed=2, min_tokens=1),
    ]
    params.append(SamplingParams(**common, temperature=0.0, min_tokens=23))
    answers = {}
    for plan in ("off", "tree:eagle26", "tree:eagle26,sampled"):
        answers[plan] = model(config, plan).generate(prompts(config, LENGTHS), params)
        for completion, asked in zip(answers[plan], params, strict=True):
            assert not stops & set(completion.token_ids[: asked.min_tokens])
            assert len(completion.token_ids) >= asked.min_tokens
        assert min(len(completion.token_ids) for completion in answers[plan]) < 17
    assert_same(answers["tree:eagle26"], answers["off"])


@pytest.mark.parametrize("mesh", ["sequence=2", pytest.param("expert=2", marks=pytest.mark.more_meshes)])
def test_ranks_that_round_differently_draft_the_same_tree(mesh):
    """Each rank computes a part of the attention, or some experts: if ranks drafted different trees, the parts would not fit."""
    config = dataclasses.replace(few_tokens(maverick_like), max_position_embeddings=512)
    made, loaded = weights(config), loaded_drafter(drafter(config, aux_layers=(0, 1, 2)))
    long = prompts(config, (150, 200))  # on a sequence axis both ranks have pages of them
    everywhere = jax.sharding.NamedSharding(Placement.on(config, mesh).mesh, PartitionSpec())
    fuse, rng = jax.device_put(loaded.weights["fuse"], everywhere), np.random.default_rng(0)
    noisy = [jax.device_put(shard.data + rng.normal(size=fuse.shape).astype(np.float32), shard.device) for shard in fuse.addressable_shards]
    fuse = jax.make_array_from_single_device_arrays(fuse.shape, everywhere, noisy)
    apart = dataclasses.replace(loaded, weights={**loaded.weights, "fuse": fuse})
    params = SamplingParams(max_tokens=40, temperature=0.0)
    plain = LLM(config, made).generate(long, params)
    found = LLM(config, made, mesh=mesh, drafter=apart, speculation="tree:eagle26").generate(long, params)
    assert_same(found, plain)


@pytest.mark.parametrize("row", [pytest.param(i, marks=() if i == 2 else pytest.mark.more_meshes) for i in range(len(PARAMS))])
def test_a_row_alone_gets_the_tokens_of_decoding(row):
    config = few_tokens(scout_like)
    found = model(config, PLANS[1]).generate([prompts(config, LENGTHS)[row]], PARAMS[row])
    assert_same(found, generate(config, "off")[row : row + 1])


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [
        pytest.param("tensor=2", PLANS[1], marks=pytest.mark.more_meshes),
        pytest.param("sequence=2", PLANS[2], marks=pytest.mark.more_meshes),
        ("expert=2,tensor=2", PLANS[2]),
        ("data=2,sequence=2", PLANS[1]),
    ],
)
def test_speculation_on_a_mesh_gives_the_tokens_of_decoding(mesh, plan):
    """The drafts are the same too, which shows that the drafter's cache, which prefill spreads over the ranks, is right."""
    config = few_tokens(scout_like)
    found = generate(config, plan, mesh=mesh)
    assert_same(found, generate(config, "off"))
    assert [c.stats.accepted for c in found] == [c.stats.accepted for c in generate(config, plan)]


@pytest.mark.parametrize("plan", [pytest.param("tree:eagle26", marks=pytest.mark.more_meshes), "tree:eagle26,sampled"])
def test_a_reduced_vocabulary_that_is_cut_drafts_the_same(plan):
    config = dataclasses.replace(few_tokens(llama3_like), vocab_size=16)
    reduced = drafter(config, draft_vocab_size=8, aux_layers=(0, 1, 2))
    loaded = loaded_drafter(reduced)
    tokens = jnp.asarray([0, 3, 4, 5, 9, 10, 12, 15], jnp.int32)
    loaded = dataclasses.replace(loaded, weights={**loaded.weights, "token_ids": tokens})
    params = SamplingParams(max_tokens=40, seed=1)
    whole, cut = (
        LLM(config, weights(config), mesh=mesh, drafter=loaded, speculation=plan).generate(prompts(config, LENGTHS), params)
        for mesh in ("tensor=1", "tensor=2")
    )
    assert_same(cut, whole)
    assert [c.stats.accepted for c in cut] == [c.stats.accepted for c in whole]
    assert whole[0].stats.acceptance_length > 1


def test_stats_count_rounds():
    """No draft of a drafter that is always wrong is accepted: every round yields one token, and only the first token comes from prefill."""
    config = llama3_like(vocab_size=16, num_layers=2, rope_layers=(True,) * 2)
    loaded = loaded_drafter(drafter(config, draft_vocab_size=4, aux_layers=(0, 1, 2)))
    llm = LLM(config, weights(config), drafter=loaded, speculation="tree:eagle26")
    # Both settings have up to 16 biases, and so the same program.
    never = SamplingParams(max_tokens=20, temperature=0.0, logit_bias=dict.fromkeys(range(4), -1e9) | dict.fromkeys(range(4, 9), 1.0))
    (found,) = llm.generate([[5, 6, 7]], never)
    # The last rounds draft no deeper than the tokens that are left.
    depths = Speculation.parse("tree:eagle26").tree.depths
    drafted = sum(0 < depth <= min(5, left) for left in range(19) for depth in depths)
    assert (found.stats.rounds, found.stats.drafted, found.stats.accepted) == (19, drafted, (0,) * 5)
    assert found.stats.acceptance_length == 1.0
    # What can be drafted twice is accepted whenever it is the likeliest; then rounds are fewer than tokens.
    only = SamplingParams(max_tokens=21, temperature=0.0, logit_bias=dict.fromkeys(range(1, 16), -1e9))
    (found,) = llm.generate([[5, 6, 7]], only)
    assert found.token_ids == [0] * 21
    assert found.stats.acceptance_length == 1 + sum(found.stats.accepted) / found.stats.rounds
    assert found.stats.rounds < 20 <= found.stats.rounds + sum(found.stats.accepted)


def test_streams_and_batches_that_end_early_give_the_same_text():
    config = few_tokens(scout_like)
    ends = [dataclasses.replace(p, max_tokens=n) for p, n in zip(PARAMS, (1, 2, 5, 9), strict=True)]
    plain, found = (model(config, plan).generate(prompts(config, LENGTHS), ends) for plan in ("off", PLANS[1]))
    assert_same(found, plain)
    assert [len(c.token_ids) for c in plain][:3] == [1, 2, 5]


@pytest.mark.parametrize("beyond", ["window", "stop"])
def test_beyond_its_training_a_drafter_looks_back_so_far_or_stops(beyond):
    config = few_tokens(llama3_like)
    short = drafter(config, draft_vocab_size=3, aux_layers=(0, 1, 2))
    short = dataclasses.replace(short, decoder=dataclasses.replace(short.decoder, max_position_embeddings=16))
    options = {"drafter": loaded_drafter(short), "speculation": "chain:3", "beyond_training": beyond}
    # None of its three tokens is ever accepted: every round yields one token.
    params = SamplingParams(max_tokens=60, seed=1, logit_bias=dict.fromkeys(range(3), -np.inf))
    plain = LLM(config, weights(config)).generate([[1, 2, 3]], params)
    (found,) = LLM(config, weights(config), **options).generate([[1, 2, 3]], params)
    assert found.token_ids == plain[0].token_ids
    assert sum(found.stats.accepted) == 0
    if beyond == "window":
        assert (found.stats.rounds, found.stats.drafted) == (59, 3 * 59 - (3 + 2 + 1))  # the last rounds draft what is left
    else:
        # The rounds' first tokens are at positions 3 to 14, 15 and 16; the last draft of each is guessed at position 15 at most.
        assert found.stats.drafted == 12 * 3 + 2 + 1
        # Drafting ends with the 14th round; the burst that has it is the last with rounds, for in the next nothing would be drafted.
        assert 14 <= found.stats.rounds < 14 + BURST < 59
        with pytest.raises(
            ValueError, match="a prompt has 17 tokens, and the drafter was trained at lengths up to 16 and is told to stop there"
        ):
            LLM(config, weights(config), **options).generate([[1] * 17], params)


def test_a_tree_that_is_wider_than_the_draft_vocabulary_is_refused():
    config = few_tokens(llama3_like)
    loaded = loaded_drafter(drafter(config, draft_vocab_size=3, aux_layers=(0, 1, 2)))
    with pytest.raises(ValueError, match="a draft tree has nodes with 4 children; expected at most 3, the size of the draft vocabulary"):
        LLM(config, weights(config), drafter=loaded, speculation="dynamic:steps=2,topk=4,nodes=5")


def test_a_tree_that_the_cache_has_no_room_for_is_refused():
    config = few_tokens(scout_like)
    with pytest.raises(ValueError, match="a draft tree of 9 nodes is 8 levels deep, too large for the cache; expected at most 7"):
        generate(config, "chain:8")


def test_a_drafter_of_another_model_is_refused():
    config = scout_like()
    for other, message in (
        (scout_like(vocab_size=32), "a vocabulary of 32, not 64"),
        (scout_like(hidden_size=48), "a hidden size of 48, not 32"),
        (scout_like(num_layers=3, rope_layers=(True,) * 3, moe=None), "a layer count of 3, not 4"),
    ):
        with pytest.raises(ValueError, match=f"the drafter is for a model with {message}; give this model's own drafter"):
            LLM(config, weights(config), drafter=loaded_drafter(drafter(other)), speculation="chain:2")
    with pytest.raises(ValueError, match="speculation is 'chain:2', but no drafter is given"):
        LLM(config, weights(config), speculation="chain:2")
    with pytest.raises(ValueError, match='beyond_training is \'wndow\'; expected "window" or "stop"'):
        LLM(config, weights(config), beyond_training="wndow")


@pytest.mark.parametrize("mesh", ["tensor=1", "sequence=2"])
def test_a_window_is_all_that_a_drafter_sees(mesh):
    """Tokens before the window change nothing, even where ranks share the prompt; with a longer window they do."""
    config = llama3_like(num_layers=1, rope_layers=(True,))
    # Reading embeddings alone, the drafter knows of the past only what its own attention sees.
    short = drafter(config, aux_layers=(0,))
    for trained, same in ((4, True), (64, False)):
        made = dataclasses.replace(short, decoder=dataclasses.replace(short.decoder, max_position_embeddings=trained))
        llm = LLM(config, weights(config), mesh=mesh, drafter=loaded_drafter(made), speculation="chain:2")
        states = []
        for beginning in ([1] * 20, [2, 4] * 10):
            llm.generate([[*beginning, 5, 9, 2, 7, 11]], SamplingParams(max_tokens=1, temperature=0.0, logit_bias={0: 1e9}))
            states.append(np.asarray(llm.engine.runner.resident.slots.hidden_UD))
        assert np.allclose(*states, rtol=1e-5, atol=1e-6) == same


TREE = StaticTree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 1, 0]])
LONGEST = 160


class Steps:
    """Programs that take one step each: a prompt and a tree after it, one token, and a plain model's logits."""

    def __init__(self, config, mesh):
        self.config, self.llm = config, LLM(config, weights(config), prefill_lengths=(2 * LONGEST,))
        self._placement = placement = Placement.on(config, mesh)
        self._model = BoundModel(placement.build(placement.config, placement.spec))
        self._leaves = self._model.leaves(placement.place_all(weights(config)))
        self._shape = CacheShape.for_rows(config, 1, 384, placement.spec)
        self._tables = self._shape.identity_tables([0])
        self._tree, self._one = (self._on_mesh(body) for body in (self._tree_step, self._one_step))

    def cache(self):
        return empty_cache(self._shape, self.config, self._placement.array_sharding(*CACHE_AXES), self._placement.spec)

    def _on_mesh(self, body):
        everywhere, vocab = PartitionSpec(), PartitionSpec(None, self._placement.spec.along("tensor").axes or None)
        leaves, cache = jax.tree.map(lambda leaf: leaf.sharding.spec, (self._leaves, self.cache()))
        specs = {"in_specs": (leaves, cache, everywhere, everywhere), "out_specs": (vocab, cache)}
        return jax.jit(jax.shard_map(body, mesh=self._placement.mesh, check_vma=False, **specs))

    def tree(self, prompt, tokens):
        """Logits at the nodes of TREE, its root the prompt's last token; and the cache with the path 0, 1, 4, 6 accepted."""
        padded_1T = np.zeros((1, LONGEST), np.int32)
        padded_1T[0, : len(prompt)] = prompt
        return self._tree(self._leaves, self.cache(), (padded_1T, np.asarray([tokens], np.int32)), np.asarray([len(prompt) - 1], np.int32))

    def one(self, cache, token, start):
        """Logits after one token at a position, and the cache with it."""
        return self._one(self._leaves, cache, np.asarray([[token]], np.int32), np.asarray([start], np.int32))

    def _tree_step(self, leaves, cache, tokens, start_B):
        token_1T, token_1N = tokens
        llama, one_B, zero_B = self._model.bind(leaves), jnp.ones_like(start_B), jnp.zeros_like(start_B)
        _, _, cache = llama(token_1T, zero_B, start_B, cache, self._tables)
        tree = tree_tables(jnp.asarray([TREE.parents], jnp.int32), TREE.depth)
        x_BND, _, nodes = llama.tree(token_1N, start_B, tree.depth_BN, jnp.ones((1, TREE.size), bool), tree.sees_BNN, cache, self._tables)
        accepted = llama.accept(nodes, jnp.asarray([[0, 1, 4, 6]], jnp.int32), start_B, 4 * one_B, self._tables)
        return llama.logits(x_BND)[0], accepted

    def _one_step(self, leaves, cache, token_BT, start_B):
        llama = self._model.bind(leaves)
        x_BTD, _, cache = llama(token_BT, start_B, jnp.ones_like(start_B), cache, self._tables)
        return llama.logits(x_BTD)[0], cache


@functools.cache
def steps(make, mesh):
    return Steps(dataclasses.replace(few_tokens(make), max_position_embeddings=512), mesh)


@pytest.mark.parametrize("length", [4, 5, 20, 133])
@pytest.mark.parametrize(
    ("make", "mesh"),
    [
        *((make, "tensor=1") for make in (scout_like, maverick_like, llama3_like)),
        (scout_like, "expert=2,tensor=2"),
        (scout_like, "sequence=2"),
    ],
)
def test_logits_at_every_node_are_those_of_its_path(make, length, mesh):
    """Of trees in the middle of a chunk of 8, and up to its very end; then, with a path accepted, of what follows."""
    step = steps(make, mesh)
    (prompt,) = prompts(step.config, (length,))
    tokens = [prompt[-1], *np.random.default_rng(1).integers(0, step.config.vocab_size, TREE.size - 1).tolist()]
    logits_NV, cache = step.tree(prompt, tokens)
    chunk = step.config.attention_chunk_size
    for node in range(TREE.size):
        way, above = [], node
        while above != 0:
            way.insert(0, tokens[above])
            above = TREE.parents[above]
        if chunk is not None and (length - 1) // chunk != (length - 1 + len(way)) // chunk:
            continue  # no draft goes there
        expected = step.llm.logits([[*prompt, *way]])[0][-1]
        assert np.abs(logits_NV[node] - expected).max() < 1e-5 * np.abs(expected).max()
    if chunk is not None and (length - 1) // chunk != (length + 2) // chunk:
        return
    sequence = [*prompt, tokens[1], tokens[4], tokens[6]]
    following = np.random.default_rng(2).integers(0, step.config.vocab_size, 100).tolist()
    expected_TV = step.llm.logits([sequence + following])[0][len(sequence) :]
    for i, token in enumerate(following):
        (logits_V,), cache = step.one(cache, token, len(sequence) + i)
        assert np.abs(logits_V - expected_TV[i]).max() < 1e-5 * np.abs(expected_TV[i]).max()


@pytest.mark.optimized  # it computes for longer than it compiles
@pytest.mark.parametrize("drafts", [pytest.param("", marks=pytest.mark.more_meshes), ",sampled"])
def test_the_compiled_loop_has_the_target_s_distribution(drafts, tmp_path):
    """Over 200,000 rounds with temperature, top-p and repetition penalty: a chi-square that fails by chance once in 1e9 runs.

    With sampled drafts; `make test-all` also with tokens drawn as without speculation, which other tests hold to those. The model's
    attention adds nothing, so that a token's distribution is a function of the last one; the one before must make no difference.
    """
    # With a head of its own: one tied to the embedding would repeat the last token for ever.
    config = llama3_like(
        vocab_size=6,
        num_layers=1,
        rope_layers=(True,),
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    made = {name: jnp.zeros_like(weight) if name.endswith("attention.out") else weight for name, weight in weights(config).items()}
    assert sum(not weight.any() for weight in made.values()) == config.num_layers
    prompt = list(range(6))  # so the repetition penalty is on every token
    params = SamplingParams(max_tokens=120, temperature=0.8, top_p=0.9, repetition_penalty=1.2, ignore_eos=True)
    logits_VV = jnp.asarray(np.stack([logits[-1] for logits in LLM(config, made).logits([[token] for token in range(6)])]))
    counts = TokenCounts(jnp.ones((6, 6), bool), jnp.zeros((6, 6), jnp.int32))
    chances_VV = np.asarray(probabilities(logits_VV, sampling_rows([params] * 6, [0] * 6, [[]] * 6, 6), counts, jnp.zeros(6, jnp.int32))[0])
    assert 8 < (chances_VV > 0).sum() < 36
    loaded = loaded_drafter(drafter(config, aux_layers=(0, 1)))
    (tree := tmp_path / "tree.json").write_text("[[0], [1], [0, 0], [0, 1]]")
    batch = 1024
    llm = LLM(config, made, drafter=loaded, speculation=f"tree:{tree}{drafts}", max_batch=batch)
    counted_VVV = np.zeros((6, 6, 6))
    rounds, seed, accepted = 0, 0, 0
    while rounds < 200_000:
        found = llm.generate([prompt] * batch, [dataclasses.replace(params, seed=seed + i) for i in range(batch)])
        seed += batch
        tokens_Bs = np.array([[*prompt[-2:], *completion.token_ids] for completion in found])
        np.add.at(counted_VVV, (tokens_Bs[:, :-2], tokens_Bs[:, 1:-1], tokens_Bs[:, 2:]), 1)
        rounds += sum(completion.stats.rounds for completion in found)
        accepted += sum(sum(completion.stats.accepted) for completion in found)
    assert accepted > rounds // 4
    cells, degrees = [], 0
    for of_pair_VV in counted_VVV:
        for count_V, chance_V in zip(of_pair_VV, chances_VV, strict=True):
            possible = chance_V > 0
            assert not count_V[~possible].any()
            mean_V = count_V.sum() * chance_V[possible]
            if mean_V.min() >= 20:
                cells.append(((count_V[possible] - mean_V) ** 2 / mean_V).sum())
                degrees += possible.sum() - 1
    assert degrees > 20
    assert sum(cells) < chi_square_limit(degrees)
