"""What a server's front imports: rooms that take requests and write text, without JAX."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l4jax import SamplingParams
from l4jax.calls import _described
from l4jax.request import Request, RequestMaker
from l4jax.text.load import Text
from tests.tiny import llama3_like

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["l4jax", "l4jax.request", "l4jax.text.output", "l4jax.answer"])
def test_it_imports_no_jax(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted(name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib', 'flax')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_no_more_tokens_may_end_an_answer_than_the_programs_have_room_for() -> None:
    config = llama3_like(vocab_size=128, eos_token_ids=(1, 2))
    maker = RequestMaker(config, Text(None, None), drafts_up_to=math.inf)
    assert len(maker.request([5], SamplingParams(stop_token_ids=range(2, 65))).stop_ids) == 64  # 2 is one of the model's own
    with pytest.raises(ValueError, match="65 tokens would end the answer, the model's own included; expected at most 64; shorten stop_t"):
        maker.request([5], SamplingParams(stop_token_ids=range(3, 66)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"stop_token_ids": range(7)}, {"stop_token_ids": [*range(6), 9]}),
        ({"stop": ["a" * 99]}, {"stop": ["a" * 98 + "b"]}),
        ({"seed": 1}, {}),
    ],
)
def test_what_differs_between_processes_is_named_in_words_that_differ(one: dict[str, Any], other: dict[str, Any]) -> None:
    (name,) = one
    found = [_described(3, Request([1, 2], SamplingParams(**given), 5, ())) for given in (one, other)]
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {f"{name} of prompt 3, counted from 0,"}
