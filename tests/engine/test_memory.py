"""The KV cache has the tokens that were asked for, or those that memory allows."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from l4jax import LLM, SamplingParams, cli, load
from l4jax.cache import PAGE_SIZE
from l4jax.checkpoints.store import Checkpoint
from l4jax.compiled import ProgramInfo
from l4jax.engine import build, memory
from l4jax.engine.engine import Engine
from l4jax.engine.memory import CacheMemory
from l4jax.engine.runner import Runner
from tests.tiny import drafter, llama3_like, loaded_drafter, prompts, save, scout_like, shallow, weights

CONFIG = shallow(scout_like(attention_chunk_size=256, max_position_embeddings=1000))
DENSE = shallow(llama3_like(max_position_embeddings=1000))
PARAMS = SamplingParams(max_tokens=4, temperature=0)


def cache_bytes(engine: Engine) -> int:
    """The bytes of keys and values on all devices."""
    resident = engine._memory.abstract(engine.shape)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((resident.cache, resident.draft_cache)))


# Of these, each data rank has its share, and a page holds PAGE_SIZE tokens on each rank that shares a sequence's.
@pytest.mark.parametrize(
    ("mesh", "kv_tokens", "pages", "tokens"),
    [
        ("tensor=1", 1, 1, 128),
        ("tensor=1", 128, 1, 128),
        ("tensor=1", 1281, 11, 1408),
        ("data=2", 1281, 6, 768),
        ("sequence=2", 1281, 6, 1536),
        ("data=2,sequence=2", 1281, 3, 768),
    ],
)
def test_the_cache_has_the_tokens_that_were_asked_for(mesh: str, kv_tokens: int, pages: int, tokens: int) -> None:
    for config in (CONFIG, DENSE):
        engine = LLM(config, weights(config), mesh=mesh, kv_tokens=kv_tokens).engine
        assert (engine.options.full_pages, engine.shape.full_pages, engine.kv_tokens) == (pages, pages, tokens)
        ranks = engine.options.shape.token_ranks
        assert engine.options.local_pages == engine.shape.local_pages == (0 if config is DENSE else min(pages * ranks, 2 * 8 * 2))


@pytest.mark.parametrize(("mesh", "max_batch", "slots"), [("tensor=1", 3, 3), ("data=2", 3, 2), ("sequence=2", 3, 3), ("data=2", None, 8)])
def test_by_default_each_slot_has_room_for_the_context(mesh: str, max_batch: int | None, slots: int) -> None:
    engine = LLM(CONFIG, weights(CONFIG), mesh=mesh, max_batch=max_batch).engine
    assert engine.options.slots == slots
    assert engine.kv_tokens == slots * 1024  # 1,000 in whole pages


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("mesh", ["tensor=1", "data=2", "sequence=2"])
def test_a_cache_takes_a_quarter_of_a_cpus_memory_at_most(monkeypatch: pytest.MonkeyPatch, mesh: str, drafts: bool) -> None:
    made = loaded_drafter(drafter(CONFIG, aux_layers=(0, 1, 2))) if drafts else None
    speculation = "chain:2" if drafts else "off"

    def llm() -> LLM:
        return LLM(CONFIG, weights(CONFIG), mesh=mesh, drafter=made, speculation=speculation)

    whole = llm().engine
    resident = whole._memory.abstract(whole.shape)
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(resident))
    # A quarter of what is free; with less, to few binary digits, so that the next process has the same programs.
    monkeypatch.setattr(memory, "own_memory_bytes", lambda *_: everything * 4)
    assert llm().engine.shape == whole.shape
    for less in (1, 300):
        monkeypatch.setattr(memory, "own_memory_bytes", lambda *_, less=less: everything * 4 - less)
        pages = llm().engine.shape.full_pages
        assert pages == {64: 56, 32: 28}[whole.shape.full_pages]
    monkeypatch.setattr(memory, "own_memory_bytes", lambda *_: everything * 4 - cache_bytes(whole) * 2)
    assert whole.shape.full_pages * 0.3 < llm().engine.shape.full_pages < whole.shape.full_pages * 0.7
    monkeypatch.setattr(memory, "own_memory_bytes", lambda *_: 1000)
    block, data = PAGE_SIZE * (2 if mesh == "sequence=2" else 1), 2 if mesh == "data=2" else 1
    with pytest.raises(
        ValueError,
        match=rf"^a KV cache of {block * data} tokens for {8 * data} rows .* may take 0.0 GB beside the weights; lower max_batch",
    ) as no:
        llm()
    assert "\n" not in str(no.value)


class Gpu:
    """A device that says how much memory it has, and that it is a GPU."""

    platform = "gpu"

    def __init__(self, memory_bytes: int) -> None:
        self._bytes = memory_bytes

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self._bytes}


def run_on_gpu(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    """Make caches be sized as for a GPU with this much memory."""
    initialise = CacheMemory.__init__

    def on_gpu(self: CacheMemory, *arguments: object) -> None:
        initialise(self, *arguments)
        self._device = Gpu(memory_bytes)

    monkeypatch.setattr(CacheMemory, "__init__", on_gpu)


@pytest.mark.parametrize("kv_tokens", [None, 128])
def test_weights_that_do_not_fit_on_a_gpu_are_refused_as_weights(
    kv_tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller cache would not help."""
    config = shallow(llama3_like(vocab_size=400_000))  # more than 51 MB in float32
    save(tmp_path / "model", config)
    run_on_gpu(monkeypatch, 40_000_000)
    monkeypatch.setattr(Checkpoint, "restore", lambda *_: pytest.fail("weights were read"))
    message = r"^the weights take 0\.1 GB of each device, which has 0\.0 GB; use more devices, or a dtype that takes less memory$"
    for call in (lambda: LLM(config, weights(config), kv_tokens=kv_tokens), lambda: load(tmp_path / "model", kv_tokens=kv_tokens)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("drafts", [False, True])
def test_on_a_gpu_it_takes_what_weights_and_programs_leave(monkeypatch: pytest.MonkeyPatch, drafts: bool) -> None:
    config = dataclasses.replace(DENSE, max_position_embeddings=128_000)
    made = loaded_drafter(drafter(config, aux_layers=(0, 1, 2))) if drafts else None
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", reporting(code := 1_000))
    asked: list[int] = []
    infos: dict[tuple[str, str], ProgramInfo] = {}
    real = build.program_bytes

    def noted(runner: Runner, *arguments: Any) -> int:
        asked.append(real(runner, *arguments))
        infos.update({(info.kind, info.sizes): info for info in runner.programs.compiled()})
        return asked[-1]

    monkeypatch.setattr(build, "program_bytes", noted)
    limit = 50_000_000
    run_on_gpu(monkeypatch, limit)
    llm = LLM(config, weights(config), drafter=made, speculation="chain:2" if drafts else "off", max_batch=2, prefill_lengths=(8, 32))
    engine = llm.engine
    held = sum(leaf.nbytes for leaf in engine.runner.all_weights)
    resident = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine._memory.abstract(engine.shape)))
    page = cache_bytes(engine) // engine.shape.full_pages
    budget = (limit - held - asked[0]) * 0.97
    assert budget - page < resident <= budget
    # Two lengths of pieces, scored or not, a burst and four small programs: the code of each; and what the largest has in hand, while
    # the results of the one before it wait to be read.
    assert asked[0] == max(info.temporaries + 2 * info.results for info in infos.values()) + 9 * code
    assert not llm.programs(), "what was compiled for a cache of another size is kept"
    assert {kind for kind, _ in infos} == {"prefill", "score", "speculate" if drafts else "decode"}
    assert infos["score", "2 rows of 32 tokens"].results >= 2 * 32 * config.vocab_size * 4
    assert llm.generate([[1, 2, 3]], PARAMS)[0].token_ids


