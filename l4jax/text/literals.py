"""JSON and Python literals, read a character at a time and written as JSON. Imports no JAX.

A reader is a generator: it is sent the text's characters one by one, and raises :class:`Unreadable` at the first that cannot be meant.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Generator
from typing import Literal

Notation = Literal["python", "json"]
Reader = Generator[None, str, str]

MAX_DEPTH = 64

# Models mix the two notations, so each is read with the other's words.
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_JSON_ESCAPES = '"\\/bfnrt'
_PYTHON_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_IN_QUOTES = {chr(code): json.dumps(chr(code))[1:-1] for code in (*range(32), ord('"'), ord("\\"))}


class Unreadable(Exception):
    """The characters so far cannot be the start of what is read."""


def next_character() -> Reader:
    """Return the next character that is not white space."""
    return (yield from after_space((yield)))


def after_space(character: str) -> Reader:
    """Return the first character that is not white space, from this one on."""
    while character.isspace():
        character = yield
    return character


def in_quotes(character: str) -> str:
    """A character as it stands in a JSON string."""
    if "\ud800" <= character <= "\udfff":  # half a surrogate pair has no UTF-8
        return f"\\u{ord(character):04x}"
    return _IN_QUOTES.get(character, character)


def read_value(character: str, before: str, write: Callable[[str], None], notation: Notation, depth: int = 0) -> Reader:
    """Read a value that begins with ``character``; write ``before`` and the value as JSON, as far as it is certain.

    Strings are written as they come, numbers and words once they are complete. White space between values is written as ``json.dumps``
    does, and a comma after the last value is left out. Mistakes that models make, and that can have one meaning only, are read as meant:
    a line break in a string, an escape that does not exist, the other notation's quotes and words. ``depth`` containers are around it.

    Returns the character after the value and its white space, or nothing if the value's end was clear without it.
    """
    closing: list[str] = []
    while True:
        if character in "[{":
            if depth + len(closing) == MAX_DEPTH:
                raise Unreadable
            write(before + character)
            closing.append("]" if character == "[" else "}")
            before = ""
            character = yield from next_character()
        else:
            character = yield from _read_plain(character, before, write, notation)
            if not closing:
                return character
            before = ", "
            character = character or (yield from next_character())
        # Nothing in `before` says that the container has just been opened.
        while character == closing[-1] or before:
            if character == closing[-1]:
                write(closing.pop())
                if not closing:
                    return ""
                before = ", "
                character = yield from next_character()
            elif character == ",":
                character = yield from next_character()
                if character != closing[-1]:
                    break
            else:
                raise Unreadable
        if closing[-1] == "}":
            character = yield from _read_key(character, before, write, notation)
            before = ""


def _read_key(character: str, before: str, write: Callable[[str], None], notation: Notation) -> Reader:
    """Read a key and its colon; return the first character of its value."""
    if character in "\"'":
        character = yield from _read_string(character, before, write, notation)
    elif notation == "python":
        # JSON's keys are strings: json.dumps writes {1: 2} as {"1": 2}.
        character = yield from _read_scalar(character, f'{before}"', lambda text: write(f'{text}"'))
    else:
        raise Unreadable
    if (character or (yield from next_character())) != ":":
        raise Unreadable
    write(": ")
    return (yield from next_character())


def _read_plain(character: str, before: str, write: Callable[[str], None], notation: Notation) -> Reader:
    if character in "\"'":
        return (yield from _read_string(character, before, write, notation))
    return (yield from _read_scalar(character, before, write))


def _read_scalar(character: str, before: str, write: Callable[[str], None]) -> Reader:
    characters = []
    while character.isalnum() or character in "+-._":
        characters.append(character)
        character = yield
    character = yield from after_space(character)
    scalar = _scalar("".join(characters))
    # What another character follows is an expression: 2 * x.
    if scalar is None or character not in ",:)]}":
        raise Unreadable
    write(before + scalar)
    return character


def _scalar(text: str) -> str | None:
    """A word or a number as JSON writes it; None for other text."""
    if text in _WORDS:
        return _WORDS[text]
    # As it is written: neither its precision nor its size is Python's business.
    if _JSON_NUMBER.fullmatch(text):
        return text
    try:
        return str(int(text, 0))
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return repr(number) if math.isfinite(number) else None


def _read_string(quote: str, before: str, write: Callable[[str], None], notation: Notation) -> Reader:
    write(f'{before}"')
    length = 1  # of the quotes at its end
    character = yield
    if character == quote:
        character = yield
        if character != quote:
            write('"')
            return (yield from after_space(character))
        length = 3
        character = yield
    quotes = 0
    while True:
        if character == quote:
            quotes += 1
            if quotes == length:
                write('"')
                return ""
            character = yield
            continue
        write(in_quotes(quote) * quotes)
        quotes = 0
        if character == "\\":
            character = yield from _read_escape(write, notation)
        else:
            write(in_quotes(character))
            character = yield


def _read_escape(write: Callable[[str], None], notation: Notation) -> Reader:
    """Read what follows a backslash; return the character after it."""
    character = yield
    if notation == "json" and character in _JSON_ESCAPES:
        write("\\" + character)
    elif character in _HEX_DIGITS:
        digits = ""
        for _ in range(_HEX_DIGITS[character]):
            digit = yield
            if digit not in "0123456789abcdefABCDEF":
                raise Unreadable
            digits += digit
        if int(digits, 16) > 0x10FFFF:
            raise Unreadable
        write(f"\\u{digits}" if notation == "json" and character == "u" else in_quotes(chr(int(digits, 16))))
    elif character in _PYTHON_ESCAPES:
        write("".join(map(in_quotes, _PYTHON_ESCAPES[character])))
    elif character in "01234567":
        digits = ""
        while len(digits) < 3 and character in "01234567":
            digits += character
            character = yield
        write(in_quotes(chr(int(digits, 8))))
        return character
    elif character == "N":
        write(in_quotes((yield from _read_named())))
    else:
        # As in Python, a backslash before any other character is one.
        write("\\\\" + in_quotes(character))
    return (yield)


def _read_named() -> Reader:
    """Read a character's name in braces; return the character."""
    if (yield) != "{":
        raise Unreadable
    name = []
    while (character := (yield)) != "}":
        name.append(character)
    try:
        return unicodedata.lookup("".join(name))
    except KeyError as error:
        raise Unreadable from error
