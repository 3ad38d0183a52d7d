"""The calls of tools in an answer, found as its text grows. Imports no JAX.

Models write calls in two notations, and mix them: ``[get_weather(city="Paris"), get_time()]``, which Llama 4 is trained on, and
``{"name": "get_weather", "parameters": {"city": "Paris"}}``, one or several, which Llama 3 is. Both are read from every model.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Generator, Iterable

from l4jax.text.literals import Notation, Reader, Unreadable, after_space, in_quotes, next_character, read_value

# Tokens around a call, which a model may also spell out.
_BEGINNINGS = ("<|python_start|>", "<|python_tag|>")
_END = "<|python_end|>"


@dataclasses.dataclass(frozen=True, slots=True)
class TextPiece:
    """Text to show."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins: ``index`` counts the answer's calls from 0, ``name`` is a tool's whole name."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """Further characters of a call's arguments. All of them joined are a JSON object."""

    index: int
    json: str


Event = TextPiece | CallStart | ArgumentsPiece


@dataclasses.dataclass
class ToolCall:
    """A call and its arguments: a JSON object, or as much of it as there is."""

    name: str
    arguments: str = ""


@dataclasses.dataclass
class ParsedAnswer:
    """What the events of an answer add up to. ``incomplete``: the arguments of a call are no whole object."""

    text: str = ""
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    incomplete: bool = False


def parse_answer(text: str, names: Collection[str]) -> ParsedAnswer:
    """Return the text and the calls of a whole answer. ``names``: of the tools that may be called."""
    parser = ToolCallParser(names)
    answer = ParsedAnswer()
    for event in parser.push(text) + parser.finish():
        match event:
            case TextPiece(piece):
                answer.text += piece
            case CallStart(_, name):
                answer.calls.append(ToolCall(name))
            case ArgumentsPiece(index, piece):
                answer.calls[index].arguments += piece
    answer.incomplete = parser.incomplete
    return answer


