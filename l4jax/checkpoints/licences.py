"""The notice that Llama's community licences require of everyone who redistributes the weights.

The licence of Llama 4 (section 1.b) requires a redistributor to keep a "Notice" file with a given line, to show "Built with Llama", and
to pass on a copy of the agreement. The converter copies these from the source, and writes the notice if the source lacks it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

NOTICE = "NOTICE"
_LICENSED = re.compile(r"(?:Meta )?Llama (\d+(?:\.\d+)?) Community License", re.IGNORECASE)


def write_notice(directory: Path, copied: Sequence[str], *, architecture: str, source_format: str) -> list[str]:
    """Write ``NOTICE`` into a converted Llama checkpoint whose source lacks it; return the names of the files written.

    ``copied``: the source's own files in ``directory``. A checkpoint is Llama if one of these, a licence file, says so, if its
    architecture is Llama 4's, or if it came in Meta's own format; other models of the ``llama`` architecture have other licences.
    """
    if any(name.lower().startswith("notice") for name in copied):
        return []
    texts = ((directory / name).read_text(encoding="utf-8", errors="replace") for name in copied if name.lower().startswith("license"))
    versions = [match[1] for text in texts for match in _LICENSED.finditer(text)]
    if not versions and architecture == "llama4":
        versions = ["4"]
    if versions:
        name = "Meta Llama 3" if versions[0] == "3" else f"Llama {versions[0]}"
        line = f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    elif source_format == "meta":
        # Llama 3, 3.1, 3.2 or 3.3: the files do not say which.
        line = "The source came without its licence: before you pass this on, add the Llama agreement and the notice of its version."
    else:
        return []
    (directory / NOTICE).write_text(f"{line}\n\nBuilt with Llama\n", encoding="utf-8")
    return [NOTICE]
