"""What a drafter is trained on: the prompts of a JSONL file and the target's own answers to them, kept as they arrive."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from l4jax.decoding.params import SamplingParams
from l4jax.files import parse_json, reading
from l4jax.llm import LLM
from l4jax.text.chat import ChatOptions
from l4jax.training.folder import reading_own
from sharding.kinds import shown

_EXPECTED = 'expected an object with "messages", "prompt", or "prompt_token_ids" and "token_ids"'
_CHECK = "check its name and its permissions"

# What a conversation in the data may give to the chat template beside its messages.
_TEMPLATE_OPTIONS: tuple[Literal["tools", "documents", "chat_template_kwargs"], ...] = ("tools", "documents", "chat_template_kwargs")

Progress = Callable[[int, int], None]
"""Called with the amount done and the total."""


Asked = tuple[str, float]
"""A prompt's key and its temperature. Within one run these two decide the target's answer."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its answer (None: not answered yet); ``key`` is the prompt's SHA-256.

    ``temperature``: what to answer it at, where it has no answer.
    """

    key: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None
    temperature: float = 0.0

    def is_held_out(self, share: float) -> bool:
        """Whether it belongs to the share that is kept for evaluation: decided by the prompt alone, whatever else the data has."""
        return int(self.key[:8], 16) < share * 2**32

    @property
    def asked(self) -> Asked:
        """See :data:`Asked`."""
        return self.key, self.temperature


@dataclasses.dataclass(frozen=True)
class Data:
    """The prompts of a JSONL file, in its order; ``digest``: the file's SHA-256; ``repeated``: lines left out as repetitions."""

    examples: list[Example]
    digest: str
    repeated: int


def check_readable(path: Path) -> None:
    """Raise ValueError for a file of prompts that cannot be read. A pipe is not opened: it can be read only once."""
    with reading(path, _CHECK):
        if not stat.S_ISFIFO(path.stat().st_mode):
            path.open("rb").close()


def read_data(path: Path, llm: LLM, temperature: float) -> Data:
    """Read the prompts of a JSONL file, which may be a pipe: it is read once.

    A line has ``messages`` (a conversation; a last answer in it is dropped, because the target gives its own), ``prompt`` (text or token
    ids), or ``prompt_token_ids`` and ``token_ids``, an answer given before. Beside messages it may have ``tools``, ``documents`` and
    ``chat_template_kwargs`` for the chat template. It may have a ``temperature`` to answer at, in place of ``temperature``, the run's.
    Every given answer is kept; a prompt without one is kept once for each temperature. Raises ValueError for a file that cannot be
    read and, naming the line, for anything else.
    """
    digest = hashlib.sha256()
    examples: list[Example] = []
    asked: set[Asked] = set()
    repeated = 0
    with reading(path, _CHECK), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            digest.update(raw)
            if not raw.strip():
                continue
            try:
                example = _example(_parsed(raw), llm, temperature)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
            if example.answer is None and example.asked in asked:
                repeated += 1
                continue
            if example.answer is None:
                asked.add(example.asked)
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} has no prompts; expected a JSON object a line")
    return Data(examples, digest.hexdigest(), repeated)


def _parsed(raw: bytes) -> dict[str, Any]:
    line = parse_json(raw, "it", _EXPECTED)
    if not isinstance(line, dict):
        raise ValueError(f"it is {raw.strip().decode(errors='replace')[:40]!r}; {_EXPECTED}")
    return line


def _example(line: dict[str, Any], llm: LLM, default: float) -> Example:
    prompt, answer = _tokens(line, llm)
    for token in (*prompt, *(answer or ())):
        if not 0 <= token < llm.config.vocab_size:
            raise ValueError(f"it has token id {shown(token)}; expected 0 to {llm.config.vocab_size - 1}, the model's vocabulary")
    temperature = line.get("temperature")
    if temperature is not None:
        SamplingParams(temperature=temperature)
    if answer is not None:
        return Example(_key(prompt), prompt, answer)
    return Example(_key(prompt), prompt, None, float(default if temperature is None else temperature))


