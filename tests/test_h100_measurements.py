"""What the items of ``benchmarks.h100`` measure: every call is made, waited for and counted, over arrays that no cache holds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from benchmarks.h100 import generation, kernels, launches, ops, timing
from benchmarks.h100.bench import Bench, Model, llama_and_head
from benchmarks.h100.errors import DeviceBroken
from benchmarks.h100.generation import BURST, decode_bytes, prefill_flops, round_bytes
from benchmarks.h100.launches import Launches
from benchmarks.h100.ops import CASES, in_turn
from benchmarks.h100.plan import KERNELS, OPS
from benchmarks.h100.results import Results
from benchmarks.h100.shapes import SHAPES
from benchmarks.h100.sizes import REAL, TOY
from l4jax.decoding.plan import Speculation
from l4jax.planning.compile import AbstractModel
from l4jax.planning.target import h100_devices
from pallas_kernels.heads import Targets
from pallas_kernels.keys import PagedKeys
from pallas_kernels.shapes import Attention, Linear, Merge, Mixture
from sharding.mesh import MeshSpec

CODE = {"code": "c0de"}


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "h100.json")


def started(results, name, source=CODE):
    results.await_items([name])
    results.start(name, source)


def test_a_step_of_the_8b_model_reads_its_published_parameters_and_its_cache():
    config, drafter = llama_and_head(REAL)
    abstract = AbstractModel(config, MeshSpec(), jax.devices()[:1], jnp.dtype(jnp.bfloat16), drafter)
    model = Model(abstract, dataclasses.replace(abstract.decode_call(1, 128).arguments[0], drafter=()))
    embedding, parameters = 128256 * 4096, 8_030_261_248
    a_token = 32 * 2 * 8 * 128 * 2
    assert decode_bytes(model, 8, 1024) == 2 * (parameters - embedding) + 8 * (1024 + 16) * a_token
    chain = Speculation.parse("chain:3")
    drafting = dataclasses.replace(
        model, weights=dataclasses.replace(model.weights, drafter=(jax.ShapeDtypeStruct((100, 7), jnp.bfloat16),))
    )
    assert round_bytes(drafting, 8, 1024, chain) == decode_bytes(model, 8, 1024) + 3 * 1400
    # Two a parameter and token, the head once, and scores of the pairs that causal attention leaves.
    norms = 65 * 4096
    matrices = parameters - 2 * embedding - norms
    assert prefill_flops(config, 2048, 1) == 2 * matrices * 2048 + 2 * embedding + 32 * 4 * 4096 * 2048 * 2049 // 2


def command_params():
    from l4jax import SamplingParams

    return SamplingParams(temperature=0.0)


@pytest.mark.parametrize("op", ["tree_attention", "flash_attention", "matmul", "experts"])
def test_rivals_in_jax_compute_what_our_op_does(op):
    arrays, implementations, _ = CASES[op](SHAPES["toy"][op][0])
    given = arrays(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it
        own, *others = (
            jnp.asarray(function(*given), jnp.float32) for name, function in implementations.items() if not name.startswith("cuDNN")
        )
    assert others
    for other in others:
        assert jnp.abs(own.reshape(other.shape) - other).max() <= 0.02 * jnp.abs(own).max()


def test_our_ops_are_timed_as_they_are_compiled_for_the_device(results, tmp_path):
    """Without a mesh they would take the form that works on any device."""
    seen = {"own": set(), "rival": set()}

    def op(name, x_MD):
        device = jax.sharding.get_abstract_mesh().abstract_device
        seen[name].add(device and device.platform)
        return x_MD + 1

    bench = Bench(TOY, jax.devices()[0], tmp_path)
    shape = Linear("toy", 2, 4, 4)
    started(results, "ops/toy")
    implementations = {name: functools.partial(op, name) for name in seen}
    ops.compare(bench, functools.partial(results.record, "ops/toy"), shape, lambda key: (jnp.ones((2, 4)),), implementations, 1)
    assert seen == {"own": {"cpu"}, "rival": {None}}


def test_every_op_is_timed_or_compared():
    rooms = [importlib.import_module(f"pallas_kernels.{room.name}") for room in pkgutil.iter_modules(pallas_kernels.__path__) if room.ispkg]
    public = {name for room in rooms for name in room.__all__ if name[0].islower()}
    parts = {"attend_masked", "attend_pages", "keeps_no_scores", "put", "rms_normalize", "split_heads", "swiglu_block"}  # of other ops
    timed = {name.replace("merge_attention", "merge") for name in public - parts}
    not_timed = {"merge_splits", "write_heads", "add_norm"}  # each takes no longer than starting a kernel
    assert timed - not_timed == set(OPS) == set(CASES)
    assert timed == set(SHAPES["real"]) and not_timed < set(KERNELS) < timed


def test_the_arrays_of_every_shape_exceed_the_l2_cache():
    for op, case in CASES.items():
        for shape in SHAPES["real"][op]:
            given = jax.eval_shape(case(shape)[0], jax.random.key(0))
            nbytes = sum(array.size * array.dtype.itemsize for array in given)
            copies = REAL.copies(shape.nbytes)
            assert REAL.rotated_bytes <= copies * shape.nbytes < 2e9, shape
            assert copies * nbytes > 1.4 * 50 * 2**20, shape  # without the results


@pytest.mark.optimized
def test_every_call_is_made_in_every_turn_with_all_that_it_computes():
    """XLA removes calls whose results nothing needs, and moves out of the loop what does not wait for the turn."""

    def op(x_MD, w_DD):
        return x_MD + jnp.sort(w_DD, axis=0)

    sets = [(jnp.full((4, 4), float(i)), jnp.arange(16.0).reshape(4, 4)[::-1] + i) for i in range(3)]
    compiled = jax.jit(in_turn(op, loops=5)).lower(sets).compile()
    loops = re.findall(r"\n%?(\S*body\S*|\S*region\S*|ENTRY \S+) .*\{\n((?:  .*\n)*)", compiled.as_text())
    assert sorted((text.count(" sort("), name.startswith("ENTRY")) for name, text in loops if " sort(" in text) == [(3, False)]
    turn, results = compiled(sets)
    assert turn == 4
    for result, given in zip(results, sets, strict=True):
        assert (result == op(*given)).all()


@pytest.mark.h100
@pytest.mark.parametrize("name", ["own", "XLA: pages gathered, then dot_product_attention"])
def test_every_call_is_made_in_every_turn_on_an_h100(name):
    sharding = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    shape = Attention("8B decode, 1 row, 8K", 1, 1, 8192)
    arrays, implementations, _ = CASES["tree_attention"](shape)
    given = jax.eval_shape(arrays, jax.random.key(0))
    given = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in given)
    copies = REAL.copies(shape.nbytes)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it
        text = jax.jit(in_turn(implementations[name], loops=4)).lower([given] * copies).compile().as_text()
    before, entry = text[: text.index("\nENTRY")], text[text.index("\nENTRY") :]
    assert copies == 4
    assert "gather(" not in entry
    if name == "own":
        assert before.count(" while(") == copies
    else:
        assert before.count(" gather(") == 2 * copies  # keys and values


class Clock:
    """Time that passes only while a result is waited for; ``seconds``: for each dispatch, in turn."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.dispatched, self.waited, self._seconds = 0.0, 0, 0, iter(seconds)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.jax, "block_until_ready", self._wait)

    def dispatch(self):
        self.dispatched += 1
        return next(self._seconds)

    def _wait(self, seconds):
        self.waited += 1
        self.now += seconds


