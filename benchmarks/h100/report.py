"""Prints tables of results in Markdown: ``python -m benchmarks.h100.report [FILE ...]``, by default all in ``benchmarks/results``.

Each time has a floor beside it: the bytes that must be moved over the copy's bandwidth, or the FLOPs over the matrix product's rate,
whichever takes longer. Both ceilings come from the same run, or from an H100's data sheet (3.35 TB/s, 989 TFLOP/s) if the run has none.
Imports no JAX, so that results can be read anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.h100.results import DONE, Results

FOLDER = Path(__file__).parents[1] / "results"
DATA_SHEET = {"copy": 3.35e12, "matmul": 989e12}


def render(runs: Iterable[Results]) -> str:
    """The tables of some runs, one after the other."""
    return "\n".join(line for run in runs for line in _Report(run).lines())


class _Report:
    """The tables of one run; tables without any values are left out."""

    def __init__(self, run: Results) -> None:
        self._machine, self._items = run.machine, run.items
        ceilings = self._values("ceilings")
        self._measured = {"copy", "matmul"} <= ceilings.keys()
        self._copy: float = ceilings["copy"]["bytes_per_second"] if self._measured else DATA_SHEET["copy"]
        self._matmul: float = ceilings["matmul"]["flops_per_second"] if self._measured else DATA_SHEET["matmul"]

    def lines(self) -> Iterator[str]:
        if self._machine:
            versions = ", ".join(f"{name} {version}" for name, version in self._machine["versions"].items())
            driver = f", driver {self._machine['driver']}" if "driver" in self._machine else ""
            toy = " Toy sizes: the times mean nothing." if self._machine["sizes"] == "toy" else ""
            yield f"**{self._machine.get('device', 'unknown device')}**{driver}; Python {self._machine['python']}, {versions}.{toy}"
            yield ""
        where = "measured by the same run" if self._measured else "an H100's data sheet"
        read = self._values("ceilings").get("read")
        reading = f", reading {_number(read['bytes_per_second'] / 1e9)} GB/s" if read else ""
        copy, product = f"copy {_number(self._copy / 1e9)} GB/s", f"bfloat16 matrix product {_number(self._matmul / 1e12)} TFLOP/s"
        yield f"Ceilings ({where}): {copy}{reading}, {product}."
        yield ""
        yield from self._sources()
        yield from self._correctness()
        yield from self._kernels()
        yield from self._generation()
        yield from self._ops()
        yield from self._launches()
        yield from self._not_measured()

    def _sources(self) -> Iterator[str]:
        """The code and the packages that items were measured with."""
        by_version: dict[str, list[str]] = {}
        for name, item in self._items.items():
            if item.get("values"):
                for package, version in item["source"].items():
                    by_version.setdefault(f"{package} {version}", []).append(name)
        codes = [version for version in by_version if version.startswith("code ")]
        if len(codes) > 1:
            yield "**Not everything was measured with the same code.**"
            yield ""
        for version, names in by_version.items():
            yield f"- {version}: {'everything' if codes == [version] else ', '.join(names)}"
        if by_version:
            yield ""

    def _values(self, name: str) -> dict[str, Any]:
        return self._items.get(name, {}).get("values", {})

    def _named(self, *groups: str) -> list[tuple[str, dict[str, Any]]]:
        return [(name, item) for name, item in self._items.items() if name.split("/")[0] in groups and item.get("values")]

    def _floor_ms(self, values: dict[str, Any]) -> float:
        return 1e3 * max(values.get("bytes", 0) / self._copy, values.get("flops", 0) / self._matmul)

    def _correctness(self) -> Iterator[str]:
        rows = []
        for name, item in self._named("correctness"):
            for what, values in item["values"].items():
                seen = (
                    f"{values['largest_difference']:.1e} of the largest"
                    if what == "logits"
                    else f"{values['differing']} of {values['tokens']} differ"
                )
                rows.append((name.split("/")[1], what, seen, "yes" if values["agree"] else "**no**"))
        yield from _table(("like", "compared with the CPU", "seen", "agrees"), rows)

    def _kernels(self) -> Iterator[str]:
        rows = [
            (
                name.split("/")[1],
                at,
                f"{values['output_difference']:.1e} of the largest",
                f"{values['lse_difference']:.1e}",
                "yes" if values["same_bits_twice"] else "**no**",
                "yes" if values["agree"] else "**no**",
            )
            for name, item in self._named("kernels")
            for at, values in item["values"].items()
        ]
        yield from _table(("kernel, compared with float32", "shape", "output", "log-sum-exp", "same bits twice", "agrees"), rows)

    def _generation(self) -> Iterator[str]:
        rows = []
        for name, item in self._named("decode", "chain3", "eagle26", "prefill"):
            for at, values in item["values"].items():
                if "ms" not in values:
                    continue
                floor = self._floor_ms(values)
                tokens = f"{values['tokens_a_round']:.2f}" if "tokens_a_round" in values else "–"
                spread = f"{_number(values['least_ms'])} to {_number(values['most_ms'])}"
                rows.append(
                    (name, at, _number(values["ms"]), spread, _number(floor), f"{floor / values['ms']:.0%}", tokens, *self._program(item))
                )
        yield from _table(
            (
                "program / rows or piece",
                "at",
                "ms",
                "least to most",
                "floor, ms",
                "floor / measured",
                "tokens a round",
                "compile s",
                "temporaries GB",
                "needs GB",
                "peak GB",
            ),
            rows,
        )

    def _program(self, item: dict[str, Any]) -> tuple[str, ...]:
        compiled, memory = item.get("compile", {}), item["values"].get("memory", {})
        seconds = f"{compiled['compile_seconds']:.1f}" if "compile_seconds" in compiled else "–"
        temporaries = f"{compiled['temporary_bytes'] / 1e9:.2f}" if "temporary_bytes" in compiled else "–"
        needed, peak = compiled.get("device_bytes"), memory.get("peak_bytes")
        return seconds, temporaries, *(f"{nbytes / 1e9:.1f}" if nbytes is not None else "–" for nbytes in (needed, peak))

    def _ops(self) -> Iterator[str]:
        rows = []
        for name, item in self._named("ops", "tokamax", "torch"):
            op = name.split("/")[1]
            for key, values in item["values"].items():
                shape, who = key.split(" | ")
                if "why" in values:
                    rows.append((op, shape, who, values["why"][:60].replace("|", "/"), "", "", "", ""))
                    continue
                floor, seconds = self._floor_ms(values), values["ms"] / 1e3
                rates = (_number(values["bytes"] / seconds / 1e9), _number(values["flops"] / seconds / 1e12))
                rows.append((op, shape, who, _number(values["ms"] * 1e3), _number(floor * 1e3), f"{floor / values['ms']:.0%}", *rates))
        rows.sort(key=lambda row: row[:2])
        for name, item in self._named("transformers"):
            rows += [(name, at, "transformers", _number(values["ms"] * 1e3), *[""] * 4) for at, values in item["values"].items()]
        yield from _table(("op", "shape", "by", "µs", "floor, µs", "floor / measured", "GB/s", "TFLOP/s"), rows)

    def _launches(self) -> Iterator[str]:
        rows = []
        for name, values in self._values("launches").items():
            two, layer, more = values["two_layers"], values["a_layer"], values["layers"] - 2
            rows.append((name, *(f"{two[what] + more * layer[what]} ({layer[what]} a layer)" for what in two)))
        header = (
            "of one step or round",
            "kernels",
            "CUDA graphs",
            "kernels outside graphs",
            "inner loops",
            "kernels a turn",
            "graphs a turn",
        )
        yield from _table(header, rows)

    def _not_measured(self) -> Iterator[str]:
        for name, item in self._items.items():
            if item["status"] != DONE:
                yield f"- {name}: {item['status']}{f', {item["why"]}' if 'why' in item else ''}"


def _number(value: float) -> str:
    """Write a number of 100 or more without a fraction, and a smaller one with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(header)} |"
        yield "|---" * len(header) + "|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def main() -> int:
    """Print the tables of the files, or of every file in ``benchmarks/results``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.h100.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = parser.parse_args().files or sorted(FOLDER.glob("*.json"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        what = f"{', '.join(missing)} does not exist" if missing else f"{FOLDER} holds no results yet"
        print(f"benchmarks.h100.report: {what}; expected h100.json files of python -m benchmarks.h100", file=sys.stderr)
        return 2
    try:
        print(render(map(Results, files)))
    except ValueError as error:
        print(f"benchmarks.h100.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
