"""Conversations in a model's own format, by its Jinja chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from l4jax.text.tokenizer import Tokenizer, TokenizerError, check_unicode, read_json, token_text

ROLES = ("system", "user", "assistant", "tool", "ipython")

# The built-in templates, and the special tokens that tell which one a tokenizer is made for.
_BUILT_IN = {
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
_END_OF_TURN = ("<|eot|>", "<|eom|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")

# A Unicode noncharacter, which no text contains that was meant to be exchanged.
_MARK = "\ufdd0"
_EXHAUSTED = (RecursionError, MemoryError)


class ChatError(ValueError):
    """A conversation or chat template that cannot be used; the message is one line."""


class ChatFormat:
    """Turns conversations into prompts by a Jinja template with what transformers offers to templates.

    A template is complete: no BOS is added to what it writes. ``origin`` says where the template is from.
    ``stop_token_ids`` end the assistant's turn.
    """

    def __init__(
        self, template: str, tokenizer: Tokenizer, *, origin: str, variables: Mapping[str, str], stop_token_ids: Sequence[int]
    ) -> None:
        """``variables``: the names of special tokens for the template (``bos_token``). Raises :class:`ChatError` if it does not compile."""
        self.origin = origin
        self.stop_token_ids = tuple(stop_token_ids)
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(f"{origin}: line {error.lineno} of the chat template is not valid Jinja: {error.message}") from error
        except RecursionError as error:
            raise ChatError(f"{origin}: the chat template is nested too deep") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for ``messages``, each with a ``role`` and a ``content`` (a text, or a list of ``{"type": "text", "text": ...}``).

        With ``add_generation_prompt`` it ends where the assistant's answer begins. Raises :class:`ChatError` for messages of another
        form and for those that the template refuses.
        """
        _check(messages)
        return self._render(messages, add_generation_prompt)

    def encode(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the prompt. Special tokens are the template's only: spelt out in a message they are plain text."""
        _check(messages)
        # The names of special tokens in messages are broken up by a mark, so that those left in the prompt are the template's.
        # It is longer than all the like that the messages have, however a template joins them.
        mark = _MARK * (1 + json.dumps(messages, ensure_ascii=False, default=str).count(_MARK))
        prompt = self._render(_broken_up(messages, self._tokenizer, mark), add_generation_prompt)
        check_unicode(prompt)
        ids: list[int] = []
        for piece in self._tokenizer.split_special(prompt):
            ids += [piece] if isinstance(piece, int) else self._tokenizer.encode_ordinary(piece.replace(mark, ""))
        return ids

    def _render(self, messages: Any, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._variables
            )
        # A template may do anything with the messages; whatever fails in it, it is the conversation that it cannot format.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *_EXHAUSTED) as error:
            raise ChatError(f"{self.origin}: the chat template cannot format these messages: {error}") from error


def load_chat_format(directory: Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """The chat format of the checkpoint in ``directory``.

    The template is its ``chat_template.jinja``, else the one in ``chat_template.json`` or ``tokenizer_config.json``, else the built-in
    one (Llama 4, Llama 3, ChatML) whose special tokens the tokenizer has; None if there is no such.
    """
    config = read_json(directory / "tokenizer_config.json")
    found = _checkpoint_template(directory, config) or _built_in_template(tokenizer)
    if found is None:
        return None
    template, origin = found
    texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    variables = {name: texts[token_id] for name, token_id in ids.items() if token_id in texts}
    named = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    variables |= {key: text for key, text in named.items() if text is not None}
    stops = [*_generation_ends(directory), *tokenizer.eos_ids, *(tokenizer.special_tokens.get(name) for name in _END_OF_TURN)]
    stop_token_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    return ChatFormat(template, tokenizer, origin=origin, variables=variables, stop_token_ids=stop_token_ids)


def _checkpoint_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> tuple[str, str] | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text ({error}); fetch the file again") from error
    separate = directory / "chat_template.json"
    for path, values in ((separate, read_json(separate)), (directory / "tokenizer_config.json", tokenizer_config)):
        template = values.get("chat_template")
        if isinstance(template, list):
            # Several, by name.
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(template, str):
            return template, f"{path}: chat_template"
    return None


def _built_in_template(tokenizer: Tokenizer) -> tuple[str, str] | None:
    for name, tokens in _BUILT_IN.items():
        if all(token in tokenizer.special_tokens for token in tokens):
            path = Path(__file__).parent / "templates" / f"{name}.jinja"
            return path.read_text(encoding="utf-8"), f"built-in {name} template"
    return None


def _generation_ends(directory: Path) -> list[int]:
    ends = read_json(directory / "generation_config.json").get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if any(type(end) is not int for end in ends):
        raise TokenizerError(f"{directory / 'generation_config.json'}: eos_token_id is {ends!r}; expected a token id or a list of them")
    return ends


def _check(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"the conversation is a {type(messages).__name__}; expected a list of messages, each with role and content")
    if not messages:
        raise ChatError("the conversation has no messages; expected at least one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ChatError(f"message {number} is a {type(message).__name__}; expected an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise ChatError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            for part in content:
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ChatError(
                        f"message {number} has a content part that is no text; only {{'type': 'text', 'text': ...}} is supported"
                    )
        elif not isinstance(content, str):
            raise ChatError(f"message {number} has content of type {type(content).__name__}; expected a text, or a list of text parts")


def _broken_up(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    """``value`` with the special tokens in all its texts broken up by ``mark``."""
    if isinstance(value, str):
        return tokenizer.break_special(value, mark)
    if isinstance(value, Mapping):
        return {key: _broken_up(item, tokenizer, mark) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_broken_up(item, tokenizer, mark) for item in value]
    return value


def _environment() -> jinja2.Environment:
    """What transformers gives to chat templates. Sandboxed: a template comes with a download and is not trusted."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, text_of=_text_of)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training, writes what is in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _text_of(message: Mapping[str, Any]) -> str:
    """For the built-in templates: the text of a message's content."""

    def texts() -> Iterator[str]:
        content = message["content"]
        for part in [content] if isinstance(content, str) else content:
            yield part if isinstance(part, str) else part["text"]

    return "".join(texts())