def test_dispatches_are_waited_for_and_the_first_does_not_count(monkeypatch):
    clock = Clock(monkeypatch, [9.0, 1.0, 2.0, 3.0])
    assert timing.repeated(clock.dispatch, budget=0.0) == [1.0, 2.0, 3.0]
    assert (clock.dispatched, clock.waited) == (4, 4)


@pytest.mark.parametrize(("budget", "count"), [(0.0, 3), (3.5, 4), (100.0, 20)])
def test_dispatches_repeat_until_the_budget_is_spent(monkeypatch, budget, count):
    clock = Clock(monkeypatch, [1.0] * 30)
    assert timing.repeated(clock.dispatch, budget=budget) == [1.0] * count


def test_queued_dispatches_are_waited_for_once_and_share_the_time(monkeypatch):
    clock = Clock(monkeypatch, [float(i) for i in range(16)])
    assert timing.queued(clock.dispatch, 4, budget=0.0) == [7 / 4, 11 / 4, 15 / 4]
    assert (clock.dispatched, clock.waited) == (16, 4)


def test_times_are_of_one_call():
    assert timing.summary([0.3, 0.1, 0.8], per=10) == {"ms": 30.0, "least_ms": 10.0, "most_ms": 80.0, "repetitions": 3}


def test_a_call_of_an_op_is_timed_over_all_copies_and_turns(monkeypatch):
    sizes = dataclasses.replace(TOY, rotated_bytes=3 * 128, most_loops=7)
    monkeypatch.setattr(timing, "repeated", lambda dispatch, budget: [len(dispatch()[1]) * 7 * 1e-3] * 3)
    times, _ = ops.timed(Bench(sizes, jax.devices()[0], Path()), jnp.negative, lambda key: (jnp.zeros(16),), 128, 0)
    assert times["ms"] == pytest.approx(1.0)


