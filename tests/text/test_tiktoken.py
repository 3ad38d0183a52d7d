"""Meta's tokenizer.model: special tokens, words and slices. The ranks here are made up; the rest is Meta's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.text.load import load_tokenizer
from l4jax.text.tiktoken_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TiktokenTokenizer, llama3_special_tokens, llama4_special_tokens
from l4jax.text.tokenizer import TokenizerError
from tests.text import small

LLAMA3 = TiktokenTokenizer(small.tiktoken_ranks(LLAMA3_RANKS))
LLAMA4 = TiktokenTokenizer(small.tiktoken_ranks(LLAMA4_RANKS))


# The ids are those of llama_models' own tokenizers.
@pytest.mark.parametrize(
    ("token", "token_id"),
    [
        ("<|begin_of_text|>", 128000),
        ("<|end_of_text|>", 128001),
        ("<|reserved_special_token_1|>", 128003),
        ("<|finetune_right_pad_id|>", 128004),
        ("<|step_id|>", 128005),
        ("<|start_header_id|>", 128006),
        ("<|end_header_id|>", 128007),
        ("<|eom_id|>", 128008),
        ("<|eot_id|>", 128009),
        ("<|python_tag|>", 128010),
        ("<|image|>", 128011),
        ("<|reserved_special_token_2|>", 128012),
        ("<|reserved_special_token_245|>", 128255),
    ],
)
def test_special_tokens_of_llama_3(token: str, token_id: int) -> None:
    assert LLAMA3.token_id(token) == token_id


@pytest.mark.parametrize(
    ("token", "token_id"),
    [
        ("<|begin_of_text|>", 200000),
        ("<|end_of_text|>", 200001),
        ("<|fim_suffix|>", 200004),
        ("<|header_start|>", 200005),
        ("<|header_end|>", 200006),
        ("<|eom|>", 200007),
        ("<|eot|>", 200008),
        ("<|step|>", 200009),
        ("<|text_post_train_reserved_special_token_0|>", 200010),
        ("<|python_start|>", 200016),
        ("<|python_end|>", 200017),
        ("<|finetune_right_pad|>", 200018),
        ("<|text_post_train_reserved_special_token_8|>", 200019),
        ("<|text_post_train_reserved_special_token_68|>", 200079),
        ("<|image_start|>", 200080),
        ("<|image_end|>", 200081),
        ("<|tile_x_separator|>", 200084),
        ("<|tile_y_separator|>", 200085),
        ("<|image|>", 200090),
        ("<|patch|>", 200092),
        ("<|vision_reserved_special_token_7|>", 200093),
        ("<|vision_reserved_special_token_1047|>", 201133),
        ("<|reasoning_reserved_special_token_0|>", 201134),
        ("<|reasoning_thinking_start|>", 201142),
        ("<|reasoning_thinking_end|>", 201143),
        ("<|reserved_special_token_0|>", 201144),
        ("<|reserved_special_token_903|>", 202047),
    ],
)
def test_special_tokens_of_llama_4(token: str, token_id: int) -> None:
    assert LLAMA4.token_id(token) == token_id


def test_vocabularies() -> None:
    assert len(set(llama3_special_tokens())) == 256
    assert len(set(llama4_special_tokens())) == 2048
    assert (LLAMA3.vocab_size, LLAMA4.vocab_size) == (128256, 202048)
    assert (LLAMA3.bos_id, LLAMA3.eos_ids) == (128000, (128001, 128008, 128009))
    assert (LLAMA4.bos_id, LLAMA4.eos_ids) == (200000, (200001, 200007, 200008))


@pytest.mark.parametrize("tokenizer", [LLAMA3, LLAMA4])
@given(text=st.one_of(st.text(), st.sampled_from([*small.TEXTS, "<|eot|><|eot_id|>"])))
def test_text_survives(tokenizer: TiktokenTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)[1:], skip_special=False) == text


def test_bos_comes_first_and_once() -> None:
    assert LLAMA4.encode("") == [200000]
    assert LLAMA4.encode("", add_bos=False) == []
    assert LLAMA4.encode("<|begin_of_text|>", parse_special=True) == [200000]
    assert LLAMA4.encode("<|begin_of_text|>")[:1] == [200000]
    assert 200000 not in LLAMA4.encode("<|begin_of_text|>")[1:]


def words(tokenizer: TiktokenTokenizer, text: str) -> list[str]:
    """With tokens of at most three bytes, words of up to three ASCII characters show as they were cut."""
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_bos=False)]


def test_words() -> None:
    assert words(LLAMA3, "12345") == words(LLAMA4, "12345") == ["123", "45"]
    assert words(LLAMA3, "a\n\nb") == ["a", "\n\n", "b"]
    # Llama 4 cuts at changes to upper case and keeps contractions with their word.
    assert (words(LLAMA3, "aB"), words(LLAMA4, "aB")) == (["aB"], ["a", "B"])
    assert (words(LLAMA3, "I'm"), words(LLAMA4, "I'm")) == (["I", "'m"], ["I'm"])


def test_long_runs_are_cut_as_meta_does() -> None:
    # The token for "aaa" or "aa" would cross the border.
    run = "a" * 25_001
    assert LLAMA4.encode(run, add_bos=False) == [*LLAMA4.encode(run[:25_000], add_bos=False), ord("a")]
    long = "ab " * 133_334
    ids = LLAMA4.encode(long, add_bos=False)
    assert ids == LLAMA4.encode(long[:400_000], add_bos=False) + LLAMA4.encode(long[400_000:], add_bos=False)
    assert LLAMA4.decode(ids) == long


def test_the_file_is_read(tmp_path: Path) -> None:
    ranks = small.tiktoken_ranks(LLAMA3_RANKS)
    (tmp_path / "tokenizer.model").write_bytes(small.tiktoken_file(ranks))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("the quick\n fox") == LLAMA3.encode("the quick\n fox")
    assert tokenizer.token_id("the") == ranks[b"the"]
    assert tokenizer.token_id("longer") is None
    assert tokenizer.token_bytes(10**6) == b""


def test_ranks_without_one_of_the_bytes_are_refused() -> None:
    tokens = [token for token in small.tiktoken_ranks(LLAMA3_RANKS) if token != b"\x06"]
    with pytest.raises(TokenizerError, match="the tokenizer has no token for byte 6; the file is damaged"):
        TiktokenTokenizer({token: rank for rank, token in enumerate([*tokens, b"\x06" * 9])})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00", "line 1 is not a token in base64 and its rank; expected the tiktoken file"),
        (b"IQ== 0\nIg== one\n", "line 2 is not a token"),
        (b"IQ== 0\nIg==\n", "line 2 is not a token"),
        (b"IQ== 0\nIg== 2\n", "the ranks are not the numbers from 0 to 1"),
        (b"IQ== 0\nIQ== 1\n", "the ranks are not the numbers from 0 to 0"),
        (b"IQ== 0\nIg== 1\n", r"the tokenizer has 2 tokens; expected 128000 \(Llama 3\) or 200000 \(Llama 4\)"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
