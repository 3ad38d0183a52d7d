"""Published EAGLE heads: what is not clear is refused in one line, and an option can say it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4jax import cli
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import open_drafter
from l4jax.files import FileError
from tests import tiny
from tests.checkpoints import heads
from tests.checkpoints.folders import GOLDEN, config_of, golden, reconfigure, refused, tensors_of
from tests.checkpoints.gguf_file import write_gguf
from tests.checkpoints.heads import V
from tests.checkpoints.meta_folder import write_torch_file
from tests.checkpoints.published import (
    HEADS,
    eagle1_head,
    eagle3_head,
    llama4_head,
    save_target,
    speculators_head,
    target_config,
    with_tensor,
    without,
)


def test_an_output_head_that_is_another_model_s_is_refused(target: Path, tmp_path: Path) -> None:
    head = eagle3_head(target_head=True)
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the output head of .*, as target_head .* says; give the model"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


def test_an_output_head_of_its_own_is_not_left_out(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "drafter"), str(tmp_path / "small"), "--to", "eagle", "--without-head"]) == 2
    assert "drafter is not a drafter with its target's output head (train-drafter --target-head makes those)" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_drafter_of_another_version_is_to_be_converted_again(target: Path, tmp_path: Path) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    manifest = json.loads((tmp_path / "drafter" / "checkpoint.json").read_text())
    del manifest["drafter"]["target_head"]
    (tmp_path / "drafter" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"or another version of l4jax made it .*target_head.*; make the checkpoint again"):
        open_drafter(tmp_path / "drafter")


REFUSED = {
    **{
        f"no {key}": (without(eagle3_head(), key), f"the checkpoint has no tensor {key}, which the configuration asks for")
        for key in heads.eagle3_tensors(0)
        if key != "t2d"
    },
    "another tensor": (with_tensor(eagle3_head(), extra=np.zeros(3, np.float32)), "source tensor extra would be used 0 times"),
    "absolute d2t": (
        with_tensor(eagle3_head(), d2t=eagle3_head().tensors["d2t"] + np.arange(heads.DRAFT)),
        "d2t does not lead to different tokens|d2t and t2d name different tokens",
    ),
    "other t2d": (with_tensor(eagle3_head(), t2d=np.arange(V) < heads.DRAFT), "tensors d2t and t2d name different tokens"),
    "vocabulary": (eagle3_head(vocab_size=50), "the drafter is for a model with a vocabulary of 50, not 40; give this model's own drafter"),
    "width": (eagle3_head(target_hidden_size=64), "hidden size of 64, not 32|width"),
    "numbering": (
        eagle3_head(eagle_aux_hidden_state_layer_ids=[1, 4, 7]),
        "does not say whether these .* --aux-layers 2,5,8 if they number outputs",
    ),
    "numbering twice": (
        eagle3_head(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}, eagle_aux_hidden_state_layer_ids=[3, 4, 5]),
        r"is \[1, 5, 8\] in eagle_config and \[3, 4, 5\] outside; give .* --aux-layers I,J,K",
    ),
    "speculators' numbering": (
        dataclasses.replace(
            speculators_head(norms="none"),
            config={**speculators_head(norms="none").config, "eagle_aux_hidden_state_layer_ids": [1, 5, 8]},
        ),
        "does not say whether these .* --aux-layers 2,6,9 if they number outputs",
    ),
    "the model's context": (
        eagle3_head(max_position_embeddings=256),
        "says max_position_embeddings 256, which is the model's context, and does not say what .* trained at; give --trained-length N",
    ),
    "no length": (
        dataclasses.replace(llama4_head(), config={k: v for k, v in llama4_head().config.items() if k != "max_position_embeddings"}),
        "has no max_position_embeddings, and does not say what .* trained at; give --trained-length N",
    ),
    "norm_output": (eagle3_head(norm_output=True), "norm_output is true, .*; give --norm-fed-back yes or no"),
    "single state": (
        eagle3_head(eagle_config={"use_aux_hidden_state": False}),
        "use_aux_hidden_state is false, a head that reads one state",
    ),
    "residual": (
        dataclasses.replace(
            speculators_head(norms="none"),
            config={k: v for k, v in speculators_head(norms="none").config.items() if k != "norm_before_residual"},
        ),
        "config.json has no norm_before_residual, .*; give --norm-before-residual yes or no",
    ),
    "no norm": (eagle3_head(norm_before_fc=True), "disagree on input_norm.weight"),
    "bias": (
        dataclasses.replace(eagle1_head(), config={**eagle1_head().config, "bias": False}),
        "says no bias, and the head has tensor fc.bias",
    ),
    "quantised": (eagle3_head(quantization_config={"quant_method": "fp8"}), "quantization_config is .*, which is not supported"),
    "experts": (
        dataclasses.replace(llama4_head(), config={**llama4_head().config, "moe_layers": [1]}),
        "moe_layers names layers with experts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_line_and_writes_nothing(name: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, message = REFUSED[name]
    heads.write(tmp_path / "head", head.config, head.tensors)
    assert cli.main(["convert", str(tmp_path / "head"), str(tmp_path / "drafter"), "--target", str(target)]) != 0
    (said,) = capsys.readouterr().err.splitlines()  # no bar
    assert re.search(message, said), said
    assert not (tmp_path / "drafter").exists()


def test_what_a_head_leaves_open_can_be_said(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = eagle3_head(eagle_aux_hidden_state_layer_ids=[1, 4, 7], norm_output=True, max_position_embeddings=1000)
    heads.write(tmp_path / "head", head.config, head.tensors)
    common = [str(tmp_path / "head"), str(tmp_path / "drafter"), "--aux-layers", "2,5,8", "--norm-fed-back", "no", "--trained-length", "48"]
    assert cli.main(["convert", *common]) != 0
    assert "are for EAGLE heads; give the head's model as --target" in capsys.readouterr().err
    assert cli.main(["convert", *common, "--target", str(target), "--dry-run"]) == 0
    assert "token_ids <- d2t [12] int64, t2d [40] bool: d2t: offsets" in capsys.readouterr().out
    assert cli.main(["convert", *common, "--target", str(target)]) == 0
    config = open_drafter(tmp_path / "drafter").config
    assert (config.aux_layers, config.norm_fed_back, config.decoder.max_position_embeddings) == ((2, 5, 8), False, 48)
    assert cli.main(["show", str(tmp_path / "drafter"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"aux_layers +2, 5, 8 +--aux-layers\n", shown) and "a model of 12 layers, width 32, 40 tokens" in shown
    for row in (
        r"version +eagle3 +derived from the names of the tensors",
        r"decoder\.vocab_size +40 +config\.json: vocab_size",
        r"decoder\.max_position_embeddings +48 +--trained-length",
        r"norm_fed_back +false +--norm-fed-back",
        r"norm_before_fuse +false +absent from config\.json: norm_before_fc",
        r"target_layers +12 +derived from the target",
    ):
        assert re.search(rf"^{row}$", shown, re.MULTILINE), row


@pytest.mark.parametrize("tied", [False, True])
def test_an_eagle1_head_with_a_copy_of_an_output_head(tied: bool, tmp_path: Path) -> None:
    """An EAGLE-1 drafter uses its target's output head. An equal copy of it is ignored; any other head is refused."""
    config, head = target_config(tie_word_embeddings=tied), eagle1_head()
    target = save_target(tmp_path / "target", config)
    head.tensors["lm_head.weight"] = np.asarray(tiny.weights(config)["embed" if tied else "head"])
    convert(heads.write(tmp_path / "head", head.config, head.tensors), tmp_path / "drafter", target=target)
    assert "head" not in open_drafter(tmp_path / "drafter").weights
    head.tensors["lm_head.weight"] = head.tensors["lm_head.weight"] * np.float32(1.01)
    heads.write(tmp_path / "other", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the output head of .*, with which an EAGLE-1 drafter drafts; give"):
        convert(tmp_path / "other", tmp_path / "another", target=target)


def test_a_tensor_under_two_names_is_refused(target: Path, tmp_path: Path) -> None:
    head = llama4_head()
    head.tensors["norm.weight"] = head.tensors["model.norm.weight"] + 1
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"has tensor norm\.weight twice, once as model\.norm\.weight"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize("tensors", [{"d2t": np.zeros(heads.DRAFT, np.float32)}, {"t2d": np.ones(V, np.int64)}], ids=["offsets", "tokens"])
def test_tables_of_another_type_are_refused(tensors: heads.Tensors, target: Path, tmp_path: Path) -> None:
    head = with_tensor(eagle3_head(), **tensors)
    heads.write(tmp_path / "head", head.config, head.tensors)
    with pytest.raises(CheckpointError, match=r"tensors d2t and t2d are of the types .*; expected integers, and true or false"):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text(""), "expected the folder of an EAGLE head"),
        (lambda path: path.mkdir(), "has no config.json; expected the folder of an EAGLE head"),
    ],
    ids=["nothing", "file", "empty"],
)
def test_what_is_not_a_head(make: Any, message: str, target: Path, tmp_path: Path) -> None:
    make(tmp_path / "head")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "head", tmp_path / "drafter", target=target)


