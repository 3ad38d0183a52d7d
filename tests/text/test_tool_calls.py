"""Calls of tools in an answer, as its text grows."""

from __future__ import annotations

import ast
import io
import itertools
import json
import time
import tokenize
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.literals import MAX_DEPTH
from l4jax.text.tool_calls import ArgumentsPiece, CallStart, Event, ParsedAnswer, TextPiece, ToolCallParser, parse_answer

NAMES = ("get_weather", "get_time", "get", "files.read-all", "run")


def parsed(text: str, names: tuple[str, ...] = NAMES) -> tuple[str, list[tuple[str, str]], bool]:
    answer = parse_answer(text, names)
    return answer.text, [(call.name, call.arguments) for call in answer.calls], answer.incomplete


def calls_of(text: str) -> list[tuple[str, Any]]:
    """The calls of an answer that is nothing else."""
    shown, calls, incomplete = parsed(text)
    assert (shown, incomplete) == ("", False)
    return [(name, json.loads(arguments)) for name, arguments in calls]


def joined(events: list[Event]) -> list[Event]:
    """The events with pieces of the same thing put together: the order of text and calls stays."""
    result: list[Event] = []
    for event in events:
        match (result[-1] if result else None), event:
            case TextPiece(a), TextPiece(b):
                result[-1] = TextPiece(a + b)
            case ArgumentsPiece(i, a), ArgumentsPiece(j, b) if i == j:
                result[-1] = ArgumentsPiece(i, a + b)
            case _:
                result.append(event)
    return result


def streamed(pieces: list[str], names: tuple[str, ...] = NAMES) -> tuple[list[Event], bool]:
    parser = ToolCallParser(names)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    assert parser.calls == sum(isinstance(event, CallStart) for event in events)
    assert parser.finish() == []
    return joined(events), parser.incomplete


