"""A folder's tokenizer and template are read before its weights are converted; a model whose text is unusable takes token ids."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

import l4jax
from l4jax import SamplingParams
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.export import export
from l4jax.cli import main
from l4jax.text.load import Text, check_text, load_text
from l4jax.text.template import ChatError
from tests.text import small

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n"


def damaged(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def metaspace(folder: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.decoder = decoders.Metaspace()
    made.save(str(folder / "tokenizer.json"))


def unreadable(name: str) -> Callable[[Path], object]:
    """As a file without permission is, for every user."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / name)

    return damage


def dangling(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "blobs" / "0123")


BROKEN = [
    *((unreadable(name), f"{name} cannot be read (Too many levels") for name in ("tokenizer.json", "tokenizer_config.json")),
    *((unreadable(name), f"{name} cannot be read (Too many levels") for name in ("chat_template.jinja", "chat_template.json")),
    (dangling, "tokenizer.json is a link to a file that does not exist"),
    (damaged("tokenizer_config.json", '{"a": ' + "1" * 5000 + "}"), "tokenizer_config.json is not valid JSON (Exceeds the limit"),
    (
        damaged("tokenizer.json", POINTER),
        "tokenizer.json is a git-lfs pointer in place of the file; run `git lfs pull` in its folder, or fetch the file",
    ),
    (damaged("tokenizer.json", "{"), "tokenizer.json cannot be read"),
    (damaged("tokenizer_config.json", POINTER), "tokenizer_config.json is a git-lfs pointer"),
    (damaged("tokenizer_config.json", "[" * 100_000), "tokenizer_config.json is not valid JSON"),
    (damaged("special_tokens_map.json", "{"), "special_tokens_map.json is not valid JSON"),
    (metaspace, "has a BPE model with a Metaspace decoder, which is not supported"),
    (damaged("chat_template.jinja", POINTER), "chat_template.jinja is a git-lfs pointer"),
    (damaged("chat_template.jinja", "{% for %}"), "line 1 of the chat template is not valid Jinja"),
    (damaged("chat_template.jinja", "{{ messages | no_such_filter }}"), "No filter named 'no_such_filter'"),
    (damaged("chat_template.jinja", "{{ messages[0].content.no.such }}"), "the chat template cannot format these messages"),
    (damaged("chat_template.json", '{"chat_template": 5}'), "chat_template is neither a template nor a list of templates with names"),
    (damaged("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'), "chat_template is neither a template nor a list"),
]
SOUND = [
    lambda folder: None,
    damaged("chat_template.jinja", "{{ raise_exception('a system message first') }}"),
    damaged("chat_template.jinja", "{{ messages[0].content }}"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_what_load_would_trip_over_is_found(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(small.write(tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_text(tmp_path)
    assert "\n" not in str(error.value)
    # A model that has been converted is loaded all the same, and says why it has no text, or no chat.
    text = load_text(tmp_path)
    if text.chat_format is None:
        reason = text.no_chat if text.tokenizer else text.no_tokenizer
        assert message in reason
        assert reason.startswith("this checkpoint's")
    else:
        with pytest.raises(ChatError, match=message):
            text.chat_format.encode([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("change", SOUND)
def test_what_is_sound_passes(tmp_path: Path, change: Callable[[Path], object]) -> None:
    check_text(tmp_path)
    change(small.write(tmp_path))
    check_text(tmp_path)
    assert load_text(tmp_path).chat_format is not None


def test_a_pointer_in_place_of_metas_tokenizer_is_found(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer.model is a git-lfs pointer"):
        check_text(tmp_path)


def test_text_is_checked_before_any_weight_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    (small.write(source) / "chat_template.jinja").write_text(POINTER)
    assert main(["convert", str(source), str(tmp_path / "made")]) == 2
    assert "chat_template.jinja is a git-lfs pointer" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert not any((tmp_path / "made.partial").glob("weights/*"))


def test_without_its_tokenizer_a_model_keeps_all_other_files(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "processor_config.json"):
        (source / name).write_text("{")
    for name in ("LICENSE", "generation_config.json"):
        (source / name).write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read .*; or convert the weights alone, .*: --without-tokenizer$"):
        convert(source, tmp_path / "made")
    convert(source, tmp_path / "made", without_tokenizer=True)
    assert load_text(tmp_path / "made") == Text(None, None)
    kept = {"LICENSE", "generation_config.json", "source_config.json", "checkpoint.json", "weights"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == kept


def test_a_head_has_no_tokenizer_to_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an EAGLE head has no tokenizer to convert it without; leave --without-tokenizer out"):
        convert(tmp_path / "head", tmp_path / "made", target=tmp_path / "target", without_tokenizer=True)


def test_templates_with_names_are_copied_and_exported(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    small.write(source)
    (source / "additional_chat_templates").mkdir()
    for name, text in (
        ("chat_template", "{{ messages[0].content }}"),
        ("additional_chat_templates/tool_use", "T{{ tools }}{{ messages[0].content }}"),
    ):
        (source / f"{name}.jinja").write_text(text)
    convert(source, tmp_path / "made")
    export(tmp_path / "made", tmp_path / "back")
    for folder in (tmp_path / "made", tmp_path / "back"):
        chat = load_text(folder).chat_format
        assert chat is not None
        assert chat.render([{"role": "user", "content": "hi"}], tools=[]) == "T[]hi"


def test_every_file_that_load_looks_for_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    small.write(source)
    looked_for: set[str] = set()
    lstat = Path.lstat

    def recorded(path: Path) -> os.stat_result:
        looked_for.add(path.name)
        return lstat(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", recorded)
        load_text(source)
    assert {"tokenizer.json", "added_tokens.json", "chat_template.json"} <= looked_for
    for name in looked_for - {"tokenizer.json"}:
        (source / name).write_text("{{ messages[0].content }}" if name.endswith(".jinja") else "{}")
    (source / "added_tokens.json").write_text(json.dumps({"<late>": small.backend().get_vocab_size()}))
    convert(source, tmp_path / "made")
    assert {name for name in looked_for if not (tmp_path / "made" / name).exists()} == set()
    tokenizer = load_text(tmp_path / "made").tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("<late>") == [small.backend().get_vocab_size()]


def test_an_end_token_of_generation_config_is_special_in_the_loaded_tokenizer(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    values = json.loads(small.backend(special=("<s>", "</s>")).to_str())
    for token in values["added_tokens"]:
        token["special"] = False
    (source / "tokenizer.json").write_text(json.dumps(values))
    convert(source, tmp_path / "made")
    tokenizer = l4jax.load(tmp_path / "made", max_batch=1, prefill_lengths=(4,)).tokenizer
    assert tokenizer is not None
    assert tokenizer.is_special(1) and 1 not in tokenizer.encode("</s>")


def test_a_model_without_usable_text_stops_at_the_end_tokens_of_its_generation_config(tmp_path: Path) -> None:
    """No chat template, and then no tokenizer, is needed for them."""
    source = Path(shutil.copytree(GOLDEN / "llama3_tied", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [config["eos_token_id"], 7]}))
    small.write(source)
    convert(source, tmp_path / "made")
    (tmp_path / "made" / "tokenizer.json").write_text("{")
    llm = l4jax.load(tmp_path / "made", max_batch=1, prefill_lengths=(4,))
    (completion,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0.0, logit_bias={7: 1e6}))
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([7], None, "stop")
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.stream([1, 2]),
        lambda: llm.chat([{"role": "user", "content": "hi"}]),
        lambda: llm.generate([[1]], SamplingParams(stop=["x"])),
    ):
        with pytest.raises(ValueError, match=r"this checkpoint's tokenizer cannot be used \(.*tokenizer.json cannot be read") as error:
            call()
        assert "\n" not in str(error.value)
