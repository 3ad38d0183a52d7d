"""The ``l4jax`` command.

Each subcommand is a module of this package. Its ``register`` declares the arguments and makes ``run`` the parser's default of that
name; ``run`` takes the parsed arguments and returns the exit status. It is in ``run`` that the rest of l4jax is imported, so that
``l4jax --help`` does not wait for JAX.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence

COMMANDS = ("generate", "convert", "export", "show", "demo", "train-drafter")

STARTED = time.perf_counter()
"""When the command began, on the clock of ``time.perf_counter``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return the exit status.

    0: done; 2: the command could not do what was asked, and one line on stderr says why; 130: interrupted; 141: whoever read the
    output has gone. An exception other than ValueError and OSError is a bug, and shows its traceback.
    """
    parser = argparse.ArgumentParser(prog="l4jax", description="Run, convert and inspect Llama 4 and Llama 3 models.")
    parser.add_argument("--version", action="version", version=f"l4jax {importlib.metadata.version('l4jax')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        importlib.import_module(f"l4jax.cli.{command.replace('-', '_')}").register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(141)
    except (ValueError, OSError) as error:
        print(f"l4jax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _failed(2)
    except KeyboardInterrupt:
        print("l4jax: interrupted", file=sys.stderr)
        return _failed(130)
    return status


def _failed(status: int) -> int:
    """The status; one of several processes ends here, and the others with it."""
    hosts = sys.modules.get("sharding.hosts")  # not imported, with JAX, for commands that do without
    if hosts is not None:
        hosts.end_with_error(status)
    return status
