"""A process that tells whether guides can be followed: compiling one may take long, and only a process can be stopped."""

from __future__ import annotations

import resource
import signal
import sys

import msgspec

from l4jax.decoding.guide import Guide
from l4jax.serving.messages import LENGTH_BYTES
from l4jax.text.guiding import check_guide

_MOST_BYTES = 4 << 30


def main() -> None:
    """Read guides from standard input, and write to standard output why each cannot be followed, or nothing; until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; this one ends with the front
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    while len(length := sys.stdin.buffer.read(LENGTH_BYTES)) == LENGTH_BYTES:
        guide = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(length, "big")), type=Guide)
        try:
            check_guide(guide)
            why = b""
        except ValueError as error:
            why = str(error).encode("utf-8", "replace")
        sys.stdout.buffer.write(len(why).to_bytes(LENGTH_BYTES, "big") + why)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