# What models write, and what is in it.
ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    # Llama 4
    ("[get_weather(city=\"Paris\", unit='c')]", "", [("get_weather", {"city": "Paris", "unit": "c"})]),
    (
        '<|python_start|>[get_weather(city="San Francisco, CA"), get_time(x=[1, 2.5, None, True, {"a": 1}])]<|python_end|>',
        "",
        [("get_weather", {"city": "San Francisco, CA"}), ("get_time", {"x": [1, 2.5, None, True, {"a": 1}]})],
    ),
    ("[get_time()]", "", [("get_time", {})]),
    ("[get_time(), get(  ) ,run(a=1,)]\n", "", [("get_time", {}), ("get", {}), ("run", {"a": 1})]),
    ("\n\n[get_time(\n    zone = 'CET',\n    at = -1e-5\n)\n]", "", [("get_time", {"zone": "CET", "at": -1e-5})]),
    ('[files.read-all(glob="[a-z];*)", class=[])]', "", [("files.read-all", {"glob": "[a-z];*)", "class": []})]),
    ("""[run(code='print("it\\'s [1]")\\n')]""", "", [("run", {"code": 'print("it\'s [1]")\n'})]),
    ('[run(code="""for x in "ab":\n    print(x)\n""", n=0)]', "", [("run", {"code": 'for x in "ab":\n    print(x)\n', "n": 0})]),
    (r'[run(a="\u00e9\ud83d\ude00", b="\U0001F600\x41\101\N{DEGREE SIGN}")]', "", [("run", {"a": "é😀", "b": "😀AA°"})]),
    # Llama 3, and Llama 4 with its Hugging Face template
    ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", {"city": "Paris"})]),
    ('<|python_tag|>{"name": "get_time", "parameters": {}}', "", [("get_time", {})]),
    ('{"type": "function", "name": "get_time", "parameters": {"zone": null}}', "", [("get_time", {"zone": None})]),
    ('{"name": "get_time", "arguments": {"zone": "CET"}, "type": "function"}', "", [("get_time", {"zone": "CET"})]),
    (
        '{"name": "get_time", "parameters": {"a": "};"}}; {"name": "get", "parameters": {"n": "1e-5"}}\n{"name": "run", "arguments": {}}',
        "",
        [("get_time", {"a": "};"}), ("get", {"n": "1e-5"}), ("run", {})],
    ),
    (
        '{"name": "get", "parameters": {}}{"name": "run", "parameters": {}}, {"name": "get", "parameters": {}};',
        "",
        [("get", {}), ("run", {}), ("get", {})],
    ),
    (
        '[\n  {"name": "get_time", "arguments": {"q": "\\u00e9 \\"]\\" [f(x=1)]"}},\n  {"name": "get", "parameters": {"x": [[], {}]}}\n]',
        "",
        [("get_time", {"q": 'é "]" [f(x=1)]'}), ("get", {"x": [[], {}]})],
    ),
    (
        '{"name": "run", "parameters": {"r": {"months": "19", "zip": "Unknown",\n}}}',
        "",
        [("run", {"r": {"months": "19", "zip": "Unknown"}})],
    ),
    ("{'name': 'get', 'parameters': {'a': 'it\\'s', 'b': True}}", "", [("get", {"a": "it's", "b": True})]),
    ('{"name": "run", "parameters": {"a": "one\ntwo", "re": "\\d"}}', "", [("run", {"a": "one\ntwo", "re": "\\d"})]),
    # A model often forgets the last brace or bracket.
    ('{"name": "get", "parameters": {"a": 1}', "", [("get", {"a": 1})]),
    ("[get(a=1)", "", [("get", {"a": 1})]),
    # Calls in text
    ("Let me check: [get(a=1)]\n\nDone [1].", "Let me check: Done [1].", [("get", {"a": 1})]),
    ('I use [1] and a[i].\n```json\n{"name": "get", "parameters": {}}\n```', "I use [1] and a[i].\n```json\n```", [("get", {})]),
    ("In [0, 1).\n\n[get()]; then", "In [0, 1).\n\n; then", [("get", {})]),
    ("[get(a=1), unknown(x=1), run()]", ", unknown(x=1), run()]", [("get", {"a": 1})]),
    ('[get(a=1), {"name": "run", "parameters": {}}, {"type": "function"}]', ', {"type": "function"}]', [("get", {"a": 1}), ("run", {})]),
    ('{"name": "get", "parameters": {}, "name": "run"}', ', "name": "run"}', [("get", {})]),
    ("<|python_end|>[get()]", "<|python_end|>", [("get", {})]),
    ("[get(a=1) for _ in x]", "for _ in x]", [("get", {"a": 1})]),
]

# What is no call.
TEXTS = [
    "",
    " \n",
    "[x for x in y]",
    "[get_time() for _ in y]",
    "[get_weather(city) for city in cities]",
    "[get_weather(city=city) for city in cities]",
    "[get_weather(city=2 * n)]",
    "[get(a == 1)]",
    '[get_weather("Paris")]',
    "[get(**{'a': 1})]",
    "[get(=1)]",
    "[unknown(a=1)]",
    "[get_weather2(a=1)]",
    "[getx(a=1)]",
    "get(a=1)",
    "[get",
    "[get(",
    "[get(a=",
    "[get(a=Tru",
    "[get(a=nan), get(a=inf), get(a=1j), get(a=007)]",
    "[get()",
    "[]",
    "[] [1, 2, 3]",
    "[[get(a=1)]]",
    '{"a": 1}',
    '{"name": "Alice", "age": 3}',
    '{"name": "get_time"}',
    '{"name": "get_time", "age": 3}',
    '{"name": "get_time", "parameters": null}',
    '{"name": "get_time", "parameters": []}',
    '{"name": "get_time", "parameters": "{}"}',
    '{"name": "get_times", "parameters": {}}',
    '{"parameters": {}, "name": "get_time"}',
    '{"type": "object", "name": "get_time", "parameters": {}}',
    '{"name": "unknown", "parameters": {"x": [1]}}',
    '{"plan": [{"name": "get_time", "parameters": {}}]}',
    '[\n  "a",\n  {"name": "get_time", "parameters": {}}\n]',
    '{"name": "get_time", "par',
    'Write "[get(a=1)]" or `{"name": "get", "parameters": {}}` or calls[get(a=1)] or x()[get()] or x[0][get()].',
    "a < b, <|python_start|>, <|python_tag|>get.call(), <|python_end|>[get]",
    "<|python_start|>print(1)<|python_end|>",
]


