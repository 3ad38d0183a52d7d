"""The Python interface on tiny models: what generation returns, and that bad input is refused in one line."""

import dataclasses
import re
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, load
from l4jax.answer import Answer, NewTokens
from l4jax.engine.clock import BurstClock
from l4jax.engine.runner import Runner
from l4jax.engine.step import Results, RowResult
from l4jax.program_inputs import Resident
from l4jax.request import Request
from l4jax.text.hf_tokenizer import HfTokenizer
from tests.text import small
from tests.tiny import llama3_like, maverick_like, prompts, scout_like, shallow, weights

TOKENIZER = HfTokenizer(small.backend(), {})
CONFIGS = {"scout": shallow(scout_like()), "maverick": shallow(maverick_like()), "llama3": shallow(llama3_like())}


MODELS = {}


def model(name):
    """Return one LLM for all tests of this model, so that its programs are compiled once."""
    if name not in MODELS:
        MODELS[name] = LLM(CONFIGS[name], weights(CONFIGS[name]))
    return MODELS[name]


@pytest.fixture(params=CONFIGS, ids=str)
def llm(request):
    return model(request.param)


@pytest.fixture
def scout():
    return model("scout")


def greedy(max_tokens, **changes):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)


def test_logits_do_not_depend_on_how_the_prompt_is_cut_or_batched(llm):
    ragged = prompts(llm.config, (30, 3))
    whole = llm.logits(ragged)
    assert [w.shape for w in whole] == [(len(p), llm.config.vocab_size) for p in ragged]
    for lengths in ((1,), (5, 13)):
        pieces = LLM(llm.config, weights(llm.config), prefill_lengths=lengths)
        for one, batched, alone in zip(whole, pieces.logits(ragged), (pieces.logits([p])[0] for p in ragged), strict=True):
            # float32 sums of up to 64 terms in another order; logits are of order 1 to 5.
            np.testing.assert_allclose(batched, one, atol=2e-5)
            np.testing.assert_allclose(alone, one, atol=2e-5)


def test_greedy_generation_follows_the_logits(llm):
    prompt = prompts(llm.config, (21,))[0]
    completion = llm.generate(prompt, greedy(11))[0]
    logits = llm.logits([prompt + completion.token_ids])[0]
    assert completion.token_ids == logits[20:-1].argmax(-1).tolist()
    assert completion.finish_reason == "length"
    assert completion.stats.prompt_tokens == 21 and completion.stats.output_tokens == 11


def test_a_request_does_not_depend_on_what_else_is_in_the_batch(llm):
    ragged = prompts(llm.config, (30, 3, 17, 1))
    params = [
        greedy(20),
        SamplingParams(max_tokens=40, seed=2**63, temperature=1.7),
        greedy(1),
        greedy(9),
    ]
    if llm is model("scout"):  # the sampler is the same for all
        params[1] = dataclasses.replace(params[1], min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.2, logit_bias={7: 2.0})
        params[3] = SamplingParams(max_tokens=9, seed=4, top_k=5, top_p=0.8, logprobs=3)
    together = llm.generate(ragged, params)
    for prompt, p, completion in zip(ragged, params, together, strict=True):
        assert llm.generate(prompt, p)[0].token_ids == completion.token_ids
        assert len(completion.token_ids) == p.max_tokens


def test_a_seed_reproduces_and_a_drawn_one_is_reported(scout):
    first = scout.generate([[1, 2, 3]], SamplingParams(max_tokens=20))[0]
    again = scout.generate([[1, 2, 3]], SamplingParams(max_tokens=20, seed=first.seed))[0]
    other = scout.generate([[1, 2, 3]], SamplingParams(max_tokens=20, seed=first.seed ^ 1))[0]
    assert again.token_ids == first.token_ids != other.token_ids


def test_generation_ends_with_a_stop_token(scout):
    free = scout.generate([[1, 2, 3]], greedy(20))[0].token_ids
    stop = free[7]
    completion = scout.generate([[1, 2, 3]], greedy(20, stop_token_ids=[stop]))[0]
    assert completion.token_ids == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"


