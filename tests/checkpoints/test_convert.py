"""Conversion of real Hugging Face folders (the goldens): bit-exact there and back, and resumable."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints import convert as convert_module
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.export import export
from l4jax.checkpoints.open import open_source
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import group_weights, open_checkpoint
from l4jax.cli import main
from l4jax.config_formats import config_from_hf, config_to_hf
from l4jax.parallel.placement import Placement
from sharding.mesh import ONE_DEVICE
from tests.checkpoints.folders import GOLDEN, SMALL_GROUP, rewrite, tensors_of

MODELS = sorted(folder.name for folder in GOLDEN.iterdir())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_there_and_back_is_bit_exact(model, dtype, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / model, source)
    if dtype != "float32":
        for file in source.glob("*.safetensors"):
            save_file({k: v.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for k, v in load_file(file).items()}, file)
        (source / "config.json").write_text((source / "config.json").read_text().replace('"float32"', f'"{dtype}"'))
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype
        assert after[key].shape == array.shape
        assert after[key].tobytes() == array.tobytes(), key
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("*/config*.json")) + sorted((GOLDEN.parents[2] / "configs" / "models").glob("*.json")), ids=str
)
def test_a_written_hugging_face_config_reads_back_equal(path):
    config = config_from_hf(json.loads(path.read_text()))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "bfloat16")))) == config


def test_smollm2_gguf_exports_to_hugging_face_and_back(smollm2_checkpoint, tmp_path):
    export(smollm2_checkpoint, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again")
    first, again = open_checkpoint(smollm2_checkpoint), open_checkpoint(tmp_path / "again")
    assert first.config == again.config
    assert {n: (w.shape, w.crc32) for n, w in first.weights.items()} == {n: (w.shape, w.crc32) for n, w in again.weights.items()}


def test_vision_weights_are_kept(tmp_path):
    convert(GOLDEN / "multimodal", tmp_path / "ours")
    kept = {name for name in open_checkpoint(tmp_path / "ours").weights if name.startswith("vision.")}
    theirs = {key for key in tensors_of(GOLDEN / "multimodal") if not key.startswith("language_model.")}
    assert kept == {f"vision.{key}" for key in theirs}
    assert kept


@pytest.mark.parametrize(
    ("model", "licence", "notice"),
    [
        ("scout", None, "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."),
        ("llama3", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "Llama 3.1 is licensed under the Llama 3.1 Community License"),
        ("llama3", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "Meta Llama 3 is licensed under the Meta Llama 3 Community License"),
        ("llama3", "Apache License", None),
    ],
)
def test_llama_checkpoints_carry_the_licence_notice(model, licence, notice, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / model, source)
    if licence:
        (source / "LICENSE").write_text(licence)
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "LICENSE").exists() == bool(licence)
    assert (tmp_path / "ours" / "NOTICE").exists() == bool(notice)
    if notice:
        text = (tmp_path / "ours" / "NOTICE").read_text(encoding="utf-8")
        assert text.startswith(notice)
        assert "Built with Llama" in text


def test_the_sources_own_notice_is_kept_whatever_its_case(source, tmp_path):
    (source / "Notice").write_text("theirs")
    (source / "License.txt").write_text("LLAMA 4 COMMUNITY LICENSE AGREEMENT")
    convert(source, tmp_path / "ours")
    assert {"License.txt", "Notice"} <= set(open_checkpoint(tmp_path / "ours").text_files)
    assert (tmp_path / "ours" / "Notice").read_text() == "theirs"
    assert not (tmp_path / "ours" / "NOTICE").exists()


def test_groups_are_bounded_and_keep_the_image_encoder_apart(many_groups):
    sizes = {"embed": 100_000, "a": 40_000, "b": 20_000, "c": 10_000, "d": 60_000, "vision.a": 1, "vision.b": 2}
    assert list(group_weights(sizes).values()) == [["embed"], ["a", "b"], ["c"], ["d"], ["vision.a", "vision.b"]]


def test_a_dtype_casts_every_weight(source, tmp_path):
    convert(source, tmp_path / "ours", dtype="bfloat16")
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in open_checkpoint(tmp_path / "ours").weights.values()} == {"bfloat16"}


def test_norms_in_float32_beside_matrices_in_bfloat16_load_as_bfloat16(source, tmp_path):
    def narrow(tensors):
        tensors.update({key: array.astype(ml_dtypes.bfloat16) for key, array in tensors.items() if array.ndim > 1})

    rewrite(source, narrow)
    convert(source, tmp_path / "ours")
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert {weight.dtype for weight in checkpoint.weights.values()} == {"bfloat16", "float32"}
    assert {array.dtype for array in checkpoint.restore(Placement.on(checkpoint.config, ONE_DEVICE)).values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_parts_of_several_dtypes_keep_every_bit(source, tmp_path):
    def narrow(tensors):
        key = "model.layers.0.self_attn.q_proj.weight"
        tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)

    rewrite(source, narrow)
    convert(source, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").weights["layers.0.attention.qkv"].dtype == "float32"
    export(tmp_path / "ours", tmp_path / "back")
    for key, array in tensors_of(source).items():
        np.testing.assert_array_equal(tensors_of(tmp_path / "back")[key], array.astype(np.float32))


def test_unfused_experts_give_the_same_weights(source, tmp_path):
    convert(source, tmp_path / "fused")

    def unfuse(tensors):
        for key in [k for k in tensors if k.endswith("experts.gate_up_proj")]:
            fused, down = tensors.pop(key), tensors.pop(key.replace("gate_up_proj", "down_proj"))
            for e in range(len(fused)):
                gate, up = np.split(fused[e], 2, axis=-1)
                for name, matrix in (("gate", gate), ("up", up), ("down", down[e])):
                    tensors[key.replace("gate_up_proj", f"{e}.{name}_proj.weight")] = np.ascontiguousarray(matrix.T)

    rewrite(source, unfuse)
    convert(source, tmp_path / "unfused")
    assert open_checkpoint(tmp_path / "fused").weights == open_checkpoint(tmp_path / "unfused").weights


# Kills itself before the group of that number is written, or between the manifest and the renaming.
KILLER = f"""
import os, signal, sys
from l4jax.checkpoints import convert as module, store
store.GROUP_BYTES = {SMALL_GROUP}
reads = 0
save_group = module.save_group
def killed(directory, arrays):
    global reads
    reads += 1
    if reads == int(sys.argv[3]):
        if sys.argv[4] == "half-written":
            temporary = directory.with_name(directory.name + ".orbax-checkpoint-tmp")  # as Orbax names them
            temporary.mkdir(parents=True)
            (temporary / "array").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save_group(directory, arrays)
