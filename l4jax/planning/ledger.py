"""Reads what a compiled program does off its text: its matrix products, and what its collectives send along which mesh axes.

The text is XLA's after scheduling: a computation lists its instructions in the order in which the device gets them. Shapes are those on
one device, so every number is for one device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from pallas_kernels.cost import kernel_flops
from sharding.mesh import AXES, MeshSpec

_COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all"
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_KERNELS = ("fusion", "custom-call", "copy")
_LAUNCHES = (
    *_KERNELS,
    "copy-start",
    "fusion-start",
    "async-start",
    *_COLLECTIVES.split("|"),
    *(f"{kind}-start" for kind in _COLLECTIVES.split("|")),
)
_STRATEGIES = {"KERNEL_STRATEGY_TRITON_ONE_SHOT": "one-shot", "KERNEL_STRATEGY_TRITON_TWO_SHOT": "two-shot"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective in a compiled program.

    ``scope``: the named scopes that it was traced in. ``axes``: the mesh axes along which the devices of a group differ, ``ranks``
    of them together. ``nbytes``: bytes on a device of each of its results. ``strategy``: "one-shot" or "two-shot" for an all-reduce
    that a kernel of XLA's own computes over NVLink (each rank reads all others' arrays; or each reads a part of them and shares the
    sums), "NCCL" for every other. ``flops_meanwhile`` and ``bytes_meanwhile``: the work that a device is given between the
    collective's start and the wait for its end, which hides it: FLOPs of matrix products, and bytes that kernels write.
    """

    kind: str
    scope: str
    axes: tuple[str, ...]
    ranks: int
    nbytes: tuple[int, ...]
    strategy: str = "NCCL"
    flops_meanwhile: int = 0
    bytes_meanwhile: int = 0

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends to others: an all-reduce scatters sums, then gathers them, but sends all to each in a one-shot kernel.

        Raises ValueError for a ragged all-to-all, whose sizes are known at run time only.
        """
        result, others = sum(self.nbytes), self.ranks - 1
        match self.kind:
            case "collective-permute":
                return result
            case "all-to-all" | "all-gather":
                return result * others // self.ranks
            case "reduce-scatter":
                return result * others
            case "all-reduce" if self.strategy == "one-shot":
                return result * others
            case "all-reduce":
                return 2 * result * others // self.ranks
        raise ValueError(f"how much a {self.kind} sends does not follow from its shapes")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, copy or collective that a device is given. XLA leaves some without a scope; they have that of the launch before them.

    ``kernel``: the name of l4jax's own kernel; empty for XLA's. ``operand_shapes``: of the arrays that it is given. ``operand_bytes``:
    bytes read of each operand. One that is only sliced or gathered counts as its slices, one that is changed in place as 0.
    ``written_bytes``: bytes written, but for what l4jax's kernels write in place, which the program's text does not say. ``flops``: of
    matrix products. ``collective``: set if this launch is a collective, or starts one.
    """

    opcode: str
    scope: str
    name: str
    kernel: str
    operand_shapes: tuple[tuple[int, ...], ...]
    operand_bytes: tuple[int, ...]
    written_bytes: int
    flops: int
    collective: Collective | None

    @property
    def layer(self) -> int | None:
        """The layer of the target model that it belongs to."""
        found = re.search(r"/layer_(\d+)/", self.scope)
        return int(found[1]) if found and "draft" not in self.scope else None


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[tuple[str, list[int]]]:
        """Type and dimensions of each array of the result."""
        return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", self.shapes)]

    @property
    def nbytes(self) -> list[int]:
        """Bytes of each array of the result."""
        return [_BYTES[dtype] * math.prod(dims) for dtype, dims in self.arrays]

    @property
    def written_bytes(self) -> int:
        """Bytes of the results, less those of arrays that a kernel changes in place: how much of them it writes is not known."""
        in_place = re.findall(r"\{(\d*)\}: \(", self.found(r"output_to_operand_aliasing=\{(.*?\))\}"))
        return sum(self.nbytes) - sum(self.nbytes[int(index or 0)] for index in in_place)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def first_operand(self) -> str:
        return self.found(r"%([\w.-]+)")

    @property
    def scope(self) -> str:
        return self.found(r'op_name="([^"]*)"')

    @property
    def called(self) -> str:
        """The computation that a fusion, a loop or a reduction calls."""
        return self.found(r" (?:calls|body|to_apply)=%([\w.-]+)")

    @property
    def own_kernel(self) -> str:
        """The name of l4jax's kernel that this calls; empty if it calls none."""
        is_own = self.opcode == "custom-call" and "mosaic_gpu" in self.found(r'custom_call_target="(\w+)"')
        return self.scope.split("/")[-2] if is_own else ""

    @property
    def is_collective(self) -> bool:
        return re.fullmatch(rf"({_COLLECTIVES})(-start)?", self.opcode) is not None

    def trip_count(self, *, unknown: int) -> int:
        """How often a loop turns; ``unknown`` if the text does not say it."""
        return int(self.found(r'"known_trip_count":\{"n":"(\d+)"\}') or unknown)

    def found(self, pattern: str) -> str:
        """What the pattern's group matches in the operands and attributes; the empty string if it matches nowhere."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


class Ledger:
    """The instructions of a program compiled for ``mesh``, counted."""

    def __init__(self, text: str, mesh: MeshSpec) -> None:
        self._mesh = mesh
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        computation: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                computation = self._computations.setdefault(header[2], {})
                self._entry = header[2] if header[1] else self._entry
            elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)", line):
                computation[found[1]] = _Instruction(*found.groups())

    def flops(self, scope: str = "") -> int:
        """FLOPs of the matrix products whose scope contains ``scope``, two for each multiplication; l4jax's kernels are counted as if all
        queries saw all keys.

        Not counted: loops of unknown length and branches, whose work only running the program would show, and other kernels.
        """
        return self._computation_flops(self._entry, scope)

    @functools.cached_property
    def iteration(self) -> list[Launch]:
        """What one iteration of the program's largest loop (the one of most instructions) launches, with its condition, in order.

        A loop within it counts once for each of its iterations, or once if their number is not known. Branches do not count: which one is
        taken is decided while the program runs. Raises ValueError for a program without a loop.
        """
        loops = [instruction for instruction in self._computations[self._entry].values() if instruction.opcode == "while"]
        if not loops:
            raise ValueError("the program has no loop; expected one of decoding or speculation")
        loop = max(loops, key=lambda instruction: len(self._computations[instruction.called]))
        launches = list(self._launched(loop))
        scope, scoped = "", []
        for launch in launches:
            scope = launch.scope or scope
            scoped.append(dataclasses.replace(launch, scope=scope))
        return scoped

    def _launched(self, loop: _Instruction) -> Iterator[Launch]:
        for computation in (loop.called, loop.found(r" condition=%([\w.-]+)")):
            for name, instruction in self._computations[computation].items():
                if instruction.opcode == "while":
                    yield from list(self._launched(instruction)) * instruction.trip_count(unknown=1)
                elif instruction.opcode in _LAUNCHES:
                    yield self._launch(computation, name, instruction)

    def _launch(self, computation: str, name: str, instruction: _Instruction) -> Launch:
        given = [self._computations[computation][operand] for operand in instruction.operands]
        called = self._computations.get(instruction.called, {})
        own = instruction.own_kernel
        fused = instruction.opcode.startswith("fusion")
        return Launch(
            instruction.opcode,
            instruction.scope,
            name,
            own,
            tuple(tuple(operand.arrays[0][1]) for operand in given if operand.arrays),
            tuple(_bytes_read(called, index) if fused else sum(operand.nbytes) for index, operand in enumerate(given)),
            # A copy's start gives its source too.
            instruction.nbytes[0] if instruction.opcode == "copy-start" else _bytes_written(called) if fused else instruction.written_bytes,
            self._flops(computation, instruction, ""),
            self._collective_of(computation, instruction),
        )

    def _collective_of(self, computation: str, instruction: _Instruction) -> Collective | None:
        if instruction.is_collective:
            return self._collective(computation, instruction)
        called = self._computations.get(instruction.called, {})
        return next((self._collective(instruction.called, inner) for inner in called.values() if inner.is_collective), None)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Every collective, those in loop bodies once; XLA may have combined several into one of many results."""
        return [
            self._collective(name, instruction)
            for name, computation in self._computations.items()
            for instruction in computation.values()
            if instruction.is_collective
        ]

    @functools.cached_property
    def _callers(self) -> dict[str, tuple[str, _Instruction]]:
        """For the computation of a fusion or of a wrapped operation: the computation that starts it, and the instruction."""
        return {
            instruction.called: (name, instruction)
            for name, computation in self._computations.items()
            for instruction in computation.values()
            if instruction.opcode in ("fusion", "fusion-start", "async-start")
        }

    def _computation_flops(self, name: str, scope: str) -> int:
        return sum(self._flops(name, instruction, scope) for instruction in self._computations[name].values())

    def _flops(self, computation: str, instruction: _Instruction, scope: str) -> int:
        if instruction.opcode == "dot":
            (_, left) = self._computations[computation][instruction.first_operand].arrays[0]
            contracted = [left[int(n)] for n in instruction.found(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if n]
            (_, result) = instruction.arrays[0]
            return 2 * math.prod(result) * math.prod(contracted) if scope in instruction.scope else 0
        if instruction.own_kernel:
            constraints = instruction.found(r"operand_layout_constraints=\{(.*?\})\}")
            operands = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", constraints)]
            return kernel_flops(instruction.own_kernel, operands) if scope in instruction.scope else 0
        called = instruction.called
        times = instruction.trip_count(unknown=0) if instruction.opcode == "while" else 1
        return times * self._computation_flops(called, scope) if called else 0

    def _collective(self, computation: str, instruction: _Instruction) -> Collective:
        kind, nbytes = instruction.opcode.removesuffix("-start"), instruction.nbytes
        # A start's result is a tuple of its operands and its results; of an all-reduce, XLA has one of its results only too.
        halves = instruction.shapes.startswith("((" if kind == "all-reduce" else "(")
        if kind != instruction.opcode and halves:
            nbytes = nbytes[-1:] if kind == "ragged-all-to-all" else nbytes[len(nbytes) // 2 :]
        # A kernel's all-reduce is inside a fusion, which is what starts and is waited for.
        within, start = self._callers.get(computation, (computation, instruction))
        meanwhile = list(self._until_done(within, start))
        axes = self._axes(instruction)
        return Collective(
            kind,
            instruction.scope,
            axes,
            self._mesh.along(*axes).count,
            tuple(nbytes),
            _STRATEGIES.get(instruction.found(r'"kernel_strategy":"(\w+)"'), "NCCL"),
            sum(self._flops(within, other, "") for other in meanwhile),
            sum(other.written_bytes for other in meanwhile if other.opcode in _KERNELS),
        )

    def _until_done(self, computation: str, start: _Instruction) -> Iterator[_Instruction]:
        """The instructions between an instruction's start and the wait for its end; none if one instruction does both."""
        if not start.opcode.endswith("-start"):
            return iter(())
        instructions = iter(self._computations[computation].values())
        after_start = itertools.islice(itertools.dropwhile(lambda other: other is not start, instructions), 1, None)
        done = start.opcode.removesuffix("start") + "done"
        return itertools.takewhile(lambda other: (other.opcode, other.first_operand) != (done, start.name), after_start)

    def _axes(self, instruction: _Instruction) -> tuple[str, ...]:
        """Mesh axes along which the devices of a group, or the two of a transfer, differ."""
        if named := instruction.found(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}"):
            return tuple(re.findall(r"'(\w+)'", named))
        if not (group := instruction.found(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")):
            raise ValueError(f"{instruction.name} has groups of devices in an unknown form: {instruction.rest[:200]}")
        coordinates = np.unravel_index([int(n) for n in group.split(",")], self._mesh.sizes)
        return tuple(axis for axis, places in zip(AXES, coordinates, strict=True) if len(set(places.tolist())) > 1)


def _users(computation: dict[str, _Instruction], name: str) -> Iterator[tuple[_Instruction, int]]:
    """The instructions that use an array, or a view of it, and as which operand."""
    for instruction in computation.values():
        for index, operand in enumerate(instruction.operands):
            if operand == name and instruction.opcode == "bitcast":
                yield from _users(computation, instruction.name)
            elif operand == name:
                yield instruction, index


def _bytes_read(fusion: dict[str, _Instruction], index: int) -> int:
    """Bytes that a fusion reads of an operand."""
    parameter = next(i for i in fusion.values() if i.opcode == "parameter" and i.rest.startswith(f"{index})"))
    users = list(_users(fusion, parameter.name))
    if users and all(user.opcode in ("slice", "dynamic-slice", "gather") and place == 0 for user, place in users):
        return sum(sum(user.nbytes) for user, _ in users)
    in_place = users and all(user.opcode in ("scatter", "dynamic-update-slice") and place == 0 for user, place in users)
    return 0 if in_place else sum(parameter.nbytes)


def _bytes_written(fusion: dict[str, _Instruction]) -> int:
    """Bytes that a fusion writes: of an array that it changes in place, those of the change."""
    root = list(fusion.values())[-1]
    written = 0
    for result in [fusion[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while result.opcode == "bitcast":
            result = fusion[result.first_operand]
        change = {"dynamic-update-slice": 1, "scatter": 2}.get(result.opcode)
        written += sum((result if change is None else fusion[result.operands[change]]).nbytes)
    return written
