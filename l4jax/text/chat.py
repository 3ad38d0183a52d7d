"""Conversations in a model's own format, by its Jinja chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from l4jax.files import is_there, read_json_if_there, read_text
from l4jax.text.hf_tokenizer import read_tokenizer_config
from l4jax.text.template import ChatError, ChatTemplate, TemplateRefusal, turns_of
from l4jax.text.tokenizer import Tokenizer, TokenizerError, check_unicode, token_text
from sharding.kinds import shown

ROLES = ("system", "user", "assistant", "tool", "ipython")

# The built-in templates, and the tokens that tell which one a tokenizer is made for.
_BUILT_IN = {
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
# Ends of a turn that a template may write after tool calls only, or never.
_END_OF_TURN = ("<|eot|>", "<|eom|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")

# Unicode noncharacters, which no text should contain. One breaks special tokens up, the other marks where the model is to continue.
_BREAK, _CONTINUE = "\ufdd0", "\ufdd1"
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


class ChatOptions(TypedDict, total=False):
    """What may be given to a chat template beside the messages.

    ``tools``: JSON schemas of functions; ``documents``: objects with a title and a text; ``chat_template_kwargs``: further variables
    of the template, such as ``enable_thinking``. ``continue_final_message``: the prompt ends inside the last message, which the model
    continues, as with transformers' ``apply_chat_template``.
    """

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool


class ChatFormat:
    """Turns conversations into prompts with a Jinja template, which gets the filters and functions that transformers offers.

    What the template writes is the whole prompt: no BOS is added to it. ``origin`` says where the template was found.
    ``stop_token_ids`` end the assistant's turn.
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        *,
        origin: str,
        variables: Mapping[str, str],
        stop_token_ids: Sequence[int] = (),
        tool_use: str | None = None,
    ) -> None:
        """``variables``: special tokens by the template's names for them (``bos_token``). ``tool_use``: a template for calls with tools.

        The tokenizer's tokens that the template writes around turns become special, and those that it writes after an assistant's
        words are added to ``stop_token_ids``. Raises :class:`ChatError` for a template that does not compile.
        """
        self.origin = origin
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, origin=origin, variables=variables)
        self._tool_use = self._template if tool_use is None else ChatTemplate(tool_use, origin=f"{origin} (tool_use)", variables=variables)
        turns = [turns_of(one, tokenizer) for one in dict.fromkeys((self._template, self._tool_use))]
        further = {name: token_id for name in _END_OF_TURN if (token_id := tokenizer.marker_id(name)) is not None}
        for markers in (*(each.markers for each in turns), further):
            tokenizer.make_special(markers)
        ends = [end for each in turns for end in each.ends]
        self.stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *ends, *further.values())))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool | None = None, **options: Unpack[ChatOptions]
    ) -> str:
        """Return the prompt for ``messages``, each with a ``role`` and a ``content``.

        ``content`` is a text, or a list of ``{"type": "text", "text": ...}``; beside ``tool_calls`` it may be absent or None. By default
        the prompt ends where the assistant's answer begins; with ``continue_final_message`` it ends inside the final message. Raises
        :class:`ChatError` for other messages and options, and where the template refuses them.
        """
        return self._render(_Conversation.checked(messages, options), add_generation_prompt, str)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool | None = None, **options: Unpack[ChatOptions]
    ) -> list[int]:
        """Return the prompt as token ids. Only the template writes special tokens: spelt out in a message or option they are text."""
        conversation = _Conversation.checked(messages, options)
        # A mark breaks up the names of special tokens in what the user gives: those that are whole in the prompt come from the template.
        # The mark repeats one character more often than all given texts together, so no template can join texts to a mark.
        mark = conversation.longer_than_any(_BREAK)
        prompt = self._render(conversation, add_generation_prompt, lambda text: self._tokenizer.break_special(text, mark))
        check_unicode(prompt)
        ids: list[int] = []
        for piece in self._tokenizer.split_special(prompt.replace(_escaped(mark), mark)):
            ids += [piece] if isinstance(piece, int) else self._tokenizer.encode_ordinary(piece.replace(mark, ""))
        return ids

    def check(self) -> None:
        """Raise :class:`ChatError` for a template that fails on the simplest conversation. A template that refuses it on purpose passes."""
        with contextlib.suppress(TemplateRefusal):
            self.render([{"role": "user", "content": "Hello"}])

    def _render(self, given: _Conversation, add_generation_prompt: bool | None, text_of: Callable[[str], str]) -> str:
        template = self._template if given.tools is None else self._tool_use
        own = sorted({*_OWN_VARIABLES, *template.variables} & given.variables.keys())
        if own:
            raise ChatError(f"chat_template_kwargs has {own[0]}, which l4jax gives to the template itself; leave it out")
        asked = {name for name in ("tools", "documents") if getattr(given, name) is not None} | given.variables.keys()
        for name in sorted(asked - template.names):
            known = ", ".join(sorted(template.names - template.variables.keys() - set(_OWN_VARIABLES))) or "no further ones"
            raise ChatError(f"{template.origin}: the chat template does not use {name}; leave it out (its own variables: {known})")
        given = given.mapped(text_of)
        if not given.continues:
            return template.render(given.messages, **given.rest(add_generation_prompt is not False))
        if add_generation_prompt:
            raise ChatError("continue_final_message and add_generation_prompt are both set; give one of them")
        # As transformers does: what follows the mark is cut off, and with it space that the template has trimmed before the mark.
        mark = given.longer_than_any(_CONTINUE)
        messages, last = given.marked(mark + " ")
        text = template.render(messages, **given.rest(False))
        before, found, after = text.rpartition(mark)
        if not found or last.strip() not in text:
            raise ChatError(f"{template.origin}: the chat template does not write the final message as it is, so it cannot be continued")
        return before if after.startswith(" ") else before.rstrip()


