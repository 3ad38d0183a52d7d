"""Threads take turns to drive the engine, and what fails in one's turn harms nobody whom it need not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from l4jax import LLM, SamplingParams
from l4jax.engine import engine as module
from tests.tiny import few_tokens, llama3_like, weights

CONFIG = few_tokens(llama3_like)
PARAMS = SamplingParams(max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(CONFIG, weights(CONFIG), max_batch=2, prefill_lengths=(32,))


def in_another_thread[T](call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1, thread_name_prefix="another") as pool:
        return pool.submit(call).result(60)


def test_a_step_does_not_wait_for_another_threads_whole_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, order = llm.engine, list[str]()
    iterate, begun = engine._iterate, threading.Event()

    def noted() -> bool:
        order.append(threading.current_thread().name)
        if len(order) == 3:  # the other thread has its turn, and keeps it until this one waits for its own
            begun.set()
            deadline = time.monotonic() + 60
            while not engine._queue and time.monotonic() < deadline:
                time.sleep(0.001)
        return iterate()

    monkeypatch.setattr(engine, "_iterate", noted)
    with ThreadPoolExecutor(1, thread_name_prefix="another") as pool:
        answer = pool.submit(llm.generate, [[1, 2]], PARAMS)
        assert begun.wait(60)
        llm.step()
        assert order[2:4] == ["another_0", threading.current_thread().name]
        assert len(answer.result(60)[0].token_ids) == 100
    assert order.count("another_0") > 4 and not engine._queue


def test_a_failed_warm_up_harms_no_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[1, 2]], PARAMS)[0]
    handle = llm.add([1, 2], PARAMS)
    llm.step()

    def fail() -> None:
        raise MemoryError("no room for a program")

    monkeypatch.setattr(module, "preparations", lambda *_: [fail])
    with pytest.raises(MemoryError, match="no room for a program"):
        llm.warmup()
    while llm.step():
        pass
    assert handle.completion is not None and handle.completion.token_ids == expected.token_ids


def test_on_several_hosts_one_thread_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(CONFIG, weights(CONFIG), max_batch=2, prefill_lengths=(32,))
    monkeypatch.setattr(llm.engine._commands, "several", True)
    handle = in_another_thread(lambda: llm.add([1, 2], PARAMS))
    assert llm.step()
    for call in (lambda: llm.generate([[1]], PARAMS), llm.step, llm.warmup, lambda: llm.logits([[1]])):
        with pytest.raises(RuntimeError) as refused:
            in_another_thread(call)
        assert "\n" not in str(refused.value) and "thread" in str(refused.value)
    while llm.step():
        pass
    assert handle.completion is not None and len(handle.completion.token_ids) == 100