@pytest.mark.parametrize(("text", "shown", "calls"), ANSWERS)
def test_calls_of_models(text: str, shown: str, calls: list[tuple[str, Any]]) -> None:
    found, found_calls, incomplete = parsed(text)
    assert (found, [(name, json.loads(arguments)) for name, arguments in found_calls], incomplete) == (shown, calls, False)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parsed(text) == (text, [], False)


@pytest.mark.parametrize("text", [text for text, *_ in ANSWERS] + TEXTS)
def test_the_place_of_a_cut_makes_no_difference(text: str) -> None:
    whole = streamed([text])
    assert streamed(list(text)) == whole
    assert all(streamed([text[:at], text[at:]]) == whole for at in range(len(text)))


PARTS = st.sampled_from(
    [
        *"[]{}(),;:'\"\\= \n-10aeu<`",
        *('"name"', '"parameters"', '"x": ', "get", "get(", "a=", "True", "1e-5", '"""', "\n\n", "});", "<|python_end|>", "<|python_tag|>"),
        *('{"name": "get", "parameters": {', '[{"name": ', "[get(a=1", "[get()", "\\u00e9", "\\x41", "\\1"),
    ]
)


@given(st.lists(PARTS, max_size=14), st.lists(st.integers(0, 100)))
def test_any_text_in_any_pieces(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    borders = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    whole = streamed([text])
    assert streamed([text[a:b] for a, b in itertools.pairwise(borders)]) == whole
    assert streamed(list(text)) == whole
    shown, calls, incomplete = parsed(text)
    if not calls:
        assert (shown, incomplete) == (text, False)
    broken = 0
    for _, arguments in calls:
        try:
            assert isinstance(json.loads(arguments), dict)
        except json.JSONDecodeError:
            assert arguments.startswith("{")
            broken += 1
    assert incomplete == (broken > 0)


@given(st.lists(PARTS, max_size=14))
def test_without_tools_all_is_text(parts: list[str]) -> None:
    text = "".join(parts)
    assert parsed(text, ()) == (text, [], False)


@given(st.lists(st.sampled_from([text for text, *_ in ANSWERS[:19]]), max_size=4))
def test_calls_of_all_kinds_may_follow_each_other(texts: list[str]) -> None:
    assert calls_of(" \n".join(texts)) == [call for text in texts for call in calls_of(text)]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON_VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)
OBJECTS = st.dictionaries(st.text(), JSON_VALUES, max_size=3)


@given(st.sampled_from(NAMES), OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]), st.sampled_from(["parameters", "arguments"]))
def test_json_arguments_are_as_the_model_wrote_them(name: str, arguments: Any, ascii_only: bool, indent: int | None, key: str) -> None:
    text = json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only, indent=indent)
    # But for white space, to the letter: numbers and escapes are not written anew.
    assert parsed(text) == ("", [(name, json.dumps(arguments, ensure_ascii=ascii_only))], False)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from("abc"), JSON_VALUES)), min_size=1, max_size=3))
def test_pythonic_arguments_are_the_literals(calls: list[tuple[str, dict[str, Any]]]) -> None:
    text = "[" + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls) + "]"
    assert calls_of(text) == [(name, json.loads(json.dumps(args))) for name, args in calls]


IN_STRINGS = st.sampled_from(
    [
        *(
            "a",
            "é",
            "😀",
            "'",
            '"',
            "''",
            '""',
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            ";",
            ",",
            " ",
            "\t",
            "\\n",
            "\\t",
            "\\\\",
            "\\'",
            '\\"',
            "\\\n",
        ),
        *("\\x41", "\\xe9", "\\u00e9", "\\ud83d\\ude00", "\\ud800", "\\U0001F600", "\\7", "\\101", "\\1234", "\\N{EM DASH}", "\\d", "\\/"),
    ]
)