def test_the_first_token_may_be_the_stop_token(scout):
    first = scout.generate([[1, 2, 3]], greedy(1))[0].token_ids[0]
    completion = scout.generate([[1, 2, 3]], greedy(20, stop_token_ids=[first]))[0]
    assert completion.token_ids == [first] and completion.finish_reason == "stop"


def test_the_models_end_token_stops_unless_ignored(scout):
    free = scout.generate([[1, 2, 3]], greedy(20))[0].token_ids
    ending = LLM(dataclasses.replace(scout.config, eos_token_ids=(free[4],)), scout.weights)
    assert ending.generate([[1, 2, 3]], greedy(20))[0].token_ids == free[: free.index(free[4]) + 1]
    assert ending.generate([[1, 2, 3]], greedy(20, ignore_eos=True))[0].token_ids == free


def test_output_ends_where_the_context_does(scout):
    context = scout.config.max_position_embeddings
    completion = scout.generate(prompts(scout.config, (context - 3,)), greedy(50))[0]
    assert len(completion.token_ids) == 3 and completion.finish_reason == "length"


def test_logprobs_are_the_log_softmax_of_the_logits(scout):
    completion = scout.generate([[5, 6]], SamplingParams(max_tokens=6, seed=1, logprobs=2))[0]
    logits = scout.logits([[5, 6, *completion.token_ids]])[0][1:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for step, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert entry.logprob == pytest.approx(expected[step, token], abs=1e-5)
        assert [t for t, _ in entry.top] == np.argsort(-expected[step])[:2].tolist()


def test_more_prompts_than_the_batch_holds():
    llama = model("llama3")
    narrow = LLM(llama.config, llama.weights, max_batch=2)
    many = prompts(llama.config, (4, 9, 2))
    assert [c.token_ids for c in narrow.generate(many, greedy(5))] == [c.token_ids for c in llama.generate(many, greedy(5))]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_close_to_float32(dtype):
    config = CONFIGS["maverick"]
    prompt = prompts(config, (30,))
    exact = model("maverick").logits(prompt)[0]
    half = LLM(config, weights(config, dtype=jnp.dtype(dtype))).logits(prompt)[0]
    assert half.dtype == np.float32
    # Two layers of values rounded to eight (eleven) bits; a router near-tie may send single tokens elsewhere.
    error = np.abs(half - exact).max(-1) / np.abs(exact).max()
    assert np.median(error) < {jnp.bfloat16: 0.05, jnp.float16: 0.006}[dtype]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([[1, 64]]), "the prompt has token id 64; expected 0 to 63"),
        (lambda llm: llm.generate([[-1]]), "the prompt has token id -1"),
        (lambda llm: llm.generate([[10**5000]]), "the prompt has token id <an integer of about 5001 digits>; expected 0 to 63"),
        (lambda llm: llm.generate([[1]], SamplingParams(stop_token_ids=[10**5000])), "stop_token_ids has token id <an integer of about"),
        (lambda llm: llm.generate([[1]], SamplingParams(logit_bias={10**5000: 1})), "logit_bias has token id <an integer of about 5001"),
        (lambda llm: llm.logits([[]]), "the prompt has no tokens"),
        (lambda llm: llm.generate([[1] * 257]), "the prompt has 257 tokens; expected at most the model's context of 256"),
        (lambda llm: llm.generate([[1] * 256]), "fills the model's context of 256 tokens"),
        (lambda llm: llm.generate("hello"), "no tokenizer"),
        (lambda llm: llm.stream([1, 2]), "no tokenizer"),
        (lambda llm: llm.chat([{"role": "user", "content": "hello"}]), "no chat template"),
        (lambda llm: llm.generate([[1], [2]], [SamplingParams()]), "2 prompts but 1 sampling params"),
        (lambda llm: llm.generate([[1]], [SamplingParams()] * 2), "1 prompt but 2 sampling params"),
        (lambda llm: llm.generate([[1]], SamplingParams(stop=["x"])), "stop strings need a tokenizer"),
        (lambda llm: llm.generate([[1]], SamplingParams(stop_token_ids=[64])), "stop_token_ids has token id 64"),
        (lambda llm: llm.generate([[1]], SamplingParams(logit_bias={-3: 1.0})), "logit_bias has token id -3"),
        (lambda llm: llm.generate([[1.5, 2.0]]), "a prompt is [1.5, 2.0]; expected text or a list of token ids"),
        (lambda llm: llm.generate([None]), "a prompt is None; expected text or a list of token ids"),
        (lambda llm: llm.logits("hello"), "the prompt is text, but this checkpoint has no tokenizer"),
        (lambda llm: llm.generate([[1]], [{"max_tokens": 3}]), "the sampling params are {'max_tokens': 3}; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate(b"abc"), "a prompt is b'abc'; expected text or a list of token ids"),
        (lambda llm: llm.generate([bytearray(b"abc")]), "a prompt is bytearray(b'abc'); expected text or a list of token ids"),
        (lambda llm: llm.logits(memoryview(b"abc")), "expected text or a list of token ids"),
        (lambda llm: llm.logits([True, False]), "a prompt is [True, False]; expected text or a list of token ids"),
        (lambda llm: llm.generate([[1, True]]), "a prompt is [1, True]; expected text or a list of token ids"),
        (lambda llm: llm.generate(np.array([True, False])), "expected text or a list of token ids"),
        (lambda llm: llm.logits([np.array([1.0, 2.0])]), "expected text or a list of token ids"),
        (lambda llm: llm.generate([[1], [2]], (SamplingParams() for _ in range(3))), "2 prompts but 3 sampling params"),
        (lambda llm: llm.generate([[1]], 5), "the sampling params are 5; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate(5), "the prompts are 5; expected text, a list of token ids, or a list of these"),
        (lambda llm: llm.generate(np.array(5)), "the prompts are array(5); expected text, a list of token ids, or a list of these"),
        (lambda llm: llm.generate([np.array(5)]), "a prompt is array(5); expected text or a list of token ids"),
        (lambda llm: llm.logits(None), "the prompts are None; expected text"),
        (
            lambda llm: llm.generate([[1]], SamplingParams(logit_bias=dict.fromkeys(range(64), -np.inf))),
            "logit_bias forbids all 64 tokens; leave at least one",
        ),
        (lambda llm: LLM(llm.config, {}, max_batch=0), "max_batch is 0"),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=()), "prefill_lengths is (); expected at least one length"),
        # A mapping, a text and an iterator can be iterated over too.
        (lambda llm: llm.generate([[1]], {"max_tokens": 3}), "the sampling params are {'max_tokens': 3}; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate([[1]], {}), "the sampling params are {}; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate([], {}), "the sampling params are {}; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate([[1]], "greedy"), "the sampling params are 'greedy'; expected l4jax.SamplingParams"),
        (lambda llm: llm.stream([1], {}), "the sampling params are {}; expected l4jax.SamplingParams"),
        (lambda llm: llm.stream([1], [SamplingParams()]), "the sampling params are [SamplingParams("),
        (lambda llm: llm.generate([{"prompt": 3}]), "a prompt is {'prompt': 3}; expected text or a list of token ids"),
        (lambda llm: llm.generate([{"role": "user", "content": "hi"}]), "token ids; use chat, or stream_chat, for a conversation"),
        (lambda llm: llm.generate([{3: "prompt"}]), "a prompt is {3: 'prompt'}; expected text or a list of token ids"),
        (lambda llm: llm.stream({1, 2}), "a prompt is {1, 2}; expected text or a list of token ids"),
        (lambda llm: llm.logits([iter([1, 2])]), "a prompt is <list_iterator"),
        (lambda llm: llm.generate(prompt for prompt in [[1], [2]]), "the prompts are <generator"),
        (lambda llm: llm.generate(b""), "a prompt is b''; expected text or a list of token ids"),
        (lambda llm: llm.generate([np.zeros((3, 1))]), "expected text or a list of token ids"),
        (lambda llm: llm.warmup(max_length="10"), "max_length is '10'; expected 2 (a prompt and a token) to 256"),
        (lambda llm: llm.warmup(max_length=2.5), "max_length is 2.5; expected 2"),
        (lambda llm: LLM(llm.config, {}, kv_tokens=0), "kv_tokens is 0; expected a whole number of at least 1"),
        (lambda llm: load("folder", kv_tokens=2.5), "kv_tokens is 2.5; expected a whole number of at least 1"),
        (lambda llm: LLM(3, {}), "the configuration is 3; expected an l4jax.ModelConfig"),
        (lambda llm: LLM(llm.config, {**llm.weights, "embed": 3}), "weight embed is 3; expected an array of shape (64, 32)"),
        (
            lambda llm: LLM(llm.config, {**llm.weights, "embed": np.zeros((64, 32), np.int32)}),
            "weight embed has dtype int32; expected one of floating-point numbers",
        ),
        (lambda llm: LLM(llm.config, {}, tokenizer="folder"), "the tokenizer is 'folder'; expected an l4jax.text.tokenizer.Tokenizer"),
        (lambda llm: LLM(llm.config, {}, chat_format="chatml"), "the chat format is 'chatml'; expected an l4jax.text.chat.ChatFormat"),
        (lambda llm: LLM(llm.config, {}, speculation=np.array(["a", "b"])), "speculation is array(['a', 'b']"),
        (lambda llm: LLM(llm.config, {}, beyond_training=np.array(["a", "b"])), "beyond_training is array(['a', 'b']"),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=[[1], [2, 3]]), "prefill_lengths is [[1], [2, 3]]; expected at least one length"),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=np.array(8)), "prefill_lengths is array(8); expected at least one length"),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=jnp.array([8, 0])), "prefill_lengths is Array([8, 0]"),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=[True]), "prefill_lengths is [True]; expected at least one length"),
        (lambda llm: LLM(llm.config, {}, max_batch=True), "max_batch is True; expected a whole number of at least 1"),
        (lambda llm: llm.generate([[1]], [None]), "the sampling params are None; expected l4jax.SamplingParams"),
        (lambda llm: llm.generate(jnp.array([1.0, 2.0])), "expected text or a list of token ids"),
        (lambda llm: llm.generate(jnp.array([True, False])), "expected text or a list of token ids"),
        (lambda llm: llm.generate(jnp.array(5)), "the prompts are Array(5"),
        (lambda llm: LLM(llm.config, 3), "the value of weights is 3; expected a mapping from names to arrays"),
        (lambda llm: LLM(llm.config, {}), "21 of 21 weights are missing, embed among them; give all of the model's"),
        (lambda llm: LLM(llm.config, {}, drafter="folder"), "the drafter is 'folder'; expected an l4jax.speculator.LoadedDrafter"),
        (lambda llm: LLM(llm.config, {}, mesh=3), "the mesh is 3; expected a description"),
        (lambda llm: LLM(llm.config, {}, speculation=None), 'speculation is None; expected "auto", "off"'),
        (lambda llm: LLM(llm.config, {}, beyond_training=None), 'beyond_training is None; expected "window" or "stop"'),
        (lambda llm: load(3), "the checkpoint is 3; expected the path of a folder that l4jax convert made"),
        (lambda llm: load(None), "the checkpoint is None; expected the path"),
        (lambda llm: load("folder", drafter=3), "the drafter is 3; expected the path of a drafter's folder"),
        (lambda llm: load("folder", dtype=32), "dtype is 32; expected float32, bfloat16, float16 or None"),
        (lambda llm: load("folder", dtype=np.array([1, 2])), "dtype is array([1, 2]); expected float32, bfloat16, float16 or None"),
        (lambda llm: load("folder", speculation=np.array(["a", "b"])), "speculation is array(['a', 'b']"),
        (lambda llm: load("folder", max_batch=2.5), "max_batch is 2.5; expected a whole number of at least 1"),
        (lambda llm: load("folder", max_batch="8"), "max_batch is '8'; expected a whole number of at least 1"),
        (lambda llm: load("folder", prefill_lengths=128), "prefill_lengths is 128; expected at least one length, in a list"),
        (lambda llm: load("folder", prefill_lengths="128"), "prefill_lengths is '128'; expected at least one length, in a list"),
        (lambda llm: load("folder", prefill_lengths=(32, 2.5)), "prefill_lengths is (32, 2.5); expected at least one length, in a list"),
        (lambda llm: load("folder", ring_hardware=3), "ring_hardware is 3; expected a sharding.select.RingHardware"),
        (lambda llm: llm.warmup(progress="yes"), "progress is 'yes'; expected True or False"),
        (lambda llm: llm.generate([[1]], progress=1), "progress is 1; expected True or False"),
        (lambda llm: llm.logits([[1]], progress=None), "progress is None; expected True or False"),
        (lambda llm: llm.score([[1]], progress="no"), "progress is 'no'; expected True or False"),
        (lambda llm: load("folder", max_batch=10**400), "expected a whole number of at least 1, at most 10**15"),
        (lambda llm: load("folder", kv_tokens=10**400), "expected a whole number of at least 1, at most 10**15"),
        (
            lambda llm: LLM(llm.config, {}, prefill_lengths=(32, 10**9)),
            "prefill_lengths has 1000000000; expected at most 256, the model's con",
        ),
        (lambda llm: LLM(llm.config, {}, prefill_lengths=[10**5000]), "prefill_lengths has <an integer of about 5001 digits>; expected"),
        (lambda llm: LLM(llm.config, {}, mesh=[[1, 2]] * 500), "the mesh is [[1, 2], [1, 2],"),
        (lambda llm: dataclasses.replace(llm.config, vocab_size=-(10**5000)), "vocab_size is -<an integer of about 5001 digits>; expected"),
        (lambda llm: dataclasses.replace(llm.config, pad_token_id=10**5000), "pad_token_id has token <an integer of about 5001 digits>"),
    ],
)
def test_bad_input_is_refused_in_one_line(scout, call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        call(scout)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "value", [np.ones((20, 20)), ["word"] * 5000, "x" * 5000, -(10**5000)], ids=["an array", "a list", "a text", "an integer"]
)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_a_sampling_parameter_of_any_kind_is_refused_in_one_short_line(name, value):
    if name == "stop" and isinstance(value, list | str):  # which it may be
        value = [*value, 3]
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected ") as refused:
        SamplingParams(**{name: value})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stop", "a list of non-empty strings ([] for none)"),
        ("stop_token_ids", "a list of token ids ([] for none)"),
        ("logit_bias", "a mapping from token ids to numbers, or -inf to forbid a token ({} for none)"),
    ],
)
def test_a_list_that_is_none_is_refused_with_what_to_give_instead(name, expected):
    with pytest.raises(ValueError, match=re.escape(f"{name} is None; expected {expected}")):
        SamplingParams(**{name: None})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.score([[1, 2], []]), "prompt 1 of 2, counted from 0: the prompt has no tokens; expected at least one"),
        (lambda llm: llm.logits([[1], [2], [64]]), "prompt 2 of 3, counted from 0: the prompt has token id 64; expected 0 to 63"),
        (lambda llm: llm.logits([[1], [2.5]]), "prompt 1 of 2, counted from 0: a prompt is [2.5]; expected text or a list of token ids"),
        (lambda llm: llm.score([[1], [2] * 257]), "prompt 1 of 2, counted from 0: the prompt has 257 tokens; expected at most the model's"),
        (lambda llm: llm.generate([[1] * 256, [1]]), "prompt 0 of 2, counted from 0: the prompt fills the model's context of 256 tokens"),
        (
            lambda llm: llm.generate([[1], "hello"]),
            "prompt 1 of 2, counted from 0: the prompt is text, but this checkpoint has no tokenizer",
        ),
        (
            lambda llm: llm.generate([[1], [2]], [SamplingParams(), SamplingParams(stop_token_ids=[64])]),
            "prompt 1 of 2, counted from 0: stop_token_ids has token id 64",
        ),
        (
            lambda llm: llm.generate([[1], [2]], [None, SamplingParams()]),
            "prompt 0 of 2, counted from 0: the sampling params are None; expected l4jax.SamplingParams",
        ),
    ],
)
def test_of_several_prompts_the_bad_one_is_named(scout, call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refused:
        call(scout)
    assert "\n" not in str(refused.value)


def test_a_handle_has_what_a_caller_may_use_and_nothing_else(scout):
    public = {"request", "tokens", "over", "completion", "error", "cancel"}
    handle = scout.add([1], greedy(2))
    assert {name for name in dir(handle) if not name.startswith("_")} == public
    handle.cancel()
    while scout.step():
        pass


def test_numbers_and_lists_may_be_numpys_and_jaxs():
    """Numpy's integers lack methods of Python's, and an array of several numbers is neither true nor false."""
    config, w = CONFIGS["scout"], weights(CONFIGS["scout"])
    llm = LLM(config, w, max_batch=np.int64(2), prefill_lengths=np.array([16, 8]))
    of_jax = LLM(config, w, prefill_lengths=jnp.array([8, 16]))
    assert llm.engine.options.piece_lengths == of_jax.engine.options.piece_lengths == (8, 16)
    llm.warmup(max_length=np.int64(10))
    expected = llm.generate([[1, 2]], greedy(2))[0].token_ids
    assert llm.generate([[1, 2]], greedy(np.int64(2)))[0].token_ids == expected
    each = (np.array([1, 2]), jnp.array([1, 2]), list(np.array([1, 2])), list(jnp.array([1, 2])))
    for prompts_of_one in (*each, *([prompt] for prompt in each), jnp.array([[1, 2]])):
        (completion,) = llm.generate(prompts_of_one, greedy(2))
        assert completion.prompt_token_ids == [1, 2] and completion.token_ids == expected


def test_pages_may_lie_anywhere():
    """Shuffled pages give the same logits: nothing relies on pages being in order."""
    config = shallow(scout_like(attention_chunk_size=256, max_position_embeddings=1024))
    prompt, made = prompts(config, (600,)), weights(config)
    plain, shuffled = (LLM(config, made, max_batch=4, prefill_lengths=(128,)) for _ in range(2))
    for pages in (shuffled.engine._scheduler.ranks[0].pool.full, shuffled.engine._scheduler.ranks[0].pool.local):
        np.random.default_rng(0).shuffle(pages._free)
    np.testing.assert_allclose(shuffled.logits(prompt)[0], plain.logits(prompt)[0], atol=2e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_call_that_ends_in_an_error_leaves_a_usable_model(scout, monkeypatch, error):
    expected = scout.generate([[1, 2, 3]], greedy(5))[0].token_ids
    dispatch = Runner.dispatch

    def fail(runner, *arguments):
        dispatch(runner, *arguments)
        runner._resident = None  # as where a program was given it, and has returned nothing
        raise error

    with monkeypatch.context() as patch:
        other = scout.add([1], greedy(9))
        patch.setattr(Runner, "dispatch", fail)
        with pytest.raises(error):
            scout.generate([[1, 2, 3]], greedy(5))
    assert other.over and other.completion is None and str(other.error).startswith("a step that this request shared with others ")
    assert scout.generate([[1, 2, 3]], greedy(5))[0].token_ids == expected


def test_a_failed_step_frees_the_cache_while_its_error_is_kept(scout, monkeypatch):
    scout.generate([[1]], greedy(2))
    leaves = jax.tree.leaves(scout.engine.runner.resident)

    def fail(runner, *arguments):
        resident = runner.resident
        raise MemoryError(f"no memory for a program of {len(jax.tree.leaves(resident))} arrays")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "dispatch", fail)
        with pytest.raises(MemoryError) as kept:
            scout.generate([[1]], greedy(2))
    assert kept.tb is not None and leaves and all(leaf.is_deleted() for leaf in leaves)
    assert scout.generate([[1]], greedy(2))


def test_a_failed_allocation_leaves_a_usable_model(scout, monkeypatch):
    fresh = LLM(scout.config, weights(scout.config))

    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Resident, "empty", out_of_memory)
        with pytest.raises(ValueError, match="there is no memory for a KV cache of 2048 tokens; set a lower kv_tokens, or max_batch"):
            fresh.generate([[1]], greedy(5))
    assert fresh.generate([[1, 2, 3]], greedy(5))[0].token_ids == scout.generate([[1, 2, 3]], greedy(5))[0].token_ids


