"""Chat formats: which template, what it renders, and that messages cannot speak for the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.chat import ChatError, ChatFormat, load_chat_format
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.load import load_tokenizer
from l4jax.text.tiktoken_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TiktokenTokenizer
from l4jax.text.tokenizer import Tokenizer
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
BLANK = [{"role": "user", "content": ""}]


def chat_format(template: str, tokenizer: Tokenizer = TOKENIZER, tool_use: str | None = None) -> ChatFormat:
    return ChatFormat(template, tokenizer, origin="test", variables={"bos_token": "<|begin_of_text|>"}, tool_use=tool_use)


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
    with pytest.raises(ValueError, match="which is not a Unicode character"):
        chat_format("{{ messages[0].content }}").encode([{"role": "user", "content": "a\udcff"}])
    with pytest.raises(ValueError, match="at position 1, which is not a Unicode character"):
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
        ({"processor_config.json": {"chat_template": "A"}, "tokenizer_config.json": {"chat_template": "B"}}, "processor_config.json"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]}},
            "tokenizer_config.json",
        ),
        ({"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "B"}, "chat_template.jinja"),
    ],
)
def test_the_checkpoints_template_is_used(tmp_path: Path, files: dict[str, Any], origin: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    found = load_chat_format(tmp_path, TOKENIZER)
    assert found is not None
    assert origin in found.origin
    assert found.render(BLANK) == "A"


def test_without_any_template_there_is_no_chat(tmp_path: Path) -> None:
    assert load_chat_format(tmp_path, HfTokenizer(small.backend(special=("<s>", "</s>")), {})) is None


def test_stop_tokens_come_from_all_that_names_them(tmp_path: Path) -> None:
    small.write(tmp_path, eos_token="<|end_of_text|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert built_in(tmp_path, tokenizer).stop_token_ids == (1, 3)


def test_templates_know_the_special_tokens(tmp_path: Path) -> None:
    small.write(tmp_path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"}, pad_token="<|end_of_text|>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    found = load_chat_format(tmp_path, tokenizer)
    assert found is not None
    assert found.render(BLANK) == "<|im_start|><|im_end|><|end_of_text|>"


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
    every_message = "|{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_format(template + every_message).render(CONVERSATION).partition("|")[0] == rendered


def test_no_bos_is_added_to_what_the_template_writes() -> None:
    assert chat_format("{{ bos_token }}x").encode(BLANK) == [0, *TOKENIZER.encode("x")]
    assert chat_format("x").encode(BLANK) == TOKENIZER.encode("x")


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


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


# Llama 3.2's way: the system message is a text, the others texts or lists of parts, each trimmed.
EITHER = (
    "{% if messages[0].role == 'system' %}[{{ messages[0]['content'] | trim }}]{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.content is string %}<{{ m.content }}>"
    "{% else %}{% for part in m['content'] %}{% if part.type == 'text' %}({{ part.text | trim }}){% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }};{% endif %}{% endfor %}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}[{{ m['content'][0]['text'] }}]{% endfor %}"
TEXT_OR_FIRST_PART = FIRST_PART.replace("[{{", "{% if m.content is string %}<{{ m.content }}>{% else %}[{{").replace(
    "}}]", "}}]{% endif %}"
)
UPPER_CASE = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
TEXT_ONLY = "{% for m in messages %}{{ m['content'] | trim }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "contents", "rendered"),
    [
        (TEXT_ONLY, [parts("Bye", " now "), "x"], "Bye now;x;"),
        (TEXT_ONLY.replace("| trim", ""), [parts("Bye", " now "), parts()], "Bye now ;;"),
        (TEXT_ONLY.replace("| trim", "+ ''"), [parts("Bye", " now")], "Bye now;"),
        (PARTS_ONLY, ["Bye now", parts("a", "b")], "Bye now;a;b;"),
        (EITHER, [parts(" Bye ", "now"), " x"], "(Bye)(now)< x>"),
        (FIRST_PART, ["Bye now", parts("a "), parts("b", " c ")], "[Bye now][a ][b c ]"),
        (TEXT_OR_FIRST_PART, ["Bye now", parts("a "), parts("b", " c ")], "<Bye now>[a ]<b c >"),
        (UPPER_CASE, ["a", parts("b", "c")], "ABC"),
    ],
)
def test_a_template_gets_contents_in_the_form_that_it_takes(template: str, contents: list[Any], rendered: str) -> None:
    assert chat_format(template).render([{"role": "user", "content": content} for content in contents]) == rendered


@pytest.mark.parametrize("content", ["hi", parts("hi"), parts("h", "i")])
def test_a_message_that_a_template_would_lose_is_refused(content: Any) -> None:
    users_only = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    user = {"role": "user", "content": "Hello"}
    with pytest.raises(ChatError, match="test: the chat template does not write what a message of role tool says; leave the message out"):
        chat_format(users_only).render([user, {"role": "tool", "content": content}])
    with pytest.raises(ChatError, match="what a message of role user says"):
        chat_format("{% for m in messages %}{{ m.text }}{% endfor %}").render([{"role": "user", "content": content}])
    # With nothing in it there is nothing to lose; what a template does not write beside tool calls is its own decision.
    assert chat_format(users_only).render([user, {"role": "tool", "content": " "}]) == "Hello"
    calls = "{% for m in messages %}{{ 'call' if m.tool_calls else m.content }};{% endfor %}"
    said = {"role": "assistant", "content": content, "tool_calls": [{"name": "f"}]}
    assert chat_format(calls).render([user, said]) == "Hello;call;"


def test_each_role_has_a_form_of_its_own() -> None:
    conversation = [{"role": "system", "content": parts("Be", " brief ")}, {"role": "user", "content": parts("a ", "b")}]
    assert chat_format(EITHER).render(conversation) == "[Be brief](a)(b)"


# Rendered with transformers 5.24, apply_chat_template(continue_final_message=True).
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")


@pytest.mark.parametrize(
    ("template", "content", "ending"),
    [
        (CHATML, "Hello, my name", "assistant\nHello, my name"),
        (CHATML, "  Hello \n", "assistant\n  Hello \n"),
        (TRIMMED, "  Hello \n", "assistant\nHello"),
        (TRIMMED, "Hello", "assistant\nHello"),
        (TRIMMED.replace("<|im_end|>", " <|im_end|>"), "Hello ", "assistant\nHello "),
        (PARTS_ONLY, "Hello ", "Hi;Hello "),
        (CHATML, parts("Hel", "lo "), "assistant\nHello "),
        (PARTS_ONLY, parts("Hel", "lo "), "Hi;Hel;lo "),
        # Twice in the text: the last one is continued.
        (CHATML, "user", "assistant\nuser"),
        (CHATML, "\ufdd1 \ufdd1", "assistant\n\ufdd1 \ufdd1"),
    ],
)
def test_the_final_message_is_continued_as_by_transformers(template: str, content: Any, ending: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    chat = chat_format(template)
    prompt = chat.render(messages, continue_final_message=True)
    assert prompt.endswith(ending)
    assert messages[1]["content"] == content
    assert chat.render(messages).startswith(prompt.rstrip())
    assert chat.encode(messages, continue_final_message=True) == TOKENIZER.encode(prompt, parse_special=True, add_bos=False)


def test_a_continued_message_cannot_speak_for_the_template() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>x<|im_"}]
    ids = chat_format(CHATML).encode(messages, continue_final_message=True)
    assert [i for i in ids if TOKENIZER.is_special(i)] == [2, 3, 2]
    assert TOKENIZER.decode(ids).endswith("assistant\n<|im_end|>x<|im_")


TOOLS = [{"type": "function", "function": {"name": "f", "description": "<|im_end|> & <b>"}}]
WITH_ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.title }}={{ d.text }};{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{{ 'quiet' if enable_thinking is defined and not enable_thinking else 'thinking' }}{{ date | default('') }}"
)


def test_tools_documents_and_variables_reach_the_template() -> None:
    chat = chat_format(WITH_ALL)
    documents = [{"title": "t", "text": "<|im_end|>"}]
    options: dict[str, Any] = {
        "tools": TOOLS,
        "documents": documents,
        "chat_template_kwargs": {"enable_thinking": False, "date": "<|im_start|>"},
    }
    text = json.dumps(TOOLS) + "t=<|im_end|>;<|im_start|>hiquiet<|im_start|>"
    messages = [{"role": "user", "content": "hi"}]
    assert chat.render(messages, **options) == text
    ids = chat.encode(messages, **options)
    assert [i for i in ids if TOKENIZER.is_special(i)] == [2]
    assert TOKENIZER.decode(ids, skip_special=False) == text


def test_texts_that_a_template_escapes_keep_their_marks_out() -> None:
    chat = chat_format("{{ tools | tojson(ensure_ascii=True) }}{{ messages[0].content }}")
    tools = [{"<|im_end|>": r"é \ufdd0 \\ufdd0"}]
    ids = chat.encode([{"role": "user", "content": "\ufdd0"}], tools=tools)
    assert not any(TOKENIZER.is_special(i) for i in ids)
    assert TOKENIZER.decode(ids) == json.dumps(tools) + "\ufdd0"


def test_tool_calls_need_no_content() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call], "name": None},
    ):
        assert chat_format(WITH_ALL).render([message]) == '<|im_start|>{"x": [1, 2.5, null, true]}thinking'
        # A key with None is as an absent one, as in transformers.
        assert chat_format("{{ 'content' in messages[0] }}{{ 'name' in messages[0] }}").render([message]) == "FalseFalse"


def test_the_template_for_tools_is_used_with_tools() -> None:
    chat = chat_format("{{ messages[0].content }}", tool_use="{{ tools[0].function.name }}<|im_end|>")
    messages = [{"role": "user", "content": "hi"}]
    assert (chat.render(messages), chat.render(messages, tools=TOOLS)) == ("hi", "f<|im_end|>")
    with pytest.raises(ChatError, match=r"test \(tool_use\): line 1 of the chat template is not valid Jinja"):
        chat_format("x", tool_use="{% for %}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "f"}, "tools is of type str; expected a list of JSON objects"),
        ({"tools": {"name": "f"}}, "tools is of type dict; expected a list of JSON objects"),
        ({"tools": [len]}, "tools is of type list; expected a list of JSON objects"),
        ({"documents": ["text"]}, "documents is of type list; expected a list of JSON objects"),
        ({"tools": [{"name": b"f"}]}, "tools has a value of type bytes; expected JSON values"),
        ({"tools": [{5: "f"}]}, "tools has a value of type dict; expected JSON values"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs is of type list; expected the template's variables by name"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs is of type list; expected the template's variables by name"),
        (
            {"chat_template_kwargs": {"enable_thinkng": False}},
            "the chat template does not use enable_thinkng; leave it out (its own variables: ",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has messages, which l4jax gives to the template itself"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs has add_generation_prompt"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has tools"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs has bos_token"),
        ({"chat_template_kwargs": {"date": object()}}, "chat_template_kwargs has a value of type object; expected JSON values"),
        ({"continue_final_message": 1}, "continue_final_message is 1; expected True or False"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "are both set; give one of them"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    chat = chat_format(WITH_ALL + "{{ bos_token }}{{ add_generation_prompt }}")
    for use in (chat.render, chat.encode):
        with pytest.raises(ChatError) as error:
            use([{"role": "user", "content": "hi"}], **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_what_a_template_has_no_use_for_is_refused() -> None:
    for options in ({"tools": TOOLS}, {"documents": []}):
        with pytest.raises(ChatError, match=f"test: the chat template does not use {next(iter(options))}; leave it out"):
            chat_format(CHATML).render(CONVERSATION[:1], **options)
    with pytest.raises(TypeError, match="unexpected argument 'tool'; expected tools, documents, chat_template_kwargs"):
        chat_format(CHATML).render(CONVERSATION[:1], tool=TOOLS)


@pytest.mark.parametrize(
    ("template", "message", "refusal"),
    [
        (CHATML, {"role": "assistant", "tool_calls": [{"name": "f"}]}, "the final message has no text to continue"),
        (CHATML, {"role": "assistant", "content": []}, "the final message has no text to continue"),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            {"role": "assistant", "content": "Hi"},
            "does not write what a message of role assistant says",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            {"role": "assistant", "content": "Hi"},
            "does not write the final message as it is",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(template: str, message: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ChatError, match=refusal):
        chat_format(template).render([message], continue_final_message=True)


def test_the_built_in_templates_refuse_tool_calls(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    for tokenizer in (TOKENIZER, LLAMA3, LLAMA4):
        with pytest.raises(ChatError, match="the built-in template has no form for tool calls"):
            built_in(tmp_path, tokenizer).render([message])


def test_a_conversation_that_contains_itself_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "hi"}
    message["more"] = message
    with pytest.raises(ChatError, match="nested too deep, or contains itself"):
        chat_format(CHATML).encode([message])


def test_a_refusal_of_several_lines_is_told_in_one() -> None:
    with pytest.raises(ChatError) as error:
        chat_format("{{ raise_exception('first\n  second') }}").render(CONVERSATION)
    assert str(error.value).endswith(": first second")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "the conversation is of type str; expected a list of messages"),
        ({"role": "user", "content": "hi"}, "the conversation is of type dict; expected a list of messages"),
        (None, "the conversation is of type NoneType"),
        ([], "the conversation has no messages; expected at least one"),
        (["hi"], "message 1 is of type str; expected an object with role and content"),
        ([*CONVERSATION, {"content": "hi"}], "message 5 has role None; expected one of system, user, assistant, tool, ipython"),
        ([{"role": "robot", "content": "hi"}], "message 1 has role 'robot'"),
        ([{"role": ["user"], "content": "hi"}], "message 1 has role ['user']"),
        ([{"role": np.array(["user", "tool"]), "content": "hi"}], "message 1 has role array(['user', 'tool']"),
        ([{"role": "user"}], "message 1 has content of type NoneType; expected a text"),
        ([{"role": "user", "content": 5}], "message 1 has content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a content part that is not text"),
        ([{"role": "user", "content": ["hi"]}], "message 1 has a content part that is not text"),
        (b"hi", "the conversation is of type bytes; expected a list of messages"),
        ([{"role": "user", "content": b"hi"}], "message 1 has content of type bytes"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "message 1 has content of type NoneType"),
        ([{"role": "assistant", "content": None, "tool_calls": {"name": "f"}}], "message 1 has tool_calls of type dict; expected a list"),
        ([{"role": "user", "content": "hi", "name": b"x"}], "message 1 has a value of type bytes; expected JSON values"),
    ],
)
def test_bad_messages_are_refused_in_one_line(messages: Any, message: str) -> None:
    for use in (chat_format(ECHO).render, chat_format(ECHO).encode):
        with pytest.raises(ChatError) as error:
            use(messages)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
