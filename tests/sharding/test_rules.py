"""Shardings from logical axes, for the weights of the real models."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from l4jax.config_formats import config_from_hf
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs
from sharding.mesh import AXES, MeshSpec
from sharding.rules import RULES, check_divides, sharding

MODELS = Path(__file__).parents[2] / "configs" / "models"


def weights_of(model):
    return weight_specs(Llama(config_from_hf(json.loads((MODELS / f"{model}.json").read_text()))))


def abstract(text):
    return AbstractMesh(MeshSpec.parse(text).sizes, AXES)


@pytest.mark.parametrize(
    ("model", "mesh", "share"),
    [
        ("llama-4-scout-17b-16e-instruct", "tensor=8", 0.13),
        ("llama-4-scout-17b-16e-instruct", "expert=2,tensor=4", 0.15),
        ("llama-4-maverick-17b-128e-instruct", "expert=8,tensor=2", 0.09),
        ("llama-3.1-405b", "tensor=8", 0.13),
        ("llama-3.1-8b", "data=2,sequence=4", 1.0),
    ],
)
def test_each_device_has_its_share_of_a_real_model(model, mesh, share):
    mesh = abstract(mesh)
    specs = weights_of(model)
    held = sum(math.prod(sharding(mesh, *spec.axes).shard_shape(spec.shape)) for name, spec in specs.items())
    assert held <= share * sum(spec.size for spec in specs.values())


def test_every_logical_axis_of_the_model_has_a_rule():
    for model in ("llama-4-scout-17b-16e-instruct", "smollm2-135m-instruct"):
        assert {axis for spec in weights_of(model).values() for axis in spec.axes} - {None} <= RULES.keys()


def test_an_axis_of_one_device_cuts_nothing():
    assert sharding(abstract("sequence=4"), "vocab", "embed").spec == PartitionSpec()
    assert sharding(abstract("tensor=4"), "expert", "feed_forward", "embed").spec == PartitionSpec(None, "tensor")


def test_arrays_lie_as_said():
    mesh = MeshSpec(expert=2, tensor=4).build()
    array = jax.device_put(np.arange(64).reshape(2, 8, 4), sharding(mesh, "expert", "feed_forward", "embed"))
    assert {shard.data.shape for shard in array.addressable_shards} == {(1, 2, 4)}


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        (
            (3, 5, 64),
            ("kv_heads", None, "head_dim"),
            "w has 3 along kv_heads, which mesh axis tensor=2 does not divide; tensor may be 1, 3$",
        ),
        ((4, 4), ("vocab",), "w has 2 dimensions and 1 logical axes"),
        ((4, 4), ("vocab", "feed_forward"), "would be cut twice along one mesh axis"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(shape, axes, message):
    with pytest.raises(ValueError, match=message):
        check_divides("w", shape, axes, MeshSpec(tensor=2))