def test_on_a_gpu_the_programs_for_a_cache_of_the_whole_context_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory would make it larger than it is when programs are asked what they need."""
    run_on_gpu(monkeypatch, 1_000_000_000)
    llm = LLM(DENSE, weights(DENSE), max_batch=2, prefill_lengths=(32,))
    kept = llm.programs()
    assert {info.kind for info in kept} == {"prefill", "score", "decode"}
    assert llm.generate(prompts(DENSE, (20, 20)), PARAMS)
    assert set(kept) < set(llm.programs())


def reporting(code: int) -> Callable[[jax.stages.Compiled], Any]:
    """What XLA says of a program's memory, with the bytes of its code, which it does not know on CPUs."""
    real = jax.stages.Compiled.memory_analysis

    def analysis(self: jax.stages.Compiled) -> Any:
        names = ("temp_size", "argument_size", "alias_size", "output_size")
        said = {f"{name}_in_bytes": getattr(real(self), f"{name}_in_bytes") for name in names}
        return types.SimpleNamespace(generated_code_size_in_bytes=code, **said)

    return analysis


def test_a_gpus_programs_are_not_looked_at_for_a_cache_of_a_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling programs may take minutes."""
    monkeypatch.setattr(build, "program_bytes", lambda *_: pytest.fail("programs were compiled"))
    assert LLM(DENSE, weights(DENSE), kv_tokens=2048).engine.kv_tokens == 2048


@pytest.mark.parametrize(
    ("meminfo", "files", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:  5 kB\n", {}, 5 * 1024),
        ("MemTotal: 9 kB\nMemAvailable:  5 kB\n", {"max": "max\n", "current": "10\n"}, 5 * 1024),
        ("MemAvailable: 5 kB\n", {"max": "4000\n", "current": "3000\n", "stat": "anon 1\ninactive_file 500\n"}, 1500),
        ("MemAvailable: 1 kB\n", {"max": "4000\n", "current": "1000\n", "stat": "anon 1\n"}, 1024),
        (None, {}, memory.free_bytes(Path("nowhere"), Path("nowhere"))),
    ],
)
def test_what_is_free_is_what_machine_and_container_say(meminfo: str | None, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    assert memory.free_bytes(tmp_path / "meminfo", tmp_path) == expected


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"^a KV cache of 1,000,000,000,000 tokens for \d+ rows \(max_batch\) takes \d+,[\d,]+\.\d GB, and beside the weights this device "
    )
    for mesh in ("tensor=1", "data=2"):
        with pytest.raises(ValueError, match=message) as refused:
            LLM(CONFIG, weights(CONFIG), mesh=mesh, kv_tokens=10**12)
        assert "\n" not in str(refused.value)
    # All of the memory may be asked for, not only a quarter.
    size = LLM(CONFIG, weights(CONFIG), kv_tokens=2048).engine
    resident = size._memory.abstract(size.shape)
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(resident))
    monkeypatch.setattr(memory, "own_memory_bytes", lambda *_: everything)
    assert LLM(CONFIG, weights(CONFIG), kv_tokens=2048).engine.shape == size.shape
    with pytest.raises(ValueError, match="a KV cache of 2,049 tokens"):
        LLM(CONFIG, weights(CONFIG), kv_tokens=2049)


HUGE = [
    ({"max_batch": 10**9}, r"^a KV cache of 128 tokens for 1,000,000,000 rows \(max_batch\) takes [\d,]+\.\d GB, and may take "),
    ({"max_batch": 10**15}, r"^a KV cache of 128 tokens for 1,000,000,000,000,000 rows \(max_batch\) takes [\d,]+\.\d GB, and may "),
    ({"max_batch": 10**9, "kv_tokens": 1}, r"^a KV cache of 1 token for 1,000,000,000 rows \(max_batch\) takes [\d,]+\.\d GB, and beside"),
    ({"kv_tokens": 10**15}, r"^a KV cache of 1,000,000,000,000,000 tokens for 8 rows \(max_batch\) takes [\d,]+\.\d GB, and beside the"),
    (
        {"prefill_lengths": (128, 10**9)},
        "^prefill_lengths has 1000000000; expected at most 1024, the model's context of 1000 tokens in whole ",
    ),
]


@pytest.mark.parametrize(("huge", "message"), HUGE)
def test_what_no_machine_has_memory_for_is_refused_before_weights_are_read(
    huge: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model", CONFIG)
    monkeypatch.setattr(Checkpoint, "restore", lambda *_: pytest.fail("weights were read"))
    for call in (lambda: LLM(CONFIG, weights(CONFIG), **huge), lambda: load(tmp_path / "model", **huge)):
        with pytest.raises(ValueError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_the_command_line_refuses_what_no_machine_has_memory_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", CONFIG)
    assert cli.main(["show", str(tmp_path / "model"), "--programs", "--max-batch", str(10**9)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("l4jax: error: a KV cache of 128 tokens for 1,000,000,000 rows (max_batch) takes ")


@pytest.mark.parametrize("mesh", ["tensor=1", "data=2", "sequence=2"])
def test_a_request_longer_than_the_cache_is_refused_and_nothing_else_is_lost(mesh: str) -> None:
    llm = LLM(DENSE, weights(DENSE), mesh=mesh, max_batch=2, kv_tokens=256, prefill_lengths=(64,))
    held = llm.engine.kv_tokens
    assert held == (128 if mesh == "data=2" else 256)
    joined = llm.add([1, 2, 3], PARAMS)
    for ask in (llm.generate, llm.add, lambda prompt, params: llm.generate([[5], prompt], [params] * 2)):
        with pytest.raises(
            ValueError, match=rf"a prompt of {held} tokens with up to 4 of output may need room for .* larger kv_tokens$"
        ) as refused:
            ask([7] * held, PARAMS)
        assert "\n" not in str(refused.value)
    assert len(llm.generate([[7] * (held - 3)], PARAMS)[0].token_ids) == 4  # the last token is never run
    assert joined.completion is not None and joined.completion.token_ids == joined.tokens
