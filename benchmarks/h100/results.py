"""The results so far, in one JSON file that is complete at every moment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FORMAT = 1
WAITING, RUNNING, DONE, FAILED, SKIPPED, UNFINISHED = "waiting", "running", "done", "failed", "skipped", "unfinished"


class Results:
    """The file ``h100.json``: the machine, and for each item its status and values.

    After every change it is written under another name and then renamed, so a process that is killed leaves the last state.
    """

    def __init__(self, path: Path) -> None:
        """Read the file if there is one. Raises ValueError if it is not one of ours."""
        self.path = path
        self.machine: dict[str, Any] = {}
        self.items: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT}")
            self.machine, self.items = dict(values["machine"]), dict(values["items"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold results of this benchmark ({error}); give another folder") from error

    def save(self) -> None:
        """Replace the file by the present state."""
        partial = self.path.with_suffix(".partial")
        text = json.dumps({"format": FORMAT, "machine": self.machine, "items": self.items}, indent=1)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def on(self, machine: dict[str, Any]) -> None:
        """Record the machine. Raises ValueError if the file's results come from another machine, other versions or other sizes.

        What is None cannot be seen from this process, and is compared with nothing.
        """
        known = {name: value for name, value in machine.items() if value is not None}
        for name, value in known.items():
            before = self.machine.get(name, value)
            if before != value:
                raise ValueError(f"{self.path} holds results of {name} {before!r}, and this is {value!r}; give another folder for these")
        self.machine |= known
        self.save()

    def is_done(self, name: str) -> bool:
        """Whether the item was measured to its end; items that failed or were skipped are tried again."""
        return self.items.get(name, {}).get("status") == DONE

    def tries(self, name: str) -> int:
        """How often the item was started."""
        tries: int = self.items.get(name, {}).get("tries", 0)
        return tries

    def await_items(self, names: list[str]) -> None:
        """Mark these items as waiting. A value of an earlier try stays until it is measured again."""
        for name in names:
            before = self.items.pop(name, {"compile": {}, "values": {}})
            before.pop("why", None)
            self.items[name] = before | {"status": WAITING}
        self.save()

    def start(self, name: str, source: dict[str, str]) -> None:
        """Mark the item as being measured. ``source``: the code and packages that values depend on; those of another are dropped."""
        item = self.items[name]
        if item.get("source") != source:
            item |= {"source": source, "compile": {}, "values": {}}
        item |= {"status": RUNNING, "tries": self.tries(name) + 1, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.save()

    def record(self, name: str, key: str, values: dict[str, Any]) -> None:
        """Keep values of the item. Later ones replace earlier ones, except under ``compile``: a second compilation comes from a cache."""
        item = self.items[name]
        if key == "compile":
            item["compile"] = values | item["compile"]
        else:
            item["values"][key] = values
        self.save()

    def finish(self, name: str, status: str, why: str | None = None) -> None:
        """Mark the item as ended; ``why`` is one line if it did not end well."""
        self.items[name]["status"] = status
        if why is not None:
            self.items[name]["why"] = " ".join(why.split())[:300]
        self.save()

    def with_status(self, *statuses: str) -> list[str]:
        """Names of the items with one of these statuses."""
        return [name for name, item in self.items.items() if item["status"] in statuses]
