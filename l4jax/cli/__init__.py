"""The ``l4jax`` command.

Each subcommand is a module of this package. Its ``register`` declares the arguments and sets the parser's default ``run``; ``run`` takes
the parsed arguments and returns the exit status. Only ``run`` imports the rest of l4jax, so that ``l4jax --help`` does not wait for JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import io
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import NoReturn, override

COMMANDS = ("generate", "serve", "bench", "convert", "export", "show", "demo", "train-drafter")

_OF_STREAMS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What writing to an open file or stream ends in."""

STARTED = time.perf_counter()
"""When the command began, on the clock of ``time.perf_counter``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return the exit status.

    0: done; 2: the command could not do what was asked, and one line on stderr says why; 130: interrupted; 141: the reader of the
    output has gone. An exception other than ValueError and OSError is a bug, and shows its traceback.
    """
    try:
        _open_streams()
        status: int = _run(argv)
    except BrokenPipeError:
        _drop_output()
        return _failed(141)
    except (ValueError, OSError) as error:
        hosts = sys.modules.get("sharding.hosts")  # importing it would load JAX, which this command may not need
        if hosts is not None:
            hosts.hold(error)
        _say(f"error: {_in_words(error)}")
        return _failed(2)
    except KeyboardInterrupt:
        _say("interrupted")
        return _failed(130)
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="l4jax", description="Run, convert and inspect Llama 4 and Llama 3 models.")
    parser.add_argument("--version", action="version", version=f"l4jax {importlib.metadata.version('l4jax')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        importlib.import_module(f"l4jax.cli.{command.replace('-', '_')}").register(subparsers)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            given = sys.argv[1:] if argv is None else argv
            arguments, unknown = parser.parse_known_args(given)
            if unknown:
                before_command = given.index(unknown[0]) < given.index(arguments.command)
                its = parser if before_command else subparsers.choices[arguments.command]
                its.error(f"unrecognized arguments: {' '.join(unknown)}")
            status: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def print_pieces(pieces: Iterable[str]) -> None:
    """Print a text as it comes, then end its line: also before an error or a Ctrl-C is reported, which would be glued to the text."""
    line_ended = True
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            line_ended = piece.endswith("\n") if piece else line_ended
    except BaseException:
        if not line_ended:
            print(flush=True)
        raise
    print(flush=True)


def _in_words(error: ValueError | OSError) -> str:
    """The error's message; of an OSError that nothing has put into words: what failed, on what, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is not None:
        return f"{error.filename} cannot be read or written ({error.strerror}); check that path, its permissions and its disk"
    if error.errno in _OF_STREAMS:
        # Files that commands write have errors of their own; which stream it was, the system does not say.
        return f"standard output or another stream cannot be used ({error.strerror}); free some space, or redirect it to another file"
    return f"the system refused an operation ({error.strerror}); run the same command again once that is cured"


def _open_streams() -> None:
    """Make the standard streams usable, whatever the caller has left of them.

    A closed standard input is empty, and what a closed standard error would show is dropped; a closed standard output is refused before
    anything is done. A character that the output's encoding lacks is printed as its code, as in ``\\xe9``.
    """
    # Opened in the order of their numbers: a closed stream's number would go to the next file that is opened.
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w", encoding="utf-8"))
    if "stdout" in closed:
        raise OSError("standard output is closed; redirect it to a file, or to /dev/null if its text is not wanted")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(line: str) -> None:
    """One line on stderr; a reader that has gone is not an error."""
    with contextlib.suppress(OSError):
        print(f"l4jax: {' '.join(line.split())}", file=sys.stderr)


def _drop_output() -> None:
    """Drop what standard output still holds: Python writes it when it exits, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(status: int) -> int:
    """Return the status. If this is one of several joined processes, end it here instead, and the others with it."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    hosts = sys.modules.get("sharding.hosts")
    if hosts is not None:
        hosts.end_with_error(status)
    return status
