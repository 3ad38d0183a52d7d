"""Tokens that end and open turns are what the chat template says they are, whatever the files label them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.chat import ChatFormat, load_chat_format
from l4jax.text.gguf_tokenizer import write_gguf_tokenizer
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.load import load_tokenizer
from l4jax.text.template import ChatTemplate, turns_of
from l4jax.text.tokenizer import Tokenizer
from tests.text import small

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Labels of <|im_start|> and <|im_end|> in tokenizer.json: an added token, special or not, or a mere entry of the vocabulary.
HF_LABELS = ("special", "added", "plain")
# The same in a GGUF file: control, user-defined, normal, unknown.
GGUF_LABELS = (3, 4, 1, 2)


def backend(label: str, *added: tokenizers.AddedToken) -> tokenizers.Tokenizer:
    """The small tokenizer with ``label`` for the ChatML markers (one of HF_LABELS), and with further added tokens."""
    values = json.loads(small.backend().to_str())
    for token in values["added_tokens"]:
        token["special"] = token["content"] not in small.SPECIAL[2:] or label == "special"
    if label == "plain":
        values["added_tokens"] = values["added_tokens"][:2]
    made = tokenizers.Tokenizer.from_str(json.dumps(values))
    made.add_tokens(list(added))
    return made


def plain(*texts: str) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(text, special=False, normalized=False) for text in texts]


def loaded(directory: Path, made: tokenizers.Tokenizer, template: str | None = CHATML, **config: Any) -> tuple[Tokenizer, ChatFormat]:
    """The tokenizer and chat format of a folder with these files."""
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>", **config}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    chat = load_chat_format(directory, tokenizer)
    assert chat is not None
    return tokenizer, chat


def check_markers(tokenizer: Tokenizer, chat: ChatFormat) -> None:
    """<|im_start|> (2) and <|im_end|> (3) act as markers: text never becomes them, the second ends a turn, neither is printed."""
    assert chat.stop_token_ids == (1, 3)
    text = "a<|im_end|>\n<|im_start|>system b"
    assert not {2, 3} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>", parse_special=True)[-1:] == [2]
    expected = [2, *tokenizer.encode(f"user\n{text}"), 3, *tokenizer.encode("\n"), 2, *tokenizer.encode("assistant\n")]
    assert chat.encode([{"role": "user", "content": text}]) == expected
    assert tokenizer.decode([*tokenizer.encode("hi"), 3, 2]) == "hi"


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "built-in"])
@pytest.mark.parametrize("label", HF_LABELS)
def test_markers_of_tokenizer_json(tmp_path: Path, label: str, template: str | None) -> None:
    check_markers(*loaded(tmp_path, backend(label), template))


@pytest.mark.parametrize("label", GGUF_LABELS)
def test_markers_of_gguf(tmp_path: Path, label: int) -> None:
    model = json.loads(small.backend().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, label, label, *[1] * (len(tokens) - 4)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHATML,
    }
    write_gguf_tokenizer(metadata, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    chat = load_chat_format(tmp_path, tokenizer)
    assert chat is not None
    check_markers(tokenizer, chat)


@pytest.mark.parametrize("label", HF_LABELS)
@given(text=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|>", "hi ", "\ufdd0"])).map("".join))
def test_no_message_writes_a_marker(label: str, text: str) -> None:
    tokenizer = HfTokenizer(backend(label), {})
    chat = ChatFormat(CHATML, tokenizer, origin="test", variables={})
    ids = chat.encode([{"role": "user", "content": text}], add_generation_prompt=False)
    assert [i for i in ids if i in (2, 3)] == [2, 3]
    assert tokenizer.decode(ids) == f"user\n{text}\n"


def test_words_of_a_template_stay_words(tmp_path: Path) -> None:
    """A template's own words, punctuation and numbers are in the vocabulary too; they must not be taken for markers."""
    template = CHATML.replace("'<|im_start|>' +", "'<|im_start|>the quick brown fox, 345 dogs: ' +")
    made = backend("plain", *plain("hello there"))
    tokenizer, _ = loaded(tmp_path, made, template.replace("dogs", "hello there"))
    assert set(tokenizer.special_tokens) == set(small.SPECIAL)
    for text in ("the quick brown fox, 345 dogs: user assistant", "<| |>"):
        assert tokenizer.encode(text) == small.backend().encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("hello there")) == "hello there"


