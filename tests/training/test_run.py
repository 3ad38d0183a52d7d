"""Whole runs: interrupted anywhere they end as if they had not been; what cannot be used is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4jax import LLM, cli
from l4jax.checkpoints.partial import unfinished
from l4jax.checkpoints.store import StoredWeight, load_verified, open_drafter
from l4jax.training.drafters import trained_at, weights_from_target
from l4jax.training.folder import claim
from l4jax.training.run import Settings, train_drafter
from tests import tiny
from tests.training import small

SETTINGS = Settings(
    draft_vocab=4, ttt_steps=2, length=24, batch=2, epochs=2, lr=1e-2, warmup=1, held_out=0.3, max_tokens=10, seed=2**64 - 1
)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def llm() -> LLM:
    of = small.config()
    return LLM(of, tiny.weights(of), max_batch=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    prompts = tiny.prompts(small.config(), tuple(range(2, 14)))
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def train(llm: LLM, data: Path, out: Path, settings: Settings = SETTINGS, **hooks: Any) -> Path:
    options = {
        "target_digest": "x",
        "target_tokenizer": "y",
        "keep_states": False,
        "report_every": 3,
        "save_every": 2,
        "log": lambda line: None,
        "progress": lambda done, total: None,
    }
    return train_drafter(llm, data, out, settings, **(options | hooks))


def outcome(out: Path) -> tuple[list[str], list[dict[str, Any]], Mapping[str, np.ndarray]]:
    """Answers, metrics without speeds, and the drafter's weights."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for of_step in metrics:
        del of_step["tokens_per_second"]
    manifest = json.loads((out / "drafter" / "checkpoint.json").read_text())
    stored = {name: StoredWeight(**{**w, "shape": tuple(w["shape"])}) for name, w in manifest["weights"].items()}
    return (out / "answers.jsonl").read_text().splitlines(), metrics, load_verified(out / "drafter" / "weights" / "00000", stored)


@pytest.fixture(scope="module")
def whole(llm: LLM, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(llm, data, out)
    return out


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(
    llm: LLM, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"

    def kill_when(wanted: str) -> Any:
        def log(line: str) -> None:
            if line.startswith(wanted):
                raise Killed

        return log

    def kill_while_answering(done: int, total: int) -> None:
        if done >= 4:
            raise Killed

    def killed_while_saving(directory: Path, *_: Any, **__: Any) -> None:
        directory.with_name(directory.name + ".orbax-checkpoint-tmp-1").mkdir(parents=True)
        raise Killed

    with pytest.raises(Killed):
        train(llm, data, killed, progress=kill_while_answering)
    with (killed / "answers.jsonl").open("a") as file:
        file.write('{"prompt_token_ids": [1')
    with pytest.raises(Killed):
        train(llm, data, killed, log=kill_when("step 3/"))  # after the state of step 2
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    for function in ("folder.save_group", "run.save_drafter"):
        with monkeypatch.context() as patched:
            patched.setattr(f"l4jax.training.{function}", killed_while_saving)
            with pytest.raises(Killed):
                train(llm, data, killed)
    train(llm, data, killed)

    (answers, metrics, weights), (expected_answers, expected_metrics, expected_weights) = outcome(killed), outcome(whole)
    assert answers == expected_answers and len(answers) == 12
    assert metrics == expected_metrics and [m["step"] for m in metrics][:4] == [2, 3, 4, 6]
    assert metrics[0]["held_out_acceptance_length"] >= 1 and len(metrics[0]["accuracy"]) == 2
    for name, weight in expected_weights.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)
    assert len(list((killed / "states").iterdir())) == 2
    logged: list[str] = []
    train(llm, data, killed, log=logged.append)
    assert logged == [f"{killed / 'drafter'} is complete"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"length": 3},
            "none of 12 prompts can be trained on: answers to 12 have no room in 3 tokens, and the held-out share takes 0; give more",
        ),
        (
            {"held_out": 0.999},
            "none of 12 prompts can be trained on: answers to 0 have no room in 24 tokens, and the held-out share takes 12; give",
        ),
        ({"draft_vocab": 25}, "draft_vocab is 25; expected at most 24, the target's vocabulary"),
        ({"seed": 2**64}, rf"seed is {2**64}; expected an integer from 0 to 2\*\*64 - 1"),
        ({"seed": -1}, "seed is -1; expected an integer from 0"),
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"lr": 0.0}, r"lr is 0.0; expected a number above 0"),
        ({"held_out": 1.0}, "held_out is 1.0; expected a share from 0 to below 1"),
        ({"layers": 2}, "layers is 2; expected 1 for an EAGLE-3 drafter"),
        ({"version": "eagle1", "target_head": True}, "target_head is for EAGLE-3 drafters: .*; leave it out"),
        ({"temperature": -1.0}, "temperature is -1.0; expected 0"),
        ({"length": 512}, "length is 512; expected at most the target's context of 256"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_answered(
    changes: dict[str, Any], message: str, llm: LLM, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        train(llm, data, tmp_path / "out", dataclasses.replace(SETTINGS, **changes))
    assert not (tmp_path / "out").exists()


def test_a_mesh_must_share_out_the_rows(data: Path, tmp_path: Path) -> None:
    for mesh in ("data=4", "tensor=2"):
        with pytest.raises(ValueError, match=rf"^the mesh is {mesh}; expected data=N, where N divides the batch of 2$"):
            train(small.target(mesh), data, tmp_path / "out")


def test_another_runs_folder_is_refused(llm: LLM, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, {"seed": 0}), pytest.raises(ValueError, match="is being written by another process; wait for it to end"):
        train(llm, data, out)

    few = {"max_tokens": 3}  # answers without some of the tokens

    # Until there is a state, only what the answers depend on must be the same.
    def refused(message: str, changes: dict[str, Any], run: Path = tmp_path / "run", **hooks: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train(llm, data, run, dataclasses.replace(SETTINGS, **changes), **hooks)

    refused(r"^the draft vocabulary is 24; expected at most \d+, the different tokens of the answers; lower it$", few | {"draft_vocab": 24})
    refused(r"belongs to another run: its temperature is 0\.8, and this one's is 0\.7; give the same settings", few | {"temperature": 0.7})
    diverging = few | {"lr": 1e30, "warmup": 0, "batch": 1, "epochs": 9}
    refused(r"^the loss is nan at step 9; expected a number: lower lr$", diverging, report_every=9, save_every=99)
    refused(r"belongs to another run: its lr is 0\.01, and this one's is 0\.02; give the same settings", {"lr": 0.02}, whole)
    # Other data from a pipe, which can be read once: it is not taken for the same.
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=[data.read_bytes() + b'{"prompt": [1]}'])
    writer.start()
    with pytest.raises(ValueError, match=r"belongs to another run: its data is '[0-9a-f]{64}', and this one's is '[0-9a-f]{64}'; give"):
        train(llm, tmp_path / "fifo", whole)
    writer.join()

    shutil.copytree(whole, tmp_path / "damaged")
    for name, content in {"run.json": "[" * 100_000, "metrics.jsonl": "{\n", "answers.jsonl": '{"token_ids": [1]}\n'}.items():
        before = (tmp_path / "damaged" / name).read_text()
        (tmp_path / "damaged" / name).write_text(content)
        shutil.rmtree(tmp_path / "damaged" / "drafter", ignore_errors=True)
        with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\); restore it, or give another folder for the run$"):
            train(llm, data, tmp_path / "damaged")
        (tmp_path / "damaged" / name).write_text(before)
    (tmp_path / "damaged" / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl cannot be read \(No such file or directory\); restore it, or give another folder"
    ):
        train(llm, data, tmp_path / "damaged")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="full is not the folder of a training run; choose another"):
        train(llm, data, tmp_path / "full")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="has no prompts; expected a JSON object a line"):
        train(llm, tmp_path / "empty.jsonl", tmp_path / "other")


