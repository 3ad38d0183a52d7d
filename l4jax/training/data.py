"""What a drafter is trained on: prompts of a JSONL file, and the target's own answers to them, kept as they come."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from l4jax.decoding.params import SamplingParams
from l4jax.llm import LLM

_EXPECTED = 'expected an object with "messages", "prompt", or "prompt_token_ids" and "token_ids"'

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the answer to it (None: not yet given); ``key`` is the prompt's SHA-256.

    ``temperature``: what it is to be answered at, if not at the run's.
    """

    key: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None
    temperature: float | None = None

    def is_held_out(self, share: float) -> bool:
        """Whether it is of the share that is kept for evaluation: decided by the prompt alone, whatever else there is."""
        return int(self.key[:8], 16) < share * 2**32


def read_prompts(path: Path, llm: LLM) -> list[Example]:
    """The prompts of a JSONL file, each once, in its order.

    A line has ``messages`` (a conversation, of which a last answer is dropped: the target gives its own), ``prompt`` (text, or token ids),
    or ``prompt_token_ids`` and ``token_ids``, an answer given before. It may have a ``temperature`` to answer at. Raises ValueError,
    naming the line, for any other.
    """
    examples: dict[str, Example] = {}
    for number, line in _lines(path):
        try:
            prompt, answer = _tokens(line, llm)
            for token in (*prompt, *(answer or ())):
                if not 0 <= token < llm.config.vocab_size:
                    raise ValueError(f"it has token id {token}; expected 0 to {llm.config.vocab_size - 1}, the model's vocabulary")
            temperature = line.get("temperature")
            if temperature is not None:
                SamplingParams(temperature=temperature)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        key = _key(prompt)
        examples.setdefault(key, Example(key, prompt, answer, temperature))
    if not examples:
        raise ValueError(f"{path} has no prompts; expected a JSON object a line")
    return list(examples.values())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}); {_EXPECTED}") from error
            if not isinstance(line, dict):
                raise ValueError(f"{path} line {number} is {raw.strip().decode(errors='replace')[:40]!r}; {_EXPECTED}")
            yield number, line


def _tokens(line: dict[str, Any], llm: LLM) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """A line's prompt and, if it has one, its answer."""
    kinds = [kind for kind in ("messages", "prompt", "prompt_token_ids") if kind in line]
    if len(kinds) != 1:
        raise ValueError(f"it has {', '.join(line) or 'nothing'}; {_EXPECTED}")
    value = line[kinds[0]]
    if kinds == ["prompt_token_ids"]:
        return _token_ids(value), _token_ids(line.get("token_ids"))
    if kinds == ["prompt"]:
        if not isinstance(value, str):
            return _token_ids(value), None
        if llm.tokenizer is None:
            raise ValueError("its prompt is text, but the target has no tokenizer; give token ids")
        ids = llm.tokenizer.encode(value)
        if not ids:
            raise ValueError("its prompt is empty; expected at least one token")
        return tuple(ids), None
    if llm.chat_format is None:
        raise ValueError('it has messages, but the target has no chat template; give "prompt"')
    if not isinstance(value, list):
        raise ValueError(f'its messages are a {type(value).__name__}; expected a list of {{"role": ..., "content": ...}}')
    while value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[:-1]
    return tuple(llm.chat_format.encode(value)), None


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(token) is not int for token in value):
        raise ValueError(f"it has {json.dumps(value)[:40]}; expected a list of token ids, at least one")
    return tuple(value)


def _key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Generation:
    """How the target answers; ``length`` is the most that prompt and answer may have together."""

    temperature: float
    max_tokens: int
    length: int
    seed: int


def answer(llm: LLM, examples: Sequence[Example], how: Generation, file: Path, progress: Progress) -> list[Example]:
    """The examples with the target's answers: those in ``file``, and new ones, which are added to it batch by batch.

    Prompts that leave no room for an answer of two tokens are left out. Each has a random seed of its own, so that its answer does
    not depend on when it was given.
    """
    fitting = [example for example in examples if len(example.prompt) + 2 <= how.length]
    answers = _read_answers(file)
    missing = [example for example in fitting if example.answer is None and example.key not in answers]
    done = len(fitting) - len(missing)
    progress(done, len(fitting))
    with file.open("a", encoding="utf-8") as out:
        for start in range(0, len(missing), llm.max_batch):
            group = missing[start : start + llm.max_batch]
            params = [
                SamplingParams(
                    temperature=how.temperature if example.temperature is None else example.temperature,
                    max_tokens=min(how.max_tokens, how.length - len(example.prompt)),
                    seed=int(hashlib.sha256(f"{how.seed} {example.key}".encode()).hexdigest()[:16], 16),
                )
                for example in group
            ]
            for example, completion in zip(group, llm.generate([e.prompt for e in group], params), strict=True):
                answers[example.key] = tuple(completion.token_ids)
                line = {"prompt_token_ids": list(example.prompt), "token_ids": completion.token_ids}
                out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
            done += len(group)
            progress(done, len(fitting))
    given = [dataclasses.replace(e, answer=e.answer or answers[e.key]) for e in fitting]
    return [dataclasses.replace(e, answer=e.answer[: how.length - len(e.prompt)]) for e in given if e.answer is not None]


def _read_answers(file: Path) -> dict[str, tuple[int, ...]]:
    """The answers given so far, by their prompts' keys. What a killed run left of a last line is cut off."""
    if not file.exists():
        return {}
    whole = file.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) < len(whole):
        with file.open("r+b") as out:
            out.truncate(len(complete))
    lines = [line for _, line in _lines(file)]
    return {_key(line["prompt_token_ids"]): tuple(line["token_ids"]) for line in lines}