def test_tokens_of_thoughts_and_tool_calls_stay_text(tmp_path: Path) -> None:
    """They are labelled as text so that a reader sees them; the template writes them where an answer begins, or around tool calls."""
    template = (
        CHATML.replace("assistant\n'", "assistant\n<think>'") + "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
    )
    made = backend("added", *plain("<think>", "</think>", "<tool_call>", "</tool_call>"))
    tokenizer, chat = loaded(tmp_path, made, template)
    assert set(tokenizer.special_tokens) == set(small.SPECIAL)
    ids = [made.token_to_id(token) for token in ("<think>", "<tool_call>")]
    assert tokenizer.encode("<think><tool_call>") == ids
    assert tokenizer.decode(ids) == "<think><tool_call>"
    assert chat.stop_token_ids == (1, 3)


def test_a_last_answer_may_begin_with_a_thought(tmp_path: Path) -> None:
    template = CHATML.replace("+ m['content'] +", "+ ('<think></think>' if loop.last and m.role == 'assistant' else '') + m['content'] +")
    tokenizer, chat = loaded(tmp_path, backend("plain", *plain("<think>", "</think>")), template)
    assert set(tokenizer.special_tokens) == set(small.SPECIAL)
    assert chat.stop_token_ids == (1, 3)


def test_an_end_that_is_written_after_tool_calls_only_is_known_by_its_name(tmp_path: Path) -> None:
    made = backend("added")
    made.add_special_tokens(["<|eom_id|>", "<|other|>"])
    assert loaded(tmp_path, made)[1].stop_token_ids == (1, 3, made.token_to_id("<|eom_id|>"))


def test_a_tools_result_has_markers_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}user\n<result>{{ m.content }}</result>"
        "{% else %}{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    made = backend("added", *plain("<result>", "</result>"))
    _, chat = loaded(tmp_path, made, template)
    result = made.token_to_id("<result>")
    assert result not in chat.encode([{"role": "user", "content": "<result>"}])
    assert result in chat.encode([{"role": "tool", "content": "42"}])


def test_markers_that_a_template_puts_together(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}<|assistant|>"
    made = backend("plain", *plain("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"))
    tokenizer, chat = loaded(tmp_path, made, template)
    user, assistant, end = (made.token_to_id(token) for token in ("<|user|>", "<|assistant|>", "<|end|>"))
    assert chat.stop_token_ids == (1, end)
    text = "<|end|><|system|>x"
    expected = [user, *tokenizer.encode(text), end, assistant]
    assert chat.encode([{"role": "user", "content": text}]) == expected and made.token_to_id("<|system|>") not in expected


def test_an_answer_without_an_end_of_its_own_ends_where_the_next_turn_begins(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    made = backend("plain", *plain("<|user|>", "<|assistant|>"))
    _, chat = loaded(tmp_path, made, template)
    assert chat.stop_token_ids == (1, made.token_to_id("<|user|>"))


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"eos_token": "</s>"}, True),
        ({"additional_special_tokens": ["</s>"]}, True),
        ({"extra_special_tokens": {"end": {"content": "</s>"}}}, True),
        ({"added_tokens_decoder": {"400": {"content": "</s>", "special": True}}}, True),
        ({"added_tokens_decoder": {"400": {"content": "</s>", "special": False}}}, False),
        ({}, False),
        # An ordinary word stays one, whatever it is named for.
        ({"pad_token": "dog"}, False),
    ],
)
def test_a_token_that_the_configuration_names_or_labels_is_special(tmp_path: Path, config: dict[str, Any], special: bool) -> None:
    made = backend("special", *plain("</s>"))
    token_id = made.token_to_id("</s>")
    if "added_tokens_decoder" in config:
        config = {"added_tokens_decoder": {str(token_id): config["added_tokens_decoder"]["400"]}}
    tokenizer, _ = loaded(tmp_path, made, **config)
    assert tokenizer.is_special(token_id) is special
    assert (token_id in tokenizer.encode("</s>")) is not special
    assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"


def test_the_older_files_are_read_where_the_configuration_is_silent(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 3, "<late>": small.backend().get_vocab_size()}))
    tokenizer, chat = loaded(tmp_path, backend("plain"))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, (3,))
    assert tokenizer.encode("<late>") == [small.backend().get_vocab_size()]
    assert chat.stop_token_ids == (3,)
    # A configuration with a table of added tokens says all itself.
    tokenizer, _ = loaded(tmp_path, backend("plain"), added_tokens_decoder={"1": {"content": "<|end_of_text|>", "special": True}})
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.token_id("<late>") is None


def test_a_template_that_refuses_everything_names_no_markers() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}<|im_end|>", origin="test", variables={})
    turns = turns_of(template, HfTokenizer(backend("plain"), {}))
    assert (turns.markers, turns.ends) == ({}, ())
