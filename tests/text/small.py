"""Small tokenizers made on the spot."""

from __future__ import annotations

import functools
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
def _trained(kind: str) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def backend(kind: str = "bytes") -> tokenizers.Tokenizer:
    """A byte-level BPE of 420 tokens, trained on a few lines."""
    return tokenizers.Tokenizer.from_str(_trained(kind))


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
    """``count`` tokens of up to three bytes: all single bytes, all pairs, and as many triples as there is room for."""
    tokens = [bytes([a]) for a in range(256)]
    tokens += [a + b for a in tokens[:256] for b in tokens[:256]]
    missing = count - len(tokens)
    tokens += [pair + tokens[32 + i // 256 % 224] for i, pair in enumerate(tokens[256 : 256 + 65536] * 3)][:missing]
    unique = dict.fromkeys(tokens)
    extra = (pair + bytes([c]) for c in range(256) for pair in tokens[256 : 256 + 65536])
    for token in extra:
        if len(unique) == count:
            break
        unique.setdefault(token)
    return {token: rank for rank, token in enumerate(unique)}