def _tokens(line: dict[str, Any], llm: LLM) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """A line's prompt and, if it has one, its answer."""
    kinds = [kind for kind in ("messages", "prompt", "prompt_token_ids") if kind in line]
    if len(kinds) != 1:
        raise ValueError(f"it has {', '.join(line) or 'nothing'}; {_EXPECTED}")
    value = line[kinds[0]]
    for name in ChatOptions.__annotations__:
        if line.get(name) is not None and (kinds != ["messages"] or name not in _TEMPLATE_OPTIONS):
            raise ValueError(f"it has {name}; expected {', '.join(_TEMPLATE_OPTIONS)} beside messages, and none of these elsewhere")
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
    return tuple(llm.chat_format.encode(value, **{name: line[name] for name in _TEMPLATE_OPTIONS if name in line})), None


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(token) is not int for token in value):
        raise ValueError(f"it has {json.dumps(value)[:40]}; expected a list of token ids, at least one")
    return tuple(value)


def _key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()


_BATCHES_A_WRITE = 4
"""How many times ``max_batch`` prompts are answered between two writes: a run that is killed loses these, and rows wait for the last."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """How the target answers; ``length`` is the most tokens that a prompt and its answer may have together."""

    max_tokens: int
    length: int
    seed: int

    def leaves_room_for(self, example: Example) -> bool:
        """Whether an answer of two tokens fits after the prompt."""
        return len(example.prompt) + 2 <= self.length

    def most_tokens(self, example: Example) -> int:
        """Tokens that an answer to this prompt may have."""
        return min(self.max_tokens, self.length - len(example.prompt))


def answer(llm: LLM, examples: Sequence[Example], how: Generation, file: Path, progress: Progress) -> list[Example]:
    """Return the examples with answers: given ones, those in ``file``, and the target's new ones, which are added to ``file`` in groups.

    A given answer is cut to what ``how.length`` leaves for it. Each prompt has a random seed of its own, so that its answer does not
    depend on what else is in its batch.
    """
    answers = _read_answers(file)
    missing = [example for example in examples if example.answer is None and example.asked not in answers]
    done = len(examples) - len(missing)
    progress(done, len(examples))
    with file.open("a", encoding="utf-8") as out:
        at_once = _BATCHES_A_WRITE * llm.max_batch
        for start in range(0, len(missing), at_once):
            group = missing[start : start + at_once]
            params = [
                SamplingParams(
                    temperature=example.temperature,
                    max_tokens=how.most_tokens(example),
                    seed=int(hashlib.sha256(f"{how.seed} {example.key}".encode()).hexdigest()[:16], 16),
                )
                for example in group
            ]
            for example, completion in zip(group, llm.generate([e.prompt for e in group], params), strict=True):
                answers[example.asked] = tuple(completion.token_ids)
                line = {"prompt_token_ids": example.prompt, "token_ids": completion.token_ids, "temperature": example.temperature}
                out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
            done += len(group)
            progress(done, len(examples))
    given = [answers[example.asked] if example.answer is None else example.answer for example in examples]
    return [dataclasses.replace(e, answer=tokens[: how.length - len(e.prompt)]) for e, tokens in zip(examples, given, strict=True)]


def _read_answers(file: Path) -> dict[Asked, tuple[int, ...]]:
    """The answers of an earlier start of this run. What a killed run left of a last line is cut off."""
    if not file.exists():
        return {}
    with reading_own(file):
        whole = file.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) < len(whole):
        with file.open("r+b") as out:
            out.truncate(len(complete))
    with reading_own(file):
        lines = [json.loads(line) for line in complete.splitlines()]
        return {(_key(line["prompt_token_ids"]), line["temperature"]): tuple(line["token_ids"]) for line in lines}
