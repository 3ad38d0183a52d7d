"""Measure everything on an H100, within a given time; call it again to measure what is left.

    python -m benchmarks.h100 --minutes 4 --out DIR [--only NAME ...] [--skip NAME ...] [--device cpu] [--list]

DIR/h100.json holds what was measured, item by item, and is written after each value. A second call with the same DIR measures what
is missing or failed. Worker processes do the measuring, so the command ends in time whatever they do, and an item that crashes its
worker does not affect the others. What workers print is in DIR/log.txt. The tables are printed last.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from benchmarks.h100.plan import Item, items, selected
from benchmarks.h100.report import render
from benchmarks.h100.results import DONE, FAILED, RUNNING, SKIPPED, UNFINISHED, WAITING, Results
from benchmarks.h100.sizes import REAL, TOY
from benchmarks.h100.worker import REFUSED

MARGIN, ENDING = 3.0, 2.0
"""Seconds reserved for ending the worker and printing the tables, and those of them for ending it: freeing its memory takes time."""


class Ended(Exception):
    """A signal has asked this process to end."""


def main() -> int:
    """Parse the command line, measure, print; the exit code is 0 if every selected item was measured or does not apply here."""
    started = time.monotonic()
    arguments = _arguments()
    sizes = TOY if arguments.device == "cpu" else REAL
    try:
        plan = selected(items(sizes), arguments.only, arguments.skip)
    except ValueError as error:
        return _refuse(str(error))
    if arguments.list:
        print("\n".join(item.name for item in plan))
        return 0
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with _locked(arguments.out / "lock"), (arguments.out / "log.txt").open("a", encoding="utf-8") as log:
            path = arguments.out / "h100.json"
            Results(path)  # refuses another program's file before anything is run
            return _measure(path, plan, arguments.device, started + arguments.minutes * 60 - MARGIN, log)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still holds back goes nowhere
        return _refuse(f"standard output was closed; for the tables: python -m benchmarks.h100.report {arguments.out / 'h100.json'}")
    except OSError as error:
        return _refuse(f"{arguments.out} cannot be written ({error.strerror}); give a folder that can")
    except ValueError as error:
        return _refuse(str(error))


def _measure(path: Path, plan: list[Item], device: str, deadline: float, log: TextIO) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise_ended)
    before, ended, refused = Results(path).items, None, None
    try:
        refused = _measure_missing(path, plan, device, deadline, log)
    except Ended as error:
        ended = str(error)
    why = f"ended by {ended}" if ended else "time is up"
    _close_interrupted(path, why)
    results = Results(path)
    if refused is not None and results.items == before:
        return _refuse(refused)
    print(render([results]), flush=True)
    failed = [item.name for item in plan if item.name in results.with_status(FAILED)]
    missing = [item.name for item in _in_turn(plan, results) if item.name not in results.with_status(DONE, SKIPPED, FAILED)]
    for name in failed:
        print(f"{name} failed: {results.items[name]['why']}", file=sys.stderr)
    if refused is not None:
        return _refuse(refused)
    if missing:
        print(f"{why}, and {len(missing)} items are left, {missing[0]} first: call again with --out {path.parent}", file=sys.stderr)
    return 1 if missing or failed else 0


def _measure_missing(path: Path, plan: list[Item], device: str, deadline: float, log: TextIO) -> str | None:
    """Try each item that is not done once, until time is up. Returns the reason if nothing can be measured here."""
    _close_interrupted(path, "its process ended")
    left = _in_turn(plan, Results(path))
    while left and time.monotonic() < deadline:
        together = left[: next((n for n, item in enumerate(left) if item.process != left[0].process), len(left))]
        code, refused = _run(path, together, device, deadline, log)
        if refused is not None:
            return refused
        results = Results(path)
        if time.monotonic() >= deadline:
            break
        waiting = [item for item in together if results.items.get(item.name, {}).get("status") == WAITING]
        broken = results.with_status(RUNNING) or ([waiting[0].name] if waiting == together else [])
        for name in broken:
            why = f"its process {_how_it_ended(code)}, as {log.name} shows"
            results.finish(name, FAILED, why)
            print(f"{name}: failed, {why}", flush=True)
        left = [item for item in left if item not in together or (item in waiting and item.name not in broken)]
    return None


def _in_turn(plan: list[Item], results: Results) -> list[Item]:
    """The items that are not done, in the order of the next call.

    Those that were started in earlier calls come last, so that one that takes longer than a call does not keep others from their turn.
    """
    return sorted((item for item in plan if not results.is_done(item.name)), key=lambda item: results.tries(item.name))


def _close_interrupted(path: Path, why: str) -> None:
    """Mark the items that a worker had started as unfinished; no worker is running any more."""
    results = Results(path)
    for name in results.with_status(RUNNING):
        results.finish(name, UNFINISHED, why)


def _run(path: Path, together: list[Item], device: str, deadline: float, log: TextIO) -> tuple[int, str | None]:
    """Run one worker for these items, and end it when time is up. Returns its exit code, and the reason if it can measure nothing."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), environment.get("PYTHONPATH"))))
    environment["JAX_PLATFORMS"] = "cpu" if device == "cpu" else "cuda,cpu"
    # 32 rows of 8K tokens and the weights take 51 GB; by default JAX takes at most 60 of the 80 GB.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    sizes = (TOY if device == "cpu" else REAL).name
    options = ["--results", str(path), "--sizes", sizes, "--device", device, "--items", *(item.name for item in together)]
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.h100.worker", *options], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    refused: list[str] = []

    def relay() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith(REFUSED):
                refused.append(line.removeprefix(REFUSED).strip())
            else:
                with suppress(BrokenPipeError):  # the worker goes on
                    print(line, end="", flush=True)

    relayed = threading.Thread(target=relay, daemon=True)
    relayed.start()
    try:
        code = worker.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    finally:
        if worker.poll() is None:
            worker.kill()
            with suppress(subprocess.TimeoutExpired):
                worker.wait(ENDING)
    relayed.join(0.5)
    return code, refused[0] if refused else None


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.h100", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=4.0, help="the command ends within this many minutes (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("h100-results"), help="folder for the results (default: h100-results)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="items, or groups of them such as decode")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: at toy sizes, to try the program")
    parser.add_argument("--list", action="store_true", help="print the items in their order, and measure nothing")
    return parser.parse_args()


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes; expected a number above 0")
    return value


def _refuse(message: str) -> int:
    print(f"benchmarks.h100: {message}", file=sys.stderr)
    return 2


def _raise_ended(number: int, _: FrameType | None) -> None:
    raise Ended(signal.Signals(number).name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path.parent} is in use by another call; wait for it, or give another folder") from error
        yield


if __name__ == "__main__":
    sys.exit(main())
