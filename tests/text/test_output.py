"""Text that grows: pieces that are whole characters, and stop strings."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.output import OutputText, StopStringFilter, StreamDecoder
from tests.text import small

TOKENIZER = HfTokenizer(small.backend(), {})


def cut(items: list[int] | str, cuts: list[int]) -> list[list[int] | str]:
    borders = sorted({0, len(items), *(c % (len(items) + 1) for c in cuts)})
    return [items[a:b] for a, b in itertools.pairwise(borders)]


@given(st.text(), st.lists(st.integers(0, 100)))
def test_streamed_text_is_the_text_and_every_piece_is_whole(text: str, cuts: list[int]) -> None:
    decoder = StreamDecoder(TOKENIZER)
    shown = ""
    for ids in cut(TOKENIZER.encode(text), cuts):
        shown += decoder.push(ids)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.finish() == ""


@given(st.lists(st.integers(0, 430)), st.lists(st.integers(0, 100)), st.booleans())
def test_streaming_any_tokens_gives_what_decoding_them_at_once_does(ids: list[int], cuts: list[int], skip_special: bool) -> None:
    decoder = StreamDecoder(TOKENIZER, skip_special=skip_special)
    streamed = "".join(decoder.push(part) for part in cut(ids, cuts)) + decoder.finish()
    assert streamed == TOKENIZER.decode(ids, skip_special=skip_special)


def test_an_emoji_of_several_tokens_comes_when_it_is_complete() -> None:
    ids = TOKENIZER.encode("🛸")
    assert len(ids) > 2
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["🛸"]
    cut_short = StreamDecoder(TOKENIZER)
    assert [cut_short.push([i]) for i in ids[:2]] == ["", ""]
    assert cut_short.finish() == "\ufffd"


def test_special_tokens_are_no_text() -> None:
    assert StreamDecoder(TOKENIZER).push([2, 3]) == ""
    assert StreamDecoder(TOKENIZER, skip_special=False).push([2, 3]) == "<|im_start|><|im_end|>"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    ids = TOKENIZER.encode("the quick brown fox " * 10)
    decoder = StreamDecoder(TOKENIZER)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        for i in range(tokens):
            decoder.push([ids[i % len(ids)]])
        return time.perf_counter() - started

    seconds(100_000)
    # 100,000 tokens on top of 100,000 take a fraction of a second; decoding everything again at each would take hours.
    assert seconds(100_000) < 30


def up_to_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character until the text ends with a stop string, the longest if with several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.text("ab\n", max_size=20), STOPS, st.lists(st.integers(0, 100)))
def test_text_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stopped_by = up_to_stop(text, stops)
    stop_filter = StopStringFilter(stops)
    shown = ""
    for piece in cut(text, cuts):
        shown += stop_filter.push(piece)
        assert expected.startswith(shown)
    shown += stop_filter.finish()
    assert (shown, stop_filter.stopped_by) == (expected, stopped_by)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_filter = StopStringFilter(["</end>", "STOP"])
    assert stop_filter.push("text </e") == "text "
    assert stop_filter.push("m> ST") == "</em> "
    assert stop_filter.push("ART ") == "START "
    assert stop_filter.push("ST") == ""
    assert not stop_filter.stopped
    assert stop_filter.push("OP and more") == ""
    assert stop_filter.stopped
    assert stop_filter.push("even more") == stop_filter.finish() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    stop_filter = StopStringFilter(["###"])
    assert stop_filter.push("a ##") == "a "
    assert stop_filter.finish() == "##"
    assert not stop_filter.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStringFilter(["a", ""])


@given(st.lists(st.integers(0, 430), max_size=20), st.data())
def test_output_is_the_text_without_end_tokens_up_to_a_stop_string(ids: list[int], data: st.DataObject) -> None:
    end_ids = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
    shown_ids = [i for i in ids if i not in end_ids]
    whole = TOKENIZER.decode(shown_ids)
    places = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 3))
    stops = [stop for at, size in data.draw(st.lists(places, max_size=2)) if (stop := whole[at : at + size])]
    expected, stopped_by = up_to_stop(whole, stops)
    decoder = StreamDecoder(TOKENIZER)
    growing = list(itertools.accumulate("" if i in end_ids else decoder.push([i]) for i in ids))
    answer = next((n for n, text in enumerate(growing, 1) if up_to_stop(text, stops)[1] is not None), len(ids))

    output, shown, kept = OutputText(TOKENIZER, stops, end_ids), "", 0
    parts = cut(ids, data.draw(st.lists(st.integers(0, 100))))
    for n, part in enumerate(parts):
        more, text = output.extend(part, done=n == len(parts) - 1)
        kept += more
        shown += text
        assert expected.startswith(shown)
    if not parts:
        assert output.extend([], done=True) == (0, "")
    assert (shown, output.stopped_by, kept) == (expected, stopped_by, answer)
    assert output.text == shown


@pytest.mark.parametrize(("min_tokens", "expected"), [(3, "one "), (4, "one "), (5, "one two one "), (7, "one two one ")])
def test_stop_strings_are_looked_for_after_the_first_tokens(min_tokens: int, expected: str) -> None:
    ids = TOKENIZER.encode("one two one two")
    assert len(ids) == 15  # one for each character
    output = OutputText(TOKENIZER, ["two"], (), min_tokens)
    assert "".join(output.extend([i], done=False)[1] for i in ids) == expected
    assert output.stopped


def test_without_a_tokenizer_there_is_no_text_and_every_token_counts() -> None:
    output = OutputText(None, (), {2})
    assert output.extend([1, 2], done=True) == (2, "")
    assert output.text is None and not output.stopped
