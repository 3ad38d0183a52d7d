"""The device mesh: how many devices along each of the four axes.

``data``: rows of the batch. ``sequence``: positions of a sequence (context parallelism). ``expert``: routed experts. ``tensor``: heads,
feed-forward width and vocabulary. Neighbours along ``tensor`` exchange the most data, so it is the innermost axis: the devices of one
host.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sharding.kinds import is_whole, shown
from sharding.ranks import Ranks
from sharding.words import counted

AXES = ("data", "sequence", "expert", "tensor")
"""Names of the mesh axes, outermost first."""
_MOST = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The number of devices along each axis. Raises ValueError if one is not a whole number of at least 1."""

    data: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not is_whole(size) or not 1 <= size <= _MOST:
                raise ValueError(f"mesh axis {axis} is {shown(size)}; expected a whole number of at least 1, at most {_MOST}")
            object.__setattr__(self, axis, operator.index(size))

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read ``"sequence=4,tensor=2"`` (axes left out are 1), or a ``.json`` file that holds ``{"sequence": 4, "tensor": 2}``."""
        if text.endswith(".json"):
            return cls._from_file(Path(text))
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = (word.strip() for word in part.partition("="))
            _check_axis(axis, text)
            if axis in sizes:
                raise ValueError(f"mesh {shown(text)} names {axis} twice; expected each axis once")
            if not re.fullmatch("[0-9]{1,9}", size):
                raise ValueError(f"mesh {shown(text)} has {shown(part)}; expected {axis}= and a whole number, as in {axis}=8")
            sizes[axis] = int(size)
        return cls(**sizes)

    @classmethod
    def _from_file(cls, path: Path) -> MeshSpec:
        if not path.is_file():
            raise ValueError(f'mesh file {path} does not exist; expected JSON such as {{"sequence": 4, "tensor": 2}}')
        try:
            sizes = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"mesh file {path} is not valid JSON ({error})") from error
        if not isinstance(sizes, dict):
            raise ValueError(f"mesh file {path} holds a {type(sizes).__name__}; expected an object from axes to sizes")
        for axis in sizes:
            _check_axis(axis, str(path))
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "tensor=1"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each of :data:`AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes)

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh) -> MeshSpec:
        """The sizes of a mesh that :meth:`build` made."""
        return cls(**mesh.shape)

    def along(self, *axes: str) -> Ranks:
        """The devices along these axes; axes of one device are left out."""
        several = tuple(axis for axis in axes if getattr(self, axis) > 1)
        return Ranks(several, math.prod(getattr(self, axis) for axis in several))

    @property
    def token_ranks(self) -> Ranks:
        """The devices that a sequence's positions are spread over: those along ``sequence`` and ``expert``.

        Ranks along ``expert`` differ only in their experts. Each gets tokens and cached keys of its own, so that no work is repeated.
        """
        return self.along("sequence", "expert")

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """Build the mesh over ``devices`` (default: all devices of all processes), in their order.

        A smaller mesh takes the first devices. With several processes the mesh must have all devices, so that every process has a part
        of it. Raises ValueError if there are too few devices or, with several processes, too many.
        """
        present = list(jax.devices() if devices is None else devices)
        processes = {device.process_index for device in present}
        among = f" in {counted(len(processes), 'process', 'processes')}; expected all of them" if len(processes) > 1 else ""
        if self.size > len(present) or (among and self.size < len(present)):
            on_cpu = present[0].platform == "cpu" and self.size > len(present)
            advice = f"; on a CPU, JAX_NUM_CPU_DEVICES={-(-self.size // len(processes))} makes as many" if on_cpu else ""
            kind = f"{present[0].platform} device"
            found = f"{counted(len(present), f'{kind} is', f'{kind}s are')} present{among}"
            raise ValueError(f"mesh {self} has {counted(self.size, 'device')}, and {found}{advice}")
        return jax.sharding.Mesh(np.array(present[: self.size], dtype=object).reshape(self.sizes), AXES)


ONE_DEVICE = MeshSpec()
"""The mesh of a single device."""


def _check_axis(axis: str, text: str) -> None:
    if axis not in AXES:
        close = difflib.get_close_matches(axis, AXES, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"mesh {shown(text)} has the axis {shown(axis)}{meant}; expected {', '.join(AXES)}")
