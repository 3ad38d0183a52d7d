"""Training on a mesh, and what a trained drafter is worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from l4jax import LLM, SamplingParams
from l4jax.decoding.plan import Speculation, SpeculationTable
from l4jax.speculator import LoadedDrafter
from l4jax.training.batches import batch, draft_vocabulary, pack, take
from l4jax.training.drafters import Version, first_weights
from l4jax.training.evaluate import replay
from tests.training import small


@pytest.fixture(scope="module")
def target() -> LLM:
    return small.target()


@pytest.mark.parametrize("version", ["eagle3", "eagle1"])
def test_two_devices_learn_what_one_does(version: Version, target: LLM) -> None:
    losses, weights = [], []
    examples = small.answered(target, (3, 6, 2, 9, 5, 4, 7), 8)
    for llm in (target, small.target("data=2")):
        ids = draft_vocabulary(examples, 6) if version == "eagle3" else np.arange(llm.config.vocab_size, dtype=np.int32)
        trainer = small.trainer(llm, version, ids)
        state = trainer.first_state(small.random_drafter(trainer))
        rows = pack(examples, small.LENGTH, seed=0)
        for step in range(3):
            part = batch(rows, 4, step, seed=0)
            state, (loss, _) = trainer.step(state, part, trainer.target_states(part), step)
            losses.append(float(loss))
        weights.append(trainer.weights(state))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weights[1][name], weight, atol=1e-4, err_msg=name)


def test_begins_with_residual_streams_of_one_size(target: LLM) -> None:
    ids = np.arange(6, dtype=np.int32)
    trainer = small.trainer(target, "eagle3", ids)
    count, width = len(trainer.config.aux_layers), trainer.config.target_hidden_size
    feature_Mf = np.random.default_rng(0).normal(size=(64, count, width)) * np.array([0.1, 1.0, 30.0])[:, None]
    feature_Mf[0] *= 1000.0  # as the first token of a sequence has it
    weights = first_weights(trainer.config, {"token_ids": ids}, feature_Mf.reshape(64, -1), seed=0)
    read_NID = np.einsum("niw,diw->nid", feature_Mf, np.asarray(weights["fuse"]).reshape(-1, count, width))
    sizes_I = np.sqrt(np.median(np.mean(read_NID**2, axis=-1), axis=0))
    np.testing.assert_allclose(sizes_I, sizes_I[0], rtol=0.2)  # of a random projection


def test_all_bits_of_a_seed_count(target: LLM) -> None:
    trainer = small.trainer(target, "eagle3", np.arange(6, dtype=np.int32))
    feature_Mf = np.ones((1, len(trainer.config.aux_layers) * trainer.config.target_hidden_size))
    drawn = [np.asarray(first_weights(trainer.config, {}, feature_Mf, seed)["head"]) for seed in (1, 1 + 2**32, 1 + 2**63, 2**64 - 1)]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_learns_a_few_answers_by_heart_and_real_speculation_shows_it(target: LLM) -> None:
    depth = 2
    llm = target
    examples = small.answered(llm, (3, 6, 2, 9), 1 + 4 * (1 + depth))
    ids = draft_vocabulary(examples, len({token for example in examples for token in example.answer or ()}))
    trainer = small.trainer(llm, "eagle3", ids, passes=depth, steps=100)
    rows = pack(examples, small.LENGTH, seed=0)
    every = take(rows, np.arange(len(rows.number_B)), 4)
    feature_Mf = np.asarray(trainer.target_states(every).feature_BTf).reshape(4 * small.LENGTH, -1)
    state = trainer.first_state(first_weights(trainer.config, {"token_ids": ids}, feature_Mf, seed=0))
    untrained = replay(trainer, state, rows, 4, depth)
    for step in range(100):
        state, _ = trainer.step(state, every, trainer.target_states(every), step)
    simulated = replay(trainer, state, rows, 4, depth)
    assert untrained.acceptance_length < 2.0 and simulated.acceptance_length > 1 + 0.9 * depth

    drafter = LoadedDrafter(trainer.config, trainer.weights(state), SpeculationTable.always(Speculation.parse(f"chain:{depth}")))
    speculating = LLM(llm.config, llm.weights, drafter=drafter)
    params = SamplingParams(max_tokens=len(examples[0].answer or ()), temperature=0.0)
    completions = speculating.generate([example.prompt for example in examples], params)
    assert [tuple(c.token_ids) for c in completions] == [example.answer for example in examples]
    rounds, accepted = sum(c.stats.rounds for c in completions), np.sum([c.stats.accepted for c in completions], axis=0)
    assert rounds == simulated.rounds
    # Speculation also counts what is accepted after an answer's end.
    assert 1 + accepted.sum() / rounds == pytest.approx(simulated.acceptance_length, abs=0.2)