def bench_of_cpu(tmp_path=Path(), sizes=TOY):
    return Bench(sizes, jax.devices()[0], tmp_path)


def recorder(results, name):
    started(results, name)
    return lambda key, values: results.record(name, key, values)


def test_an_implementation_that_fails_does_not_stop_the_others(results):
    def missing(x):
        raise ImportError("no cuDNN here")

    def fails(x):
        return jax.pure_callback(lambda x: 1 / 0, x, x)

    shape = Linear("toy", 2, 4, 4)
    implementations = {"missing": missing, "fails when it runs": fails, "good": jnp.negative}
    ops.compare(bench_of_cpu(), recorder(results, "ops/matmul"), shape, lambda key: (jnp.zeros(4),), implementations, 8)
    item = results.items["ops/matmul"]
    values = item["values"]
    assert values["toy | missing"]["why"] == "ImportError: no cuDNN here"
    assert "CpuCallback error" in values["toy | fails when it runs"]["why"]
    assert values["toy | good"]["ms"] > 0
    assert set(item["compile"]) == {"toy | good"}


def test_a_device_that_does_not_respond_ends_the_item(monkeypatch, results):
    def fails(x):
        monkeypatch.setattr(jax, "block_until_ready", fails)
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access was encountered")

    with pytest.raises(DeviceBroken, match=r"the device does not respond after that .*illegal memory access"):
        ops.compare(bench_of_cpu(), recorder(results, "ops/matmul"), Linear("toy", 2, 4, 4), lambda key: (jnp.zeros(4),), {"own": fails}, 8)
    assert results.items["ops/matmul"]["values"]["toy | own"]["why"].startswith("JaxRuntimeError: INTERNAL")


def test_each_dispatch_is_divided_by_its_own_rounds(monkeypatch):
    turns = iter([np.array([30, 32]), np.array([8, 10]), np.array([20, 16]), np.array([32, 32])])

    def burst(state, context):
        return state + 1, next(turns), np.zeros((BURST, 2), np.int32)

    monkeypatch.setattr(timing, "repeated", lambda dispatch, budget: [dispatch() and seconds for seconds in (9.0, 1.0, 2.0, 3.2)][1:])
    state, times, tokens_a_round = generation._timed_bursts(bench_of_cpu(), burst, 0, 16)
    assert state == 4
    assert (times["least_ms"], times["ms"], times["most_ms"]) == pytest.approx((100, 100, 100))
    assert tokens_a_round == pytest.approx(3 * BURST / (10 + 20 + 32))


def test_a_burst_that_ends_early_is_not_a_measurement():
    tokens_sB = np.full((BURST, 2), -1, np.int32)
    tokens_sB[0] = 5
    with pytest.raises(RuntimeError, match=f"a dispatch produced 1 tokens a row instead of {BURST}: the logits were not finite"):
        generation._timed_bursts(bench_of_cpu(), lambda state, context: (state, np.int32(1), tokens_sB), 0, 16)


@pytest.mark.parametrize(("peaks", "kept"), [((5, 9), {"memory": {"peak_bytes": 9}}), ((9, 9), {}), ((None, None), {})])
def test_the_peak_is_the_items_own_or_none(monkeypatch, results, peaks, kept):
    bench = types.SimpleNamespace(peak_bytes=peaks[0])
    monkeypatch.setattr(generation, "decode", lambda bench, record: setattr(bench, "peak_bytes", peaks[1]))
    generation.measure(bench, recorder(results, "decode/1"), part="decode")
    assert results.items["decode/1"]["values"] == kept


def test_fewer_rows_than_experts_read_an_expert_a_row():
    few, many = Mixture("few", 3, 16, 8, 4), Mixture("many", 40, 16, 8, 4)
    assert (few.nbytes, sum(few.sizes)) == (2 * (3 * 96 + 3 * 16), 3)
    assert (many.nbytes, sum(many.sizes)) == (2 * (16 * 96 + 40 * 16), 40)


def test_a_product_and_a_merge_move_their_arrays_once():
    linear, merge = Linear("product", 3, 8, 4), Merge("merge", 2, 1, 4, 3, h=16)
    assert (linear.nbytes, linear.flops) == (2 * (32 + 24 + 12), 2 * 3 * 32)
    assert (merge.nbytes, merge.flops) == (4 * (3 + 1) * 2 * 4 * 17, 3 * 2 * 2 * 4 * 16)


