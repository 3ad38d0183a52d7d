"""Programs: compiled once for each set of shapes, and kept on disk, where others cannot write and damage is harmless."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import LLM, SamplingParams, compiled
from l4jax.compiled import Folder, Program
from l4jax.parallel.placement import Placement
from l4jax.programs import Programs
from tests.tiny import drafter, few_tokens, llama3_like, loaded_drafter, prompts, weights

NOT_KEPT = r"^compiled programs are not kept for the next start: [^\n]*%s$"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where programs are kept. JAX keeps none, as for most users: what it has kept cannot be serialised again."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "l4jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


class Traced:
    """A program as a process that has just started makes it, and how often it was traced."""

    def __init__(self, folder: Folder | None, context: str = "", factor: float = 3.0) -> None:
        self.times = 0

        def function(weights: jax.Array, kept: jax.Array, x: jax.Array, *, plan: float = 1.0) -> tuple[jax.Array, jax.Array]:
            self.times += 1
            return kept + 1, factor * plan * (weights + x)

        jitted = jax.jit(function, donate_argnums=1, static_argnames="plan")
        self.program = Program("triple", jitted, context, jax.local_devices()[:1], folder)

    def __call__(self, x: float = 2.0, size: int = 1, **static: float) -> float:
        kept, result = self.program(jnp.zeros(size), jnp.zeros(size), np.full(size, x, np.float32), **static)
        assert kept.tolist() == [1.0] * size
        return float(result[0])


def test_a_program_is_traced_once_for_each_set_of_shapes_and_static_arguments() -> None:
    traced = Traced(None)
    assert [traced(2.0), traced(5.0), traced(2.0, size=4), traced(2.0, plan=2.0), traced(1.0, size=4)] == [6.0, 15.0, 6.0, 12.0, 3.0]
    assert traced.times == 3
    assert [info.kind for info in traced.program.compiled()] == ["triple"] * 3
    assert [info.arguments for info in traced.program.compiled()] == [12, 48, 12]
    assert [info.donated for info in traced.program.compiled()] == [4, 16, 4]


def test_what_one_process_compiled_the_next_loads_without_tracing(folder: Path) -> None:
    assert Traced(Folder.of_user())() == 6.0
    again = Traced(Folder.of_user())
    assert (again(), again(4.0), again.times) == (6.0, 12.0, 0)
    assert [info.donated for info in again.program.compiled()] == [4]
    # Others are not mistaken for it.
    assert (Traced(Folder.of_user(), context="another", factor=2.0)(), Traced(Folder.of_user())(size=2)) == (4.0, 6.0)
    assert len(list(folder.iterdir())) == 3


def test_an_engine_loads_all_that_another_compiled_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, config = LLM._begin, few_tokens(llama3_like)
    monkeypatch.setattr(LLM, "_begin", lambda self, parts: begin(self, dataclasses.replace(parts, folder=Folder.of_user())))
    draft = loaded_drafter(drafter(config, aux_layers=(0, 1)))

    def answers() -> tuple[Any, Any, Any]:
        options = {"speculation": "chain:2", "deterministic": True, "max_batch": 2, "prefill_lengths": (128,)}
        # Both rows come to a second page, and there are three: one row is saved and loaded.
        llm = LLM(config, weights(config), drafter=draft, kv_tokens=3 * 128, **options)
        llm.warmup()
        completions = llm.generate(prompts(config, (115, 120)), SamplingParams(max_tokens=40, seed=1, logprobs=1, frequency_penalty=0.1))
        return [(c.token_ids, c.logprobs, c.stats.accepted) for c in completions], llm.score([[1, 2, 3]], top=2), llm.programs()

    first = answers()
    assert {"prefill", "speculate", "score", "update_slots", "save", "load"} <= {info.kind for info in first[2]}

    def traced(self: Program, *arguments: Any, **static: Any) -> None:
        pytest.fail(f"{self.kind} is traced again")

    monkeypatch.setattr(Program, "lower", traced)
    assert answers() == first


def test_several_programs_are_loaded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(size: int) -> tuple[object, ...]:
        return jnp.zeros(size), jnp.zeros(size), np.zeros(size, np.float32)

    kept = Traced(Folder.of_user())
    for size in (1, 2):
        kept(size=size, plan=1.0)
    again, load, both = Traced(Folder.of_user()), Folder.load, threading.Barrier(2, timeout=60)

    def loaded(*given: Any) -> Any:
        both.wait()  # until the other program is being loaded too
        return load(*given)

    monkeypatch.setattr(Folder, "load", loaded)
    with ThreadPoolExecutor(2) as pool:
        for size in (1, 2, 1):
            again.program.load_early(pool, *arguments(size), plan=1.0)
        assert [again(size=size, plan=1.0) for size in (1, 2)] == [6.0, 6.0]
    assert again.times == 0
    monkeypatch.setattr(Folder, "load", load)
    with ThreadPoolExecutor(1) as pool:
        again.program.load_early(pool, *arguments(3), plan=1.0)  # not kept
    assert (again(size=3, plan=1.0), again.times) == (6.0, 1)
    # One that has not begun is not waited for.
    with ThreadPoolExecutor(1) as pool:
        begun, ends = threading.Event(), threading.Event()
        pool.submit(lambda: (begun.set(), ends.wait(60)))
        assert begun.wait(60)
        other = Traced(Folder.of_user())
        other.program.load_early(pool, *arguments(2), plan=1.0)
        assert (other(size=2, plan=1.0), other.times) == (6.0, 0)
        ends.set()


def test_other_settings_make_another_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Traced(Folder.of_user())()
    for count, setting in enumerate((jax.default_matmul_precision("float32"), jax.debug_nans(True)), start=2):
        with setting:
            other = Traced(Folder.of_user())
            assert (other(), other.times, len(list(folder.iterdir()))) == (6.0, 1, count)
    assert len(list(folder.iterdir())) == 3


def newer(package: str) -> Callable[[str], str]:
    real = importlib.metadata.version
    return lambda asked: "99" if asked == package else real(asked)


class Topology:
    """Of other devices."""

    def __init__(self, devices: list[jax.Device]) -> None:
        pass

    def serialize(self) -> bytes:
        return b"other instruction sets"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (compiled, "_SOURCES", "changed"),
        *[(importlib.metadata, "version", newer(package)) for package in ("l4jax", "jax", "jaxlib", "flax", "numpy")],
        (jax.local_devices()[0].client.__class__, "platform_version", "another compiler"),
        (os, "sched_getaffinity", lambda _: set(range(999))),
        (jax, "process_index", lambda: 1),
        (compiled.topologies, "TopologyDescription", Topology),
        (os, "environ", {**os.environ, "XLA_FLAGS": "--xla_other"}),
    ],
)
def test_other_surroundings_make_another_program(where: Any, name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Folder.of_user()
    Traced(kept)()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        other = Traced(kept)
        assert (other(), other.times) == (6.0, 1)
    assert (again := Traced(kept))() == 6.0 and again.times == 0


def test_other_models_kinds_and_meshes_make_another_program(folder: Path) -> None:
    """Although their arguments are alike."""
    config = llama3_like()
    others = [config, dataclasses.replace(config, rope_theta=5e5), dataclasses.replace(config, rms_norm_eps=1e-3)]
    contexts = [Programs(Placement.on(each, "tensor=1")).prefill.context for each in others]
    contexts += [Programs(Placement.on(config, mesh)).prefill.context for mesh in ("data=2", "tensor=2")]
    assert len(set(contexts)) == 5
    one, two = (Program(kind, jax.jit(lambda w, k, x: (k, x)), "", jax.local_devices()[:1], Folder.of_user()) for kind in ("one", "two"))
    for program in (one, two):
        program(jnp.zeros(1), jnp.zeros(1), jnp.ones(1))
    assert len(list(folder.iterdir())) == 2


def test_other_static_arguments_make_another_program(folder: Path) -> None:
    assert Traced(Folder.of_user())(plan=2.0) == 12.0
    other = Traced(Folder.of_user())
    assert (other(plan=3.0), other.times, len(list(folder.iterdir()))) == (18.0, 1, 2)


def test_arguments_of_another_structure_make_another_program(folder: Path) -> None:
    """Although their arrays are alike."""

    def minus(weights: jax.Array, of: dict[str, jax.Array]) -> jax.Array:
        return weights + of.get("more", 0) - of.get("less", 0)

    found = []
    for name in ("more", "less"):
        program = Program("minus", jax.jit(minus), "", jax.local_devices()[:1], Folder.of_user())
        found.append(float(program(jnp.ones(1), {name: jnp.ones(1)})[0]))
    assert (found, len(list(folder.iterdir()))) == ([2.0, 0.0], 2)


def test_programs_may_be_listed_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, real = Traced(None), compiled._info
    traced(size=1)

    def info(*arguments: Any) -> compiled.ProgramInfo:
        traced(size=2 + traced.times)  # as another thread might, between any two
        return real(*arguments)

    monkeypatch.setattr(compiled, "_info", info)
    assert len(traced.program.compiled()) == 1
    assert len(traced.program.compiled()) == 2


def test_a_link_to_the_users_own_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (target := tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(target)
    Traced(Folder.of_user())()
    assert len(list(target.iterdir())) == 1


def test_what_a_killed_process_was_writing_is_removed_after_an_hour(folder: Path) -> None:
    kept = Folder.of_user()
    for name, hours in (("old", 2), ("new", 0)):
        (folder / f"{compiled._BEGUN}{name}").touch()
        os.utime(folder / f"{compiled._BEGUN}{name}", (about := time.time() - hours * 3600, about))
    Traced(kept)()
    assert sorted(path.name for path in folder.glob(f"{compiled._BEGUN}*")) == [f"{compiled._BEGUN}new"]


def test_nothing_is_kept_where_jax_is_told_to_keep_nothing() -> None:
    with mock.patch.object(type(jax.config), "jax_enable_compilation_cache", False, create=True):
        assert Folder.of_user() is None


@pytest.mark.parametrize("of_another", ["none", "kept"])
def test_processes_load_a_program_if_all_have_it(of_another: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Folder.of_user()
    Traced(kept)()
    monkeypatch.setattr(compiled.hosts, "share", lambda own, channel: [own, of_another])
    traced = Traced(kept)
    assert (traced(), traced.times) == (6.0, of_another == "none")


def test_a_process_without_a_folder_does_not_leave_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[str] = []
    monkeypatch.setattr(compiled.hosts, "share", lambda own, channel: [shared.append(own) or own, "kept"])
    traced = Traced(None)
    assert (traced(), traced.times, shared) == (6.0, 1, ["none"])


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty", "another's name", "a pickle of our own"])
def test_a_damaged_file_is_replaced_without_a_word(damage: str, folder: Path) -> None:
    Traced(Folder.of_user())()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    made = pickle.dumps((b"nothing", None, None))
    file.write_bytes(
        {
            "cut off": content[:-1],
            "a bit": content[:100] + bytes([content[100] ^ 1]) + content[101:],
            "empty": b"",
            "another's name": compiled._checksum("other", content[32:]) + content[32:],
            "a pickle of our own": compiled._checksum(file.stem, made) + made,
        }[damage]
    )
    traced = Traced(Folder.of_user())
    assert (traced(), traced.times) == (6.0, 1)
    assert len(list(folder.iterdir())) == 1
    traced = Traced(Folder.of_user())
    assert (traced(), traced.times) == (6.0, 0)


class Opened:
    """Reading it runs code."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("what others could have written was unpickled",))


