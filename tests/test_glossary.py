"""The letters in array names and shape annotations are those of the glossary in ``l4jax.model``, and names and annotations agree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import l4jax.model

ROOT = Path(__file__).parent.parent
FILES = sorted(file for package in ("l4jax", "sharding", "pallas_kernels") for file in (ROOT / package).rglob("*.py"))
ARRAY_TYPES = {"Bool", "Float", "Float32", "Float64", "Int", "Int32", "Key", "Shaped", "UInt8", "UInt32"}
# With a capital, for a last word of small letters is a word. Where a name is annotated as an array, a single small letter is a suffix too.
SUFFIX = re.compile(r"_?[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")
SUFFIX_OF_ARRAY = re.compile(r"_?[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*|[a-z])")
UNNAMED = ("*B", "...", "_")


def glossary(text: str) -> dict[str, str]:
    """The letters of a docstring's table and their meanings."""
    entries = re.findall(r"^([A-Za-z]) {5}(\S.*)$", text, re.MULTILINE)
    letters = [letter for letter, _ in entries]
    assert len(set(letters)) == len(letters), f"the glossary has a letter twice: {sorted(letters)}"
    return dict(entries)


GLOSSARY = glossary(l4jax.model.__doc__ or "")


def names(tree: ast.AST) -> Iterator[str]:
    """Every variable, parameter and attribute of a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name


def shapes(annotation: ast.AST) -> Iterator[str]:
    """The shapes in an annotation: "B T" of ``Float[Array, "B T"] | None``."""
    for node in ast.walk(annotation):
        match node:
            case ast.Subscript(value=ast.Name(id=kind), slice=ast.Tuple(elts=[_, ast.Constant(value=str(shape))])) if kind in ARRAY_TYPES:
                yield shape


def arrays(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Parameters and fields that are annotated with one shape, and the shape."""
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name, annotation=ast.AST() as annotation) | ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                found = list(shapes(annotation))
                if len(found) == 1:
                    yield name, found[0]


def letters(source: str) -> dict[str, str]:
    """The letters that a module uses, each with a name or shape that has it."""
    tree = ast.parse(source)
    used = {letter: name for name in names(tree) if (match := SUFFIX.fullmatch(name)) for letter in match[1]}
    used |= {part: f'"{shape}"' for shape in shapes(tree) for part in shape.split() if part not in UNNAMED}
    return {letter: user for letter, user in used.items() if not letter.isdigit()}


def disagreements(source: str) -> list[str]:
    """Names whose suffix is not the shape that they are annotated with; ``*B`` agrees with any leading letters."""
    wrong = []
    for name, shape in arrays(ast.parse(source)):
        match = SUFFIX_OF_ARRAY.fullmatch(name)
        pattern = "".join({"*B": "[A-Za-z0-9]*", "...": ".*", "_": "."}.get(part, part) for part in shape.split())
        if match and not re.fullmatch(pattern, match[1]):
            wrong.append(f'{name}: "{shape}"')
    return wrong


def test_every_letter_is_in_the_glossary():
    unknown = {
        f"{file.relative_to(ROOT)}: {letter} in {user}"
        for file in FILES
        for letter, user in letters(file.read_text(encoding="utf-8")).items()
        if letter not in GLOSSARY
    }
    assert not unknown, f"write a line for the letter in l4jax/model/__init__.py, or use one that is there: {sorted(unknown)}"


def test_every_letter_of_the_glossary_is_used():
    used = {letter for file in FILES for letter in letters(file.read_text(encoding="utf-8"))}
    assert set(GLOSSARY) - used == set()


def test_suffixes_and_annotations_agree():
    wrong = [f"{file.relative_to(ROOT)}: {entry}" for file in FILES for entry in disagreements(file.read_text(encoding="utf-8"))]
    assert not wrong, wrong


def test_a_letter_is_explained_once():
    with pytest.raises(AssertionError, match="twice"):
        glossary("B     rows\nT     tokens\nB     blocks")


def test_a_letter_is_found_wherever_it_is_used():
    source = 'def f(x_YT: Float[Array, "Y T"]) -> Int32[Array, "Q"] | None:\n    return g.best_Z[x_YT], h(left_X=1), top_k, _LIMIT\n'
    assert letters(source) == {"Y": '"Y T"', "T": '"Y T"', "Q": '"Q"', "Z": "best_Z", "X": "left_X"}


@pytest.mark.parametrize(
    ("name", "shape", "agree"),
    [
        ("x_BTD", "B T D", True),
        ("x_BTD", "*B D", True),
        ("token_BT", "B t", False),
        ("sizes_e", "e", True),
        ("sizes_e", "E", False),
        ("x_BTD", "B D", False),
        ("kv_2BSKh", "2 B S K h", True),
        ("x", "B T", True),
    ],
)
def test_a_suffix_that_is_not_the_annotation_is_found(name, shape, agree):
    assert disagreements(f'def f({name}: Float[Array, "{shape}"]): ...') == ([] if agree else [f'{name}: "{shape}"'])
