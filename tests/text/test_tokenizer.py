"""tokenizer.json: ids, bytes, special tokens and BOS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from l4jax.files import FileError
from l4jax.text.hf_tokenizer import _CHARACTERS, HfTokenizer, byte_alphabet
from l4jax.text.load import load_tokenizer
from l4jax.text.output import StreamDecoder
from l4jax.text.tokenizer import TokenizerError
from tests.text import small

TOKENIZER = HfTokenizer(small.backend(), {})
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from([*small.TEXTS, *small.SPECIAL, "<|", "|>", " "])).map("".join))


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert byte_alphabet().keys() == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ")


@given(ANY_TEXT)
def test_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, parse_special=True), skip_special=False) == text


@given(ANY_TEXT)
def test_ids_are_the_librarys(text: str) -> None:
    backend = small.backend()
    assert TOKENIZER.encode(text, parse_special=True) == backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = True
    assert TOKENIZER.encode(text) == backend.encode(text, add_special_tokens=False).ids


@given(st.lists(st.integers(0, 430)))
def test_decoding_any_tokens_agrees_with_the_library(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids, skip_special=False) == small.backend().decode(ids, skip_special_tokens=False)
    assert TOKENIZER.decode(ids) == small.backend().decode(ids, skip_special_tokens=True)


# A word of another writing in the vocabulary itself, as converters of finetuned models leave it, and ids without a token.
ODD = {"你好 世": 700, "Ġ日": 702, "\u0141\u0142\u0143": 703}


def with_odd_tokens() -> tokenizers.Tokenizer:
    values = json.loads(small.backend().to_str())
    values["model"]["vocab"] |= ODD
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def test_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    tokenizer = HfTokenizer(with_odd_tokens(), {})
    assert tokenizer.decode([700, 5, 702]) == "你好 世" + TOKENIZER.decode([5]) + "Ġ日"
    assert tokenizer.token_id("你好 世") == 700
    # All of its characters are in the alphabet, where they are bytes.
    assert tokenizer.token_bytes(703) == bytes(byte_alphabet()[c] for c in "\u0141\u0142\u0143")
    assert tokenizer.decode(tokenizer.encode("你好 世")) == "你好 世"


@given(st.lists(st.integers(-3, 710)))
def test_every_id_decodes_as_in_the_library(ids: list[int]) -> None:
    tokenizer = HfTokenizer(with_odd_tokens(), {})
    assert tokenizer.vocab_size == 704
    known = [i for i in ids if i >= 0]
    assert tokenizer.decode(ids, skip_special=False) == with_odd_tokens().decode(known, skip_special_tokens=False)
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([i]) for i in ids) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("token_id", [-1, 2**31, 2**64, 421, 699])
def test_ids_without_a_token_are_nothing(token_id: int) -> None:
    assert HfTokenizer(with_odd_tokens(), {}).token_bytes(token_id) == b""


def without(characters: str, unknown: str | None = None) -> tokenizers.Tokenizer:
    """The small tokenizer without these entries for single bytes, and with a token for what is unknown."""
    values = json.loads(small.backend().to_str())
    values["model"]["unk_token"] = unknown
    values["model"]["vocab"] = {token: i for token, i in values["model"]["vocab"].items() if token not in characters}
    values["model"]["merges"] = [m for m in values["model"]["merges"] if not set("".join(m)) & set(characters)]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


@pytest.mark.parametrize("unknown", [None, "<|end_of_text|>"])
def test_text_of_bytes_that_the_vocabulary_lacks_is_refused_not_lost(unknown: str | None) -> None:
    """The library drops byte 6, or writes the unknown token, which ends texts."""
    backend = without(_CHARACTERS[6] + _CHARACTERS[0xF1], unknown)
    backend.add_tokens([tokenizers.AddedToken("\x06\x06", special=False, normalized=False)])
    tokenizer = HfTokenizer(backend, {})
    for text, named in (("a\x06b", r"'\x06'"), ("a\U00040000", r"'\U00040000'")):
        with pytest.raises(ValueError, match=r"^the text has .*, for which the model's tokenizer has no token; leave it out$") as error:
            tokenizer.encode(text)
        assert named in str(error.value)
    for text in ("the dog\x07", "\x06\x06"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_no_token() -> None:
    assert TOKENIZER.token_id("\ud800") is None


def test_special_tokens_are_text_unless_asked() -> None:
    text = "<|im_start|>x"
    assert TOKENIZER.encode(text, parse_special=True)[0] == TOKENIZER.token_id("<|im_start|>") == 2
    assert not any(TOKENIZER.is_special(i) for i in TOKENIZER.encode(text))
    assert TOKENIZER.split_special("a<|im_start|><|im_end|>b") == ["a", 2, 3, "b"]


def test_of_two_special_tokens_the_longer_is_meant() -> None:
    backend = small.backend()
    backend.add_special_tokens(["<|a|>", "<|a|><|b|>"])
    tokenizer = HfTokenizer(backend, {})
    assert tokenizer.split_special("<|a|><|b|><|a|>") == [tokenizer.token_id("<|a|><|b|>"), tokenizer.token_id("<|a|>")]


def test_added_tokens_that_are_not_special_are_text() -> None:
    backend = small.backend()
    backend.add_tokens(["hello there"])
    tokenizer = HfTokenizer(backend, {})
    ids = tokenizer.encode("say hello there")
    assert ids[-1] == small.backend().get_vocab_size()
    assert tokenizer.decode(ids) == "say hello there"
    assert tokenizer.vocab_size == ids[-1] + 1


def test_token_ids_by_name() -> None:
    assert TOKENIZER.token_id(" the") == TOKENIZER.encode(" the")[0]
    assert TOKENIZER.token_id("no such token") is None
    assert TOKENIZER.token_bytes(-1) == TOKENIZER.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("post_processed", "config", "prepends"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"bos_token": "<|begin_of_text|>"}, True),
        (True, {"bos_token": "<|begin_of_text|>", "add_bos_token": False}, False),
        (False, {"bos_token": {"content": "<|begin_of_text|>"}, "add_bos_token": True}, True),
        (False, {"bos_token": "<|begin_of_text|>"}, False),
    ],
)
def test_bos_is_put_first_where_the_model_expects_it(
    tmp_path: Path, post_processed: bool, config: dict[str, object], prepends: bool
) -> None:
    tokenizer = load_tokenizer(small.write(tmp_path, post_processed=post_processed, **config))
    assert tokenizer is not None
    plain = TOKENIZER.encode("the dog")
    assert tokenizer.encode("the dog") == [0] * prepends + plain
    assert tokenizer.encode("the dog", add_bos=False) == plain
    assert tokenizer.encode("<|begin_of_text|>the dog", parse_special=True) == [0, *plain]


def test_bos_and_eos_are_those_of_the_tokenizers_configuration(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small.write(tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>", add_bos_token=False))
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prepends_bos) == (2, (3,), False)


def test_truncation_and_padding_in_the_file_have_no_effect(tmp_path: Path) -> None:
    backend = small.backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("the quick brown fox jumps") == TOKENIZER.encode("the quick brown fox jumps")


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .*; expected a tokenizer of the tokenizers library") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    small.backend("words").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="a BPE model with a Metaspace decoder, which is not supported; expected byte-level BPE"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="a WordLevel model with a NoneType decoder"):
        load_tokenizer(tmp_path)


def test_a_special_token_that_strips_is_refused(tmp_path: Path) -> None:
    backend = small.backend()
    backend.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="the special token '<mask>' changes the text around it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list; expected a JSON object")])
def test_a_damaged_tokenizer_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (small.write(tmp_path) / "tokenizer_config.json").write_text(text)
    with pytest.raises(FileError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"3": {"content": "<|im_start|>"}}, "the token '<|im_start|>' has id 3 among the added tokens and 2 in tokenizer.json"),
        ({"9999": {"content": "<late>"}}, "the token '<late>' has id 9999 among the added tokens"),
        ({"x": {"content": "<late>"}}, "added_tokens_decoder is not a table of tokens by id"),
        ({"3": "<|im_end|>"}, "added_tokens_decoder is not a table of tokens by id"),
    ],
)
def test_added_tokens_of_another_tokenizer_are_refused(tmp_path: Path, added: dict[str, object], message: str) -> None:
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(small.write(tmp_path, added_tokens_decoder=added))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizer_json_is_preferred_to_tokenizer_model(tmp_path: Path) -> None:
    small.write(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    assert isinstance(load_tokenizer(tmp_path), HfTokenizer)


def test_smollm2_tokens_are_those_of_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    from l4jax.text.gguf_tokenizer import write_gguf_tokenizer

    metadata = {name: field.contents() for name, field in GGUFReader(smollm2_gguf).fields.items() if name.startswith("tokenizer.")}
    assert write_gguf_tokenizer(metadata, tmp_path) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prepends_bos, tokenizer.vocab_size) == (1, (2,), False, 49152)
    golden = json.loads((Path(__file__).parent.parent / "golden" / "smollm2_tokens.json").read_text(encoding="utf-8"))
    assert len(golden["texts"]) > 100
    for entry in golden["texts"]:
        assert tokenizer.encode(entry["text"], parse_special=True) == entry["token_ids"]
        assert tokenizer.decode(entry["token_ids"], skip_special=False) == entry["text"]