write_manifest = module.write_manifest
def complete_but_killed(*args, **kwargs):
    write_manifest(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
module.save_group = killed
if sys.argv[4] == "verified":
    module.write_manifest = complete_but_killed
module.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(("group", "state"), [(1, "clean"), (3, "half-written"), (5, "clean"), (8, "half-written"), (99, "verified")])
def test_a_killed_conversion_is_resumed_to_the_same_result(group, state, source, tmp_path, monkeypatch, many_groups):
    command = [sys.executable, "-c", KILLER, str(source), str(tmp_path / "ours"), str(group), state]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
    assert (tmp_path / "ours.partial" / "checkpoint.json").exists() == (state == "verified")
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_checkpoint(tmp_path / "ours.partial")

    written = []
    save_group = convert_module.save_group
    monkeypatch.setattr(
        convert_module, "save_group", lambda directory, arrays: (written.append(directory.name), save_group(directory, arrays))
    )
    convert(source, tmp_path / "ours")
    convert(source, tmp_path / "whole")
    resumed, whole = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "whole")
    assert resumed == whole.__class__(**{**vars(whole), "directory": resumed.directory})
    # What was there was not made again, and nothing else is there.
    groups = len(whole.groups(whole.weights))
    assert groups > 10
    assert len(written) == 2 * groups - min(group - 1, groups)
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == sorted(file.name for file in (tmp_path / "whole").iterdir())


def doubled(source: Path, partial: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({key: array * 2 for key, array in tensors.items()}))