def test_warm_up_refuses_what_cannot_be(scout):
    for length in (0, 1, 257):
        with pytest.raises(ValueError, match=rf"max_length is {length}; expected 2 .* to 256"):
            scout.warmup(max_length=length)


def test_requests_of_several_threads_and_streams_go_on_together(scout):
    talking = LLM(scout.config, scout.weights, tokenizer=TOKENIZER)
    asked = {n: ([n, n + 1, 3], SamplingParams(max_tokens=20 + n, seed=n)) for n in range(1, 9)}
    expected = {n: scout.generate([prompt], params)[0].token_ids for n, (prompt, params) in asked.items()}
    found = {}

    def answer(n):
        prompt, params = asked[n]
        if n % 2:
            stream = talking.stream(prompt, params)
            text = "".join(stream)
            assert text == stream.completion.text
            found[n] = stream.completion.token_ids
        else:
            found[n] = talking.generate([prompt], params)[0].token_ids

    threads = [threading.Thread(target=answer, args=(n,)) for n in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_request_joins_those_under_way_and_others_drive_it(scout):
    expected = [completion.token_ids for completion in scout.generate([[1, 2], [3]], greedy(30))]
    assert not scout.step()
    first = scout.add([1, 2], greedy(30))
    while not first.tokens:
        assert scout.step()
    assert not first.over
    second = scout.add([3], greedy(30))
    scout.generate([[9]], greedy(30))
    while not (first.over and second.over):
        assert scout.step()
    assert [handle.completion.token_ids for handle in (first, second)] == [first.tokens, second.tokens] == expected
    assert not scout.step()
    first.cancel()
    assert first.error is None and first.completion is not None


def test_a_cancelled_request_ends_and_gives_its_slot_back(scout):
    narrow = LLM(scout.config, scout.weights, max_batch=1)
    for _ in range(3):
        handle = narrow.add([1, 2], greedy(200))
        narrow.step()
        handle.cancel()
    waiting = narrow.add([5], greedy(3))
    while not waiting.over:
        narrow.step()
    assert handle.over and handle.completion is None and str(handle.error) == "this request was cancelled"
    assert waiting.completion.token_ids == scout.generate([[5]], greedy(3))[0].token_ids


def test_a_request_that_is_cancelled_before_it_is_taken_in_harms_nobody(scout):
    """Calls of other threads may come at any moment, also while a step takes in those before."""
    expected = scout.generate([[1, 2]], greedy(30))[0].token_ids
    going_on = scout.add([1, 2], greedy(30))
    scout.step()
    gone = scout.add([3], greedy(30))
    gone.cancel()
    gone.cancel()
    while scout.step():
        pass
    assert going_on.completion.token_ids == expected and str(gone.error) == "this request was cancelled"


def test_prompts_that_the_cache_cannot_hold_are_named_before_any_is_computed(scout):
    small = LLM(scout.config, scout.weights, kv_tokens=128)
    with pytest.raises(
        ValueError, match=r"^prompt 1 of 2, counted from 0: a prompt of 200 tokens with up to 5 of output may need room for 204 tokens"
    ):
        small.generate([[1], [1] * 200], greedy(5))
    assert not small.step()


def test_the_cache_is_freed_unless_a_request_is_under_way(scout):
    fresh = LLM(scout.config, scout.weights)
    handle = fresh.add([1, 2], greedy(30))
    fresh.step()
    fresh.engine.discard()
    assert fresh.engine.runner._resident is not None
    handle.cancel()
    fresh.engine.discard()
    assert fresh.engine.runner._resident is None
    assert fresh.generate([[1, 2]], greedy(30))[0].token_ids == scout.generate([[1, 2]], greedy(30))[0].token_ids


def test_step_belongs_to_one_thread(scout):
    scout.step()
    refused = []

    def step():
        with pytest.raises(RuntimeError, match=r"llm.step\(\) was called from another thread before; call it from that one"):
            scout.step()
        refused.append(True)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert refused == [True]


def test_a_prompt_whose_prefix_is_cached_is_not_computed_again(scout):
    """Of the layers that keep everything pages are shared; what is generated is the same, whatever was cached."""
    config = dataclasses.replace(scout.config, max_position_embeddings=1024, attention_chunk_size=256)
    llm, fresh = (LLM(config, scout.weights, prefill_lengths=(64,), max_batch=2) for _ in range(2))
    common, params = prompts(config, (400,))[0], SamplingParams(max_tokens=5, temperature=0.7, seed=3, repetition_penalty=1.4)
    llm.generate([common], params)
    for end in ([7], [9, 1]):
        prompt, pieces = [*common[:390], *end], []
        dispatch = Runner.dispatch

        def watch(runner, step, *rest, pieces=pieces, dispatch=dispatch):
            pieces.extend(row.start for row in step.pieces if row)
            return dispatch(runner, step, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "dispatch", watch)
            found = llm.generate([prompt], params)[0].token_ids
        assert min(pieces) == 384
        assert found == fresh.generate([prompt], params)[0].token_ids


def test_stats_say_when_the_first_token_came_and_how_fast_the_others():
    def stats(*steps):
        answer = Answer(None, Request([1, 2, 3], SamplingParams(), 0, ()))
        for i, (tokens, elapsed) in enumerate(steps):
            answer.extend(NewTokens([7] * tokens, None), i == len(steps) - 1, elapsed)
        return answer.completion().stats

    some = stats((1, 3.0), (32, 5.0), (32, 9.0), (5, 10.0))
    assert (some.first_token_seconds, some.decode_seconds) == (3.0, 7.0)
    assert some.decode_tokens_per_second == 37 / 5.0  # a program may be compiled during the first burst
    assert stats((1, 3.0), (6, 5.0)).decode_tokens_per_second == 3.0
    alone = stats((1, 3.0))
    assert (alone.first_token_seconds, alone.decode_seconds, alone.decode_tokens_per_second) == (3.0, 0.0, 0.0)


def test_a_burst_takes_no_longer_than_it_may(scout):
    """As far as the last one tells; before the first there is nothing to go by, and it is short."""
    clock = LLM(scout.config, scout.weights).engine._clock
    assert clock.most_steps == 4
    for seconds, steps in ((0.02, 5), (0.008, 12), (3.0, 1)):
        clock._round_seconds = seconds
        assert clock.most_steps == steps


def test_an_answers_first_token_does_not_wait_until_its_second_is_compiled(scout):
    fresh = LLM(scout.config, scout.weights)
    handle = fresh.add([1, 2, 3], greedy(9))
    fresh.step()
    assert len(handle.tokens) == 1 and len(fresh.engine.runner._ready) == 1
    while fresh.step():
        pass
    assert handle.completion.token_ids == scout.generate([[1, 2, 3]], greedy(9))[0].token_ids


def test_a_slow_reader_does_not_shorten_bursts(monkeypatch):
    """Results that were there before they were asked for say only that the burst took no longer."""
    monkeypatch.setattr("l4jax.engine.clock.time", types.SimpleNamespace(perf_counter=lambda: 10.0))
    clock = BurstClock("cpu", 4)
    results, begun = Results(burst=(RowResult((1, 2, 3, 4)), None)), 1.0
    for waited, before, after in ((False, 0.0, 0.0), (False, 0.5, 0.5), (False, 3.0, 2.0), (True, 0.5, 2.0)):
        clock._last_read, clock._round_seconds = 2.0, before
        clock.measure(results, {}, begun, waited=waited)
        assert clock._round_seconds == after
    clock._round_seconds = 0.0
    assert clock.most_steps == 8  # nobody waited for the first: devices are faster than the host