class ToolCallParser:
    """Takes in an answer's text piece by piece, and returns what it is found to be: text to show, and calls of the tools ``names``.

    - The events do not depend on how the text is cut, but for how many pieces there are of one text, or of one call's arguments.
    - A call starts once its name and the first of its arguments are certain. Until then what it may be is held back; if it is none,
      it comes out as text, unchanged. The same goes for calls of other names.
    - A call may follow text, and text a call. White space after a call, ``;`` or ``,`` between calls, and spelt-out tokens around them
      are dropped. In quotes and in other brackets, as in a JSON answer that mentions a call, there is no call.
    - ``incomplete_calls`` has the indices of calls that have started, and whose arguments are no whole object: the text has ended, or
      has gone on with what cannot be read, which is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = _beginnings(names)
        self._place = _Place()
        self._events: list[Event] = []
        self._pieces: list[str] = []  # of the last event
        self._piece_of: int | None = None  # the call that they are arguments of; None: text
        self._reader: Generator[None, str, None] | None = None  # reads calls; None: in text
        self._held: list[str] = []  # characters that may turn out to be text
        self._name = ""  # of the call that is read
        self._open = False  # it has started
        self._after_call = False  # the reader has read one
        self.calls = 0
        self.incomplete_calls: set[int] = set()

    @property
    def incomplete(self) -> bool:
        """Whether any call is."""
        return bool(self.incomplete_calls)

    def push(self, text: str) -> list[Event]:
        """Return what is certain after ``text`` has been added."""
        self._take(deque(text))
        return self._taken()

    def finish(self) -> list[Event]:
        """Return what was held back, at the end of the text."""
        while self._reader is not None:
            if self._open:
                self.incomplete_calls.add(self.calls - 1)
                self._reader = None
            elif self._after_call and not "".join(self._held).strip().strip(";,"):
                self._reader = None
            else:
                self._take(self._given_up())
        return self._taken()

    def _take(self, characters: deque[str]) -> None:
        while characters:
            character = characters.popleft()
            if self._reader is None:
                if not self._place.may_begin_call(character):
                    self._show(character)
                    continue
                self._reader = self._read_calls()
                next(self._reader)
            if self._open:
                self._held.clear()
            self._held.append(character)
            try:
                self._reader.send(character)
            except Unreadable:
                characters.extendleft(reversed(self._given_up()))

    def _given_up(self) -> deque[str]:
        """What is held is no call: show its first character, and return the others, among which a call may yet begin."""
        held = deque(self._held)
        while self._after_call and held[0].isspace():
            held.popleft()
        self._show(held.popleft())
        if self._open:
            self.incomplete_calls.add(self.calls - 1)
        self._held.clear()
        self._reader, self._open, self._after_call = None, False, False
        return held

    def _show(self, character: str) -> None:
        self._place.pass_on(character)
        self._add(None, character)

    def _write(self, text: str) -> None:
        """Add to the arguments of the call that is read, which starts with the first of them."""
        if not self._open:
            self._open, self._after_call = True, False
            self._flush()
            self._events.append(CallStart(self.calls, self._name))
            self.calls += 1
        self._add(self.calls - 1, text)

    def _add(self, piece_of: int | None, text: str) -> None:
        if piece_of != self._piece_of:
            self._flush()
            self._piece_of = piece_of
        self._pieces.append(text)

    def _flush(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if text:
            self._events.append(TextPiece(text) if self._piece_of is None else ArgumentsPiece(self._piece_of, text))

    def _taken(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _settle(self) -> None:
        """All characters so far belong to calls."""
        self._open, self._after_call = False, True
        self._held.clear()

    def _read_calls(self) -> Generator[None, str, None]:
        """Read calls with what stands around them."""
        character = yield from next_character()
        while True:
            if self._after_call and character in ";,":
                character = yield from next_character()
            if character == "<":
                marker = yield from self._read_word(character, _MARKERS, ">")
                if marker == _MARKER_END:
                    if not self._after_call:
                        raise Unreadable
                    self._settle()
                    character = yield from next_character()
                    continue
                character = yield from next_character()
            if character == "[":
                character = yield from self._read_list()
            elif character == "{":
                character = yield from self._read_json()
            else:
                raise Unreadable

    def _read_list(self) -> Reader:
        """Read calls up to a closing bracket; return the character after it."""
        character = yield from next_character()
        while True:
            character = yield from (self._read_json() if character == "{" else self._read_python(character))
            if character == ",":
                character = yield from next_character()
            elif character != "]":
                raise Unreadable
            if character == "]":
                self._settle()
                return (yield from next_character())

    def _read_python(self, character: str) -> Reader:
        """Read ``name(key=value, ...)``; return the character after it."""
        self._name = yield from self._read_word(character, self._names, "(")
        character = yield from next_character()
        if character == ")":
            # `[get_time() for ...` is no call.
            character = yield from next_character()
            if character not in ",]":
                raise Unreadable
            self._write("{}")
            self._settle()
            self._held.append(character)
            return character
        before = "{"
        while character != ")":
            key = []
            while character.isalnum() or character in "_-.":
                key.append(character)
                character = yield
            if not key or (yield from after_space(character)) != "=":
                raise Unreadable
            before += f'"{"".join(map(in_quotes, key))}": '
            character = yield from next_character()
            character = (yield from self._read_value(character, before, "python")) or (yield from next_character())
            before = ", "
            if character == ",":
                character = yield from next_character()
            elif character != ")":
                raise Unreadable
        self._write("}")
        self._settle()
        return (yield from next_character())

    def _read_json(self) -> Reader:
        """Read ``"name": ..., "parameters": {...}}``; return the character after it. A type may be among them."""
        self._name = ""
        whole = False
        character = ","
        while character == ",":
            key = yield from self._read_quoted((yield from next_character()), _KEYS)
            if (yield from next_character()) != ":":
                raise Unreadable
            character = yield from next_character()
            if key in ("name", "type"):
                word = yield from self._read_quoted(character, self._names if key == "name" else _TYPES)
                self._name = word if key == "name" else self._name
            elif character == "{" and self._name:
                yield from self._read_value(character, "", "json")
                self._settle()
                self._name, whole = "", True
            else:
                raise Unreadable
            character = yield from next_character()
        if character != "}" or self._name or not whole:
            raise Unreadable
        self._settle()
        return (yield from next_character())

    def _read_value(self, character: str, before: str, notation: Notation) -> Reader:
        # A pythonic call's parentheses become an object around its values.
        return read_value(character, before, self._write, notation, depth=1 if notation == "python" else 0)

    def _read_quoted(self, quote: str, words: dict[str, bool]) -> Reader:
        if quote not in "\"'":
            raise Unreadable
        return (yield from self._read_word((yield), words, quote))

    def _read_word(self, character: str, words: dict[str, bool], end: str) -> Reader:
        """Read one of the words up to ``end``, which is none of its characters."""
        read = ""
        while character != end:
            read += character
            if read not in words:
                raise Unreadable
            character = yield
        if not words[read]:
            raise Unreadable
        return read


class _Place:
    """Where in an answer's text a call may begin."""

    def __init__(self) -> None:
        self._previous = ""
        self._depth = 0  # of brackets
        self._line_is_blank = False

    def pass_on(self, character: str) -> None:
        self._previous = character
        if character in "[{":
            self._depth += 1
        elif character in "]}":
            self._depth = max(self._depth - 1, 0)
        elif character == "\n":
            # Prose need not close its brackets: [0, 1) is an interval. JSON has no blank lines.
            self._depth = 0 if self._line_is_blank else self._depth
            self._line_is_blank = True
        if not character.isspace():
            self._line_is_blank = False

    def may_begin_call(self, character: str) -> bool:
        if character in "[{":
            # After a name or a value, a bracket is an index; after a quote or backtick, a quotation.
            return not (self._depth or self._previous.isalnum() or (self._previous and self._previous in "_)]\"'`"))
        # An answer's first white space counts with the call that it begins with.
        return character == "<" or (not self._previous and character.isspace())


def _beginnings(words: Iterable[str]) -> dict[str, bool]:
    """Every beginning of the words, from none of it, and whether it is a whole word."""
    whole = dict.fromkeys(words, True)
    return {"": False} | {word[:length]: False for word in whole for length in range(1, len(word))} | whole


_MARKERS = _beginnings(marker.removesuffix(">") for marker in (*_BEGINNINGS, _END))
_MARKER_END = _END.removesuffix(">")
_KEYS = _beginnings(("name", "type", "parameters", "arguments"))
_TYPES = _beginnings(("function",))
