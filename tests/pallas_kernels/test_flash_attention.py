"""Interval attention: the reference against float64 softmax, and every implementation against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import IMPLEMENTATIONS, attend_pages, cpu, flash_attention, gpu, reference, xla
from pallas_kernels.flash_attention.cost import computed_scores, flash_attention_cost, scores
from pallas_kernels.flash_attention.xla import attend
from pallas_kernels.keys import Interval, NewKeys, PagedKeys
from tests.pallas_kernels.programs import AN_H100, on_one_cpu
from tests.pallas_kernels.simulator import simulated

WHOLE = [on_one_cpu(functools.partial(function, scale=1.0)) for function in (attend, reference.attend)]
PAGED = {"reference": reference.attend_pages, "xla": xla.attend_pages, "cpu": cpu.attend_pages}
PAGED["cpu, rows apart"] = functools.partial(cpu.attend_pages, apart=True)
PAGED["blocks"] = functools.partial(xla.attend_pages, block=3)
# One device's heads of real models: key/value heads, query heads for each of them, head dimension.
HEADS = {"SmolLM2": (3, 3, 64), "Llama 3.1 8B": (8, 4, 128), "Llama 3.1 70B, tensor=8": (1, 8, 128), "Scout, tensor=8": (1, 5, 128)}


def softmax(q_BTKGh, k_BSKh, v_BSKh, start_BT, end_BT, scale=1.0):
    """In float64, with a boolean mask."""
    q_BTKGh, k_BSKh, v_BSKh = (np.asarray(a).astype(np.float64) for a in (q_BTKGh, k_BSKh, v_BSKh))
    scores = scale * np.einsum("btkgh,bskh->btkgs", q_BTKGh, k_BSKh)
    key = np.arange(k_BSKh.shape[1])
    visible = (key >= start_BT[..., None]) & (key < end_BT[..., None])
    highest = np.where(visible[:, :, None, None], scores, -1e300).max(-1, keepdims=True)
    exponentials = np.where(visible[:, :, None, None], np.exp(np.minimum(scores - highest, 0)), 0.0)
    total = exponentials.sum(-1)
    out = np.einsum("btkgs,bskh->btkgh", exponentials, v_BSKh) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.log(total) + np.where(total == 0, 0, highest[..., 0])


def problem(seed, B, T, S, heads=(2, 3, 4), dtype=np.float32):
    K, G, h = heads
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=s).astype(dtype) for s in ((B, T, K, G, h), (B, S, K, h), (B, S, K, h)))
    start, end = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0).astype(np.int32)
    return q, k, v, start, end


def paged(seed, k_BSKh, v_BSKh, page, start_BT, end_BT):
    """The keys and values in pages of a pool, in any order; NaN in every page that no query's interval spans, and in spare ones."""
    B, S, K, h = k_BSKh.shape
    width = S // page
    pages_BW = np.random.default_rng(seed).permutation(B * width + 2)[: B * width].reshape(B, width).astype(np.int32)
    pools = np.full((2, B * width + 2, K, page, h), np.nan).astype(k_BSKh.dtype)
    first, last = start_BT.min() // page, -(-end_BT.max() // page)
    for pool, keys in zip(pools, (k_BSKh, v_BSKh), strict=True):
        pool[pages_BW[:, first:last]] = keys.reshape(B, width, page, K, h).swapaxes(2, 3)[:, first:last]
    return PagedKeys(*pools, pages_BW, Interval(start_BT, end_BT))


@functools.cache
def program(name, scale=1.0):
    return on_one_cpu(functools.partial(PAGED[name], scale=scale))


def check(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a).astype(np.float64), b, rtol=tolerance, atol=tolerance)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1, 1), (2, 3, 7), (3, 5, 24)]))
def test_attend_equals_masked_softmax(seed, shape):
    args = problem(seed, *shape)
    for attended in WHOLE:
        check(attended(*args), softmax(*args), 1e-5)


@pytest.mark.parametrize("name", PAGED)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 1), (2, 3), (3, 5)]))
def test_attend_pages_equals_masked_softmax_whatever_the_page_order(name, seed, shape):
    """Intervals differ by row; pages that none of them reaches hold NaN."""
    q, k, v, start, end = problem(seed, *shape, 40)
    found = program(name)(q, paged(seed, k, v, 8, start, end))
    check(found, softmax(q, k, v, start, end), 1e-5)


