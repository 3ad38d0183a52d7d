"""Standard streams that are closed, full or narrow: one line and a status, and nothing lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
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


def shell(run: str, redirection: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, "-c", COMMAND.format(run=run)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=ROOT, env=buffered, check=False, capture_output=True, text=True)


def test_a_closed_output_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    done = shell(f"open({str(tmp_path / 'started')!r}, 'w')", ">&-")
    assert done.returncode == 2 and not (tmp_path / "started").exists()
    assert done.stderr == ("l4jax: error: standard output is closed; redirect it to a file, or to /dev/null if its text is not wanted\n")


def test_a_full_disk_is_one_line() -> None:
    done = shell("print('the answer')", "> /dev/full")
    assert (done.returncode, done.stderr) == (2, "l4jax: error: [Errno 28] No space left on device\n")


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