@dataclasses.dataclass(frozen=True)
class _Conversation:
    """What is given to a chat template: checked, and made of plain JSON values."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    documents: list[Any] | None
    variables: dict[str, Any]
    continues: bool

    @classmethod
    def checked(cls, messages: Any, options: ChatOptions) -> _Conversation:
        _check_messages(messages)
        unknown = sorted(options.keys() - ChatOptions.__annotations__.keys())
        if unknown:
            raise TypeError(f"unexpected argument {unknown[0]!r}; expected {', '.join(ChatOptions.__annotations__)}")
        objects = {}
        for name in ("tools", "documents"):
            given: Any = options.get(name)
            if given is not None and not (_is_list(given) and all(isinstance(item, Mapping) for item in given)):
                raise ChatError(f"{name} is of type {type(given).__name__}; expected a list of JSON objects")
            objects[name] = given
        variables: Any = options.get("chat_template_kwargs")
        if variables is None:
            variables = {}
        if not isinstance(variables, Mapping):
            raise ChatError(f"chat_template_kwargs is of type {type(variables).__name__}; expected the template's variables by name")
        continues = options.get("continue_final_message", False)
        if not isinstance(continues, bool):
            raise ChatError(f"continue_final_message is {shown(continues)}; expected True or False")
        try:
            return cls(
                # A key with None says what an absent key says; templates test for keys.
                [{k: v for k, v in _plain(m, f"message {n}").items() if v is not None} for n, m in enumerate(messages, start=1)],
                _plain(objects["tools"], "tools"),
                _plain(objects["documents"], "documents"),
                _plain(variables, "chat_template_kwargs"),
                continues,
            )
        except RecursionError as error:
            raise ChatError("the conversation is nested too deep, or contains itself; expected JSON values") from error

    def mapped(self, text_of: Callable[[str], str]) -> _Conversation:
        """The same with every text changed by ``text_of``."""
        messages, tools, documents, variables = _map_texts([self.messages, self.tools, self.documents, self.variables], text_of)
        return _Conversation(messages, tools, documents, variables, self.continues)

    def longer_than_any(self, character: str) -> str:
        """Return ``character``, repeated more often than it occurs in all that is given, as itself or as a JSON escape."""
        escaped = json.dumps([self.messages, self.tools, self.documents, self.variables])
        return character * (1 + escaped.count(_escaped(character)))

    def rest(self, add_generation_prompt: bool) -> dict[str, Any]:
        """All variables but the messages."""
        return {**self.variables, "tools": self.tools, "documents": self.documents, "add_generation_prompt": add_generation_prompt}

    def marked(self, mark: str) -> tuple[list[dict[str, Any]], str]:
        """The messages with ``mark`` at the end of the last one's text, and that text without it."""
        *before, final = self.messages
        content = final.get("content")
        if isinstance(content, str):
            return [*before, {**final, "content": content + mark}], content
        if not content:
            raise ChatError("continue_final_message is set, but the final message has no text to continue")
        *parts, last = content
        return [*before, {**final, "content": [*parts, {**last, "text": last["text"] + mark}]}], str(last["text"])