def test_goes_on_from_a_drafter(llm: LLM, data: Path, whole: Path, tmp_path: Path) -> None:
    """Its weights, shape, vocabulary and table, whatever the settings say; and longer texts count as trained on."""
    first = open_drafter(whole / "drafter")
    longest = max(len(line["prompt_token_ids"]) + len(line["token_ids"]) for line in map(json.loads, outcome(whole)[0]))
    assert first.config.decoder.max_position_embeddings <= longest  # some are held out
    first = dataclasses.replace(first, speculation={"float32": {"1": "chain:1"}})
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "LICENSE.txt").write_text("terms")
    more = dataclasses.replace(SETTINGS, lr=1e-12, length=40, max_tokens=20, held_out=0.0, draft_vocab=3, intermediate_size=8)
    found = open_drafter(train(llm, data, tmp_path / "second", more, start=first, target_directory=tmp_path / "target"))
    assert found.config.decoder.max_position_embeddings > longest
    assert found.config == trained_at(first.config, found.config.decoder.max_position_embeddings)
    assert (found.speculation, found.text_files) == (first.speculation, ("LICENSE.txt",))
    for name, weight in outcome(whole)[2].items():
        np.testing.assert_allclose(outcome(tmp_path / "second")[2][name], weight, atol=1e-9, err_msg=name)
    with pytest.raises(ValueError, match=r"belongs to another run: its start is '[0-9a-f]+', and this one's is None; give the same"):
        train(llm, data, tmp_path / "second", more.of_shape(first.config))
    other = tiny.llama3_like(vocab_size=32)
    with pytest.raises(ValueError, match="the drafter is for a model with a vocabulary of 24, not 32"):
        train(LLM(other, tiny.weights(other)), data, tmp_path / "third", start=first)


