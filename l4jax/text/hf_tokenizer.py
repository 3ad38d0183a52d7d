"""Hugging Face's ``tokenizer.json``: byte-level BPE by the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

import tokenizers

from l4jax.text.tokenizer import Tokenizer, TokenizerError, read_json, token_text


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte, to the byte.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


class HfTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library with a byte-level vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]) -> None:
        """``tokenizer_config``: the contents of ``tokenizer_config.json``, which names BOS and EOS."""
        added = backend.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        # What a plain prompt gets from the tokenizer's own post-processing.
        template = backend.encode("", add_special_tokens=True).ids
        named_bos = token_text(tokenizer_config.get("bos_token"))
        named_eos = token_text(tokenizer_config.get("eos_token"))
        bos_id = backend.token_to_id(named_bos) if named_bos is not None else next(iter(template), None)
        eos_id = backend.token_to_id(named_eos) if named_eos is not None else None
        prepends_bos = tokenizer_config.get("add_bos_token")
        super().__init__(
            vocab_size=backend.get_vocab_size(with_added_tokens=True),
            special_tokens=special,
            bos_id=bos_id,
            eos_ids=() if eos_id is None else (eos_id,),
            prepends_bos=prepends_bos if isinstance(prepends_bos, bool) else bos_id is not None and template[:1] == [bos_id],
        )
        # From here on the library takes the names of special tokens as text; split_special finds them where they are wanted.
        backend.encode_special_tokens = True
        self._backend = backend
        self._bytes = {token_id: token.content.encode() for token_id, token in added.items()}

    @override
    def encode_ordinary(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    @override
    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            known = self._bytes[token_id] = b"" if token is None else bytes(_BYTES[character] for character in token)
        return known

    @override
    def token_id(self, token: str) -> int | None:
        special = self.special_tokens.get(token)
        if special is not None:
            return special
        ordinary: int | None = self._backend.token_to_id("".join(_CHARACTERS[byte] for byte in token.encode()))
        return ordinary


def load_hf_tokenizer(directory: Path) -> HfTokenizer:
    """The tokenizer in ``directory/tokenizer.json``. Raises :class:`TokenizerError`."""
    path = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
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
    for token in backend.get_added_tokens_decoder().values():
        if token.special and (token.lstrip or token.rstrip or token.single_word):
            raise TokenizerError(f"{path}: the special token {token.content!r} changes the text around it, which is not supported")
    backend.no_truncation()
    backend.no_padding()
    return HfTokenizer(backend, read_json(directory / "tokenizer_config.json"))
