"""``l4jax show`` on each kind of thing that it takes."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from l4jax.checkpoints.convert import convert
from l4jax.cli import show
from l4jax.data import configs_path
from tests.text import small

GOLDEN = Path(__file__).parent.parent / "golden" / "data"


def output(capsys: pytest.CaptureFixture[str], checkpoint: str | Path, *options: str) -> str:
    parser = argparse.ArgumentParser()
    show.register(parser.add_subparsers())
    arguments = parser.parse_args(["show", str(checkpoint), *options])
    assert arguments.run(arguments) == 0
    return capsys.readouterr().out


def cells(text: str) -> dict[str, list[str]]:
    """Each line's columns, which two spaces part, by the first."""
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines() if "  " in line]
    return {row[0]: row[1:] for row in rows}


def test_a_shipped_configuration_by_name_or_path(capsys: pytest.CaptureFixture[str]) -> None:
    by_name = output(capsys, "llama-4-maverick-17b-128e")
    assert by_name == output(capsys, configs_path() / "models" / "llama-4-maverick-17b-128e.json")
    rows = cells(by_name)
    assert rows["parameters"] == ["400,711,848,960"]
    assert rows["rope_theta"] == ["500000.0", "config.json: text_config.rope_theta"]
    assert rows["rope_layers"] == ["(true, true, true, false) x 12", "config.json: text_config.no_rope_layers"]
    assert rows["moe.moe_layers"] == ["(false, true) x 24", "config.json: text_config.moe_layers"]
    assert rows["eos_token_ids"] == ["200001, 200007, 200008", "config.json: text_config.eos_token_id"]
    assert rows["rope_scaling"] == ["none", "config.json: text_config.rope_scaling"]


def test_a_source_that_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.write(Path(shutil.copytree(GOLDEN / "multimodal", tmp_path / "source")), bos_token="<|im_start|>", add_bos_token=True)
    rows = cells(output(capsys, folder))
    assert rows["format"] == ["hf, not converted"]
    assert rows["vision parameters"] == ["19,008"]
    assert rows["dtypes as read"] == ["float32 (87 tensors)"]
    assert rows["tokenizer"] == [f"{small.backend().get_vocab_size()} tokens, 4 of them special"]
    assert rows["begin token"] == ["2 <|im_start|>, put before a plain prompt"]
    assert rows["chat template"] == ["built-in chatml template"]
    assert rows["end of a turn"] == ["3 <|im_end|>"]
    assert rows["vision.image_size"] == ["28", "config.json: vision_config.image_size"]


def test_a_converted_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(GOLDEN / "scout", tmp_path / "scout")
    capsys.readouterr()
    rows = cells(output(capsys, tmp_path / "scout"))
    assert rows["format"] == ["l4jax checkpoint, converted from hf"]
    assert rows["tokenizer"] == ["none"]
    assert "vision parameters" not in rows
    # What was read from the source is still known.
    assert rows["attention_chunk_size"] == ["8", "config.json: attention_chunk_size"]


def test_the_programs_of_a_converted_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(GOLDEN / "scout", tmp_path / "scout")
    capsys.readouterr()
    text = output(capsys, tmp_path / "scout", "--programs", "--max-batch", "1", "--dtype", "float32")
    lines = [line.split("  ") for line in text[text.index("Programs\n") :].splitlines()]
    found = [(line[0], next((cell.strip() for cell in line[1:] if cell), "")) for line in lines[2:] if len(line) > 1]
    kinds = [("update_slots", "unknown"), ("count", "unknown"), ("mask", "unknown"), ("zero_pages", "unknown"), ("decode", "1 row")]
    pieces = [(kind, f"1 row of {length} tokens") for kind in ("prefill", "score") for length in (32, 128, 512)]
    assert sorted(found) == sorted([*kinds, *pieces])
    assert "11 programs" in text
    assert " ".join(lines[1]).split() == ["kind", "sizes", "code", "temporaries", "arguments", "donated", "results"]
    decode = next([cell.strip() for cell in line if cell] for line in lines[2:] if line[0] == "decode")
    code, _, arguments, donated, _ = decode[2:]
    # On CPUs XLA says nothing of a program's code. The cache comes back in its own memory, the weights do not.
    assert code == "unknown" and 0 < float(donated.removesuffix(" MB")) < float(arguments.removesuffix(" MB"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama-3.1-8b", ["--programs"], r"^--programs with llama-3\.1-8b; expected the folder of a model that l4jax convert made$"),
        ("llama-3.1-8b", ["--max-batch", "2"], "^--mesh, --dtype and --max-batch need --programs; add it or leave them out$"),
    ],
)
def test_programs_are_those_of_a_converted_model(name: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        output(capsys, name, *options)
    assert capsys.readouterr().out == ""


def test_one_source_that_is_missing_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a field that is newer than the checkpoint."""
    convert(GOLDEN / "scout", tmp_path / "scout")
    manifest = json.loads((tmp_path / "scout" / "checkpoint.json").read_text())
    manifest["config"]["sources"] = [pair for pair in manifest["config"]["sources"] if pair[0] != "hidden_size"]
    (tmp_path / "scout" / "checkpoint.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    rows = cells(output(capsys, tmp_path / "scout"))
    assert rows["hidden_size"][1] == "unknown"
    assert rows["attention_chunk_size"] == ["8", "config.json: attention_chunk_size"]


def test_a_tokenizer_that_cannot_be_used_does_not_hide_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    (folder / "tokenizer.json").write_text("{")
    rows = cells(output(capsys, folder))
    assert rows["tokenizer"][0].startswith("not usable: ")
    assert rows["tie_word_embeddings"] == ["true", "config.json: tie_word_embeddings"]


def test_on_a_terminal_it_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    text = output(capsys, "smollm2-135m-instruct")
    assert "134,515,008" in text
    assert any("rope_theta" in line and "config.json: rope_theta" in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer in place of the file"),
        ("[]", "holds a list"),
        (json.dumps({"architectures": ["GPT2LMHeadModel"]}), "is not supported"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        output(capsys, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("llama-3.1-8", r"\(did you mean llama-3\.1-8b or .*\?\)$"),
        ("nosuch", r"\(llama-3\.1-405b, .*, smollm2-135m-instruct\)$"),
        ("meta-llama/Llama-3.1-8B", r"\(did you mean llama-3\.1-8b or .*\?\)\. If it is a model on the Hugging Face hub, fetch it first"),
    ],
)
def test_nothing_there(name: str, choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = r"expected the folder of a converted checkpoint, what l4jax convert reads, a config\.json, or the name of a shipped "
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} does not exist.*; {expected}configuration .*{choice}"):
        output(capsys, name)


def test_one_tensor_is_not_called_tensors() -> None:
    assert show._counts(["float32", "bfloat16", "bfloat16"]) == "bfloat16 (2 tensors), float32 (1 tensor)"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "\xff"}'])
def test_a_damaged_manifest_says_to_make_it_again(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(GOLDEN / "scout", tmp_path / "scout")
    (tmp_path / "scout" / "checkpoint.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"checkpoint\.json .*; check the file, or make the checkpoint again$"):
        output(capsys, tmp_path / "scout")
