"""``l4jax generate`` on the real model."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from l4jax import cli

PROMPT = "The capital of France is"
ANSWER = " Paris.\n\nThe answer\n"


# With the drafter in its folder; and without, over three devices.
@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        pytest.param(["--dtype", "float32"], r"; [1-5] rounds of speculation, acceptance length [1-3]\.\d\d", id="one device"),
        pytest.param(["--speculation", "off", "--mesh", "tensor=3"], "", id="mesh", marks=pytest.mark.more_meshes),
    ],
)
def test_continues_a_prompt_and_says_how_fast(
    smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], rounds: str
) -> None:
    assert cli.main(["generate", str(smollm2_checkpoint), "-p", PROMPT, "--max-tokens", "6", *options]) == 0
    out, err = capsys.readouterr()
    assert out == ANSWER
    said = r"5 prompt tokens, first token after \d+\.\d\d s; 6 tokens, \d+\.\d tokens/s; finished by length, seed \d+"
    assert re.fullmatch(said + rounds + "\n", err)


def test_answers_a_question_from_standard_input_up_to_a_stop_string(
    smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?"))
    command = [
        "generate",
        str(smollm2_checkpoint),
        "-p",
        "-",
        "--chat",
        "--system",
        "You are a helpful AI assistant.",
        "--stop",
        "Paris",
        "--seed",
        "1",
    ]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith("is") and "Paris" not in out
    assert "finished by stop, seed 1" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "x", "--system", "y"], "--system needs --chat"),
        (["-p", "x", "--chat-template-kwargs", "{}"], "--chat-template-kwargs needs --chat"),
        (["-p", "x", "--chat", "--chat-template-kwargs", "{"], "--chat-template-kwargs is not valid JSON"),
        (["-p", "x", "--chat", "--chat-template-kwargs", "[" * 100_000], "--chat-template-kwargs is not valid JSON"),
        (["-p", "x", "--chat", "--chat-template-kwargs", "[]"], "--chat-template-kwargs is a list; expected a JSON object"),
        (["-p", "x", "--chat", "--chat-template-kwargs", '{"tone": 1}'], "the chat template does not use tone; leave it out"),
        (["-p", "x", "--process-id", "0"], "--processes, --process-id and --coordinator-timeout need --coordinator HOST:PORT"),
        (["-p", "x", "--coordinator-timeout", "5"], "--processes, --process-id and --coordinator-timeout need --coordinator HOST:PORT"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "x", "--temperature", "-1"], "temperature is -1.0; expected 0 (greedy) or a positive number"),
        (["-p", "x", "--max-tokens", "0"], "max_tokens is 0; expected an integer of at least 1"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["generate", str(smollm2_checkpoint), *options]) != 0
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_one_token_is_not_called_tokens(smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(smollm2_checkpoint), "-p", PROMPT, "--max-tokens", "1"]) == 0
    assert " s; 1 token, " in capsys.readouterr().err


def test_a_standard_input_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with os.fdopen(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)) as for_writing:
        monkeypatch.setattr("sys.stdin", for_writing)
        assert cli.main(["generate", "no-such-checkpoint", "-p", "-"]) == 2
    assert capsys.readouterr().err == "l4jax: error: standard input cannot be read (Bad file descriptor); expected the prompt\n"
