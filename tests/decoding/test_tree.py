"""Draft trees: what may be one, and the tables made of it."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from l4jax.data import configs_path
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.decoding.tree import NONE, DynamicTree, StaticTree, tree_tables

compiled_tables = jax.jit(tree_tables, static_argnums=1)


def tables(parents, depth):
    return jax.tree.map(np.asarray, compiled_tables(np.asarray([parents], np.int32), depth))


def test_the_tables_of_a_small_tree():
    """0 has the children 1 and 2; 1 has 3 and 4; 2 has 5; 5 has 6."""
    found = tables((-1, 0, 0, 1, 1, 2, 5), 3)
    assert found.depth_BN[0].tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert found.first_child_BN[0].tolist() == [1, 3, 5, -1, -1, 6, -1]
    assert found.next_sibling_BN[0].tolist() == [-1, 2, -1, 4, -1, -1, -1]
    assert found.sees_BNN[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1, 1],
    ]


@hypothesis.given(st.integers(1, 12).flatmap(lambda n: st.tuples(*(st.integers(0, i) for i in range(n)))))
def test_tables_of_any_tree(parents):
    """``parents`` of the nodes but the root, each lower than its child."""
    parents = (NONE, *parents)
    found = tables(parents, len(parents) - 1)
    for node in range(len(parents)):
        way = [node]
        while way[-1] != 0:
            way.append(parents[way[-1]])
        children = [n for n, parent in enumerate(parents) if parent == node]
        assert np.flatnonzero(found.sees_BNN[0, node]).tolist() == sorted(way)
        assert found.depth_BN[0, node] == len(way) - 1
        listed = []
        child = int(found.first_child_BN[0, node])
        while child != NONE:
            listed.append(child)
            child = int(found.next_sibling_BN[0, child])
        assert listed == children


def test_the_tree_of_eagle_has_26_nodes():
    tree = StaticTree.from_file(configs_path() / "trees" / "eagle26.json")
    assert (tree.size, tree.depth) == (26, 5)
    assert [tree.depths.count(d) for d in range(6)] == [1, 4, 8, 8, 3, 2]


def test_a_chain_is_a_tree():
    assert StaticTree.chain(3) == StaticTree.from_paths([[0], [0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], r"tree path \[1, 0\] is an orphan; expected its parent \[1\] in the tree"),
        ([[0], [1], [0]], r"tree path \[0\] is given twice; expected each path once"),
        ([[0], [2]], r"tree path \[2\] is out of range; expected its better sibling \[1\] in the tree"),
        ([[0], [-1]], r"tree path \[-1\] is out of range; expected at least one rank, each a whole number of 0 or more"),
        ([[0], []], r"tree path \[\] is out of range; expected at least one rank"),
        ([[0], [0.5]], r"tree path \[0.5\] is out of range"),
        ([[0], [True]], r"tree path \[True\] is out of range"),
    ],
)
def test_what_is_no_tree_is_refused_with_its_file(paths, message, tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(paths))
    with pytest.raises(ValueError, match=f"tree.json: {message}"):
        StaticTree.from_file(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "holds no list of paths"),
        ('{"a": 1}', "holds no list of paths"),
        ("[1]", "holds no list of paths"),
    ],
)
def test_a_file_without_a_tree_is_refused(text, message, tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        StaticTree.from_file(file)


def test_plans_as_text():
    assert Speculation.parse("off") is None
    assert Speculation.parse("chain:5") == Speculation(StaticTree.chain(5))
    assert Speculation.parse("chain:5,sampled") == Speculation(StaticTree.chain(5), sampled=True)
    eagle = Speculation.parse("tree:eagle26")
    assert eagle is not None and eagle.tree.size == 26
    assert Speculation.parse("dynamic:steps=5,topk=4,nodes=16") == Speculation(DynamicTree(5, 4, 16))


@pytest.mark.parametrize("text", ["chain:5", "chain:2,sampled", "tree:eagle26", "tree:eagle26,sampled", "dynamic:steps=5,topk=4,nodes=16"])
def test_a_plan_is_printed_as_it_is_given(text):
    assert str(Speculation.parse(text)) == text


def test_a_tree_without_a_name_is_told_from_others_of_its_size(tmp_path):
    one, two = StaticTree.from_paths([[0], [1], [0, 0]]), StaticTree.from_paths([[0], [1], [1, 0]])
    assert [str(tree) for tree in (one, two)] == ["tree with parents 0, 0, 1", "tree with parents 0, 0, 2"]
    (tmp_path / "own.json").write_text("[[0], [1], [1, 0]]")
    named = Speculation.parse(f"tree:{tmp_path}/own.json").tree
    assert str(named) == f"tree:{tmp_path}/own.json" and named == two != one and hash(named) == hash(two)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain", 'speculation is \'chain\'; expected "auto", "off", "chain:5"'),
        ("chain:0", "speculation is 'chain:0'"),
        ("chain:x", "speculation is 'chain:x'"),
        ("tree:nothing", "nothing.json does not exist"),
        ("dynamic:steps=5,topk=4", "speculation is 'dynamic:steps=5,topk=4'"),
        ("dynamic:steps=2,topk=2,nodes=8", "nodes=8; expected 2 to 7, which is what steps=2 and topk=2 can draft"),
        ("dynamic:steps=0,topk=2,nodes=3", "steps=0; expected at least 1"),
        ("dynamic:steps=5,topk=4,nodes=16,sampled", "cannot be sampled: its nodes are chosen by their probability after they are drawn"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Speculation.parse(text)


def test_the_table_chooses_by_rows():
    table = SpeculationTable.from_json({"bfloat16": {"8": "off", "1": "chain:5", "4": "chain:2"}}, "bfloat16")
    assert [table.at(n) for n in (1, 3)] == [Speculation(StaticTree.chain(5))] * 2
    assert [table.at(n) for n in (4, 7)] == [Speculation(StaticTree.chain(2))] * 2
    assert table.at(8) is None and table.at(100) is None
    assert SpeculationTable.from_json({"float32": {"2": "chain:3"}}, "float32").at(1) == Speculation(StaticTree.chain(3))
    assert SpeculationTable.from_json({"float32": {"2": "chain:3"}}, "bfloat16").at(2) is None
    for values, message in (
        ({"float32": {}}, "has 'float32': {}; expected dtypes"),
        ({"1": "off"}, "has '1': 'off'; expected dtypes"),
        ({"float32": {"x": "off"}}, "has 'x': 'off'; expected numbers of rows"),
        ({"float32": {"1": 5}}, "has '1': 5"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculationTable.from_json(values, "float32")
