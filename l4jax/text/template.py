"""Chat templates: compiles and renders them as transformers does, and reads off what they write which tokens begin and end turns."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from l4jax.text.tokenizer import Tokenizer, is_punctuation

Messages = Sequence[Mapping[str, Any]]
_Form = Literal["text", "part", "parts"]  # of a message's content: a text, a list of one text part, a longer list


class ChatError(ValueError):
    """A conversation or chat template that cannot be used; the message is one line."""


class TemplateRefusal(ChatError):
    """The template itself refuses the conversation, by ``raise_exception``."""


class ChatTemplate:
    """A compiled chat template. ``origin`` says where it was found, ``variables`` are the special tokens that it may name.

    ``names``: the variables that it reads. Raises :class:`ChatError` if it does not compile.
    """

    def __init__(self, source: str, *, origin: str, variables: Mapping[str, str]) -> None:
        self.origin = origin
        self.variables = dict(variables)
        environment = _environment()
        try:
            self.names = jinja2.meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(f"{origin}: line {error.lineno} of the chat template is not valid Jinja: {_one_line(error)}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise ChatError(f"{origin}: the chat template is nested too deep") from error
        self._takes: dict[tuple[str, _Form], bool] = {}

    def render(self, messages: Messages, **variables: Any) -> str:
        """Return the text for ``messages``, whose contents are texts or lists of text parts.

        The template gets each content in the form that it takes. Raises :class:`TemplateRefusal` for messages that the template
        refuses, :class:`ChatError` for those that it fails on or writes nothing of.
        """
        return self._render([self._shaped(message) for message in messages], **variables)

    def _render(self, messages: Messages, **variables: Any) -> str:
        given = {"tools": None, "documents": None, "add_generation_prompt": False, **self.variables, **variables}
        try:
            return self._template.render(messages=messages, **given)
        except _Refused as error:
            raise TemplateRefusal(f"{self.origin}: the chat template cannot format these messages: {_one_line(error)}") from error
        # A template may do anything with the messages; whatever fails in it, the cause is a conversation that it cannot format.
        except Exception as error:
            raise ChatError(f"{self.origin}: the chat template cannot format these messages: {_one_line(error)}") from error

    def _shaped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``message`` with its content in a form that the template takes from this role: its own, if the template takes it."""
        content, role = message.get("content"), message["role"]
        if content is None:
            return message
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        joined = "".join(part["text"] for part in parts)
        one_part = [{"type": "text", "text": joined}]
        shapes: list[tuple[_Form, Any]] = [("text", joined), ("part", one_part)]
        if isinstance(content, list):
            shapes.insert(0, ("part" if len(parts) == 1 else "parts", parts))
        for form, shape in shapes:
            if self._takes_content(role, form):
                return {**message, "content": shape}
        if joined.strip() and self._ignores_content(role):
            raise ChatError(f"{self.origin}: the chat template does not write what a message of role {role} says; leave the message out")
        # Templates that change what they write, or refuse what they are tried with, are taken at their word.
        return {**message, "content": joined}

    def _takes_content(self, role: str, form: _Form) -> bool:
        """Whether contents of this form appear as they are in what the template writes."""
        key = (role, form)
        if key not in self._takes:
            text = self._tried(role, form, _WORDS[0], _WORDS[1])
            # A template that expects text writes a list of parts in Python's or JSON's notation, with "text" in quotes.
            written = text is not None and all(word in text for word in _WORDS[:2]) and not re.search(r"""["']text["']""", text)
            self._takes[key] = written
        return self._takes[key]

    def _ignores_content(self, role: str) -> bool:
        """Whether the template writes the same whatever a message of this role says, in every form."""
        for form in get_args(_Form):
            text = self._tried(role, form, _WORDS[0], _WORDS[1])
            if text is None or text != self._tried(role, form, _WORDS[1], _WORDS[0]):
                return False
        return True

    def _tried(self, role: str, form: _Form, *words: str) -> str | None:
        """What the template writes of a message that says these words, in a short conversation; None if it fails or refuses."""
        said = words if form == "parts" else ["".join(words)]
        parts = [{"type": "text", "text": text} for text in said]
        tried = {"role": role, "content": said[0] if form == "text" else parts}
        user, answer = {"role": "user", "content": _WORDS[2]}, {"role": "assistant", "content": _WORDS[3]}
        conversations: dict[str, Messages] = {"system": [tried, user], "user": [tried], "assistant": [user, tried, user]}
        try:
            return self._render(conversations.get(role, [user, answer, tried]))
        except ChatError:
            return None


@dataclasses.dataclass(frozen=True)
class Turns:
    """The tokens that a template writes around the turns of a plain conversation.

    ``markers``: their ids by their names, whatever the tokenizer's files label them. ``ends``: the ids of those that follow an
    assistant's words.
    """

    markers: Mapping[str, int]
    ends: tuple[int, ...]


def turns_of(template: ChatTemplate, tokenizer: Tokenizer) -> Turns:
    """Render conversations of a few plain words. Of what the template puts around the words, find the tokens that text never becomes."""
    system, user, answer, result, further = _WORDS
    roles = {system: "system", user: "user", answer: "assistant", result: "tool", further: "user"}
    markers: dict[str, int] = {}
    ends: list[int] = []
    for words in ((system, user, answer, further), (user, answer, further), (user, answer), (user, answer, result, further)):
        try:
            text = template.render([{"role": roles[word], "content": word} for word in words])
        except ChatError:
            continue
        # Before the last answer, and before one that a tool's result follows, a template may write a thought or a tool call: not searched.
        searched = text if words[-1] == further and result not in words else text.partition(answer)[2]
        _, said, after = text.partition(answer)
        pieces = re.split("|".join(words), searched)
        markers |= dict(found for piece in pieces for found in _markers(piece, tokenizer))
        first = next(_markers(re.split("|".join(words), after)[0], tokenizer), None) if said else None
        ends += [] if first is None else [first[1]]
    return Turns(markers, tuple(dict.fromkeys(ends)))


# Words that no template knows.
_WORDS = ("quistel", "voramin", "tessolor", "belquin", "ardanoy")
_LONGEST_MARKER = 64


def _markers(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Find the special tokens and markers in ``text``, by name, in order; where several start at one place, the longest."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    for piece in tokenizer.split_special(text):
        if isinstance(piece, int):
            yield names[piece], piece
            continue
        places = [place for place, character in enumerate(piece) if is_punctuation(character)]
        done = 0
        for start in places:
            for end in reversed([p + 1 for p in places if done <= start < p < start + _LONGEST_MARKER]):
                if (token_id := tokenizer.marker_id(piece[start:end])) is not None:
                    yield piece[start:end], token_id
                    done = end
                    break


class _Refused(jinja2.TemplateError):
    """What ``raise_exception`` raises."""


def _environment() -> jinja2.Environment:
    """What transformers gives to chat templates. Sandboxed: a template comes with a download and is not trusted."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
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
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