@given(st.sampled_from(['"', "'", '"""', "'''"]), st.lists(IN_STRINGS, max_size=8))
def test_python_strings_are_read_as_python_reads_them(quotes: str, parts: list[str]) -> None:
    literal = quotes + "".join(parts) + quotes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d"
        try:
            value = ast.literal_eval(literal)
            tokens = list(tokenize.generate_tokens(io.StringIO(literal).readline))
        except (SyntaxError, tokenize.TokenError):
            return
    # Python joins "a" "b", which no model writes.
    if sum(token.type == tokenize.STRING for token in tokens) == 1:
        shown, [(_, arguments)], incomplete = parsed(f"[run(a={literal})]")
        assert (shown, incomplete) == ("", False)
        assert json.loads(arguments) == json.loads(json.dumps({"a": value}))
        arguments.encode()


@pytest.mark.parametrize(
    "literal",
    [
        *("0", "-0", "-17", "+5", "1_000", "0x1F", "0b101", "1.", ".5", "-.5", "2.50", "1e-5", "1E5", "-1.5e+10", "+1e5", "10_0.5"),
        *("[]", "[1,]", "{}", "{'a': 1,}", '{2: "a", True: None}', "[[[]], [{}]]", "-9007199254740993"),
    ],
)
def test_python_numbers_and_containers(literal: str) -> None:
    [(_, arguments)] = parsed(f"[run(a={literal}, b=0)]")[1]
    assert json.loads(arguments) == json.loads(json.dumps({"a": ast.literal_eval(literal), "b": 0}))


def test_a_number_may_be_longer_than_pythons() -> None:
    assert parsed(f"[run(a={'1' * 5000}, b=1e999)]")[1] == [("run", f'{{"a": {"1" * 5000}, "b": 1e999}}')]


def test_literals_of_the_other_notation_are_understood() -> None:
    assert calls_of("[run(a=true, b=[false, null])]") == [("run", {"a": True, "b": [False, None]})]
    assert calls_of('{"name": "run", "parameters": {"a": True, "b": [False, None, .5]}}') == [("run", {"a": True, "b": [False, None, 0.5]})]
    assert calls_of("[run(a='one\ntwo')]") == [("run", {"a": "one\ntwo"})]


@pytest.mark.parametrize(
    ("text", "arguments", "rest"),
    [
        ('[get(a="b', '{"a": "b', ""),
        ("[get(a=1, b", '{"a": 1', ""),
        ("[get(a=1, b=2", '{"a": 1', ""),
        ("[get(a=[1, ", '{"a": [1', ""),
        ('{"name": "get", "parameters": {', "{", ""),
        ('{"name": "get", "parameters": {"a": "\\u00', '{"a": "', ""),
        ('{"name": "get", "parameters": {"a": 1', '{"a": ', ""),
        # What cannot be read is text.
        ("[get(a=1, 2)]", '{"a": 1', ")]"),
        ("[get(a=1, b=x + 1)]", '{"a": 1', "+ 1)]"),
        ("[get(a='b' 'c')]", '{"a": "b"', "'c')]"),
        ('{"name": "get", "parameters": {"a" 1}}', '{"a"', "1}}"),
        ('{"name": "get", "parameters": {"a": "\\x4 z"}}', '{"a": "', ' z"}}'),
        ('{"name": "get", "parameters": {"a": [1}}', '{"a": [1', "}}"),
        ('{"name": "get", "parameters": {"a": {1: 2}}}', '{"a": {', "1: 2}}}"),
        ('[get(a="\\U00110000")]', '{"a": "', '0")]'),
        ('[get(a="\\N{NO SUCH}")]', '{"a": "', '}")]'),
        ("[get(a=[,])]", '{"a": [', ",])]"),
    ],
)
def test_a_call_that_stays_unfinished(text: str, arguments: str, rest: str) -> None:
    assert parsed(text) == (rest, [("get", arguments)], True)


