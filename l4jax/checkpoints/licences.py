"""The notice that Llama's community licences ask of whoever passes the weights on.

The licence of Llama 4 (section 1.b) has a redistributor keep a "Notice" file with a given line, show "Built with Llama", and
pass on a copy of the agreement. The converter copies what the source has of these and writes the notice if it has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

NOTICE = "NOTICE"
_LICENSED = re.compile(r"(?:Meta )?Llama (\d+(?:\.\d+)?) Community License", re.IGNORECASE)


def write_notice(directory: Path, copied: Sequence[str], *, architecture: str, source_format: str) -> list[str]:
    """Write ``NOTICE`` into a converted Llama checkpoint whose source had none; the names of the files written.

    ``copied``: the source's own files in ``directory``. A checkpoint is Llama if a licence file among them says so, if its
    architecture is Llama 4's, or if it came in Meta's own format; other models of the ``llama`` architecture have licences of
    their own.
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
        # Llama 3, 3.1, 3.2 or 3.3: the files do not say.
        line = "The source came without its licence: add the Llama agreement of its version, and that version's notice, to pass this on."
    else:
        return []
    (directory / NOTICE).write_text(f"{line}\n\nBuilt with Llama\n", encoding="utf-8")
    return [NOTICE]
