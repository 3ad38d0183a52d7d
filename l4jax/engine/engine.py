"""The engine: takes requests, drives the scheduler and the devices, and hands each request its tokens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from l4jax.answer import NO_ROUNDS, Answer, NewTokens
from l4jax.cache import CacheShape
from l4jax.engine.memory import CacheMemory
from l4jax.engine.options import Options
from l4jax.engine.results import Dispatched, RowOutput
from l4jax.engine.runner import Runner
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import Sequence, State
from l4jax.engine.step import Step
from l4jax.engine.warmup import warm_up
from l4jax.request import Completion, Request
from l4jax.text.tokenizer import Tokenizer
from sharding import hosts

NOT_FINITE_ADVICE = (
    "the model's logits are not finite; expected numbers, not NaN or infinity: its values overflow (float16 does first: load with "
    'dtype="float32" or "bfloat16"), or its weights are damaged (`l4jax show --verify` checks them)'
)
BURST_SECONDS = 0.05
"""The longest that a burst takes, as far as the last one tells."""
CPU_BURST_SECONDS = 0.1
"""The same on CPUs, where preparing a burst takes the cores that compute: 2 ms of two cores for SmolLM2, so shorter ones cost over 3 %."""
_MANY = 1 << 30


class Handle:
    """A request on its way. It goes on whenever anyone drives the engine.

    ``tokens``: those that it has so far. ``over``: it has ended. ``completion``: set at its end. ``error``: why it ended without one.
    """

    def __init__(self, engine: Engine, number: int, request: Request, tokenizer: Tokenizer | None, *, scores: bool) -> None:
        self.request = request
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self.over = False
        self._engine = engine
        self._number = number
        self._answer = Answer(tokenizer, request)
        self._added = time.perf_counter()
        self._text: deque[str] = deque()
        self._logits: list[np.ndarray] = []
        length = len(request.token_ids)
        most = 1 if scores else request.params.max_tokens
        scope = None if scores else b""
        self._sequence = Sequence(number, list(request.token_ids), length + most, scope=scope, scores=scores)

    @property
    def tokens(self) -> list[int]:
        """The answer's tokens so far."""
        return list(self._answer.token_ids)

    @property
    def logits(self) -> np.ndarray:
        """Of a request for scores that is over: float32 [T, vocabulary]."""
        return np.concatenate(self._logits)

    def cancel(self) -> None:
        """End it, unless it has ended: within two bursts nothing more is computed for it. May be called from any thread."""
        if not self.over:
            self._engine.cancel(self)

    def new_text(self) -> str:
        """The text that came since the last call."""
        return "".join(self._text.popleft() for _ in range(len(self._text)))


