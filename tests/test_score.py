"""Log-probabilities of prompts: those of the logits, in pieces, on meshes, beside other requests; and no logits reach the host."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from l4jax import LLM, SamplingParams
from l4jax.engine import results
from l4jax.engine.scores import ScoresHandle
from l4jax.request import TokenLogprob
from tests.tiny import llama3_like, prompts, scout_like, shallow, weights

DENSE, SCOUT = shallow(llama3_like()), shallow(scout_like())
LENGTHS = (1, 2, 31, 32, 33, 75)


def expected(logits_TV: np.ndarray, prompt: list[int], top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the prompt's tokens after the first: their log-probabilities, and the likeliest tokens' with their ids."""
    logprob_TV = log_softmax(logits_TV[:-1].astype(np.float64), axis=-1)
    order_TV = np.argsort(-logprob_TV, axis=-1, kind="stable")[:, :top]
    return logprob_TV[np.arange(len(prompt) - 1), prompt[1:]], np.take_along_axis(logprob_TV, order_TV, axis=-1), order_TV


def check(found: list[TokenLogprob], logits_TV: np.ndarray, prompt: list[int], top: int) -> None:
    own_T, top_Tj, id_Tj = expected(logits_TV, prompt, top)
    assert len(found) == len(prompt) - 1
    # Float32's log-softmax over 64 to 96 tokens: some 1e-7 a value.
    np.testing.assert_allclose([one.logprob for one in found], own_T, atol=2e-6)
    if top:
        np.testing.assert_allclose(np.reshape([[value for _, value in one.top] for one in found], (-1, top)), top_Tj, atol=2e-6)
        assert [[token for token, _ in one.top] for one in found] == id_Tj.tolist()


@pytest.mark.parametrize(
    ("config", "mesh"), [(DENSE, "tensor=1"), (SCOUT, "tensor=2"), (SCOUT, "data=2,sequence=2"), (DENSE, "data=2,tensor=2")]
)
def test_they_are_those_of_the_logits(config, mesh):
    llm = LLM(config, weights(config), mesh=mesh, max_batch=4, prefill_lengths=(32,))
    asked = prompts(config, LENGTHS)
    for top in (0, 5):
        found = llm.score(asked, top=top)
        for scores, logits_TV, prompt in zip(found, llm.logits(asked), asked, strict=True):
            check(scores, logits_TV, prompt, top)
    # So on several hosts nothing is left to gather after the program.
    for compiled, _ in llm.engine.runner.programs.score._compiled.values():
        assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(compiled.output_shardings[2]))


def test_beside_other_requests_and_requests_for_logits(monkeypatch):
    llm = LLM(DENSE, weights(DENSE), max_batch=4, prefill_lengths=(32,))
    asked = prompts(DENSE, LENGTHS)
    alone = llm.score(asked, top=3)
    copied = []
    to_host = results.to_host
    monkeypatch.setattr(results, "to_host", lambda array: (copied.append(array.size), to_host(array))[1])
    other = llm.add(asked[3], SamplingParams(max_tokens=20, seed=1))
    assert llm.score(asked, top=3) == alone
    assert copied and max(copied) <= 4 * 32 * 20, "logits were copied to the host"
    assert other.tokens
    # Both kinds of request in one call of the program.
    engine, make = llm.engine, llm.requests
    handles = [engine.add(make.scoring(asked[2], top), ScoresHandle) for top in (None, 3)]
    while llm.step():
        pass
    check(alone[2], logits := handles[0].logits, asked[2], 3)
    assert [id(array) for array in handles[0]._logits] == [id(logits)], "the logits are held twice"
    assert handles[1].logprobs == alone[2]


def test_logits_that_are_not_finite_are_an_error():
    made = weights(DENSE)
    llm = LLM(DENSE, {**made, "embed": made["embed"].at[0].set(np.nan)}, max_batch=1)
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        llm.score([[0, 1, 2]])


@pytest.mark.parametrize("top", [-1, 21, 1.5, "3", True])
def test_a_number_of_alternatives_that_cannot_be_had_is_refused(top):
    llm = LLM(DENSE, weights(DENSE), max_batch=1)
    with pytest.raises(ValueError, match=r"^top is .*; expected a whole number from 0 to 20$"):
        llm.score([[1, 2]], top=top)
