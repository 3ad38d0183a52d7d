"""GGUF files: whole, split, of the other byte order, and of what is not a model."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter

from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.open import open_source
from l4jax.checkpoints.store import open_checkpoint
from l4jax.cli import main
from l4jax.text.load import Text, load_text
from tests.checkpoints.folders import GOLDEN, config_of, refused, tensors_of
from tests.checkpoints.gguf_file import write_gguf

CONFIG = config_of(GOLDEN / "llama3")
TENSORS = tensors_of(GOLDEN / "llama3")
TIED = {key: array for key, array in TENSORS.items() if key != "lm_head.weight"}
HALF = list(TENSORS)[: len(TENSORS) // 2]
REST = list(TENSORS)[len(HALF) :]


def part(number: int, count: int):
    """What gguf-split writes into each part."""

    def write(writer: GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(TENSORS))

    return write


def write_split(folder: Path, first: list[str] = HALF) -> list[Path]:
    """A file in two parts, of which only the first describes the model."""
    folder.mkdir()
    names = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    second = [key for key in TENSORS if key not in first]
    write_gguf(names[0], CONFIG, TENSORS, only=first, extra=part(0, 2))
    write_gguf(names[1], CONFIG, TENSORS, only=second, extra=part(1, 2), described=False)
    return names


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of the same model's Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "ours"
    convert(GOLDEN / "llama3", folder)
    return dict(open_checkpoint(folder).weights)


def test_a_file_gives_the_weights_of_the_hugging_face_folder(expected, tmp_path):
    convert(write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS), tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").weights == expected


def test_a_head_beside_the_embedding_is_kept_whatever_it_holds(tmp_path):
    for name, tensors in {"own": TENSORS, "equal": {**TIED, "lm_head.weight": TIED["model.embed_tokens.weight"]}, "none": TIED}.items():
        source = open_source(write_gguf(tmp_path / f"{name}.gguf", CONFIG, tensors))
        assert source.config.tie_word_embeddings == (name == "none")
        if name != "none":
            np.testing.assert_array_equal(source.read("output.weight"), tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("model", "pre", "message"), [("llama", None, "tokenizer.ggml.model is 'llama'"), ("gpt2", "qwen2", "tokenizer.ggml.pre is 'qwen2'")]
)
def test_a_tokenizer_that_is_not_supported_can_be_left_out(model, pre, message, expected, tmp_path, capsys):
    def tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    file = write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, extra=tokenizer)
    refusal = refused(file, tmp_path)
    assert message in refusal and "or convert the weights alone, for a model that takes token ids: --without-tokenizer" in refusal
    assert main(["convert", str(file), str(tmp_path / "ours"), "--without-tokenizer"]) == 0
    assert "is complete and verified" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "ours").weights == expected
    assert load_text(tmp_path / "ours") == Text(None, None)


KINDS = {"F32": None, **{name: getattr(GGMLQuantizationType, name) for name in ("F16", "BF16", "Q8_0", "Q4_0")}}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_read_by_value(kind, tmp_path):
    source = open_source(write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, kind=KINDS[kind]))
    exact = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-6, "Q4_0": 2**-2}[kind]
    for name, key in {"output.weight": "lm_head.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}.items():
        read, written = source.read(name), TENSORS[key]
        assert read.dtype == source.tensors[name].dtype and read.dtype.isnative
        assert np.abs(read.astype(np.float32) - written).max() <= exact * np.abs(written).max()


@pytest.mark.parametrize("kind", [*KINDS, "F32 of bfloat16 values"])
def test_the_other_byte_order_is_refused(kind, tmp_path):
    # Read as little-endian, values of bfloat16 are denormal numbers, all finite.
    values = {key: array.astype(ml_dtypes.bfloat16).astype(np.float32) for key, array in TENSORS.items()} if "of" in kind else TENSORS
    write_gguf(tmp_path / "m.gguf", CONFIG, values, kind=KINDS.get(kind), endian=GGUFEndian.BIG)
    assert "m.gguf is a big-endian GGUF file; expected a little-endian one: fetch that" in refused(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize("first", [HALF, []], ids=["tensors in each part", "no tensors in the first part"])
def test_a_split_file_is_given_by_any_part_or_its_folder(first, expected, tmp_path):
    names = write_split(tmp_path / "parts", first)
    for i, given in enumerate([*names, tmp_path / "parts"]):
        convert(given, tmp_path / f"ours{i}")
        assert open_checkpoint(tmp_path / f"ours{i}").weights == expected


def renamed(names: list[Path]) -> Path:
    return names[1].rename(names[1].with_name("other.gguf"))


def swapped(names: list[Path]) -> Path:
    names[0].rename(names[0].with_name("x"))
    names[1].rename(names[0])
    names[0].with_name("x").rename(names[1])
    return names[0]


def doubled(names: list[Path]) -> Path:
    write_gguf(names[1], CONFIG, TENSORS, only=[*REST, HALF[0]], extra=part(1, 2), described=False)
    return names[0]


def of_another_split(names: list[Path]) -> Path:
    write_gguf(names[1], CONFIG, TENSORS, only=REST[1:], extra=part(1, 2), described=False)
    return names[0]


def whole(names: list[Path]) -> Path:
    write_gguf(names[0], CONFIG, TENSORS)
    return names[0]


def renumbered(number: int, count: int):
    def damage(names: list[Path]) -> Path:
        return names[1].rename(names[1].with_name(f"m-{number:05}-of-{count:05}.gguf"))

    return damage


def without(number: int):
    def damage(names: list[Path]) -> Path:
        names[number].unlink()
        return names[1 - number]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(0), "is one of 2 parts, and m-00001-of-00002.gguf is not beside it; fetch every part"),
        (without(1), "is one of 2 parts, and m-00002-of-00002.gguf is not beside it; fetch every part"),
        (renamed, "other.gguf is part 2 of 2 of a split file; expected a name that ends in -00002-of-00002.gguf, and the other parts"),
        (swapped, "m-00001-of-00002.gguf is part 2 of 2 of a split file; expected a name that ends in -00002-of-00002.gguf"),
        (renumbered(3, 2), "m-00003-of-00002.gguf is named as part 3 of 2, which cannot be; rename it"),
        (renumbered(1, 0), "m-00001-of-00000.gguf is named as part 1 of 0"),
        (whole, "m-00001-of-00002.gguf is a whole GGUF file, named as if it were a part; rename it"),
        (doubled, "which an earlier part has too: they are not parts of one file"),
        (of_another_split, f"have {len(TENSORS) - 1} tensors; expected {len(TENSORS)}: not of one file"),
    ],
)
def test_parts_that_do_not_fit_are_named(damage, message, tmp_path):
    given = damage(write_split(tmp_path / "parts"))
    assert message in refused(given, tmp_path)
    if "not beside" in message or "1 of 0" in message:
        assert message in refused(tmp_path / "parts", tmp_path)


@pytest.mark.parametrize("kept", [1, 4, 7, 20, 100, "half", "all but one"])
def test_a_file_that_is_cut_off_says_so(kept, tmp_path):
    """Within the magic number, the counts, the metadata and the tensors' values."""
    path = write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in GGUFReader(path).tensors)  # padding comes after it
    size = {"half": end // 2, "all but one": end - 1}.get(kept, kept)
    os.truncate(path, size)
    needed = needed_of(path, size, refused(path, tmp_path))
    assert size < needed <= end
    assert needed == end or kept != "all but one"


def needed_of(path, size, said):
    """The number of bytes that a file is said to need."""
    found = re.fullmatch(rf"{path} is cut off or damaged: it has {size:,} bytes?, and needs at least ([\d,]+); fetch it again", said)
    return int(found[1].replace(",", ""))


def test_a_length_that_is_damaged_is_not_surely_a_file_that_is_cut_off(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS)
    data = bytearray(path.read_bytes())
    data[24:32] = (1 << 60).to_bytes(8, "little")  # the length of the first name
    path.write_bytes(data)
    assert needed_of(path, len(data), refused(path, tmp_path)) > 1 << 60


def test_a_part_that_is_empty_is_named(tmp_path):
    names = write_split(tmp_path / "parts")
    names[1].write_bytes(b"")
    assert refused(names[0], tmp_path) == f"{names[1]} is empty (0 bytes); fetch it again"


def test_metadata_that_is_not_utf8_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, extra=lambda writer: writer.add_token_list(["a", "known token"]))
    path.write_bytes(path.read_bytes().replace(b"known token", b"known \xfftken"))
    assert "m.gguf: its metadata tokenizer.ggml.tokens is not UTF-8 text" in refused(path, tmp_path)


