"""Peers are timed by workers: programs that load a model once and then do one repetition whenever they are asked to.

So the systems compared can take turns on the same machine, minutes apart at most, each in its own Python environment. A worker
speaks JSON lines on standard output: first, when it is loaded, a :class:`Ready`; then for every line on its
standard input, a :class:`Work`, a :class:`Repetition`. It ends when its input does.

A repetition starts from an empty cache, processes the prompts, of equal lengths, and chooses each row's first token (prefill), then makes
``new_tokens`` greedy steps (decode), past any end token. All systems get the same token ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Ready:
    """What is being timed: library versions, data types, and the bytes of all weights."""

    library: str
    weights: str
    cache: str
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, [batch][tokens], and how many tokens to choose for each after the first."""

    prompts: list[list[int]]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Seconds of the two phases, and the tokens chosen: [batch][1 + new_tokens]."""

    prefill_seconds: float
    decode_seconds: float
    token_ids: list[list[int]]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every worker has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's folder or file")
    parser.add_argument("--capacity", type=int, default=1024, help="most tokens of a prompt and its answer")
    parser.add_argument("--batch", type=int, default=1, help="most prompts at once")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def serve(ready: Ready, repeat: Callable[[Work], Repetition]) -> None:
    """One repetition a line of standard input."""
    print(json.dumps(dataclasses.asdict(ready)), flush=True)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(repeat(Work(**json.loads(line))))), flush=True)


class Worker:
    """A running worker, as the benchmark that compares them sees it.

    ``command``: a Python interpreter, the worker's script and its arguments. Raises RuntimeError if it dies.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = Ready(**self._read())

    def run(self, work: Work) -> Repetition:
        """Run one repetition. The caller must not run anything else at the same time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(work)) + "\n")
        self._process.stdin.flush()
        return Repetition(**self._read())

    def close(self) -> None:
        """Let it end, and wait for that."""
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended with status {self._process.wait()}; its messages are above")
        return json.loads(line)