@pytest.mark.parametrize("tied", [False, True])
def test_the_target_s_output_head_stays_as_it_is(tied: bool, data: Path, tmp_path: Path) -> None:
    config = small.config(tie_word_embeddings=tied)
    table = "embed" if tied else "head"

    def target(seed: int) -> LLM:
        weights = tiny.weights(config, seed)
        # Rows with something in common, as those of real models have it.
        return LLM(config, weights | {table: weights[table] + 0.1}, max_batch=4)

    llm = target(0)
    found = open_drafter(train(llm, data, tmp_path / "out", dataclasses.replace(SETTINGS, target_head=True, epochs=1)))
    weights = outcome(tmp_path / "out")[2]
    assert found.config.target_head
    np.testing.assert_array_equal(weights["head"], np.asarray(llm.weights[table])[weights["token_ids"]])
    # Before training, the logits of a random normalised state have a standard deviation of 1.
    whole = np.arange(config.vocab_size, dtype=np.int32)
    started = weights_from_target(found.config, config, llm.weights, whole)
    state_ND = np.random.default_rng(0).normal(size=(4000, config.hidden_size)) * started["norm.scale"]
    np.testing.assert_allclose(np.sqrt(np.mean(np.var(state_ND @ started["head"].T, axis=-1))), 1.0, rtol=0.05)
    assert not np.allclose(weights["norm.scale"], started["norm.scale"])

    if tied:  # the rest is the same
        return
    other = target(1)  # of the same sizes, as a model that was trained further
    train(other, data, tmp_path / "more", dataclasses.replace(SETTINGS, epochs=1), start=found)
    np.testing.assert_array_equal(outcome(tmp_path / "more")[2]["head"], np.asarray(other.weights[table])[weights["token_ids"]])


def test_the_command_trains_reports_and_refuses(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.save(tmp_path / "target", small.config())
    changed = {field.name: getattr(SETTINGS, field.name) for field in dataclasses.fields(Settings)}
    changed = {name: value for name, value in changed.items() if value != getattr(Settings, name)}
    command = ["train-drafter", str(target), "--data", str(data), "--out", str(tmp_path / "out"), "--answer-batch=4"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    assert cli.main([*command, "--report-every", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out' / 'drafter'} is complete\n"
    assert re.search(r"^\d+ sequences with \d+ answer tokens in \d+ rows; \d+ held out; step 0 of \d+$", err, re.MULTILINE)
    assert re.search(r"^step 1/\d+: loss \d+\.\d{4}, accuracy \d\.\d\d \d\.\d\d, \d+ tokens/s", err, re.MULTILINE)
    assert cli.main([*command, "--report-every", "0"]) == 2
    assert capsys.readouterr().err == "l4jax: error: --report-every is 0; expected at least 1\n"
    assert cli.main([*command, "--start", str(tmp_path / "out" / "drafter")]) == 2
    assert capsys.readouterr().err == (
        "l4jax: error: --draft-vocab is given together with --start, whose drafter already has its shape; leave out --draft-vocab\n"
    )
    assert cli.main([*command, "--seed", "1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()  # no bar
    assert f"out belongs to another run: its seed is {SETTINGS.seed}, and this one's is 1; give the same settings" in said
    monkeypatch.setattr("l4jax.load", lambda *_, **__: pytest.fail("the target is loaded before its data is looked for"))
    for path, why in ((tmp_path / "missing.jsonl", "No such file or directory"), (tmp_path, "Is a directory")):
        assert cli.main([*command[:3], str(path), *command[4:]]) == 2
        assert capsys.readouterr() == ("", f"l4jax: error: {path} cannot be read ({why}); check its name and its permissions\n")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"cannot be written \(Not a directory\); choose another destination$"),
        claim(tmp_path / "file" / "run", {}),
    ):
        pass
    full = (
        rf"^the disk of {tmp_path}/run is full; free some space and run the same training again: what is written is kept in {tmp_path}/run$"
    )
    with pytest.raises(ValueError, match=full), claim(tmp_path / "run", {}):
        raise OSError(28, "No space left on device")
    own = rf"^{tmp_path}/run/metrics\.jsonl cannot be written \(Permission denied\); choose another destination$"
    with pytest.raises(ValueError, match=own), claim(tmp_path / "run", {}):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    "error",
    [
        OSError("text"),
        BrokenPipeError(32, "Broken pipe"),
        ConnectionRefusedError(111, "Connection refused"),
        FileNotFoundError(2, "No such file or directory", "/elsewhere/x"),
        OSError(28, "No space left on device", "/elsewhere/x"),
    ],
    ids=str,
)
def test_what_is_not_of_the_folder_is_not_blamed_on_it(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, claim(tmp_path / "run", {}):
        raise error
    assert raised.value is error
    with pytest.raises(type(error)) as raised, unfinished(tmp_path / "export", "export"):
        raise error
    assert raised.value is error
    assert not (tmp_path / "export.partial").exists()


def test_kept_states_change_nothing(llm: LLM, data: Path, whole: Path, tmp_path: Path) -> None:
    train(llm, data, tmp_path / "kept", keep_states=True)
    computed, kept = outcome(whole), outcome(tmp_path / "kept")
    assert kept[:2] == computed[:2]
    for name, weight in computed[2].items():
        np.testing.assert_array_equal(kept[2][name], weight, err_msg=name)
