"""Meta's ``tokenizer.model``: tiktoken's ranks in base64, with the special tokens of Llama 3 and Llama 4.

The file holds ordinary tokens only. The split into words and the special tokens, whose ids follow the ranks, belong to the model
family, which is recognised by the number of ranks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import override

import tiktoken

from l4jax.files import read_bytes
from l4jax.text.tokenizer import Tokenizer, TokenizerError

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 cuts text into words before merging bytes."""

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA4_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 4 cuts text into words (the o200k split)."""

LLAMA3_RANKS, LLAMA4_RANKS = 128_000, 200_000

# Meta encodes long texts in slices, and cuts long runs of spaces and long runs of other characters: tokens never cross these borders.
_SLICE_CHARACTERS, _RUN_CHARACTERS = 400_000, 25_000
_RUN = re.compile(r"\s+|\S+")


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3, in the order of their ids."""
    named = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    ]
    return named + [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(named) + 2)]


def llama4_special_tokens() -> list[str]:
    """The 2048 special tokens of Llama 4, in the order of their ids."""

    def reserved(kind: str, start: int, stop: int) -> list[str]:
        return [f"<|{kind}reserved_special_token_{i}|>" for i in range(start, stop)]

    named = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
        *reserved("text_post_train_", 0, 6),
        *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
        *reserved("text_post_train_", 8, 69),
        *("<|image_start|>", "<|image_end|>"),
        *reserved("vision_", 0, 2),
        *("<|tile_x_separator|>", "<|tile_y_separator|>"),
        *reserved("vision_", 2, 6),
        "<|image|>",
        *reserved("vision_", 6, 7),
        "<|patch|>",
        *reserved("vision_", 7, 1048),
        *reserved("reasoning_", 0, 8),
        *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    ]
    return named + reserved("", 0, 2048 - len(named))


class TiktokenTokenizer(Tokenizer):
    """Llama 3's or Llama 4's tokenizer, from its ranks."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """``ranks``: 128,000 (Llama 3) or 200,000 (Llama 4) of them, numbered from 0."""
        if len(ranks) == LLAMA3_RANKS:
            split, names, ends = LLAMA3_SPLIT, llama3_special_tokens(), ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        elif len(ranks) == LLAMA4_RANKS:
            split, names, ends = LLAMA4_SPLIT, llama4_special_tokens(), ("<|end_of_text|>", "<|eom|>", "<|eot|>")
        else:
            raise TokenizerError(f"the tokenizer has {len(ranks)} tokens; expected {LLAMA3_RANKS} (Llama 3) or {LLAMA4_RANKS} (Llama 4)")
        absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if absent:
            raise TokenizerError(f"the tokenizer has no token for byte {absent[0]}; the file is damaged, fetch it again")
        special = {name: len(ranks) + i for i, name in enumerate(names)}
        super().__init__(
            vocab_size=len(ranks) + len(special),
            special_tokens=special,
            bos_id=special["<|begin_of_text|>"],
            eos_ids=[special[name] for name in ends],
            prepends_bos=True,
        )
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(name="llama", pat_str=split, mergeable_ranks=ranks, special_tokens=special)

    @override
    def encode_ordinary(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    @override
    def token_bytes(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id) if 0 <= token_id < self.vocab_size else b""

    @override
    def token_id(self, token: str) -> int | None:
        return self.special_tokens.get(token, self._ranks.get(token.encode(errors="surrogatepass")))

    @override
    def marker_id(self, text: str) -> int | None:
        # The ranks are ordinary tokens, each a part of a word.
        return self.special_tokens.get(text)


def load_tiktoken_tokenizer(path: Path) -> TiktokenTokenizer:
    """Read a ``tokenizer.model`` of lines "base64 rank". Raises :class:`TokenizerError`."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{path}, line {number} is not a token in base64 and its rank; expected the tiktoken file of Llama 3 or Llama 4 "
                "(Llama 2's SentencePiece file of this name is not supported)"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks are not the numbers from 0 to {len(ranks) - 1}; the file is damaged, fetch it again")
    try:
        return TiktokenTokenizer(ranks)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _parts(text: str) -> Iterator[str]:
    """Cut ``text`` into the slices that Meta encodes one by one."""
    for start in range(0, len(text), _SLICE_CHARACTERS):
        piece = text[start : start + _SLICE_CHARACTERS]
        cut = 0
        for run in _RUN.finditer(piece):
            for border in range(run.start() + _RUN_CHARACTERS, run.end(), _RUN_CHARACTERS):
                yield piece[cut:border]
                cut = border
        yield piece[cut:]
