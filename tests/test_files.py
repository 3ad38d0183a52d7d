"""Files that others made: each failure is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4jax.checkpoints.source import CheckpointError
from l4jax.files import FETCH_AGAIN, FileError, is_there, read_json, read_json_if_there
from l4jax.text.tokenizer import TokenizerError

POINTER = b"version https://git-lfs.github.com/spec/v2\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "f.json is not valid JSON (Expecting"),
        (b"[" * 100_000, "f.json is not valid JSON (maximum recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "f.json is not valid JSON (Exceeds the limit"),
        (b'{"a": "\xff"}', "f.json is not UTF-8 text ("),
        (b"[]", "f.json holds a list; expected a JSON object"),
        (POINTER, "f.json is a git-lfs pointer in place of the file; run `git lfs pull`"),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    for read in (read_json, read_json_if_there):
        with pytest.raises(FileError) as error:
            read(tmp_path / "f.json")
        assert f"{tmp_path}/{message}" in str(error.value)
        assert str(error.value).endswith("or fetch the file" if content == POINTER else FETCH_AGAIN)
        assert "\n" not in str(error.value)


def test_a_file_that_may_be_absent(tmp_path: Path) -> None:
    assert read_json_if_there(tmp_path / "f.json") == {}
    (tmp_path / "file").write_text('{"a": [1]}')
    assert read_json_if_there(tmp_path / "file" / "f.json") == {}
    assert read_json(tmp_path / "file") == {"a": [1]}
    with pytest.raises(FileError, match=r"f\.json cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "f.json")


def test_a_link_to_nothing_is_not_an_absent_file(tmp_path: Path) -> None:
    (tmp_path / "f.json").symlink_to(tmp_path / "gone")
    assert is_there(tmp_path / "f.json")
    with pytest.raises(FileError, match="is a link to a file that does not exist"):
        read_json_if_there(tmp_path / "f.json")


def test_a_folder_that_cannot_be_searched_is_not_an_absent_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", denied)
    with pytest.raises(FileError, match=r"f\.json cannot be read \(Permission denied\); check the file"):
        read_json_if_there(tmp_path / "f.json")


def test_errors_about_checkpoints_and_tokenizers_are_errors_about_files() -> None:
    assert issubclass(CheckpointError, FileError) and issubclass(TokenizerError, FileError)
