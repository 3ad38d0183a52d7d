"""The demo, on the real model; and when it converts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from l4jax import smollm2
from l4jax.checkpoints.source import CheckpointError
from l4jax.cli import demo
from l4jax.data import configs_path


def test_answers_and_says_how_fast(smollm2_checkpoint: Path) -> None:
    code = "import sys, l4jax.cli; sys.exit(l4jax.cli.main(['demo', '--max-tokens=24']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    question, _, answer, *_, tokens, first, memory = done.stdout.splitlines()
    assert question == "> What is the capital of France, and why is it famous?"
    assert answer.startswith("The capital of France is Paris.")
    speeds = r"24 tokens, \d+\.\d tokens/s with speculation, acceptance length (\d\.\d\d); \d+\.\d tokens/s without, "
    speeds += r"(?:the same tokens|the same first \d+ tokens? \(in bfloat16, rounding .*\))"
    found = re.fullmatch(speeds, tokens)
    assert found is not None, tokens
    assert float(found[1]) > 1
    assert re.match(r"first text \d+\.\d s after the command started, ", first)
    assert re.fullmatch(r"peak memory \d\.\d\d GB", memory)


def test_why_only_the_beginning_may_be_the_same_is_said() -> None:
    why = "(then rounding decided between two tokens that were as likely)"
    assert [demo._same_at_first(n) for n in (1, 31)] == [f"the same first 1 token {why}", f"the same first 31 tokens {why}"]


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The destinations of conversions, which make a folder in place of a checkpoint; the user's cache is ``tmp_path``."""
    made: list[Path] = []

    def convert(source: Path, destination: Path, *, target: Path | None = None, speculation: object = None) -> None:
        of_head = source == configs_path() / "drafters" / "smollm2-135m-instruct"
        assert target == tmp_path / "l4jax" / "smollm2-135m-instruct" if of_head else source == tmp_path / "l4jax" / "model.gguf"
        destination.mkdir()
        (destination / "checkpoint.json").touch()
        made.append(destination)

    def open_checkpoint(path: Path) -> None:
        if not (path / "checkpoint.json").exists():
            raise CheckpointError("not a checkpoint")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "fetch", lambda cache: cache / "model.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "open_checkpoint", open_checkpoint)
    monkeypatch.setattr(smollm2, "open_drafter", open_checkpoint)
    return made


def test_converts_once(tmp_path: Path, conversions: list[Path]) -> None:
    checkpoint = tmp_path / "l4jax" / "smollm2-135m-instruct"
    assert smollm2.ensure_checkpoint() == checkpoint
    assert smollm2.ensure_checkpoint() == checkpoint
    assert conversions == [checkpoint, checkpoint / "drafter"]


def test_a_drafter_of_another_head_is_made_again(tmp_path: Path, conversions: list[Path]) -> None:
    drafter = smollm2.ensure_checkpoint() / "drafter"
    (drafter / "head.sha256").write_text("another")
    smollm2.ensure_checkpoint()
    assert conversions[2:] == [drafter]


def test_a_checkpoint_that_does_not_open_is_made_again(tmp_path: Path, conversions: list[Path]) -> None:
    checkpoint = tmp_path / "l4jax" / "smollm2-135m-instruct"
    (checkpoint / "weights").mkdir(parents=True)
    smollm2.ensure_checkpoint()
    assert conversions == [checkpoint, checkpoint / "drafter"]
    assert not (checkpoint / "weights").exists()
