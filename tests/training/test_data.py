"""Prompts, packing and the draft vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import l4jax
from l4jax import LLM, SamplingParams
from l4jax.text.chat import ChatFormat
from l4jax.text.hf_tokenizer import HfTokenizer
from l4jax.training.batches import batch, batches_in, draft_vocabulary, pack
from l4jax.training.data import Example, Generation, answer, check_readable, read_data
from tests import tiny
from tests.text import small as small_text
from tests.training import small


@pytest.fixture(scope="module")
def llm() -> LLM:
    return small.target()


def example(prompt: int, *answer: int) -> Example:
    return Example(f"{prompt:08x}", tuple(range(prompt)), answer)


def test_packed_rows_have_every_sequence_whole() -> None:
    rows = pack([example(3, 7, 8), example(2, 9), example(4, 5, 6), example(6, 1, 1)], 8, seed=0)
    assert rows.token_BT.tolist() == [
        [0, 1, 2, 3, 4, 5, 1, 1],
        [0, 1, 2, 3, 5, 6, 0, 0],
        [0, 1, 2, 7, 8, 0, 1, 9],
    ]
    assert rows.first_BT.tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 6, 7],
        [0, 0, 0, 0, 0, 5, 5, 5],
    ]
    assert rows.answer_BT.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 1],
    ]


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    rows = pack([example(3, token, token) for token in range(10, 15)], 6, seed=0)
    assert batches_in(rows, 2) == 3
    epochs = [[batch(rows, 2, step, seed=1).token_BT[:, 3] for step in range(start, start + 3)] for start in (0, 3)]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert [sorted(order) for order in orders] == [[0, 10, 11, 12, 13, 14]] * 2
    assert orders[0] != orders[1] and orders[0][-1] == 0  # the last batch is filled up


def test_the_draft_vocabulary_is_what_answers_have_most() -> None:
    examples = [example(3, 9, 9, 9, 4, 4, 7, 8), example(3, 2)]
    assert draft_vocabulary(examples, 3).tolist() == [2, 4, 9]
    with pytest.raises(ValueError, match=r"^the draft vocabulary is 6; expected at most 5, the different tokens of the answers; lower it$"):
        draft_vocabulary(examples, 6)


def test_prompts_are_read_once_each_and_held_out_by_their_own_digest(tmp_path: Path, llm: LLM) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = [[token, token] for token in range(20)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in [*prompts, *prompts]) + "\n")
    found = read_data(path, llm, 0.8)
    assert [list(e.prompt) for e in found.examples] == prompts and found.repeated == 20
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert 0 < sum(e.is_held_out(0.4) for e in found.examples) < 20


def test_every_given_answer_is_kept_and_the_same_question_at_another_temperature_is_another(tmp_path: Path, llm: LLM) -> None:
    given = [{"prompt_token_ids": [3, 3], "token_ids": answer} for answer in ([4], [5], [4])]
    asked: list[dict[str, Any]] = [{"prompt": [3, 3], "temperature": temperature} for temperature in (0.0, None, 0.5, 0.0, 5, None)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (*asked[:1], *given, *asked[1:])))
    found = read_data(path, llm, 5.0)
    key = found.examples[0].key
    answers: list[tuple[int, ...]] = [(4,), (5,), (4,)]
    assert found.examples == [
        Example(key, (3, 3), None, 0.0),
        *(Example(key, (3, 3), answer) for answer in answers),
        Example(key, (3, 3), None, 5.0),
        Example(key, (3, 3), None, 0.5),
    ]
    assert found.repeated == 3
    how = Generation(max_tokens=12, length=small.LENGTH, seed=0)
    file = tmp_path / "answers.jsonl"
    answered = answer(llm, found.examples, how, file, lambda done, total: None)
    assert [e.answer for e in answered[1:4]] == answers
    assert len({answered[i].answer for i in (0, 4, 5)}) == 3 and len(file.read_text().splitlines()) == 3
    assert answer(llm, found.examples, how, file, lambda done, total: None) == answered  # those in the file
    assert len(file.read_text().splitlines()) == 3


def test_data_that_cannot_be_read_is_named(tmp_path: Path, llm: LLM) -> None:
    for path, why in ((tmp_path / "missing.jsonl", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"^{path} cannot be read \({why}\); check its name and its permissions$"):
            read_data(path, llm, 0.8)
        with pytest.raises(ValueError, match=rf"^{path} cannot be read \({why}\); check its name and its permissions$"):
            check_readable(path)


def test_data_may_be_a_pipe(tmp_path: Path, llm: LLM) -> None:
    content = b'{"prompt": [1]}\n\n{"prompt": [2]}'
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[content])
    writer.start()
    check_readable(path)  # takes nothing from the pipe
    found = read_data(path, llm, 0.8)
    writer.join()
    assert [e.prompt for e in found.examples] == [(1,), (2,)] and found.digest == hashlib.sha256(content).hexdigest()


def test_a_line_s_temperature_goes_before_the_run_s(tmp_path: Path, llm: LLM) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = [[token, token] for token in range(4)]
    path.write_text("".join(json.dumps({"prompt": p, "temperature": [None, 0.0][i % 2]}) + "\n" for i, p in enumerate(prompts)))
    how = Generation(max_tokens=12, length=small.LENGTH, seed=0)
    answers = [e.answer for e in answer(llm, read_data(path, llm, 5.0).examples, how, tmp_path / "answers.jsonl", lambda done, total: None)]
    greedy = [tuple(c.token_ids) for c in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12))]
    assert [i % 2 == 1 for i in range(4)] == [one == other for one, other in zip(answers, greedy, strict=True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not valid JSON"),
        ("[" * 100_000, "line 2: it is not valid JSON"),
        ("[1]", "line 2: it is '[1]'; expected an object"),
        ("{}", "line 2: it has nothing; expected an object"),
        ('{"prompt": "x", "messages": []}', "line 2: it has prompt, messages; expected an object"),
        ('{"prompt": [1, 99]}', "line 2: it has token id 99; expected 0 to 23"),
        ('{"prompt": []}', "line 2: it has []; expected a list of token ids, at least one"),
        ('{"prompt_token_ids": [1]}', "line 2: it has null; expected a list of token ids"),
        ('{"prompt": "x"}', "line 2: its prompt is text, but the target has no tokenizer"),
        ('{"prompt": [2], "temperature": "x"}', "line 2: temperature is 'x'; expected 0 (greedy) or a positive number"),
        ('{"prompt": [2], "temperature": -1}', "line 2: temperature is -1; expected 0 (greedy) or a positive number"),
        ('{"messages": []}', "line 2: it has messages, but the target has no chat template"),
        ('{"prompt": [2], "tools": []}', "line 2: it has tools; expected tools, documents, chat_template_kwargs beside messages"),
        ('{"prompt_token_ids": [1], "token_ids": [2], "documents": []}', "line 2: it has documents; expected"),
        ('{"messages": [], "continue_final_message": true}', "line 2: it has continue_final_message; expected"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path, llm: LLM) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1]}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_data(path, llm, 0.8)
    assert "\n" not in str(caught.value)


def test_a_conversation_may_have_what_its_template_takes(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(small_text.backend(), {})
    template = (
        "{{ messages[0].content }}{% if tools %}T{{ tools[0].name }}{% endif %}"
        "{% if documents %}{{ documents[0].text }}{% endif %}{{ mood }}"
    )
    chat = ChatFormat(template, tokenizer, origin="test", variables={})
    config = small.config(vocab_size=tokenizer.vocab_size)
    llm = LLM(config, tiny.weights(config), tokenizer=tokenizer, chat_format=chat)
    messages = [{"role": "user", "content": "hi"}]
    lines: list[dict[str, Any]] = [
        {"messages": messages, "kind": "any"},
        {"messages": messages, "tools": [{"name": "f"}], "documents": None},
        {"messages": messages, "documents": [{"text": "d"}], "chat_template_kwargs": {"mood": "m"}},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [tokenizer.decode(e.prompt) for e in read_data(path, llm, 0.8).examples] == ["hi", "hiTf", "hidm"]
    for options, message in (
        ({"tools": [5]}, "tools is of type list; expected a list"),
        ({"chat_template_kwargs": {"x": 1}}, "does not use x"),
    ):
        path.write_text(json.dumps({"messages": messages, **options}))
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            read_data(path, llm, 0.8)


@pytest.mark.many_prompts
def test_a_chat_model_writes_prompts_itself(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "own_prompts.py"
    command = [sys.executable, str(script), str(smollm2_checkpoint), "8", "--batch", "8", "--dtype", "float32"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    said = [line["messages"][0]["content"] for line in lines]
    # Most turns end within 80 tokens; none has the chat format in it, or what is before the user's turn.
    assert 2 <= len(lines) <= 8 and len(set(said)) == len(said)
    assert all(len(line["messages"]) == 1 and line["messages"][0]["role"] == "user" for line in lines)
    assert all(text.strip() == text != "" and "<|im_" not in text and not text.startswith("user") for text in said)
    data = tmp_path / "prompts.jsonl"
    data.write_text(done.stdout, encoding="utf-8")
    assert len(read_data(data, l4jax.load(smollm2_checkpoint, dtype="float32"), 0.8).examples) == len(lines)