def test_a_call_may_follow_one_that_cannot_be_read() -> None:
    text = '{"name": "get", "parameters": {"a": oops}}\n{"name": "run", "parameters": {"b": 1}}'
    shown, calls, incomplete = parsed(text)
    assert (shown, calls, incomplete) == ("}}\n", [("get", '{"a": '), ("run", '{"b": 1}')], True)
    # White space is dropped after a whole call only.
    assert parsed('[get(a=1), run(b="\\x4 z")]') == (' z")]', [("get", '{"a": 1}'), ("run", '{"b": "')], True)


def shapes(text: str) -> list[tuple[str, str]]:
    """Each character of an answer with what was returned at it, if anything was."""
    parser = ToolCallParser(NAMES)
    result = []
    for character in text:
        for event in parser.push(character):
            match event:
                case TextPiece(piece):
                    result.append((character, piece))
                case CallStart(index, name):
                    result.append((character, f"{index} {name}"))
                case ArgumentsPiece(_, piece):
                    result.append((character, piece))
    return result


def test_what_is_certain_comes_at_once() -> None:
    assert shapes("a [x") == [("a", "a"), (" ", " "), ("x", "[x")]
    assert shapes("{'nx") == [("x", "{'nx")]
    assert shapes('{"name": "gex') == [("x", '{"name": "gex')]
    assert shapes("<a") == [("a", "<a")]
    assert shapes("[get(a='bé\\n'") == [("'", "0 get"), ("'", '{"a": "'), ("b", "b"), ("é", "é"), ("n", "\\n"), ("'", '"')]
    assert shapes("[get(), run(a=1,") == [(",", "0 get"), (",", "{}"), (",", "1 run"), (",", '{"a": 1')]
    assert shapes('{"name":"get","parameters":{"a":1}') == [
        *[("{", "0 get"), ("{", "{"), ('"', '"'), ("a", "a"), ('"', '"'), (":", ": ")],
        *[("}", "1}")],
    ]
    # White space after a call, and what may separate it from another, waits.
    assert shapes("[get()]; \nx") == [("]", "0 get"), ("]", "{}"), ("x", "; \nx")]


def test_containers_may_be_nested_so_deep() -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        lists = "[" * (depth - 1) + "]" * (depth - 1)
        for text in (f"[get(a={lists})]", f'{{"name": "get", "parameters": {{"a": {lists}}}}}'):
            _, calls, incomplete = parsed(text)
            expected = '{"a": ' + (f"{lists}}}" if depth == MAX_DEPTH else "[" * (MAX_DEPTH - 1))
            assert (calls, incomplete) == ([("get", expected)], depth > MAX_DEPTH)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "run", "parameters": {"a": "' + "x\\n" * 33_000 + '"}}',
        '[run(a="' + "x" * 100_000 + '")]',
        "[run(a=[" + "1, " * 33_000 + "])]",
        "[run(a=" + "1" * 100_000 + ")]",
        "[run(a=1_" + "1" * 100_000 + ")]",
        "[run(" + "a" * 100_000 + "=1)]",
        '{"name": "run", "parameters": ' + '{"a": ' * 17_000,
        "[" * 100_000,
        "[]" * 50_000,
        "[" + " " * 100_000 + "x",
        "\n" * 100_000 + "[x",
        "[run();" * 15_000,
        '{"type": "function", ' * 5_000,
        '{"type": "function"' + ', "type": "function"' * 5_000 + ", 1}",
        "[run()]" + ";" * 100_000,
        "<|python_tag|>" * 7_000,
    ],
    ids=lambda text: text[:30],
)
def test_the_time_grows_with_the_length_only(text: str) -> None:
    for pieces in (list(text), [text]):
        parser = ToolCallParser(NAMES)
        started = time.process_time()
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        # A quarter of a second; with the square of the length, hours.
        assert time.process_time() - started < 10


def test_a_whole_answer() -> None:
    answer = parse_answer("Well. [get(a=1), run()]", NAMES)
    assert isinstance(answer, ParsedAnswer)
    assert [call.name for call in answer.calls] == ["get", "run"]
    assert answer.text == "Well. "