@pytest.mark.parametrize("name", PAGED)
def test_any_number_of_pages_is_read_and_no_other(name):
    """Whole blocks of pages, blocks and single pages, single pages only; from the first page or a later one."""
    q, k, v, _, _ = problem(0, 2, 1, 10 * 4)
    for first in range(10):
        for last in range(first + 1, 11):
            start, end = np.array([[first * 4 + 1], [first * 4 + 3]], np.int32), np.array([[last * 4 - 3], [last * 4]], np.int32)
            end = np.maximum(start, end)
            found = program(name)(q, paged(first, k, v, 4, start, end))
            check(found, softmax(q, k, v, start, end), 1e-5)


@pytest.mark.parametrize("name", ["xla", "cpu, rows apart", "blocks"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_row_gets_the_same_bits_whatever_is_beside_it(name, dtype):
    """Beside rows that begin earlier and end later, each gets what it gets beside rows that attend nothing."""
    q, k, v, _, _ = problem(0, 4, 2, 11 * 4, dtype=dtype)
    rng = np.random.default_rng(1)
    attended = program(name)
    for _ in range(20):
        start, end = np.sort(rng.integers(0, 11 * 4 + 1, (2, 4, 1)).repeat(2, axis=2), axis=0).astype(np.int32)
        cached = paged(0, k, v, 4, np.zeros_like(start), np.full_like(end, 44))
        together = attended(q, dataclasses.replace(cached, interval=Interval(start, end)))
        for row in range(4):
            alone_BT = (np.arange(4) == row)[:, None]
            interval = Interval(np.where(alone_BT, start, 0), np.where(alone_BT, end, 0))
            alone = attended(q, dataclasses.replace(cached, interval=interval))
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_array_equal(a[row], b[row])


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_blocks_hold_as_many_pages_as_have_room(pages, monkeypatch):
    """With many rows that may be none, and pages are attended one by one."""
    q, k, v, start, end = problem(7, 3, 2, 10 * 4)
    page_bytes = 2 * 3 * 2 * 4 * 4 * 4  # keys and values of 3 rows, 2 heads, 4 tokens of 4 float32 numbers
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", page_bytes * pages + page_bytes // 2)
    arguments = (q, paged(7, k, v, 4, start, end))
    attended = on_one_cpu(functools.partial(cpu.attend_pages, scale=1.0))
    check(attended(*arguments), softmax(q, k, v, start, end), 1e-5)
    assert str(jax.make_jaxpr(attended)(*arguments)).count("while[") == (2 if pages > 1 else 1)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize(("queries", "dtype"), [(1, "float32"), (4, "float32"), (1, "bfloat16"), (4, "bfloat16")])
def test_implementations_agree_on_heads_of_real_models(heads, queries, dtype):
    q, k, v, start, end = problem(3, 2, queries, 6 * 32, heads, jnp.dtype(dtype))
    arguments = (q, paged(3, k, v, 32, start, end))
    scale = heads[2] ** -0.5
    expected = softmax(q, k, v, start, end, scale)
    # Inputs are the same; in bfloat16 the softmax weights carry eight bits, 2**-9 of rounding each.
    check(program("reference", scale)(*arguments), expected, 1e-5)
    for name in ("xla", "cpu", "blocks"):
        out, lse = program(name, scale)(*arguments)
        assert out.dtype == lse.dtype == jnp.float32
        check([lse], expected[1:], 1e-5)
        check([out], expected[:1], 1e-5 if dtype == "float32" else 2.0**-7)


@pytest.mark.parametrize("name", PAGED)
def test_float64_is_kept(name):
    with jax.enable_x64(True):
        q, k, v, start, end = problem(4, 2, 3, 40, dtype=np.float64)
        out, lse = on_one_cpu(functools.partial(PAGED[name], scale=1.0))(q, paged(4, k, v, 8, start, end))
        assert out.dtype == lse.dtype == jnp.float64
        check((out, lse), softmax(q, k, v, start, end), 1e-13)


@pytest.mark.parametrize("name", PAGED)
def test_a_query_that_sees_nothing_gets_zeros_and_minus_infinity(name):
    q, k, v, start, end = problem(5, 2, 2, 40)
    start[1], end[1] = 7, 7
    out, lse = program(name)(q, paged(5, k, v, 8, start, end))
    assert (np.asarray(out)[1] == 0).all() and np.isneginf(lse[1]).all()
    nothing = np.zeros_like(start)
    out, lse = program(name)(q, paged(5, k, v, 8, nothing, nothing))
    assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_scores_do_not_overflow(scale):
    q, k, v, start, end = problem(1, 1, 2, 40)
    start, end = np.zeros_like(start), np.full_like(end, 40)
    results = [attend(q * np.float32(scale), k, v, start, end, scale=1.0)]
    results += [program(name)(q * np.float32(scale), paged(1, k, v, 8, start, end)) for name in PAGED]
    assert all(np.isfinite(a).all() for result in results for a in result)


def test_bfloat16_inputs_give_float32_results():
    q, k, v, start, end = problem(2, 2, 3, 9, dtype=jnp.dtype(jnp.bfloat16))
    out, lse = attend(q, k, v, start, end, scale=1.0)
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, softmax(q, k, v, start, end)[0], atol=2.0**-7)


@pytest.mark.parametrize(
    ("B", "T", "W", "block"),
    [(1, 1, 65, 16), (1, 1, 3, 3), (32, 1, 65, 4), (200, 1, 65, 1), (1, 512, 65, 8), (1, 2048, 65, 2), (1, 9000, 65, 1)],
)
def test_programs_for_gpus_attend_as_many_pages_at_once_as_have_room(B, T, W, block):
    """Llama 3.1 8B's heads: a page of keys and values is 0.5 MB a row, its scores are 16 KB a query, and a block takes 64 MiB of either."""
    bf16, int32 = jnp.bfloat16, jnp.int32
    array = jax.ShapeDtypeStruct
    pool, bounds = array((B * W, 8, 128, 128), bf16), array((B, T), int32)
    arguments = array((B, T, 8, 4, 128), bf16), PagedKeys(pool, pool, array((B, W), int32), Interval(bounds, bounds))
    with jax.sharding.use_abstract_mesh(AN_H100):
        expected = jax.make_jaxpr(functools.partial(xla.attend_pages, scale=1.0, block=block))(*arguments)
        for function in (attend_pages, gpu.attend_pages):
            assert str(jax.make_jaxpr(functools.partial(function, scale=1.0))(*arguments)) == str(expected)
        with pytest.raises(NotImplementedError, match=r"^written for [CG]PUs; the(re is no mesh| program is for [CG]PUs)"):
            jax.make_jaxpr(functools.partial(cpu.attend_pages, scale=1.0))(*arguments)


def test_programs_for_cpus_take_the_kernels_for_cpus_and_no_others_do():
    q, k, v, start, end = problem(6, 1, 1, 40)
    arguments = (q, paged(6, k, v, 8, start, end))
    traced = {name: str(jax.make_jaxpr(functools.partial(f, scale=1.0))(*arguments)) for name, f in PAGED.items() if "cpu" not in name}
    assert str(jax.make_jaxpr(functools.partial(attend_pages, scale=1.0))(*arguments)) == traced["xla"]
    lowered = {f: on_one_cpu(functools.partial(f, scale=1.0)).lower(*arguments).as_text() for f in (attend_pages, *PAGED.values())}
    assert lowered[attend_pages] == lowered[cpu.attend_pages] != lowered[xla.attend_pages]
    for platform in (cpu, gpu):
        with pytest.raises(NotImplementedError, match=r"^written for [CG]PUs; the(re is no mesh| program is for [CG]PUs)"):
            platform.attend_pages(*arguments, scale=1.0)
    nothing = np.zeros((1, 33), np.int32)
    many = np.zeros((1, 33, *q.shape[2:]), np.float32), dataclasses.replace(arguments[1], interval=Interval(nothing, nothing))
    with pytest.raises(NotImplementedError, match="33 queries a row"):
        program("cpu").lower(*many)


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of T queries over S new keys, and over W pages of p cached tokens."""

    B: int = 1
    T: int = 128
    S: int = 128
    K: int = 1
    G: int = 1
    h: int = 64
    W: int = 2
    p: int = 128
    dtype: str = "bfloat16"
    unsupported_on_hoppers: str = ""

    @functools.cached_property
    def arguments(self):
        """Causal attention in chunks of 48 tokens over the new keys; some queries see no key of the cache, and some see nothing."""
        rng = np.random.default_rng(self.T)
        B, T, S, K, G, h, W, p = self.B, self.T, self.S, self.K, self.G, self.h, self.W, self.p
        q, k, v = (jnp.asarray(rng.normal(size=s), self.dtype) for s in ((B, T, K, G, h), (B, S, K, h), (B, S, K, h)))
        token = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        new = Interval(token // 48 * 48, np.minimum(np.where(token % 7 == 3, 0, token + 1), S).astype(np.int32))
        if W == 0:
            return q, NewKeys(k, v, new), None
        keys, values = rng.normal(size=(2, B, W * p, K, h))
        start = np.sort(rng.integers(0, W * p, (B, T)), axis=1).astype(np.int32)
        end = np.where(token % 5 == 3, 0, W * p - 9).astype(np.int32)
        cached = paged(1, keys.astype(jnp.dtype(self.dtype)), values.astype(jnp.dtype(self.dtype)), p, start, end)
        return q, NewKeys(k, v, new), jax.tree.map(jnp.asarray, cached)


CASES = [
    Case(),
    Case(B=2, T=32, S=32, K=2, W=1, p=64, dtype="float16"),
    Case(T=150, S=150, G=3, h=128, W=0),
    Case(T=64, S=200, G=2, W=3, p=64),
    Case(dtype="float32", unsupported_on_hoppers="takes bfloat16 or float16, the same for all arrays; they are float32"),
    Case(h=32, unsupported_on_hoppers="takes head dimensions 64 and 128; this one is 32"),
    Case(p=32, unsupported_on_hoppers="takes pages of a multiple of 64 tokens; they have 32, 2 a row"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_flash_attention_equals_the_reference_or_says_why_not(name, case):
    def attended(*arguments):
        return flash_attention(*arguments, scale=case.h**-0.5, implementation=name)

    if name == "hopper" and case.unsupported_on_hoppers:
        with jax.sharding.use_abstract_mesh(AN_H100), pytest.raises(NotImplementedError) as error:
            jax.make_jaxpr(attended)(*case.arguments)
        assert str(error.value) == f"no implementation of flash_attention takes these arguments (hopper: {case.unsupported_on_hoppers})"
        return
    if name == "hopper":
        (out, lse), copied = simulated(attended, *case.arguments)
        bounds = [(np.asarray(i.start_BT), np.asarray(i.end_BT)) for i in (keys and keys.interval for keys in case.arguments[1:]) if i]
        assert copied == flash_attention_cost(case.K, case.G, case.h, *bounds).copied_bytes
    else:
        out, lse = on_one_cpu(attended)(*case.arguments)
    expected_out, expected_lse = reference.flash_attention(*case.arguments, scale=case.h**-0.5)
    assert out.dtype == lse.dtype == jnp.float32
    nothing = np.isneginf(expected_lse)
    assert nothing.any() and not nothing.all()
    assert (np.isneginf(lse) == nothing).all() and (np.asarray(out)[nothing] == 0).all()
    error = np.abs(out - expected_out).max() / np.abs(expected_out).max()
    assert error < {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5}[case.dtype]
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize(("tokens", "chunk"), [(8192, None), (131072, None), (131072, 8192), (2048, None)])
def test_few_masked_scores_are_computed(tokens, chunk):
    """A causal prompt, and one of Scout's chunk-local layers on one host: at most 3 % more than the useful scores, from 8K tokens on."""
    token = np.arange(tokens)[None, :]
    bounds = token // (chunk or tokens) * (chunk or tokens), token + 1
    reach = chunk or tokens
    assert scores(bounds) == tokens // reach * reach * (reach + 1) // 2
    # Blocks of 128 queries and keys on the diagonal are computed whole: 127 in 256 of them are masked.
    blocks = reach // 128
    assert computed_scores(bounds) == tokens // reach * 128 * 128 * blocks * (blocks + 1) // 2
    assert computed_scores(bounds) / scores(bounds) < (1.03 if tokens > 2048 else 1.07)


def test_cost_of_attention():
    """Two queries of 3 heads that see 5 and 2 of the new keys, and 64 and none of the cached ones."""
    new, cached = (np.array([[1, 4]]), np.array([[6, 6]])), (np.array([[10, 9]]), np.array([[74, 3]]))
    cost = flash_attention_cost(1, 3, 64, new, cached)
    assert cost.flops == 4 * 3 * 64 * (5 + 2 + 64)
    assert cost.least_bytes == 2 * (5 + 64) * 64 * 2 + 2 * 3 * 64 * 2 + 2 * 3 * 65 * 4
    # A block of 64 queries; one block of new keys, two of cached ones, for each head.
    assert cost.copied_bytes == 3 * (64 * (128 + 16 + 260) + 3 * 64 * 2 * 64 * 2)
