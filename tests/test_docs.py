"""The documentation's form: lines of at most 120 characters, and links to pages and headings that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.md"), *(ROOT / "tests" / "golden").glob("*.md")]
)


def without_code(text: str) -> list[str]:
    """The lines of a page outside its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()


def where(page: Path, line: str) -> str:
    return f"{page.relative_to(ROOT)}: {line[:60]}..."


def test_lines_of_prose_have_at_most_120_characters():
    long = [
        where(page, line)
        for page in PAGES
        for line in without_code(page.read_text("utf-8"))
        if len(line) > 120 and not line.lstrip().startswith("|")  # a row of a table
    ]
    assert long == []


def test_tables_are_not_wrapped_as_prose_is():
    """Their lines are short enough then, and the page shows garbage."""
    wrapped = [
        where(page, line)
        for page in PAGES
        for line in without_code(page.read_text("utf-8"))
        if re.search(r"\|\s*:?-{3}", line) and not re.fullmatch(r"\s*\|(\s*:?-{3,}:?\s*\|)+\s*", line)
    ]
    assert wrapped == []


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
