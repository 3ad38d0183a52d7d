"""A measurement from beginning to end: check, load, report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

from l4jax.bench.check import Checked, check
from l4jax.bench.client import Server
from l4jax.bench.load import Load, Pattern
from l4jax.bench.report import summary, table, write
from l4jax.bench.requests import Content


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What to measure. ``goodput``: limits in ms; ``out``: the file that is written, if any."""

    server: Server
    content: Content
    pattern: Pattern
    goodput: dict[str, float]
    out: Path | None

    async def run(self) -> None:
        """Measure, print the table and write the file.

        Raises ValueError if the server cannot be measured, before any load; and after the table, if every request failed.
        """
        checked = await check(self.server, self.content, self.pattern.timeout_s)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        measured = await Load(checked.server, checked.content, self.pattern, pace=checked.pace).run()
        found = summary(measured, self.goodput)
        print(f"{checked.content.model} at http://{self.server.host}:{self.server.port}{self.server.base}, {self._how()}")
        print(table(found), flush=True)
        if self.out is not None:
            write(self.out, {"about": self._about(checked, at), **found})
        if found["requests"]["failed"] == found["requests"]["sent"] > 0:
            raise ValueError("every request failed, as the table says; look at the server's log")

    def _how(self) -> str:
        content, pattern = self.content, self.pattern
        load = f"{pattern.rate:g} requests/s" if pattern.clients is None else f"{pattern.clients} clients"
        return f"{content.api}, {load}, seed {content.seed}"

    def _about(self, checked: Checked, at: str) -> dict[str, Any]:
        """The configuration and the versions; the key is left out, and prompts of a file are only counted."""
        content = {field.name: getattr(checked.content, field.name) for field in dataclasses.fields(Content)}
        content["prompts"] = None if self.content.prompts is None else len(self.content.prompts)
        return {
            "began_at": at,
            "url": f"http://{self.server.host}:{self.server.port}{self.server.base}",
            "content": content,
            "pattern": self.pattern,
            "versions": {
                "l4jax": importlib.metadata.version("l4jax"),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "server": checked.version,
            },
        }
