"""Hugging Face's ``tokenizer.json``: byte-level BPE by the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

import tokenizers

from l4jax.files import read_json_if_there, read_text
from l4jax.text.tokenizer import Tokenizer, TokenizerError, is_punctuation, token_text


def byte_alphabet() -> dict[str, int]:
    """Map the printable character that byte-level BPE (GPT-2) writes for each byte to the byte.

    Printable bytes of Latin-1 are their own characters; the other bytes, in order, have the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


_LONG = 1 << 13
"""Characters of a text that takes milliseconds to encode."""


class HfTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library with a byte-level vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]) -> None:
        """``tokenizer_config``: the contents of ``tokenizer_config.json``, which names BOS, EOS and other special tokens."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._bytes = {token_id: token.content.encode() for token_id, token in added.items()}
        self._absent = frozenset(byte for byte, character in _CHARACTERS.items() if backend.token_to_id(character) is None)
        # What the tokenizer's own post-processing puts around a plain prompt.
        template = backend.encode("", add_special_tokens=True).ids
        named_bos = token_text(tokenizer_config.get("bos_token"))
        named_eos = token_text(tokenizer_config.get("eos_token"))
        bos_id = backend.token_to_id(named_bos) if named_bos is not None else next(iter(template), None)
        eos_id = backend.token_to_id(named_eos) if named_eos is not None else None
        prepends_bos = tokenizer_config.get("add_bos_token")
        super().__init__(
            vocab_size=1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1),
            special_tokens={t.content: i for i, t in added.items() if t.special or t.content in _labelled_special(tokenizer_config)},
            bos_id=bos_id,
            eos_ids=() if eos_id is None else (eos_id,),
            prepends_bos=prepends_bos if isinstance(prepends_bos, bool) else bos_id is not None and template[:1] == [bos_id],
        )
        # From here on the library takes the names of special tokens as text; split_special finds them where they are wanted.
        backend.encode_special_tokens = True
        named = [token_id for name in _named(tokenizer_config) if (token_id := self.token_id(name)) is not None]
        self.make_markers_special([*template, *named])

    @override
    def make_special(self, tokens: Mapping[str, int]) -> None:
        # The library finds added tokens in text unless it knows them as special. Adding a token again does not change its id.
        added = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        for token in map(added.get, tokens):
            if token is not None and (token.lstrip or token.rstrip or token.single_word):
                raise TokenizerError(f"the special token {token.content!r} changes the text around it, which is not supported")
        self._backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens if t in added])
        super().make_special(tokens)

    @override
    def encode_ordinary(self, text: str) -> list[int]:
        if len(text) < _LONG:
            ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        else:
            # Only this method lets other threads run meanwhile.
            ids = list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        # The library drops a byte that the vocabulary lacks, or takes a special token for it.
        doubtful = (
            [character for character in dict.fromkeys(text) if not self._absent.isdisjoint(character.encode())] if self._absent else []
        )
        if doubtful:
            written = b"".join(map(self.token_bytes, ids))
            for character in doubtful:
                if character.encode() not in written:
                    raise ValueError(f"the text has {character!r}, for which the model's tokenizer has no token; leave it out")
        return ids

    @override
    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            known = self._bytes[token_id] = b"" if token is None else _bytes_of(token)
        return known

    @override
    def token_id(self, token: str) -> int | None:
        try:
            characters = "".join(_CHARACTERS[byte] for byte in token.encode())
        except UnicodeEncodeError:
            return None
        found = self.special_tokens.get(token)
        # Added tokens, and entries outside the byte alphabet, are in the vocabulary as they read.
        candidates = (found, self._backend.token_to_id(characters), self._backend.token_to_id(token))
        return next((token_id for token_id in candidates if token_id is not None), None)

    @override
    def marker_id(self, text: str) -> int | None:
        token_id = self.token_id(text)
        if token_id is None or text in self.special_tokens:
            return token_id
        # Merges stay inside a word: a token that is several words was put in the vocabulary by hand.
        words = self._backend.pre_tokenizer.pre_tokenize_str(text) if self._backend.pre_tokenizer is not None else [text]
        return token_id if len(words) > 1 and is_punctuation(text[0]) and is_punctuation(text[-1]) else None


def load_hf_tokenizer(directory: Path) -> HfTokenizer:
    """Load the tokenizer in ``directory/tokenizer.json``. Raises :class:`TokenizerError`."""
    path = directory / "tokenizer.json"
    content = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    # The library raises plain Exception.
    except Exception as error:
        raise TokenizerError(
            f"{path} cannot be read ({error}); expected a tokenizer of the tokenizers library, fetch the file again"
        ) from error
    decoder = type(backend.decoder).__name__
    if decoder != "ByteLevel" or not isinstance(backend.model, tokenizers.models.BPE):
        raise TokenizerError(
            f"{path} has a {type(backend.model).__name__} model with a {decoder} decoder, which is not supported; "
            "expected byte-level BPE, as Llama 3, Llama 4 and SmolLM2 have"
        )
    config = read_tokenizer_config(directory)
    _add_missing(backend, config, directory)
    backend.no_truncation()
    backend.no_padding()
    try:
        return HfTokenizer(backend, config)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json``, completed from the older ``special_tokens_map.json`` and ``added_tokens.json`` as transformers does.

    Both are read only where ``added_tokens_decoder`` is absent, and the map's values come before the configuration's.
    """
    config = read_json_if_there(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    config |= read_json_if_there(directory / "special_tokens_map.json")
    added = read_json_if_there(directory / "added_tokens.json")
    return config | {"added_tokens_decoder": {token_id: {"content": token} for token, token_id in added.items()}}


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens that only ``added_tokens_decoder`` (or ``added_tokens.json``) has."""
    try:
        added = sorted((int(key), str(token["content"]), bool(token.get("special"))) for key, token in _added(config).items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder is not a table of tokens by id") from error
    for token_id, content, special in added:
        if backend.token_to_id(content) is None:
            backend.add_tokens([tokenizers.AddedToken(content, special=special, normalized=False)])
        if backend.token_to_id(content) != token_id:
            raise TokenizerError(
                f"{directory}: the token {content!r} has id {token_id} among the added tokens and {backend.token_to_id(content)} in "
                "tokenizer.json; the files are not of one tokenizer"
            )


def _added(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("added_tokens_decoder") or {}


def _named(config: Mapping[str, Any]) -> list[str]:
    """Return the tokens that a tokenizer's configuration names: BOS, EOS, padding, and further special ones."""
    names = [token_text(value) for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key)
        names += map(token_text, extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [])
    return [name for name in names if name]


def _labelled_special(config: Mapping[str, Any]) -> set[str]:
    """Return the tokens that a tokenizer's configuration labels as special; ``tokenizer.json`` has labels of its own."""
    return {token["content"] for token in _added(config).values() if token.get("special")}


def _bytes_of(token: str) -> bytes:
    """Return what an entry of the vocabulary stands for: bytes in GPT-2's alphabet or, with any other character in it, its own UTF-8.

    (As the tokenizers library decodes it. Converters of finetuned models write such entries.)
    """
    return bytes(_BYTES[c] for c in token) if all(c in _BYTES for c in token) else token.encode()