def load_chat_format(directory: Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """Return the chat format of the checkpoint in ``directory``; None if it has none.

    The template is its ``chat_template.jinja``, else the one in ``chat_template.json``, ``processor_config.json`` or
    ``tokenizer_config.json``, else the built-in one (Llama 4, Llama 3, ChatML) whose special tokens the tokenizer has. Where tools are
    given it is the one named ``tool_use``, if there is one beside it. Raises :class:`ChatError` or :class:`TokenizerError` for a
    template that cannot be used.
    """
    config = read_tokenizer_config(directory)
    found = _checkpoint_templates(directory)
    if "default" not in found:
        found = built_in_template(tokenizer)
    if not found:
        return None
    template, origin = found["default"]
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    variables = {name: texts[token_id] for name, token_id in ids.items() if token_id in texts}
    named = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    variables |= {key: text for key, text in named.items() if text is not None}
    tool_use, _ = found.get("tool_use", (None, None))
    return ChatFormat(template, tokenizer, origin=origin, variables=variables, stop_token_ids=tokenizer.eos_ids, tool_use=tool_use)


def _checkpoint_templates(directory: Path) -> dict[str, tuple[str, str]]:
    """The checkpoint's templates by name, with their origin. Files of their own replace what the JSON files say, as in transformers."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found = {name: (read_text(path), str(path)) for name, path in files.items() if is_there(path)}
    if found:
        return found
    for path in (directory / name for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json")):
        given = read_json_if_there(path).get("chat_template")
        if given is None:
            continue
        # Several are a list of objects, each with its name.
        several = given if isinstance(given, list) else [{"name": "default", "template": given}]
        if not all(isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in several):
            raise TokenizerError(f"{path}: chat_template is neither a template nor a list of templates with names; fetch the file again")
        return {t["name"]: (t["template"], f"{path}: chat_template") for t in several}
    return {}


def built_in_template(tokenizer: Tokenizer) -> dict[str, tuple[str, str]]:
    """The built-in template, as "default", that ``tokenizer`` is made for, and its origin; empty if there is none."""
    for name, tokens in _BUILT_IN.items():
        if all(tokenizer.marker_id(token) is not None for token in tokens):
            path = Path(__file__).parent / "templates" / f"{name}.jinja"
            return {"default": (path.read_text(encoding="utf-8"), f"built-in {name} template")}
    return {}


def _check_messages(messages: Any) -> None:
    if not _is_list(messages):
        raise ChatError(f"the conversation is of type {type(messages).__name__}; expected a list of messages, each with role and content")
    if not messages:
        raise ChatError("the conversation has no messages; expected at least one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ChatError(f"message {number} is of type {type(message).__name__}; expected an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ChatError(f"message {number} has role {shown(role)}; expected one of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
            raise ChatError(f"message {number} has tool_calls of type {type(calls).__name__}; expected a list of objects")
        content: Any = message.get("content")
        if _is_list(content):
            for part in content:
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ChatError(
                        f"message {number} has a content part that is not text; only {{'type': 'text', 'text': ...}} is supported"
                    )
        elif not isinstance(content, str) and not (content is None and calls):
            raise ChatError(f"message {number} has content of type {type(content).__name__}; expected a text, or a list of text parts")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _plain(value: Any, where: str) -> Any:
    """``value`` as plain dicts, lists, texts and numbers: a template is not trusted with the methods of other types."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if _is_list(value):
        return [_plain(item, where) for item in value]
    raise ChatError(f"{where} has a value of type {type(value).__name__}; expected JSON values")


def _map_texts(value: Any, text_of: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, dict):
        return {text_of(key): _map_texts(item, text_of) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, text_of) for item in value]
    return value


def _escaped(text: str) -> str:
    """``text`` as JSON writes it in ASCII."""
    return json.dumps(text)[1:-1]
