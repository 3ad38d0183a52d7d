"""The tokenizer of a GGUF file, written as Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4jax.text.chat import load_chat_format
from l4jax.text.gguf_tokenizer import write_gguf_tokenizer
from l4jax.text.load import load_tokenizer
from l4jax.text.tiktoken_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TiktokenTokenizer
from l4jax.text.tokenizer import Tokenizer, TokenizerError
from tests.text import small

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def metadata(**changes: Any) -> dict[str, Any]:
    """What a GGUF file made of the small tokenizer has."""
    model = json.loads(small.backend().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [CONTROL if token in small.SPECIAL else NORMAL for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 3,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def convert(directory: Path, **changes: Any) -> Tokenizer:
    write_gguf_tokenizer(metadata(**changes), directory)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert write_gguf_tokenizer({"general.architecture": "llama"}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_files_and_special_tokens(tmp_path: Path) -> None:
    with_template = metadata() | {"tokenizer.chat_template": "{{ messages }}"}
    assert write_gguf_tokenizer(with_template, tmp_path) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.special_tokens == {token: i for i, token in enumerate(small.SPECIAL)}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (3,))


@pytest.mark.parametrize("text", [text for text in small.TEXTS if not any(c.isdigit() for c in text)])
def test_ids_are_those_of_the_original(tmp_path: Path, text: str) -> None:
    expected = small.backend().encode(text, add_special_tokens=False).ids
    assert convert(tmp_path).encode(text, parse_special=True) == expected


def test_smollm_splits_digits_off_one_by_one(tmp_path: Path) -> None:
    tokenizer = convert(tmp_path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("345  12")] == ["3", "4", "5", "  ", "1", "2"]


@pytest.mark.parametrize(
    ("pre", "add_bos_token", "adds"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False), ("llama4", None, False)],
)
def test_bos(tmp_path: Path, pre: str, add_bos_token: bool | None, adds: bool) -> None:
    tokenizer = convert(tmp_path, pre=pre, add_bos_token=add_bos_token)
    assert tokenizer.prepends_bos is adds
    assert (tokenizer.encode("dog")[0] == 0) is adds


@pytest.mark.parametrize(("pre", "count"), [("llama-bpe", LLAMA3_RANKS), ("llama4", LLAMA4_RANKS), ("gpt-4o", LLAMA4_RANKS)])
def test_llamas_words_and_ids_are_those_of_its_own_tokenizer(tmp_path: Path, pre: str, count: int) -> None:
    from l4jax.text.hf_tokenizer import byte_alphabet

    original = TiktokenTokenizer(small.tiktoken_ranks(count))
    characters = {byte: character for character, byte in byte_alphabet().items()}
    tokens = ["".join(characters[byte] for byte in token) for token in small.tiktoken_ranks(count)]
    # All ways to make a token of two.
    merges = [f"{token[:cut]} {token[cut:]}" for token in tokens for cut in range(1, len(token))]
    special = list(original.special_tokens)
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special)
    tokenizer = convert(tmp_path, pre=pre, tokens=tokens + special, token_type=types, merges=merges, bos_token_id=count, add_bos_token=True)
    for text in (*small.TEXTS, "I'm 12345 WE'LL don't\n\n  aB//\n x", "<|eot|><|eot_id|>"):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.encode(text, parse_special=True) == original.encode(text, parse_special=True)


def test_user_defined_tokens_are_found_in_text_but_are_text(tmp_path: Path) -> None:
    fields = metadata()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokenizer = convert(tmp_path, tokens=[*tokens, "<tool>"], token_type=[*types, USER_DEFINED])
    assert tokenizer.encode("<tool>") == [len(tokens)]
    assert tokenizer.decode([len(tokens)]) == "<tool>"


def test_a_word_outside_the_byte_alphabet_is_decoded_as_it_is_and_unused_rows_as_nothing(tmp_path: Path) -> None:
    fields = metadata()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    count = len(tokens)
    tokenizer = convert(tmp_path, tokens=[*tokens, "[PAD1]", "你好 世", "[PAD2]"], token_type=[*types, UNUSED, NORMAL, UNUSED])
    assert tokenizer.decode(range(count, count + 3)) == "你好 世"
    assert tokenizer.token_id("[PAD1]") is None
    # Every id can be decoded, also those that the model's embedding has beyond the tokenizer.
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(count + 100))


def test_several_templates(tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "T{{ tools | tojson }}{{ messages[0].content }}",
    }
    assert write_gguf_tokenizer(metadata() | templates, tmp_path) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    chat = load_chat_format(tmp_path, tokenizer)
    assert chat is not None
    assert chat.render([{"role": "user", "content": "hi"}]) == "hi"
    assert chat.render([{"role": "user", "content": "hi"}], tools=[{"name": "f"}]) == 'T[{"name": "f"}]hi'
    with pytest.raises(TokenizerError, match="the chat template 'default' is of type int; expected a text"):
        write_gguf_tokenizer(metadata() | {"tokenizer.chat_template": 5}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', which is not supported; expected 'gpt2'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', a splitting into words that is not supported; expected one of llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"token_type": [1]}, "with 1 types; the file is damaged"),
        ({"merges": ["a b c"]}, "the merge 'a b c' does not make one token of two"),
        ({"merges": ["q z"]}, "the merge 'q z' does not make one token of two"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000; expected 0 to"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError) as error:
        write_gguf_tokenizer(metadata(**changes), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
