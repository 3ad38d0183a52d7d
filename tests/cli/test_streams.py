"""Standard streams that are closed, full or narrow: one line and a status, and nothing lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from l4jax import cli

ROOT = Path(__file__).parents[2]
# A command with `run` in the place of a real one's.
COMMAND = """
import sys, warnings, l4jax.cli, l4jax.cli.demo
def run(arguments):
    {run}
    return 0
l4jax.cli.demo.run = run
sys.exit(l4jax.cli.main(["demo"]))
"""


def shell(run: str, redirection: str, *, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, "-c", COMMAND.format(run=run)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}  # an empty one counts as absent
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_a_closed_output_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    done = shell(f"open({str(tmp_path / 'started')!r}, 'w')", ">&-")
    assert done.returncode == 2 and not (tmp_path / "started").exists()
    assert done.stderr == ("l4jax: error: standard output is closed; redirect it to a file, or to /dev/null if its text is not wanted\n")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("run", ["print('the answer')", "print('the answer', flush=True)"])
def test_a_full_disk_is_one_line(run: str, unbuffered: bool) -> None:
    done = shell(run, "> /dev/full", unbuffered=unbuffered)
    said = "standard output or another stream cannot be used (No space left on device); free some space, or redirect it to another file"
    assert (done.returncode, done.stderr) == (2, f"l4jax: error: {said}\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("PermissionError(13, 'Permission denied', '/a/b')", "/a/b cannot be read or written (Permission denied); check that path, "),
        ("OSError(5, 'Input/output error')", "standard output or another stream cannot be used (Input/output error); "),
        (
            "BlockingIOError(11, 'Resource temporarily unavailable')",
            "the system refused an operation (Resource temporarily unavailable)",
        ),
        ("ConnectionRefusedError(111, 'Connection refused')", "the system refused an operation (Connection refused); run"),
        ("OSError('the process that watches this one did not start')", "the process that watches this one did not start\n"),
    ],
)
def test_an_error_of_the_system_is_put_into_words(error: str, said: str) -> None:
    done = shell(f"raise {error}", "")
    assert done.returncode == 2 and done.stderr.startswith(f"l4jax: error: {said}")
    assert done.stderr.count("\n") == 1 and "Errno" not in done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "the following arguments are required: COMMAND; see `l4jax --help`"),
        (["generat"], "argument COMMAND: invalid choice: 'generat' (choose from "),
        (["generate", "folder"], "the following arguments are required: -p/--prompt; see `l4jax generate --help`"),
        (["convert", "a", "b", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from "),
        (["convert", "a", "b", "--aux-layers", "x"], "argument --aux-layers: 'x' is not a list of layers; expected numbers, as in 2,16,29"),
        (["show", "a", "--verfy"], "unrecognized arguments: --verfy; see `l4jax show --help`"),
        (["--verfy", "show", "a"], "unrecognized arguments: --verfy; see `l4jax --help`"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"l4jax: error: {said}") and " --help`" in err


def interrupted(*pieces: str) -> Iterator[str]:
    yield from pieces
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [(("half an", " answer"), "half an answer\n"), (("a line\n", ""), "a line\n"), ((), "")],
    ids=["within a line", "after a line", "before the text"],
)
def test_what_is_said_after_half_an_answer_begins_a_line(
    pieces: tuple[str, ...], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("l4jax.cli.demo.run", lambda arguments: cli.print_pieces(interrupted(*pieces)))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr() == (printed, "l4jax: interrupted\n")


def test_closed_input_is_empty_and_what_a_closed_standard_error_would_show_is_dropped() -> None:
    done = shell("print(repr(sys.stdin.read())); print('not for the output', file=sys.stderr)", "<&- 2>&-")
    assert (done.returncode, done.stdout) == (0, "''\n")


def test_a_warning_is_one_line() -> None:
    done = shell("warnings.warn('one\\ntwo')", "")
    assert (done.returncode, done.stderr) == (0, "l4jax: warning: one two\n")


def test_a_character_that_the_encoding_lacks_is_printed_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    def run(arguments: object) -> int:
        print("caf\xe9 \u20ac \udcff")
        return 0

    monkeypatch.setattr("l4jax.cli.demo.run", run)
    assert cli.main(["demo"]) == 0
    assert written.getvalue() == b"caf\\xe9 \\u20ac \\udcff\n"
