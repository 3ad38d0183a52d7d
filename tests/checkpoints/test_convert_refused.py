"""Conversion and loading of what is broken, or no checkpoint, or in the way: refused in one line that names it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.export import export
from l4jax.checkpoints.partial import unfinished
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import open_checkpoint
from l4jax.cli import main
from tests.checkpoints.folders import GOLDEN, refused, rewrite


def test_truncated_shard(source, tmp_path):
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10)
    assert "is cut off or damaged: it has" in refused(source, tmp_path)


def test_truncated_header(source, tmp_path):
    (source / "model.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{")
    assert "header cannot be read" in refused(source, tmp_path)


def test_empty_shard(source, tmp_path):
    (source / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty (0 bytes); fetch it again" in refused(source, tmp_path)


def test_missing_shard(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama3", source)
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refused(source, tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama3", source)
    first, second = sorted(source.glob("*.safetensors"))
    save_file({**load_file(first), "model.norm.weight": np.zeros_like(load_file(second)["model.norm.weight"])}, first)
    assert "also has tensor model.norm.weight, which the index does not put there" in refused(source, tmp_path)


def test_missing_vision_tensor(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "multimodal", source)
    rewrite(source, lambda tensors: tensors.pop("vision_model.class_embedding"))
    assert "has no tensor vision_model.class_embedding" in refused(source, tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object(text, name, source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / name).write_text(text)
    assert "expected a JSON object" in refused(source, tmp_path)


@pytest.mark.parametrize("weight_map", ["{}", "[]", '{"a": 1}'])
def test_a_broken_index(weight_map, source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    assert "model.safetensors.index.json" in refused(source, tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": []},
        {"a": {"shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
    ],
)
def test_a_broken_header(header, source, tmp_path):
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert "model.safetensors" in refused(source, tmp_path)


def test_a_header_without_end(source, tmp_path):
    text = b"[" * 100_000
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "model.safetensors is truncated or not a safetensors file" in refused(source, tmp_path)


def test_missing_tensor(source, tmp_path):
    rewrite(source, lambda tensors: tensors.pop("model.norm.weight"))
    assert "has no tensor model.norm.weight" in refused(source, tmp_path)


def test_unexpected_tensor(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)}))
    assert "q_proj.bias would be used 0 times" in refused(source, tmp_path)


def test_config_that_disagrees_with_the_tensors(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] += 1
    (source / "config.json").write_text(json.dumps(config))
    assert "model.embed_tokens.weight has shape" in refused(source, tmp_path)


def test_unknown_architecture(source, tmp_path):
    (source / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    assert "MambaForCausalLM" in refused(source, tmp_path)


def test_nan_weights(source, tmp_path):
    rewrite(source, lambda tensors: tensors["model.layers.3.self_attn.o_proj.weight"].__setitem__((0, 0), np.nan))
    assert "layers.3.attention.out" in refused(source, tmp_path)


def test_weights_too_large_for_the_dtype(source, tmp_path):
    rewrite(source, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
    with pytest.raises(CheckpointError, match=r"norm\.scale has values too large for float16"):
        convert(source, tmp_path / "ours", dtype="float16")


def test_destination_that_exists(source, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "precious").read_text() == "mine"


def test_destination_in_use(source, tmp_path):
    with unfinished(tmp_path / "ours", "conversion"), pytest.raises(CheckpointError, match="being written by another process"):
        convert(source, tmp_path / "ours")


def test_what_is_not_ours_is_left_alone(source, tmp_path):
    convert(source, tmp_path / "ours")
    mine = tmp_path / "new.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    for make in (lambda: convert(source, tmp_path / "new"), lambda: export(tmp_path / "ours", tmp_path / "new")):
        with pytest.raises(CheckpointError, match="is in the way"):
            make()
    assert mine.read_text() == "precious"
    with unfinished(tmp_path / "other", "conversion"):
        pass
    with pytest.raises(CheckpointError, match="is an unfinished conversion; finish or remove it"):
        export(tmp_path / "ours", tmp_path / "other")
    with pytest.raises(CheckpointError, match="choose another name"):
        convert(source, tmp_path / "my.partial")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "dangling")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "has no config.json and no consolidated"),
        (lambda path: path.write_bytes(b"hello"), "is a file, and not a GGUF file"),
        (lambda path: path.write_bytes(b"GGUF\x03\0\0\0"), "is cut off or damaged: it has 8 bytes, and needs at least 24; fetch it again"),
        (lambda path: path.write_bytes(b"GGUF\x07" + bytes(19)), "is not a GGUF file, or is damaged (Sorry, file appears to be version 7"),
        (lambda path: path.touch(), "source is empty (0 bytes); fetch it again"),
    ],
)
def test_what_is_no_checkpoint(make, message, tmp_path):
    make(tmp_path / "source")
    assert message in refused(tmp_path / "source", tmp_path)


def test_a_gguf_type_that_nobody_knows(smollm2_gguf, tmp_path):
    gguf_with_type(smollm2_gguf, 99, tmp_path / "other.gguf")
    assert "quantised as type 99, which is unknown; expected one of BF16, " in refused(tmp_path / "other.gguf", tmp_path)


def gguf_with_type(gguf: Path, number: int, path: Path) -> None:
    """A GGUF file with the type of one tensor changed."""
    data = bytearray(gguf.read_bytes())
    name = b"blk.0.attn_k.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, number)
    path.write_bytes(data)


def test_truncated_gguf(smollm2_gguf, tmp_path):
    data = smollm2_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    assert f"is cut off or damaged: it has {len(data) // 2:,} bytes, and needs at least " in refused(tmp_path / "cut.gguf", tmp_path)


def test_unknown_gguf_quantisation(smollm2_gguf, tmp_path):
    # IQ4_NL, whose blocks are of as many values as Q4_1's
    gguf_with_type(smollm2_gguf, 20, tmp_path / "other.gguf")
    assert "blk.0.attn_k.weight is quantised as IQ4_NL" in refused(tmp_path / "other.gguf", tmp_path)


def test_loading_a_source_says_to_convert_it(source):
    with pytest.raises(CheckpointError, match="l4jax convert"):
        open_checkpoint(source)


def test_loading_a_damaged_checkpoint(source, tmp_path, many_groups):
    convert(source, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "weights" / "00004")
    with pytest.raises(CheckpointError, match=r"weights/00004/.* is missing; .* make it again$"):
        open_checkpoint(tmp_path / "ours")


def test_loading_a_truncated_checkpoint(source, tmp_path):
    convert(source, tmp_path / "ours")
    largest(tmp_path / "ours").write_bytes(largest(tmp_path / "ours").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r" bytes; expected \d+; the checkpoint is damaged, make it again$"):
        open_checkpoint(tmp_path / "ours")


def largest(checkpoint: Path) -> Path:
    return max((file for file in (checkpoint / "weights").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_a_changed_byte_is_found(source, tmp_path, capsys):
    convert(source, tmp_path / "ours")
    assert main(["show", str(tmp_path / "ours"), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("every weight is what was written\n")
    data = bytearray(largest(tmp_path / "ours").read_bytes())
    data[1000] ^= 1
    largest(tmp_path / "ours").write_bytes(data)
    assert main(["show", str(tmp_path / "ours"), "--verify"]) == 2
    assert "is not what was written" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is not what was written"):
        export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["weights"].pop("norm.scale"), "no entry that fits weight norm.scale"),
        (lambda manifest: manifest.update(weights=[]), "is damaged"),
        (lambda manifest: manifest.pop("config"), "is damaged"),
        (lambda manifest: manifest.update(format_version=0), "has format version 0"),
    ],
)
def test_a_damaged_manifest(change, message, source, tmp_path):
    convert(source, tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "checkpoint.json").read_text())
    change(manifest)
    (tmp_path / "ours" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "ours")
