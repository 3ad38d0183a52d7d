"""The documentation's form: lines of at most 120 characters, and links to pages and headings that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md"), *(ROOT / "tests" / "golden").glob("*.md")]
)


def prose(text: str) -> list[str]:
    """The lines of a page that can be wrapped: no code and no tables."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in without_code.splitlines() if not line.lstrip().startswith("|")]


def test_lines_of_prose_have_at_most_120_characters():
    long = [f"{page.relative_to(ROOT)}: {line[:60]}..." for page in PAGES for line in prose(page.read_text("utf-8")) if len(line) > 120]
    assert long == []


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text("utf-8")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