def test_a_folder_of_several_models_says_to_give_one(tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("a", "b"):
        write_gguf(tmp_path / "models" / f"{name}.gguf", CONFIG, TENSORS)
    assert "has 2 GGUF files, a.gguf, b.gguf; give one of them" in refused(tmp_path / "models", tmp_path)
    shutil.copyfile(GOLDEN / "llama3" / "config.json", tmp_path / "models" / "config.json")
    assert "has 2 GGUF files" in refused(tmp_path / "models", tmp_path)


def test_a_folder_that_may_be_another_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    file = write_gguf(folder / "m.gguf", CONFIG, TENSORS)
    shutil.copyfile(GOLDEN / "llama3" / "config.json", folder / "config.json")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    assert "has m.gguf and pytorch_model.bin, either of which may be the model; give the GGUF file itself" in refused(folder, tmp_path)
    assert open_source(file).format == "gguf"
    (folder / "pytorch_model.bin").unlink()
    assert open_source(folder).format == "gguf"


@pytest.mark.parametrize(("kind", "advice"), [("adapter", "merge it into its model"), ("mmproj", "expected a whole model")])
def test_what_is_not_a_model(kind, advice, tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, only=[], extra=lambda writer: writer.add_type(kind))
    message = refused(tmp_path / "m.gguf", tmp_path)
    assert f"is a GGUF file of type {kind}" in message and advice in message