class Engine:
    """All requests of a model share it. ``add`` and ``cancel`` may be called from any thread; one thread at a time runs ``step``."""

    def __init__(self, runner: Runner, memory: CacheMemory, shape: CacheShape, options: Options, tokenizer: Tokenizer | None) -> None:
        self.runner, self.options, self.shape = runner, options, shape
        self._memory = memory
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(options)
        self._in_flight: deque[tuple[Dispatched, float]] = deque()
        self._handles: dict[int, Handle] = {}
        self._added: deque[Handle] = deque()
        self._cancelled: deque[Handle] = deque()
        self._numbers = 0
        self._started = False
        self._burst_seconds = CPU_BURST_SECONDS if runner.platform == "cpu" else BURST_SECONDS
        self._round_seconds = 0.0
        self._last_read = 0.0
        self._turn = threading.Condition()
        self._driving = False

    def add(self, request: Request, *, scores: bool = False) -> Handle:
        """Take a request; with ``scores`` its prompt's logits are computed, and nothing is generated.

        Raises ValueError if the cache could never hold it.
        """
        with self._turn:
            self._numbers += 1
            handle = Handle(self, self._numbers, request, self._tokenizer, scores=scores)
        sequence = handle._sequence
        self.options.check_fits(sequence.request, len(sequence.tokens), sequence.max_length)
        self._added.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request; see :meth:`Handle.cancel`."""
        self._cancelled.append(handle)

    def run_until(self, over: Callable[[], bool], check: Callable[[], None]) -> None:
        """Drive the engine until ``over()``, calling ``check`` after each step; while another thread drives it, wait for that one."""
        while not over():
            self._take_turn(lambda: self._or_fail(self._advance), unless=over)
            check()

    def step(self) -> bool:
        """Drive the engine for one step; False, at once, if there is nothing to do."""
        return bool(self._take_turn(lambda: self._or_fail(self._advance)))

    @property
    def kv_tokens(self) -> int:
        """The most tokens of one sequence that the cache holds: those of a data rank."""
        return self.shape.full_pages * self.options.shape.block

    def warm_up(self, longest: int, check: Callable[[], None]) -> None:
        """Compile, or load, every program that requests of up to ``longest`` tokens can need; requests under way wait meanwhile."""

        def run() -> None:
            self._start()
            warm_up(self.runner, self.options, longest, check)

        self._take_turn(lambda: self._or_fail(run))

    def discard(self) -> None:
        """Free the cache, unless a request is under way; the next one allocates it again, and no prefix is known then."""

        def discard() -> None:
            if not self._handles and not self._added:
                self._restart()

        self._take_turn(discard)

    def _take_turn[Result](self, act: Callable[[], Result], unless: Callable[[], bool] = lambda: False) -> Result | None:
        """Do something that one thread at a time may do, ``unless`` another thread's turn makes it unnecessary."""
        mine = False
        try:
            with self._turn:
                self._turn.wait_for(lambda: unless() or not self._driving)
                if unless():
                    return None
                mine = self._driving = True
            return act()
        finally:
            if mine:
                with self._turn:
                    self._driving = False
                    self._turn.notify_all()

    def _start(self) -> None:
        """Allocate the cache, if there is none."""
        if not self._started:
            self.runner.start(self._memory, self.shape)
            self._started = True

    def _or_fail[Result](self, act: Callable[[], Result]) -> Result:
        """Do something on the devices. If it raises, every request under way ends with that error, and the cache begins anew."""
        try:
            return act()
        except BaseException as error:
            # Programs may have been given what stays on the devices, and have returned nothing.
            reason = error if isinstance(error, Exception) else RuntimeError("the engine was interrupted; make the request again")
            for handle in (*self._handles.values(), *self._added):
                handle.error, handle.over = reason, True
            self._handles.clear()
            self._added.clear()
            self._restart()
            raise

    def _restart(self) -> None:
        self.runner.stop()
        self._started = False
        self._scheduler = Scheduler(self.options)
        self._in_flight.clear()
        self._cancelled.clear()

    def _advance(self) -> bool:
        self._take_in()
        if self._scheduler.idle and not self._in_flight:
            return False
        self._start()
        while (step := self._scheduler.next(self._most_steps())) is not None:
            requests = {number: self._handles[number].request for number in _named(step)}
            self._in_flight.append((self.runner.dispatch(step, requests), time.perf_counter()))
        assert self._in_flight, "requests wait, and there is nothing to do for any of them"
        dispatched, sent = self._in_flight.popleft()
        results, outputs = dispatched.read()
        self._measure(dispatched.step, sent)
        for row in dispatched.step.pieces:
            if row is not None and row.first and row.request in self._handles:
                self._handles[row.request]._logits.clear()
        for news in self._scheduler.finish(dispatched.step, results):
            handle = self._handles[news.sequence.request]
            self._deliver(handle, news.tokens, outputs.get(news.sequence.request, RowOutput()))
        return True

    def _take_in(self) -> None:
        while self._added:
            handle = self._added.popleft()
            self._handles[handle._number] = handle
            self._scheduler.add(handle._sequence)
        while self._cancelled:
            handle = self._cancelled.popleft()
            if not handle.over:
                self._scheduler.cancel(handle._sequence)
                del self._handles[handle._number]
                handle.error, handle.over = RuntimeError("this request was cancelled"), True

    def _deliver(self, handle: Handle, tokens: tuple[int, ...], output: RowOutput) -> None:
        sequence, answer = handle._sequence, handle._answer
        if sequence.state is State.FAILED:
            handle.error = ValueError(NOT_FINITE_ADVICE)
        elif sequence.scores:
            assert output.logits_TV is not None
            handle._logits.append(output.logits_TV)
        elif tokens:
            if output.rounds is not NO_ROUNDS:
                answer.rounds = answer.rounds.and_then(output.rounds)
            done = sequence.state.is_over
            handle._text.append(answer.extend(NewTokens(list(tokens), output.logprobs), done, time.perf_counter() - handle._added))
            if answer.stopped and not done:
                self._scheduler.cancel(sequence)
        if sequence.state.is_over:
            if handle.error is None and not sequence.scores:
                handle.completion = answer.completion()
            handle.over = True
            del self._handles[handle._number]

    def _most_steps(self) -> int:
        """The rounds of a burst that is not too long; on several hosts, whose clocks differ, any number."""
        if hosts.process_count() > 1 or self._round_seconds == 0.0:
            return _MANY
        return max(1, int(self._burst_seconds / self._round_seconds))

    def _measure(self, step: Step, sent: float) -> None:
        """Take down how long a round of the burst took: the devices began it after the step before it, or when it was dispatched."""
        now = time.perf_counter()
        if step.burst is not None and step.prefill is None:
            self._round_seconds = (now - max(sent, self._last_read)) / step.burst.steps
        self._last_read = now


def _named(step: Step) -> set[int]:
    return {row.request for row in (*step.pieces, *step.rows) if row is not None}
