"""The sampler compiled for an H100: how often it goes over the vocabulary, and where it makes its noise."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

from l4jax.decoding.params import SamplingParams
from l4jax.decoding.sampling import TokenCounts, sample
from l4jax.planning.target import h100_devices
from tests.decoding.rows import sampling_rows

pytestmark = pytest.mark.h100

B, V = 8, 202048


@functools.cache
def compiled():
    """The program's text, for logits of 8 rows over Llama 4's vocabulary."""
    on_it = jax.sharding.SingleDeviceSharding(h100_devices(1)[0])
    every = [SamplingParams()] * B
    counts = TokenCounts(np.zeros((B, V), np.bool_), np.zeros((B, V), np.int32))
    arguments = (np.zeros((B, V), np.float32), sampling_rows(every, range(B), [[]] * B, V), counts, np.zeros(B, np.int32))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_it), arguments)

    return jax.jit(sample).lower(*abstract).compile().as_text()


def computations(text):
    """Each computation's lines, by its name; "ENTRY" is the program."""
    found = re.findall(r"^(ENTRY |)%(\S+) [^\n]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    return {"ENTRY" if entry else name: body.splitlines() for entry, name, body in found}


def elements(shape):
    return max(int(np.prod([int(n) for n in size.split(",") if n])) for size in re.findall(r"\w+\[([\d,]*)\]", shape))


def branch(bodies, name):
    """The lines of a branch of the sampler: "false" if all rows are greedy, "true" if a row is not."""
    (conditional,) = (line for line in bodies["ENTRY"] if " conditional(" in line)
    return bodies[re.search(rf"{name}_computation=%([^,\s]+)", conditional)[1]]


def passes(bodies, lines):
    """Fusions outside loops that write an array as large as the logits, or reduce one; and the elements of each one's result."""
    found = {}
    for line in lines:
        match = re.match(r"\s*(?:ROOT )?%\S+ = (\([^=]*?\)|\S+) fusion\(.*?\), .*calls=%(\S+?)[,\s]", line + " ")
        if match is None:
            continue
        body = "\n".join(bodies[match[2]])
        shapes = dict(re.findall(r"%(\S+) = (\([^=]*?\)|\S+) ", body))
        reduced = [elements(shapes[operand]) for operand in re.findall(r" reduce\(%([^\s,)]+)", body)]
        if max(elements(match[1]), *reduced, 0) >= B * V:
            found[match[2]] = elements(match[1])
    return found


def test_noise_is_made_in_the_pass_that_takes_the_maximum():
    """Four passes: the highest logit, the weights, their sum, and the highest perturbed logit. (The inverse CDF took five.)"""
    bodies = computations(compiled())
    drawn = branch(bodies, "true")
    found = passes(bodies, drawn)
    assert len(found) <= 4
    # Threefry's 13 rounds, for every token: in one of the passes, which writes no noise to memory.
    noisy = [name for name in found if sum(" xor(" in line for line in bodies[name]) > 10]
    assert len(noisy) == 1 and found[noisy[0]] < B * V / 100
    assert not any(" xor(" in line and f",{V}]" in line for line in drawn)


def test_greedy_rows_need_one_pass():
    bodies = computations(compiled())
    assert len(passes(bodies, branch(bodies, "false"))) == 1
