"""The BPE tokenizer inside a GGUF file, written out as Hugging Face files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from l4jax.text.chat import ChatFormat, built_in_template
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.text.template import ChatError
from l4jax.text.tiktoken_tokenizer import LLAMA3_SPLIT, LLAMA4_SPLIT
from l4jax.text.tokenizer import TokenizerError, token_text
from sharding.kinds import shown

# GGUF's kinds of token. llama.cpp neither prints unknown and unused ones nor finds them in text.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

# By tokenizer.ggml.pre. Those with a split pattern come from tiktoken, which takes a word that is a token as it is, without
# looking at the merges.
_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama4": LLAMA4_SPLIT, "gpt-4o": LLAMA4_SPLIT}
_DIGIT_BY_DIGIT = ("smollm",)


def write_gguf_tokenizer(metadata: Mapping[str, Any], directory: Path) -> list[str]:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if there is one template, ``chat_template.jinja`` into ``directory``.

    ``metadata``: the GGUF file's, as plain Python values. Returns the names of the files, none if the file has no tokenizer. Several
    templates go into ``tokenizer_config.json``. Raises :class:`TokenizerError` for a tokenizer of another kind than byte-level BPE, or
    an unknown splitting into words.
    """
    if "tokenizer.ggml.model" not in metadata:
        return []
    config, templates = _tokenizer_config(metadata), _templates(metadata)
    tokenizer = _build(metadata)
    unused = _unused(metadata)
    if unused:
        unused -= _markers(tokenizer, config, templates)
        tokenizer = _build(metadata, without=unused)
    if len(templates) > 1:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    if templates.keys() == {"default"}:
        files["chat_template.jinja"] = templates["default"]
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return list(files)


def _build(metadata: Mapping[str, Any], without: Set[str] = frozenset()) -> tokenizers.Tokenizer:
    """Make the tokenizer, ``without`` some of the tokens."""
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.model is {shown(model)}, which is not supported; expected 'gpt2' (byte-level BPE); "
            "convert the model's Hugging Face files instead"
        )
    if pre not in (*_SPLITS, *_DIGIT_BY_DIGIT):
        known = ", ".join((*_SPLITS, *_DIGIT_BY_DIGIT))
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.pre is {shown(pre)}, a splitting into words that is not supported; expected one of {known}"
        )
    tokens, kinds = _list(metadata, "tokenizer.ggml.tokens"), _list(metadata, "tokenizer.ggml.token_type")
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise TokenizerError(
            f"GGUF: {len(tokens)} tokens, {len(set(tokens))} of them different, with {len(kinds)} types; the file is damaged"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise TokenizerError(f"GGUF: the merge {' '.join(merge)!r} does not make one token of two; the file is damaged")

    # What merges make are words.
    made = {part for merge in merges for part in (*merge, "".join(merge))}
    used = {token: i for token, i in vocabulary.items() if token not in without or token in made}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=pre in _SPLITS))
    tokenizer.decoder = decoders.ByteLevel()
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    words: pre_tokenizers.PreTokenizer
    if pre in _SPLITS:
        words = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), behavior="isolated")
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    else:
        words = pre_tokenizers.Digits(individual_digits=True)
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    for special, added_kinds in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        added = [
            tokenizers.AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k in added_kinds
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    bos = _token(metadata, "bos")
    if bos is not None and _adds_bos(metadata):
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {field: _token(metadata, key) for field, key in names.items()}
    # The ends of a turn (eot) and of a message (eom), and what is for filling gaps in text, among others.
    others = [match[1] for key in metadata if (match := re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key)) is not None]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{field: token for field, token in named.items() if token is not None},
        "additional_special_tokens": [_token(metadata, name) for name in others if name not in names.values()],
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
    }


def _unused(metadata: Mapping[str, Any]) -> set[str]:
    """The tokens that the file labels as unused: converters fill the rows beyond a tokenizer with them, as "[PAD17]"."""
    tokens, kinds = _list(metadata, "tokenizer.ggml.tokens"), _list(metadata, "tokenizer.ggml.token_type")
    return {token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNUSED}


def _markers(backend: tokenizers.Tokenizer, config: Mapping[str, Any], templates: Mapping[str, str]) -> set[str]:
    """The tokens that act as special ones, whatever the file labels them: those that it names, and those of its templates."""
    tokenizer = HfTokenizer(backend, config)
    for template in templates.values() or [text for text, _ in built_in_template(tokenizer).values()]:
        # One that cannot be used is reported when it is needed.
        with contextlib.suppress(ChatError):
            variables = {key: text for key, value in config.items() if key.endswith("_token") and (text := token_text(value)) is not None}
            ChatFormat(template, tokenizer, origin="GGUF", variables=variables)
    return set(tokenizer.special_tokens)


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: the default one, and others in fields of their own."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if key in metadata:
        found["default"] = metadata[key]
    for name, text in found.items():
        if not isinstance(text, str):
            raise TokenizerError(f"GGUF: the chat template {name!r} is of type {type(text).__name__}; expected a text; the file is damaged")
    return found


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    # The defaults are llama.cpp's.
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe"))


def _token(metadata: Mapping[str, Any], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        return None
    token_id, tokens = metadata[key], _list(metadata, "tokenizer.ggml.tokens")
    if not 0 <= token_id < len(tokens):
        raise TokenizerError(f"GGUF: {key} is {token_id}; expected 0 to {len(tokens) - 1}; the file is damaged")
    return str(tokens[token_id])


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(metadata.get(key), list):
        raise TokenizerError(f"GGUF: {key} is missing; expected a list, for a model with a tokenizer")
    return list(metadata[key])
