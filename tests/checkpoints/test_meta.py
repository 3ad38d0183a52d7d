"""Meta's folders give the weights that the Hugging Face folders give; a pickle cannot do anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from l4jax.checkpoints import torch_zip
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import open_checkpoint
from l4jax.checkpoints.torch_zip import TorchFile
from tests.checkpoints.meta_folder import write_meta_folder, write_torch_file

GOLDEN = Path(__file__).parent.parent / "golden" / "data"


def make_source(model: str, folder: Path, shards: int) -> Path:
    tensors = {key: array for file in sorted((GOLDEN / model).glob("*.safetensors")) for key, array in load_file(file).items()}
    write_meta_folder(folder, json.loads((GOLDEN / model / "config.json").read_text()), tensors, shards)
    return folder


@pytest.fixture
def source(tmp_path):
    return make_source("maverick", tmp_path / "source", 2)


@pytest.mark.parametrize(
    ("model", "shards"),
    [("llama3", 1), ("llama3", 2), ("llama3", 4), ("scout", 1), ("scout", 2), ("maverick", 2), ("maverick", 4), ("multimodal", 2)],
)
def test_meta_and_hugging_face_give_identical_weights(model, shards, tmp_path):
    # Four shards: more than KV heads, which are then replicated.
    convert(make_source(model, tmp_path / "source", shards), tmp_path / "meta")
    convert(GOLDEN / model, tmp_path / "hf")
    meta, hf = open_checkpoint(tmp_path / "meta"), open_checkpoint(tmp_path / "hf")
    assert dict(meta.weights) == dict(hf.weights)
    assert meta.config.moe == hf.config.moe
    assert meta.text_files == ("USE_POLICY.md", "NOTICE")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_read_back_as_written(dtype, tmp_path):
    arrays = {"a": np.arange(12).reshape(3, 4).astype(dtype), "b": np.ones((0, 2), dtype), "c": np.array(5).astype(dtype)}
    write_torch_file(tmp_path / "file.pth", arrays)
    file = TorchFile(tmp_path / "file.pth")
    for key, array in arrays.items():
        read = file.read(key)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read.astype(np.float32), array.astype(np.float32))


class Attack:
    """Runs a command when it is unpickled by an unpickler that lets it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_a_pickle_cannot_run_code(source, tmp_path):
    write_torch_file(source / "consolidated.01.pth", {"tok_embeddings.weight": Attack(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: its pickle asks for \w+\.system") as error:
        convert(source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_builtins_are_not_looked_up(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        archive.writestr("a/data.pkl", f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match=f"asks for builtins.{name}"):
        TorchFile(tmp_path / "file.pth")


def write_pickle(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + data + b".")
        archive.writestr("archive/data/0", bytes(64))


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"
STATE = b"}X\x01\0\0\0qK\x07s"


@pytest.mark.parametrize(
    "thing",
    [
        *(
            b"ctorch\nBFloat16Storage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n",
            b"c_io\nBytesIO\n",
            STORAGE,
        ),
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x04t(K\x01ttR",
    ],
    ids=["dtype", "function", "class", "opaque", "storage", "tensor"],
)
@pytest.mark.parametrize(
    "state", [STATE, b"N" + STATE + b"\x86", b"(K\x03X\x01\0\0\0>NNNJ\xff\xff\xff\xffK\x00K\x00t"], ids=["dict", "slots", "dtype"]
)
def test_a_pickle_cannot_change_what_it_is_given(thing, state, tmp_path):
    before = [vars(torch_zip._rebuild_parameter).copy(), dict(vars(torch_zip._Opaque)), np.dtype(ml_dtypes.bfloat16).itemsize]
    write_pickle(tmp_path / "file.pth", thing + state + b"b")
    with pytest.raises(CheckpointError, match="its pickle does not describe tensors"):
        TorchFile(tmp_path / "file.pth")
    assert [vars(torch_zip._rebuild_parameter), dict(vars(torch_zip._Opaque)), np.dtype(ml_dtypes.bfloat16).itemsize] == before


@pytest.mark.parametrize(
    "arguments",
    [
        b"(NK\x00(K\x04t(K\x01tt",
        b"(" + STORAGE + b"N(K\x04t(K\x01tt",
        b"(" + STORAGE + b"K\x00(K\x04t(K\x01K\x01tt",
        b"(" + STORAGE + b"K\x00(X\x01\0\0\x004t(K\x01tt",
        b"(" + STORAGE + b"K\x00(J\xff\xff\xff\xfft(K\x01tt",
        b"(" + STORAGE + b"K\x00(K\x04t(K\x01t\x89}}X\x03\0\0\0neg\x88st",
    ],
    ids=["no storage", "no offset", "another rank", "text", "negative", "negated"],
)
def test_a_tensor_of_nonsense_is_refused(arguments, tmp_path):
    write_pickle(tmp_path / "file.pth", b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R")
    with pytest.raises(CheckpointError, match="its pickle does not describe tensors"):
        TorchFile(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["_rebuild_tensor_v3", "_rebuild_qtensor"])
def test_quantised_tensors_are_named(name, tmp_path):
    write_pickle(tmp_path / "file.pth", f"ctorch._utils\n{name}\n".encode())
    with pytest.raises(CheckpointError, match=rf"holds quantised weights \({name}\), which are not supported; fetch the model in bfloat16"):
        TorchFile(tmp_path / "file.pth")


def test_a_pickle_cannot_take_all_memory(tmp_path):
    write_pickle(tmp_path / "file.pth", b"Nr\xff\xff\xff\x7f")
    with pytest.raises(CheckpointError):
        TorchFile(tmp_path / "file.pth")


def test_statistics_beside_the_weights_are_no_reason_to_refuse(source, tmp_path):
    file = TorchFile(source / "consolidated.00.pth")
    tensors = {key: np.array(file.read(key)) for key in file.tensors}
    write_torch_file(source / "consolidated.00.pth", tensors | {"layers.1.feed_forward.running_gate_stats_3E": np.arange(9)})
    convert(source, tmp_path / "ours")


def test_without_its_licence_a_folder_gets_a_notice_that_names_no_version(tmp_path):
    convert(make_source("llama3", tmp_path / "source", 1), tmp_path / "ours")
    notice = (tmp_path / "ours" / "NOTICE").read_text()
    assert notice.startswith("The source came without its licence")
    assert "Built with Llama" in notice


def test_a_tensor_may_not_reach_outside_its_storage(tmp_path):
    write_torch_file(tmp_path / "file.pth", {"a": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["archive/data/0"] = entries["archive/data/0"][:8]
    with zipfile.ZipFile(tmp_path / "short.pth", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="tensor a reaches outside its storage"):
        TorchFile(tmp_path / "short.pth")


def listed_with(offset: int, value: int):
    """A field of what the archive's directory says of its first entry, the pickle."""

    def damage(folder: Path) -> None:
        file = folder / "consolidated.01.pth"
        data = bytearray(file.read_bytes())
        struct.pack_into("<H", data, data.index(b"PK\x01\x02") + offset, value)
        file.write_bytes(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (listed_with(6, 255), "was not written by torch.save since 1.6 (zip file version 25.5)"),
        (listed_with(8, 0x01), "is encrypted; expected an archive as torch.save writes it"),
        (listed_with(8, 0x20), "was not written by torch.save since 1.6 (compressed patched data"),
        (listed_with(8, 0x40), "is encrypted; expected an archive as torch.save writes it"),
        (listed_with(10, zipfile.ZIP_DEFLATED), "is compressed; expected an archive as torch.save writes it"),
        (listed_with(10, 99), "is compressed; expected an archive as torch.save writes it"),
        (lambda s: (s / "consolidated.00.pth").unlink(), "has the shards 01; expected 00 to the last"),
        (lambda s: (s / "consolidated.01.pth").write_bytes((s / "consolidated.01.pth").read_bytes()[:-200]), "is truncated"),
        (lambda s: (s / "consolidated.01.pth").write_bytes(pickle.dumps({})), "was not written by torch.save since 1.6"),
        (lambda s: write_torch_file(s / "consolidated.01.pth", {"a": np.zeros(3, np.float32)}), "lacks tok_embeddings.weight in a shard"),
        (lambda s: (s / "params.json").unlink(), "has no params.json"),
        (lambda s: (s / "params.json").write_text("{"), "is not valid JSON"),
        (
            lambda s: (s / "params.json").write_text((s / "params.json").read_text().replace('"n_layers": 8', '"n_layers": 9')),
            "params.json asks for",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, message, source, tmp_path):
    damage(source)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        convert(source, tmp_path / "ours")
    assert message in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_replicas_that_differ_are_refused(source, tmp_path):
    tensors = {
        key: np.array(TorchFile(source / "consolidated.01.pth").read(key)) for key in TorchFile(source / "consolidated.01.pth").tensors
    }
    tensors["norm.weight"] += 1
    write_torch_file(source / "consolidated.01.pth", tensors)
    with pytest.raises(CheckpointError, match=r"norm\.weight differs between shard 0 and shard 1"):
        convert(source, tmp_path / "ours")
