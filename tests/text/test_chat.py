"""Chat formats: which template, what it renders, and that messages cannot speak for the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.chat import ChatError, ChatFormat, load_chat_format
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.load import load_tokenizer
from l4jax.text.tiktoken_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TiktokenTokenizer
from l4jax.text.tokenizer import Tokenizer, TokenizerError
from tests.text import small

TOKENIZER = HfTokenizer(small.backend(), {})
LLAMA3 = TiktokenTokenizer(small.tiktoken_ranks(LLAMA3_RANKS))
LLAMA4 = TiktokenTokenizer(small.tiktoken_ranks(LLAMA4_RANKS))
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hi <there> & "you"'},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": [{"type": "text", "text": "Bye"}, {"type": "text", "text": " now"}]},
]


def chat_format(template: str, tokenizer: Tokenizer = TOKENIZER) -> ChatFormat:
    return ChatFormat(template, tokenizer, origin="test", variables={"bos_token": "<|begin_of_text|>"}, stop_token_ids=())


def built_in(directory: Path, tokenizer: Tokenizer) -> ChatFormat:
    found = load_chat_format(directory, tokenizer)
    assert found is not None
    assert found.origin.startswith("built-in")
    return found


@pytest.mark.parametrize(
    "template",
    ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ 'a' * 10 ** 17 }}"],
    ids=["recursive", "nested", "endless"],
)
def test_a_template_that_asks_too_much_is_refused(template: str) -> None:
    with pytest.raises(ChatError, match=r"^test: the chat template"):
        chat_format(template).render(CONVERSATION)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="which is no Unicode character"):
        chat_format("{{ messages[0].content }}").encode([{"role": "user", "content": "a\udcff"}])
    with pytest.raises(ValueError, match="at position 1, which is no Unicode character"):
        TOKENIZER.encode("a\udcff")


def test_built_in_llama_3(tmp_path: Path) -> None:
    chat = built_in(tmp_path, LLAMA3)
    assert chat.render([*CONVERSATION[:2], {"role": "tool", "content": "42"}]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        '<|start_header_id|>user<|end_header_id|>\n\nHi <there> & "you"<|eot_id|>'
        "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert chat.stop_token_ids == (128001, 128008, 128009)


def test_built_in_llama_4(tmp_path: Path) -> None:
    chat = built_in(tmp_path, LLAMA4)
    assert chat.render([*CONVERSATION, {"role": "tool", "content": "42"}]) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        '<|header_start|>user<|header_end|>\n\nHi <there> & "you"<|eot|>'
        "<|header_start|>assistant<|header_end|>\n\nHello!<|eot|>"
        "<|header_start|>user<|header_end|>\n\nBye now<|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n42<|eom|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    assert chat.stop_token_ids == (200001, 200007, 200008)
    assert chat.render(CONVERSATION[:1], add_generation_prompt=False).endswith("Be brief.<|eot|>")


def test_built_in_chatml(tmp_path: Path) -> None:
    chat = built_in(tmp_path, TOKENIZER)
    assert chat.render(CONVERSATION[2:]) == (
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye now<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.stop_token_ids == (3,)


# What llama_models' own ChatFormat.encode_dialog_prompt writes, word for word, with its special tokens as ids.
@pytest.mark.parametrize(
    ("tokenizer", "bos", "header", "header_end", "turn_end"),
    [(LLAMA3, 128000, 128006, 128007, 128009), (LLAMA4, 200000, 200005, 200006, 200008)],
)
def test_built_in_formats_have_metas_tokens(
    tmp_path: Path, tokenizer: Tokenizer, bos: int, header: int, header_end: int, turn_end: int
) -> None:
    def text(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    expected = [bos]
    for message in CONVERSATION[:3]:
        expected += [header, *text(str(message["role"])), header_end, *text("\n\n"), *text(str(message["content"])), turn_end]
    expected += [header, *text("assistant"), header_end, *text("\n\n")]
    assert built_in(tmp_path, tokenizer).encode(CONVERSATION[:3]) == expected


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}}, "chat_template.jinja"),
        ({"chat_template.json": {"chat_template": "A"}, "tokenizer_config.json": {"chat_template": "B"}}, "chat_template.json"),
        ({"tokenizer_config.json": {"chat_template": "A"}}, "tokenizer_config.json"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]}},
            "tokenizer_config.json",
        ),
    ],
)
def test_the_checkpoints_template_is_used(tmp_path: Path, files: dict[str, Any], origin: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    found = load_chat_format(tmp_path, TOKENIZER)
    assert found is not None
    assert origin in found.origin
    assert found.render(CONVERSATION) == "A"


def test_without_any_template_there_is_no_chat(tmp_path: Path) -> None:
    backend = small.backend()
    tokenizer = HfTokenizer(backend, {})
    tokenizer.special_tokens = {}
    assert load_chat_format(tmp_path, tokenizer) is None


def test_stop_tokens_come_from_all_that_names_them(tmp_path: Path) -> None:
    small.write(tmp_path, eos_token="<|end_of_text|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert built_in(tmp_path, tokenizer).stop_token_ids == (7, 1, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(TokenizerError, match=r"eos_token_id is \['x'\]; expected a token id or a list of them"):
        load_chat_format(tmp_path, tokenizer)


def test_templates_know_the_special_tokens(tmp_path: Path) -> None:
    small.write(tmp_path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"}, pad_token="<|end_of_text|>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    found = load_chat_format(tmp_path, tokenizer)
    assert found is not None
    assert found.render(CONVERSATION) == "<|im_start|><|im_end|><|end_of_text|>"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        # Blocks take their line with them.
        ("{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n", "system\n"),
        ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}", "system,user,"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Hi <there> & \\"you\\""}'),
        ("{% generation %}{{ messages[2].content }}{% endgeneration %}", "Hello!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages[0]['content'] }}{{ tools is none }}{{ add_generation_prompt }}", "Be brief.TrueTrue"),
    ],
)
def test_templates_find_what_transformers_offers(template: str, rendered: str) -> None:
    assert chat_format(template).render(CONVERSATION) == rendered


def test_no_bos_is_added_to_what_the_template_writes() -> None:
    assert chat_format("{{ bos_token }}x").encode(CONVERSATION) == [0, *TOKENIZER.encode("x")]
    assert chat_format("x").encode(CONVERSATION) == TOKENIZER.encode("x")


def test_templates_cannot_leave_their_sandbox() -> None:
    with pytest.raises(ChatError, match="the chat template cannot format these messages: access to attribute '__class__'"):
        chat_format("{{ messages.__class__.__mro__ }}").render(CONVERSATION)
    with pytest.raises(ChatError, match="cannot format"):
        chat_format("{{ messages.append(1) }}").render(CONVERSATION)


def test_a_template_may_refuse() -> None:
    with pytest.raises(ChatError, match="test: the chat template cannot format these messages: roles must alternate"):
        chat_format("{{ raise_exception('roles must alternate') }}").render(CONVERSATION)
    with pytest.raises(ChatError, match="cannot format these messages"):
        chat_format("{{ messages[0].content + 1 }}").render(CONVERSATION)


def test_a_broken_template_is_refused_with_its_line() -> None:
    with pytest.raises(ChatError, match="test: line 2 of the chat template is not valid Jinja"):
        chat_format("\n{% for %}")


ECHO = (
    "{% for m in messages %}<|im_start|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | map(attribute='text') | join }}{% endif %}"
    "<|im_end|>{% endfor %}"
)
PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|im_end|>", "\ufdd0", "\ufdd0\ufdd0", "hi", " ", "<<|im_end|>>"]
)


@given(st.lists(PIECES).map("".join))
def test_special_tokens_in_a_message_are_text(content: str) -> None:
    expected = [2, *TOKENIZER.encode(content), 3]
    assert TOKENIZER.decode(chat_format(ECHO).encode([{"role": "user", "content": content}])[1:-1]) == content
    assert [i for i in chat_format(ECHO).encode([{"role": "user", "content": content}]) if TOKENIZER.is_special(i)] == [2, 3]
    if "<" not in content:
        assert chat_format(ECHO).encode([{"role": "user", "content": content}]) == expected


@given(st.lists(PIECES, min_size=1))
def test_parts_of_a_message_cannot_join_to_a_special_token(parts: list[str]) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": part} for part in parts]}
    ids = chat_format(ECHO).encode([message])
    assert [i for i in ids if TOKENIZER.is_special(i)] == [2, 3]
    assert TOKENIZER.decode(ids) == "".join(parts)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "the conversation is a str; expected a list of messages"),
        ({"role": "user", "content": "hi"}, "the conversation is a dict; expected a list of messages"),
        (None, "the conversation is a NoneType"),
        ([], "the conversation has no messages; expected at least one"),
        (["hi"], "message 1 is a str; expected an object with role and content"),
        ([*CONVERSATION, {"content": "hi"}], "message 5 has role None; expected one of system, user, assistant, tool, ipython"),
        ([{"role": "robot", "content": "hi"}], "message 1 has role 'robot'"),
        ([{"role": ["user"], "content": "hi"}], "message 1 has role ['user']"),
        ([{"role": "user"}], "message 1 has content of type NoneType; expected a text"),
        ([{"role": "user", "content": 5}], "message 1 has content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a content part that is no text"),
        ([{"role": "user", "content": ["hi"]}], "message 1 has a content part that is no text"),
    ],
)
def test_bad_messages_are_refused_in_one_line(messages: Any, message: str) -> None:
    for use in (chat_format(ECHO).render, chat_format(ECHO).encode):
        with pytest.raises(ChatError) as error:
            use(messages)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
