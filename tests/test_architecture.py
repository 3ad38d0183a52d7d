"""docs/architecture.md shows the code as it is: its arrows are the imports, and the names on the page exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("l4jax", "sharding", "pallas_kernels")
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name, parsed."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in names.items()}


MODULES = modules()


def room(module: str) -> str:
    """The room of a module: a package or single module of l4jax, or another package."""
    first, *rest = module.split(".")
    return rest[0] if first == "l4jax" and rest else first


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules that a module imports, at its top or in its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "expected no relative imports"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports() -> set[tuple[str, str]]:
    """Pairs of rooms, of which the first imports from the second."""
    pairs = {(room(name), room(other)) for name, tree in MODULES.items() for other in imported(tree) if other.split(".")[0] in PACKAGES}
    return {(one, other) for one, other in pairs if one != other}


def drawn(page: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """The box of each room, and the arrows between boxes, of a page's Mermaid graph."""
    (graph,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    boxes = {name: box for box, label in re.findall(r'^ +(\w+)\["(.*?)<br/>', graph, re.MULTILINE) for name in label.split(", ")}
    return boxes, set(re.findall(r"^ +(\w+) -->(?:\|.*?\|)? (\w+)$", graph, re.MULTILINE))


def below(box: str, arrows: set[tuple[str, str]]) -> set[str]:
    """The boxes that arrows lead to from this one, directly or through others."""
    found: set[str] = set()
    waiting = [box]
    while waiting:
        new = {end for start, end in arrows if start == waiting[-1]} - found
        waiting.pop()
        found |= new
        waiting += new
    return found


def faults(page: str, imports: set[tuple[str, str]]) -> list[str]:
    """What a page's picture says that the imports do not, and the reverse."""
    boxes, arrows = drawn(page)
    rooms = {room for pair in imports for room in pair}
    found = [f"the picture has no box for {room}" for room in sorted(rooms - set(boxes))]
    crossing = {(boxes[one], boxes[other]): (one, other) for one, other in sorted(imports) if one in boxes and other in boxes}
    found += [f"no import backs the arrow {start} --> {end}" for start, end in sorted(arrows - set(crossing))]
    found += [f"{box} is below itself" for box in sorted(set(boxes.values())) if box in below(box, arrows)]
    found += [
        f"{one} imports {other}, and no arrows lead from {start} to {end}"
        for (start, end), (one, other) in crossing.items()
        if start != end and end not in below(start, arrows)
    ]
    return found


def test_the_picture_and_the_imports_agree():
    assert faults(PAGE, imports()) == []


def test_every_room_that_is_drawn_is_there():
    assert set(drawn(PAGE)[0]) - {room(name) for name in MODULES} == set()


@pytest.mark.parametrize(
    ("page", "imports", "expected"),
    [
        ("a --> b", {("a", "b")}, []),
        ("a --> b\n b --> c", {("a", "b"), ("b", "c"), ("a", "c")}, []),
        ("a --> b", {("a", "b"), ("b", "c")}, ["no arrows lead from b to c"]),
        ("a --> b\n b --> c", {("a", "b")}, ["no import backs the arrow b --> c"]),
        ("a --> b\n b --> a", {("a", "b"), ("b", "a")}, ["a is below itself", "b is below itself"]),
        ("a --> b", {("a", "b"), ("b", "a")}, ["no arrows lead from b to a"]),
        ("a --> b", {("a", "b"), ("a", "d")}, ["no box for d"]),
    ],
)
def test_a_picture_that_is_wrong_is_noticed(page, imports, expected):
    boxes = "\n".join(f' {box}["{box}<br/>"]' for box in "abc")
    found = faults(f"```mermaid\n{boxes}\n {page}\n```", imports)
    assert len(found) == len(expected) and all(text in fault for text, fault in zip(expected, found, strict=True))


def defined(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Whether a module or class defines this name, and that one the next."""
    if not names:
        return True
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == names[0]:
            return defined(node, names[1:])
        if isinstance(node, ast.FunctionDef) and node.name == names[0]:
            return len(names) == 1
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == names[0] for target in node.targets):
            return len(names) == 1
    return False


def test_every_name_on_the_page_exists():
    names = re.findall(r"`([a-z_0-9]+(?:\.\w+)+)`", PAGE)
    assert len(names) > 20

    def exists(name: str) -> bool:
        whole = name if name.startswith(PACKAGES) else f"l4jax.{name}"
        parts = whole.split(".")
        split = max((i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in MODULES), default=0)
        return split > 0 and defined(MODULES[".".join(parts[:split])], parts[split:])

    assert [name for name in names if not exists(name)] == []


def test_no_file_of_the_engine_knows_both_text_and_arrays() -> None:
    found = {
        name: {other.split(".")[0] if other.split(".")[0] != "l4jax" else ".".join(other.split(".")[:2]) for other in imported(tree)}
        for name, tree in MODULES.items()
        if name.startswith("l4jax.engine.")
    }
    both = [name for name, others in found.items() if "l4jax.text" in others and others & {"jax", "numpy", "jaxtyping"}]
    # It puts together what others made.
    assert both == ["l4jax.engine.build"]
