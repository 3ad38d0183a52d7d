"""What a source is: found in its contents, read once and completely, and refused in one line where it is something else."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints import convert as convert_module
from l4jax.checkpoints import safetensors
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.export import export
from l4jax.checkpoints.open import open_source
from l4jax.checkpoints.store import open_checkpoint
from l4jax.cli import main
from tests.checkpoints.folders import GOLDEN, config_of, golden, reconfigure, refused, rewrite, tensors_of
from tests.checkpoints.gguf_file import write_gguf
from tests.checkpoints.meta_folder import write_meta_folder, write_torch_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 132\n"


@pytest.fixture
def tied(tmp_path):
    return golden("llama3_tied", tmp_path / "source")


@pytest.fixture
def meta(tmp_path):
    write_meta_folder(tmp_path / "source", config_of(GOLDEN / "llama3"), tensors_of(GOLDEN / "llama3"), 1)
    return tmp_path / "source"


@pytest.mark.parametrize("model", ["llama3", "multimodal"])
def test_a_tied_checkpoint_with_a_head_of_its_own_keeps_it(model, tmp_path, capsys):
    source, config = golden(model, tmp_path / "source"), config_of(GOLDEN / model)
    if model == "llama3":
        reconfigure(source, tie_word_embeddings=True)
    else:
        reconfigure(source, tie_word_embeddings=True, text_config={**config["text_config"], "tie_word_embeddings": True})
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert "lm_head.weight to the embedding, but the one in the files differs: it is kept" in capsys.readouterr().err
    convert(GOLDEN / model, tmp_path / "untied")
    ours, untied = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "untied")
    assert ours.weights == untied.weights and "head" in ours.weights
    assert ours.config == untied.config
    # Other readers tie what the file says is tied.
    export(tmp_path / "ours", tmp_path / "back")
    back = config_of(tmp_path / "back")
    assert not back["tie_word_embeddings"] and not back.get("text_config", back)["tie_word_embeddings"]
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert {key: array.tobytes() for key, array in after.items()} == {key: array.tobytes() for key, array in before.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tied_checkpoint_with_a_copy_of_its_embedding_stays_tied(dtype, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_BLOCK", 1000)
    rewrite(tied, lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].astype(np.float16)}))
    convert(tied, tmp_path / "tied")
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].astype(dtype)}))
    convert(tied, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").weights == open_checkpoint(tmp_path / "tied").weights
    # A difference in a single value, the last one, is enough.
    rewrite(tied, lambda tensors: tensors["lm_head.weight"].__setitem__((-1, -1), 3))
    convert(tied, tmp_path / "own")
    assert not open_checkpoint(tmp_path / "own").config.tie_word_embeddings


def test_a_head_of_another_name_is_not_taken_for_a_copy(tied, tmp_path):
    rewrite(tied, lambda tensors: tensors.update({"other.lm_head.weight": np.zeros(3, np.float32)}))
    assert "other.lm_head.weight would be used 0 times" in refused(tied, tmp_path)


def test_a_single_file_is_read_and_not_the_index_beside_it(tmp_path, capsys):
    """As transformers loads a folder in which a sharded model was saved again, in one file."""
    source = golden("llama3", tmp_path / "source")
    new = {key: 2 * array for key, array in tensors_of(source).items()}
    save_file(new, source / "model.safetensors")
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "other weights besides: model.safetensors is read, model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, " in said
    assert "model.safetensors.index.json is not" in said
    alone = golden("llama3_tied", tmp_path / "alone")
    shutil.copyfile(source / "config.json", alone / "config.json")
    save_file(new, alone / "model.safetensors")
    convert(alone, tmp_path / "expected")
    assert open_checkpoint(tmp_path / "ours").weights == open_checkpoint(tmp_path / "expected").weights


def test_a_single_file_that_is_not_whole_is_not_filled_up_from_the_shards(tmp_path):
    source = golden("llama3", tmp_path / "source")
    save_file({key: array for key, array in tensors_of(source).items() if key != "model.norm.weight"}, source / "model.safetensors")
    assert "has no tensor model.norm.weight" in refused(source, tmp_path)


@pytest.mark.parametrize(
    "other",
    ["model-00003-of-00003.safetensors", "pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "model.Q8_0.gguf"],
)
def test_weights_that_are_not_read_are_named(other, tmp_path, capsys):
    source = golden("llama3", tmp_path / "source")
    (source / other).write_bytes(b"")
    shards = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json"
    assert open_source(source).notes == (f"{source} holds other weights besides: {shards} is read, {other} is not",)
    assert main(["convert", str(source), str(tmp_path / "ours"), "--dry-run"]) == 0
    assert f"{other} is not" in capsys.readouterr().err
    assert main(["show", str(source)]) == 0
    assert f"{other} is not" in capsys.readouterr().out


def test_without_other_weights_nothing_is_said(tied):
    (tied / "training_args.bin").write_bytes(b"")
    assert open_source(GOLDEN / "llama3").notes == open_source(tied).notes == ()


def test_metas_files_beside_a_configuration_alone_are_read(meta, tmp_path):
    shutil.copyfile(GOLDEN / "llama3" / "config.json", meta / "config.json")
    assert open_source(meta).format == "meta"
    save_file(tensors_of(GOLDEN / "llama3"), meta / "model.safetensors")
    assert open_source(meta).format == "hf"


def write_safetensors(path: Path, header: str, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


A, B = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}', '"b": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (f"{{{A % (0, 4)}, {A % (4, 8)}}}", 8, "describes a twice"),
        (f"{{{A % (0, 4)}, {B % (0, 4)}}}", 4, "the bytes of tensor b begin at 0; expected 4"),
        (f"{{{B % (0, 4)}, {A % (8, 12)}}}", 12, "the bytes of tensor a begin at 8; expected 4"),
        (f"{{{A % (4, 8)}}}", 8, "the bytes of tensor a begin at 4; expected 0"),
        (f"{{{A % (0, 4)}}}", 8, "has 77 bytes and its tensors end at 73"),
        ("[" * 100_000, 0, "its header cannot be read"),
    ],
    ids=["twice", "overlap", "gap", "gap at the front", "rest", "nested too deep"],
)
def test_every_byte_belongs_to_one_tensor(header, size, message, tied, tmp_path):
    write_safetensors(tied / "model.safetensors", header, bytes(size))
    assert message in refused(tied, tmp_path)


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool"])
@pytest.mark.parametrize("to", [None, "float32"])
def test_numbers_that_are_not_weights_are_not_cast_to_them(dtype, to, tied, tmp_path):
    rewrite(tied, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, dtype)}))
    assert f"weight norm.scale, made of model.norm.weight, is {dtype}; expected float32, bfloat16, float16" in refused(
        tied, tmp_path, dtype=to
    )


def test_a_torch_file_of_the_other_byte_order_is_refused(meta, tmp_path):
    tensors = {key: array.byteswap() for key, array in tensors_of(GOLDEN / "llama3").items()}
    write_torch_file(meta / "consolidated.00.pth", tensors, byteorder="big")
    assert "was written big-endian" in refused(meta, tmp_path)


def lora(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def lora_alone(folder: Path) -> None:
    lora(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def fp8(folder: Path) -> None:
    reconfigure(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})


def mlx(folder: Path) -> None:
    reconfigure(folder, quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64, "bits": 4})


def unlabelled_fp8(folder: Path) -> None:
    header = '{"model.norm.weight": {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}}'
    write_safetensors(folder / "model.safetensors", header, bytes(32))


def converted(folder: Path) -> None:
    convert(folder, folder.with_name("done"))
    shutil.rmtree(folder)
    folder.with_name("done").rename(folder)


def torch_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lonely_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, "has adapter_config.json: it is a LoRA adapter, not a model; merge it into its model (merge_and_unload of peft)"),
        (lora_alone, "has adapter_config.json: it is a LoRA adapter"),
        (fp8, "holds quantised weights (fp8), which are not supported; fetch the model in bfloat16"),
        (mlx, "holds quantised weights (MLX), which are not supported"),
        (unlabelled_fp8, "tensor model.norm.weight has dtype F8_E4M3; expected F32, F16, BF16: quantised weights are not supported"),
        (converted, "source is converted already; load it as it is"),
        (torch_weights, "has pytorch_model.bin; expected model.safetensors, or model.safetensors.index.json and its shards"),
        (lonely_shard, "has model-00001-of-00002.safetensors; expected model.safetensors, or model.safetensors.index.json and its shards"),
    ],
)
def test_what_is_not_a_model_says_what_it_is(change, message, tied, tmp_path):
    change(tied)
    assert message in refused(tied, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("meta-llama/Llama-3.1-8B", "If it is a model on the Hugging Face hub, fetch it first (`hf download NAME --local-dir FOLDER`)"),
        ("https://huggingface.co/a/b", "If it is a model on the Hugging Face hub"),
        ("./meta-llama/x/", "If it is a model on the Hugging Face hub"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist; expected a Hugging Face or Meta folder, or a .gguf file"),
    ],
)
def test_a_name_that_is_not_a_path(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(given, tmp_path)
    assert main(["generate", given, "-p", "x"]) == 2
    assert message.split(";", maxsplit=1)[0] in capsys.readouterr().err


def test_a_file_of_a_folder_says_to_give_the_folder(tied, tmp_path):
    message = refused(tied / "model.safetensors", tmp_path)
    assert message.endswith(f"give the folder that it is in, {tied}")


def test_an_unfinished_conversion_is_not_a_source(tied, tmp_path):
    tied.rename(tmp_path / "x.partial")
    assert "x.partial is an unfinished conversion; give its source again" in refused(tmp_path / "x.partial", tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
)
def test_a_git_lfs_pointer_is_named_before_weights_are_converted(name, tied, tmp_path):
    (tied / name).write_bytes(POINTER)
    assert f"{name} is a git-lfs pointer in place of the file; run `git lfs pull`" in refused(tied, tmp_path)


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_a_git_lfs_pointer_in_metas_folder(name, meta, tmp_path):
    (meta / name).write_bytes(POINTER)
    assert f"{name} is a git-lfs pointer" in refused(meta, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_a_git_lfs_pointer_among_shards(name, tmp_path):
    source = golden("llama3", tmp_path / "source")
    (source / name).write_bytes(POINTER)
    assert f"{name} is a git-lfs pointer" in refused(source, tmp_path)


def test_a_git_lfs_pointer_in_place_of_a_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(POINTER)
    assert "m.gguf is a git-lfs pointer" in refused(tmp_path / "m.gguf", tmp_path)


def gguf(folder: Path) -> Path:
    return write_gguf(folder / "m.gguf", config_of(GOLDEN / "llama3"), tensors_of(GOLDEN / "llama3"))


def shrink(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5000)


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"\1")


CHANGES = {"vanishes": Path.unlink, "shrinks": shrink, "is replaced": replace}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["hf", "meta", "gguf"])
def test_a_weight_file_that_changes_after_it_was_opened(form, change, tmp_path, monkeypatch):
    if form == "meta":
        write_meta_folder(tmp_path / "source", config_of(GOLDEN / "llama3"), tensors_of(GOLDEN / "llama3"), 1)
        file = tmp_path / "source" / "consolidated.00.pth"
    else:
        file = gguf(tmp_path) if form == "gguf" else golden("llama3", tmp_path / "source") / "model-00002-of-00002.safetensors"
    check_complete = convert_module.check_complete

    def checked(source):
        check_complete(source)
        CHANGES[change](file)

    monkeypatch.setattr(convert_module, "check_complete", checked)
    message = refused(file if form == "gguf" else file.parent, tmp_path)
    expected = "cannot be read (No such file" if change == "vanishes" else "changed after it was opened; run the same command again"
    assert f"{file} {expected}" in message


def test_a_file_that_cannot_be_read(tied, tmp_path):
    (tied / "model.safetensors").unlink()
    (tied / "model.safetensors").symlink_to(tied / "model.safetensors")
    assert "model.safetensors cannot be read (Too many levels of symbolic links)" in refused(tied, tmp_path)
    for name, message in {"model.safetensors": "is not a regular file", "config.json": "cannot be read (Is a directory)"}.items():
        (tied / name).unlink()
        (tied / name).mkdir()
        assert f"{name} {message}" in refused(tied, tmp_path)


def unreadable(monkeypatch, method, path):
    """What the system says to a user who may not read it: root may read everything."""
    original = getattr(Path, method)

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, refuse)


def test_a_folder_of_templates_that_cannot_be_read(tied, tmp_path, monkeypatch):
    templates = tied / "additional_chat_templates"
    templates.mkdir()
    unreadable(monkeypatch, "iterdir", templates)
    assert refused(tied, tmp_path).startswith(f"{templates} cannot be read (Permission denied); check the file, or fetch it again; or ")


@pytest.mark.parametrize("name", ["config.json", "LICENSE"])
def test_a_text_file_that_cannot_be_copied(name, tied, tmp_path, monkeypatch):
    (tied / name).touch()
    unreadable(monkeypatch, "read_bytes", tied / name)
    assert f"{tied / name} cannot be read (Permission denied)" in refused(tied, tmp_path)


@pytest.mark.parametrize("name", ["source_config.json", "LICENSE"])
def test_a_text_file_that_cannot_be_exported(name, tied, tmp_path, monkeypatch):
    (tied / "LICENSE").touch()
    convert(tied, tmp_path / "ours")
    unreadable(monkeypatch, "read_bytes", tmp_path / "ours" / name)
    with pytest.raises(
        ValueError, match=rf"ours/{name} cannot be read \(Permission denied\); check the file, or make the checkpoint again$"
    ):
        export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back.partial").exists()


def test_a_refused_tokenizer_is_named_by_the_dry_run_and_show_too(tied, tmp_path, capsys):
    (tied / "tokenizer.json").write_text("{")
    assert f"{tied}/tokenizer.json cannot be read (EOF" in refused(tied, tmp_path)
    assert main(["convert", str(tied), str(tmp_path / "ours"), "--dry-run"]) == 2
    assert f"{tied}/tokenizer.json cannot be read (EOF" in capsys.readouterr().err
    assert main(["show", str(tied)]) == 0
    assert f"({tied}/tokenizer.json cannot be read (EOF" in capsys.readouterr().out


def test_a_link_to_nothing(tied, tmp_path):
    """As a copied hub cache has."""
    (tied / "model.safetensors").rename(tied / "moved")
    (tied / "model.safetensors").symlink_to(tied / "blobs" / "0123")
    assert "model.safetensors is a link to a file that does not exist" in refused(tied, tmp_path)


def test_a_destination_that_cannot_be_written(tied, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\); choose another destination$"):
        convert(tied, tmp_path / "file" / "ours")


def test_an_index_that_names_another_shard_for_a_tensor(tmp_path):
    source = golden("llama3", tmp_path / "sharded")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first = load_file(source / "model-00001-of-00002.safetensors")
    index["weight_map"][min(first)] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which the index" in refused(source, tmp_path)