@pytest.mark.parametrize("writable_by", ["group", "others", "a link"])
def test_what_others_could_have_written_is_not_read(writable_by: str, folder: Path, tmp_path: Path) -> None:
    Traced(Folder.of_user())()
    (file,) = folder.iterdir()
    payload = pickle.dumps(Opened())
    target = tmp_path / "elsewhere" if writable_by == "a link" else file
    target.write_bytes(compiled._checksum(file.stem, payload) + payload)
    if writable_by == "a link":
        file.unlink()
        file.symlink_to(target)
    else:
        file.chmod(0o620 if writable_by == "group" else 0o602)
    traced = Traced(Folder.of_user())
    assert (traced(), traced.times) == (6.0, 1)
    traced = Traced(Folder.of_user())
    assert (traced(), traced.times) == (6.0, 0)  # it was replaced


def test_another_users_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Traced(kept := Folder.of_user())()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    traced = Traced(kept)
    assert (traced(), traced.times) == (6.0, 1)


def refused(why: str) -> None:
    with pytest.warns(UserWarning, match=NOT_KEPT % why) as warned:
        assert Folder.of_user() is None
    assert len(str(warned[0].message)) < 400


def test_a_folder_that_cannot_be_used_costs_no_more_than_a_warning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    refused(r"other users can write (/.*/programs); run chmod go-w \1")
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        refused("programs belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(r"\(Not a directory\); remove the file that is in its place, or set XDG_CACHE_HOME to a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(Path, "mkdir", raising(errno.EACCES))
    refused(r"\(Permission denied\); give yourself the right to write there, or set XDG_CACHE_HOME to a folder that you can write")


def raising(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_programs_are_loaded_from_a_folder_that_nobody_can_write(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning when the first is not there."""
    Traced(Folder.of_user())()
    monkeypatch.setattr(tempfile, "mkstemp", raising(number))
    monkeypatch.setattr(os, "utime", raising(number))
    loaded = Traced(kept := Folder.of_user())
    assert (loaded(), loaded.times) == (6.0, 0)
    with pytest.warns(UserWarning, match=NOT_KEPT % "set XDG_CACHE_HOME to a folder that you can write") as warned:
        assert [Traced(kept)(size=size) for size in (2, 3)] == [6.0, 6.0]
    assert len(warned) == 1


def test_a_user_without_a_home_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    refused("this user has no home directory to keep a cache in; set XDG_CACHE_HOME to a folder for it")


def test_a_full_disk_costs_no_more_than_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    kept = Folder.of_user()
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match=NOT_KEPT % r"/programs cannot be written \(No space left on device\); free some space there"):
        assert Traced(kept)() == 6.0
    assert not list(folder.iterdir())


def test_ctrl_c_after_a_file_got_its_name_is_not_hidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def interrupted(source: str, target: Path) -> None:
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Traced(Folder.of_user())()
    assert [path.suffix for path in folder.iterdir()] == [compiled._SUFFIX]


def test_where_jax_keeps_what_it_compiles_we_do_not(folder: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    assert Folder.of_user() is None
    assert not folder.exists()


def test_what_cannot_be_serialised_is_compiled_each_time(folder: Path) -> None:
    def function(weights: jax.Array, kept: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda x: None, x)
        return kept, x

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        program = Program("calls back", jax.jit(function), "", jax.local_devices()[:1], Folder.of_user())
        assert program(jnp.zeros(1), jnp.zeros(1), jnp.ones(1))[1] == 1.0
    assert not list(folder.iterdir())


def test_the_programs_that_were_used_longest_ago_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Folder.of_user()
    for size in (1, 2, 3):
        Traced(kept)(size=size)
        for file in folder.iterdir():  # time passes
            os.utime(file, ns=(about := file.stat().st_mtime_ns - 10**9, about))
    assert (again := Traced(kept))(size=1) == 6.0 and again.times == 0  # the oldest is used
    monkeypatch.setattr(compiled, "_KEPT_BYTES", 3 * max(file.stat().st_size for file in folder.iterdir()))
    Traced(kept)(size=4)
    assert len(list(folder.iterdir())) == 3
    loaded = {size: Traced(kept) for size in (4, 1, 3)}
    assert [traced(size=size) for size, traced in loaded.items()] == [6.0] * 3
    assert [traced.times for traced in loaded.values()] == [0] * 3


def test_what_else_lies_in_the_folder_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Folder.of_user()
    (folder / "notes").write_bytes(bytes(1000))
    (folder / "older").mkdir()
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    monkeypatch.setattr(compiled, "_KEPT_BYTES", 0)
    with warnings.catch_warnings(action="error"):
        Traced(kept)()
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "older"]