THUNKS = """\
001: kCopy         [source       | next=004 (3)] kCopy
004: kWhile        [prev=003 (1) | sink        ]
condition:
    005: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=025 (1)]
        006: kCopy         [source       | next=007 (1)] kCopy
        008: kCustomKernel [source       | next=017 (9)] gemm grid: [1, 1, 1]
    025: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        026: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink]
            027: kCopy         [source       | next=029 (2)] kCopy
            028: kCustomKernel [source       | next=029 (1)] slice grid: [1024, 1, 1]
    030: kCustomKernel [source | sink] alone grid: [1, 1, 1]
    000: kCommandBuffer [prev=025 (1) | next=053 (1)]
        036: kCustomKernel [source       | next=037 (1)] divide grid: [32, 1, 1]
"""


class Dumping:
    """A call whose compilation dumps these files."""

    def __init__(self, files):
        self._files = files

    def lower(self):
        return self

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        assert compiler_options["xla_dump_hlo_as_text"] is True
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            (folder / name).write_text(text)


ONE_KERNEL = "000: kWhile [source | sink]\n  body:\n    001: kCopy [source | sink]\n"


def test_launches_are_read_anew_whatever_an_earlier_process_left(tmp_path):
    folder = tmp_path / "a b" / "decode-2"
    changed = {"module_0001.jit_f.thunk_sequence.txt": ONE_KERNEL * 9, "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt": THUNKS}
    for _ in range(2):
        assert launches.compiled(Dumping(changed), folder) == Launches.of(THUNKS)
    # Thunks of which no graph was made are dumped once; those of small programs are dumped beside them.
    unchanged = {"module_0001.jit_f.thunk_sequence.txt": ONE_KERNEL, "module_0002.jit_g.thunk_sequence.txt": ""}
    assert launches.compiled(Dumping(unchanged), folder) == Launches(1, 0, 1, 0, 0, 0)
    with pytest.raises(NotImplementedError, match=r"this version of JAX does not dump \*thunk_sequence.txt; expected 0.11.2 or 0.12"):
        launches.compiled(Dumping({}), folder)


@pytest.mark.h100
def test_a_program_for_an_h100_is_dumped_and_counted(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    x_DD = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    program = jax.jit(lambda x_DD: jax.lax.while_loop(lambda x_DD: x_DD[0, 0] < 1, lambda x_DD: jnp.sin(x_DD @ x_DD), x_DD))
    counted = launches.compiled(types.SimpleNamespace(lower=lambda: program.lower(x_DD)), tmp_path / "a b")
    assert counted.kernels >= 2


def test_launches_are_counted_by_the_loop_that_they_are_in():
    counted = Launches.of(THUNKS)
    assert counted == Launches(kernels=5, graphs=2, single=2, loops=1, kernels_a_turn=3, graphs_a_turn=1)
    assert dataclasses.astuple(counted - counted) == (0,) * 6


@pytest.mark.parametrize("op", kernels.OPS)
def test_a_kernel_that_computes_something_else_fails_its_item(op, monkeypatch, tmp_path):
    bench, recorded = Bench(TOY, jax.devices()[0], tmp_path), {}
    kernels.measure(bench, recorded.__setitem__, op=op)
    assert {values["agree"] for values in recorded.values()} == {True}
    real = kernels.OPS[op]

    def wrong_in_one_place(shape, implementation, first, own, *others):
        if op == "merge_splits":  # the first split's log-sum-exps
            return real(shape, implementation, first, own.at[:, :, 0].add(1.0) if implementation is None else own)
        third, *others = others
        if implementation is None:
            match third:
                case PagedKeys():  # no query sees its last cached key
                    third = dataclasses.replace(third, interval=dataclasses.replace(third.interval, end_BT=third.interval.end_BT - 1))
                case Targets():  # keys and values are written one place too far
                    third = dataclasses.replace(third, offset_BT=third.offset_BT + 1)
                case jax.Array():  # the last row's expert, or the last scale
                    third = third.at[-1].set((third[-1] + 1) % 4)
        return real(shape, implementation, first, own, third, *others)

    monkeypatch.setitem(kernels.OPS, op, wrong_in_one_place)
    wrong = {
        "tree_attention": "toy decode, toy tree",
        "merge_splits": "toy splits",
        "flash_attention": "toy piece",
        "experts": "toy experts",
        "write_heads": "toy heads",
        "add_norm": "toy norm",
    }[op]
    with pytest.raises(RuntimeError, match=rf"^{op} is wrong at: {wrong}$"):
        kernels.measure(bench, recorded.__setitem__, op=op)