@pytest.mark.parametrize("torch", [False, True], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_its_target_is_named(name: str, torch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = HEADS[name]()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    if torch:
        (folder / "model.safetensors").unlink()
        write_torch_file(folder / "pytorch_model.bin", head.tensors)
    said = f"l4jax: error: {folder} is an EAGLE head, not a whole model; give its model to `l4jax convert` with --target\n"
    for command in (["convert", str(folder), str(tmp_path / "drafter")], ["show", str(folder)]):
        assert cli.main(command) == 2
        assert capsys.readouterr() == ("", said)


def test_a_model_is_not_a_head(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "m.gguf", config_of(GOLDEN / "llama3"), tensors_of(GOLDEN / "llama3"))
    for model in (GOLDEN / "llama3", GOLDEN / "llama3_tied", GOLDEN / "scout", GOLDEN / "multimodal", file):
        assert cli.main(["convert", str(model), str(tmp_path / "drafter"), "--target", str(target)]) == 2
        said = f"l4jax: error: {model} is a whole model, not an EAGLE head; leave --target out, or give the head\n"
        assert capsys.readouterr() == ("", said)


def test_a_name_with_eagle_in_it_makes_no_head(tmp_path: Path) -> None:
    """Eagle 2.5 is a model of images and text."""
    folder = golden("llama3", tmp_path / "source")
    reconfigure(folder, architectures=["Eagle2_5_VLForConditionalGeneration"])
    said = refused(folder, tmp_path)
    assert "Eagle2_5_VLForConditionalGeneration" in said and "EAGLE head" not in said


def test_a_head_whose_weights_cannot_be_read_is_known_by_its_configuration(target: Path, tmp_path: Path) -> None:
    head = HEADS["speculators"]()
    folder = heads.write(tmp_path / "head", head.config, head.tensors)
    (folder / "model.safetensors").write_bytes(b"{")
    assert "is an EAGLE head, not a whole model" in refused(folder, tmp_path)
    assert "model.safetensors is truncated" in refused(folder, tmp_path, target=target)


def test_a_head_has_no_tokenizer_to_leave_out(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors)
    for dry in ([], ["--dry-run"]):
        assert cli.main(["convert", str(folder), str(tmp_path / "d"), "--target", str(target), "--without-tokenizer", *dry]) == 2
        assert "has no tokenizer to convert it without; leave --without-tokenizer out" in capsys.readouterr().err


def test_a_converted_drafter_is_not_a_head(target: Path, tmp_path: Path) -> None:
    convert(heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors), tmp_path / "drafter", target=target)
    with pytest.raises(CheckpointError, match="drafter is converted already; load it"):
        convert(tmp_path / "drafter", tmp_path / "again", target=target)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_a_git_lfs_pointer_in_a_heads_folder(name: str, target: Path, tmp_path: Path) -> None:
    folder = heads.write(tmp_path / "head", eagle3_head().config, eagle3_head().tensors)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FileError, match=f"{name} is a git-lfs pointer"):
        convert(folder, tmp_path / "drafter", target=target)
