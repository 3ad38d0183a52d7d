"""Small tokenizers made on the spot."""

from __future__ import annotations

import base64
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog, and the dog barks at the fox; naïve café 日本語 日本 🙂🙂 🙃",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 345))\n",
) * 4
TEXTS = (
    "",
    " ",
    "the dog",
    "  two spaces, and 1234 digits\n\n\tand a tab  ",
    "emoji 🙂🙃 family 👨‍👩‍👧‍👦, CJK 日本語テキスト, naïve",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00 control \x7f",
)


@functools.cache
def _trained(kind: str, special: tuple[str, ...]) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def backend(kind: str = "bytes", special: tuple[str, ...] = SPECIAL) -> tokenizers.Tokenizer:
    """A byte-level BPE of some 400 tokens, trained on a few lines; the first are ``special``."""
    return tokenizers.Tokenizer.from_str(_trained(kind, special))


def write(directory: Path, *, post_processed: bool = False, **tokenizer_config: Any) -> Path:
    """The small tokenizer as files in ``directory``; ``post_processed``: tokenizer.json itself puts BOS before a text."""
    tokenizer = backend()
    if post_processed:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    if tokenizer_config:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


@functools.cache
def tiktoken_ranks(count: int) -> dict[bytes, int]:
    """``count`` tokens: all single bytes, all pairs, and triples, those of letters and digits first."""
    letters = b"abcdefghijklmnopqrstuvwxyz0123456789 \n'"
    alphabets = [(range(256), 1), (range(256), 2), (letters, 3), (letters + b"ABCDEFGHIJKL", 3), (range(256), 3)]
    ranks: dict[bytes, int] = {}
    for alphabet, length in alphabets:
        for token in map(bytes, itertools.product(alphabet, repeat=length)):
            ranks.setdefault(token, len(ranks))
            if len(ranks) == count:
                return ranks
    raise ValueError(f"there are no {count} tokens of up to three bytes")


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    """``ranks`` as Meta's ``tokenizer.model`` has them."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
