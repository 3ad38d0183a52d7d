"""Whole models against transformers: the goldens in ``tests/golden``, converted, loaded and run in every way there is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import l4jax
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.store import open_checkpoint
from l4jax.parallel.placement import Placement
from sharding.mesh import ONE_DEVICE
from tests.tiny import with_options

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = [
    (folder.name, config.stem.removeprefix("config"))
    for folder in sorted((GOLDEN / "data").iterdir())
    for config in sorted(folder.glob("config*.json"))
]
TOLERANCE = 2e-5
"""Of the largest logit. What is measured is below 1e-5; a mistake in the mathematics moves the logits by more than 1e-2."""


class Parity:
    """A converted golden: its checkpoint, its sequences and the logits they should have."""

    def __init__(self, name: str, variant: str, work: Path) -> None:
        folder = GOLDEN / "data" / name
        source = work / "hf"
        source.mkdir()
        for file in folder.glob("model*"):
            shutil.copy(file, source)
        shutil.copy(folder / f"config{variant}.json", source / "config.json")
        self.checkpoint = work / "converted"
        convert(source, self.checkpoint)
        arrays = np.load(folder / f"golden{variant}.npz")
        count = sum(key.startswith("ids_") for key in arrays)
        self.sequences: list[list[int]] = [arrays[f"ids_{i}"].tolist() for i in range(count)]
        self.logits: list[np.ndarray] = [arrays[f"logits_{i}"] for i in range(count)]

    def llm(self, prefill_lengths: Sequence[int]) -> l4jax.LLM:
        """The model, putting prompts in its cache in pieces of these lengths."""
        opened = open_checkpoint(self.checkpoint)
        return l4jax.LLM(opened.config, opened.restore(Placement.on(opened.config, ONE_DEVICE)), prefill_lengths=prefill_lengths)


@pytest.fixture(scope="module")
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    name, variant = request.param
    return Parity(name, variant, tmp_path_factory.mktemp(name + variant))


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> Iterator[list[float]]:
    """The errors seen; the largest is printed once all are there."""
    seen: list[float] = []
    yield seen
    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if terminal is not None and seen:
        with capture.global_and_fixture_disabled():
            terminal.write_line(f"\nlargest error against transformers: {max(seen):.1e} of the largest logit")


def one_by_one(llm: l4jax.LLM, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [logits for sequence in sequences for logits in llm.logits([sequence])]


RUNS: dict[str, tuple[int, Callable[[l4jax.LLM, Sequence[Sequence[int]]], list[np.ndarray]]]] = {
    "whole": (128, one_by_one),
    "pieces": (7, one_by_one),
    "token by token": (1, one_by_one),
    "batch": (128, lambda llm, sequences: llm.logits(sequences)),
}
# Two ways for every model, all four for one of each family; the others run with `make test-all`.
ALL_WAYS = {"scout_chunk16", "llama3"}


@pytest.mark.parametrize(
    ("parity", "run"),
    [
        pytest.param(
            model,
            run,
            marks=() if run in ("pieces", "batch") or "".join(model) in ALL_WAYS else pytest.mark.more_meshes,
            id=f"{''.join(model)}-{run}",
        )
        for model in MODELS
        for run in RUNS
    ],
    indirect=["parity"],
)
def test_logits_equal_transformers_at_every_position(parity: Parity, run: str, errors: list[float]) -> None:
    prefill_length, logits_of = RUNS[run]
    for logits_TV, expected_TV in zip(logits_of(parity.llm((prefill_length,)), parity.sequences), parity.logits, strict=True):
        assert logits_TV.shape == expected_TV.shape
        error_T = np.abs(logits_TV - expected_TV).max(axis=-1) / np.abs(expected_TV).max()
        errors.append(float(error_T.max()))
        assert error_T.max() < TOLERANCE, f"position {int(error_T.argmax())} is off by {error_T.max():.1e} of the largest logit"


@pytest.mark.parametrize("parity", [("scout", ""), ("llama3", "")], ids="".join, indirect=True)
def test_decode_loop_equals_one_pass(parity: Parity) -> None:
    # Ragged rows that cross chunk boundaries at different steps; the prompts alone are shorter than the goldens.
    prompts = [sequence[:n] for sequence, n in zip(parity.sequences, (30, 17, 5), strict=True)]
    llm = l4jax.load(parity.checkpoint)
    completions = llm.generate(prompts, l4jax.SamplingParams(max_tokens=40, temperature=0.0, logprobs=1, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.logprobs is not None
        assert len(completion.token_ids) == len(completion.logprobs) == 40
        logits_TV = llm.logits([prompt + completion.token_ids])[0].astype(np.float64)
        logprobs_SV = (logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True))[len(prompt) - 1 : -1]
        one_pass_S = logprobs_SV[np.arange(40), completion.token_ids]
        np.testing.assert_allclose(one_pass_S, logprobs_SV.max(axis=-1), rtol=0, atol=1e-4)
        np.testing.assert_allclose([entry.logprob for entry in completion.logprobs], one_pass_S, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def smollm2(smollm2_checkpoint: Path) -> l4jax.LLM:
    # All 20 conversations are decoded in two batches, and all but the longest prefilled in one piece: few programs.
    llm = l4jax.load(smollm2_checkpoint, dtype="float32", speculation="off", max_batch=10, prefill_lengths=(102,))
    return with_options(llm, row_buckets=(10,), piece_rows=(1, 10))


@pytest.fixture(scope="module")
def smollm2_golden() -> dict:
    return json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))


def test_smollm2_text_becomes_the_same_tokens(smollm2: l4jax.LLM, smollm2_golden: dict) -> None:
    assert smollm2.tokenizer is not None
    assert smollm2.chat_format is not None
    assert smollm2.tokenizer.encode(smollm2_golden["page"]["text"]) == smollm2_golden["page"]["token_ids"]
    for conversation in smollm2_golden["conversations"]:
        assert smollm2.chat_format.encode(conversation["messages"]) == conversation["token_ids"]


def test_smollm2_greedy_tokens_equal_transformers(smollm2: l4jax.LLM, smollm2_golden: dict) -> None:
    conversations = smollm2_golden["conversations"]
    params = l4jax.SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    completions = smollm2.generate([c["token_ids"] for c in conversations], params)
    # The golden holds no near tie: each of its tokens leads by more than rounding can make up.
    assert [c.token_ids for c in completions] == [c["greedy"] for c in conversations]


def test_smollm2_perplexity_equals_transformers(smollm2: l4jax.LLM, smollm2_golden: dict) -> None:
    page = smollm2_golden["page"]
    logits_TV = smollm2.logits([page["token_ids"]])[0][:-1].astype(np.float64)
    chosen_T = np.take_along_axis(logits_TV, np.asarray(page["token_ids"])[1:, None], axis=-1)[:, 0]
    loss = float(np.mean(np.logaddexp.reduce(logits_TV, axis=-1) - chosen_T))
    perplexity, expected = np.exp(loss), np.exp(page["mean_negative_log_likelihood"])
    assert perplexity == pytest.approx(expected, rel=1e-3)