def damaged(source: Path, partial: Path) -> None:
    (partial / "progress.json").write_text("{")


def half_an_entry(source: Path, partial: Path) -> None:
    state = json.loads((partial / "progress.json").read_text())
    next(iter(state["weights"].values())).pop("crc32")
    (partial / "progress.json").write_text(json.dumps(state))


def fifth_group_removed(source: Path, partial: Path) -> None:
    """As a conversion leaves it which finds that a group is not what was written."""
    shutil.rmtree(partial / "weights" / "00004")


ANEW = ": its weights are removed, and all are converted anew"


@pytest.mark.parametrize(
    ("change", "dtype", "said"),
    [
        (
            doubled,
            None,
            f"is of a conversion of a source that differs or has changed, with other options, or by another version of l4jax{ANEW}",
        ),
        (lambda *_: None, "bfloat16", f"is of a conversion to another dtype{ANEW}"),
        (damaged, None, f"cannot be continued, because its progress.json is damaged{ANEW}"),
        (half_an_entry, None, f"cannot be continued, because its progress.json is damaged{ANEW}"),
        (lambda *_: None, None, "is continued: {5} of {all} weights were converted before"),
        (fifth_group_removed, None, "is continued: {4} of {all} weights were converted before"),
    ],
    ids=["another source", "another dtype", "damaged", "an entry is damaged", "the same", "a group is gone"],
)
def test_what_becomes_of_an_interrupted_conversion_is_said(change, dtype, said, source, tmp_path, many_groups):
    subprocess.run([sys.executable, "-c", KILLER, str(source), str(tmp_path / "ours"), "6", "clean"], check=False)
    change(source, tmp_path / "ours.partial")
    notes = []
    convert(source, tmp_path / "ours", dtype=dtype, note=notes.append)
    convert(source, tmp_path / "whole", dtype=dtype, note=notes.append)
    ours, whole = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "whole")
    assert ours.weights == whole.weights
    groups = list(whole.groups(whole.weights).values())
    numbers = {"{4}": sum(map(len, groups[:4])), "{5}": sum(map(len, groups[:5])), "{all}": len(whole.weights)}
    for name, number in numbers.items():
        said = said.replace(name, str(number))
    assert notes == [f"{tmp_path}/ours.partial {said}"]


def test_a_conversion_is_continued_whatever_it_calls_the_places_of_values(source, tmp_path, monkeypatch, many_groups):
    """Another version of l4jax may word them otherwise."""
    subprocess.run([sys.executable, "-c", KILLER, str(source), str(tmp_path / "ours"), "6", "clean"], check=False)
    opened = convert_module.open_source(source)
    opened.config = dataclasses.replace(opened.config, sources=())
    monkeypatch.setattr(convert_module, "open_source", lambda _: opened)
    notes = []
    convert(source, tmp_path / "ours", note=notes.append)
    assert len(notes) == 1 and " is continued: " in notes[0]


def test_an_interruption_before_any_weight_is_complete_is_no_damage(source, tmp_path):
    subprocess.run([sys.executable, "-c", KILLER, str(source), str(tmp_path / "ours"), "1", "half-written"], check=False)
    notes = []
    convert(source, tmp_path / "ours", note=notes.append)
    assert notes == [f"{tmp_path}/ours.partial has no weights that can be used: all are converted anew"]


def test_weights_that_were_grouped_otherwise_are_converted_anew(source, tmp_path):
    """By another version of l4jax: none of its groups is left in the checkpoint."""
    subprocess.run([sys.executable, "-c", KILLER, str(source), str(tmp_path / "ours"), "6", "clean"], check=False)
    notes = []
    convert(source, tmp_path / "ours", note=notes.append)
    assert notes == [f"{tmp_path}/ours.partial has no weights that can be used: all are converted anew"]
    assert [entry.name for entry in (tmp_path / "ours" / "weights").iterdir()] == ["00000"]


def test_weights_that_were_laid_out_otherwise_are_converted_anew(source, tmp_path, monkeypatch, many_groups):
    """By another version of l4jax: what is kept has the shapes that this one expects."""
    save, saved = ocp.Checkpointer.save, []

    def interrupted(self, directory, *args, **kwargs):
        saved.append(directory)
        if len(saved) == 4:
            raise KeyboardInterrupt
        save(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "ours")
    file = tmp_path / "ours.partial" / "progress.json"
    progress = json.loads(file.read_text())
    changed = next(weight for weight in progress["weights"].values() if len(set(weight["shape"])) > 1)
    changed["shape"].reverse()
    file.write_text(json.dumps(progress))
    with_it = sum(weight["group"] == changed["group"] for weight in progress["weights"].values())
    notes = []
    convert(source, tmp_path / "ours", note=notes.append)
    (note,) = (note for note in notes if "is continued" in note)
    assert f"is continued: {len(progress['weights']) - with_it} of " in note
    open_checkpoint(tmp_path / "ours")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # What tensorstore raised on a full tmpfs.
        ValueError(
            'RESOURCE_EXHAUSTED: Failed writing: "weights/00009.orbax-checkpoint-tmp/d/81b2": '
            "Failed to write 234 bytes to file 8: No space left on device [os_error_code='28']"
        ),
    ],
    ids=["system", "tensorstore"],
)
def test_a_full_disk_is_one_line_and_can_be_resumed(error, source, tmp_path, monkeypatch, many_groups):
    save, saved = ocp.Checkpointer.save, []

    def full(self, directory, *args, **kwargs):
        saved.append(directory)
        if len(saved) == 4:
            (directory.parent / f"{directory.name}.orbax-checkpoint-tmp").mkdir()
            raise error
        save(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", full)
        with pytest.raises(CheckpointError, match=r"^the disk of .* is full; free some space"):
            convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert(source, tmp_path / "ours")
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert {entry.name for entry in (tmp_path / "ours" / "weights").iterdir()} == checkpoint.groups(checkpoint.weights).keys()


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"ours\.partial needs 0\.00 GB more and its disk has 0\.00 GB free; free some space"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours.partial").exists()


# The system's own limit on the size of a file stands in for a disk that fills up.
LIMITED = """
import resource, signal, sys
from l4jax.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


def test_a_write_that_fails_says_so_in_one_line(source, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(source), str(tmp_path / "ours")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert "File too large" in said
    assert not (tmp_path / "ours").exists()


def test_what_is_read_back_must_be_what_was_written(source, tmp_path, monkeypatch, many_groups):
    save_group = convert_module.save_group

    def corrupted(directory, arrays):
        save_group(directory, {name: array + (directory.name == "00002") for name, array in arrays.items()})

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "save_group", corrupted)
        with pytest.raises(CheckpointError, match="reads back"):
            convert(source, tmp_path / "ours")
    notes = []
    convert(source, tmp_path / "ours", note=notes.append)
    convert(source, tmp_path / "whole")
    checkpoint = open_checkpoint(tmp_path / "whole")
    assert open_checkpoint(tmp_path / "ours").weights == checkpoint.weights
    total, removed = len(checkpoint.weights), len(checkpoint.groups(checkpoint.weights)["00002"])
    assert notes == [f"{tmp_path}/ours.partial is continued: {total - removed} of {total} weights were converted before"]


def test_dry_run_prints_the_mapping_and_writes_nothing(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "ours"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in open_source(source).tensors)
    assert list(tmp_path.iterdir()) == [source]
    assert main(["convert", str(source), str(source), "--dry-run"]) == 2
    assert capsys.readouterr().err.endswith("exists already; choose another destination, or remove it first\n")


def test_a_bar_is_printed_only_of_work_that_was_done(source, tmp_path, capsys, monkeypatch):
    assert main(["convert", str(source), str(source), "--dtype", "float16"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    rewrite(source, lambda tensors: tensors["model.norm.weight"].fill(np.nan))
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "has values that are not finite" in said
    rewrite(source, lambda tensors: tensors["model.norm.weight"].fill(1))
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().err.startswith("verifying ")


def test_command_line_there_and_back(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 2
    assert capsys.readouterr().err.endswith("exists already; choose another destination, or remove it first\n")
