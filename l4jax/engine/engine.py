"""The engine: takes requests, drives the scheduler and the devices, and hands each request its tokens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from l4jax.answer import NO_ROUNDS
from l4jax.cache import CacheShape
from l4jax.engine.clock import BurstClock
from l4jax.engine.commands import Command, Commands
from l4jax.engine.guided import GuideError, next_masks
from l4jax.engine.handle import Handle
from l4jax.engine.memory import CacheMemory
from l4jax.engine.meter import EngineState, Meter
from l4jax.engine.options import Options
from l4jax.engine.results import Dispatched, RowOutput
from l4jax.engine.runner import Runner
from l4jax.engine.scheduler import Scheduler
from l4jax.engine.sequence import State
from l4jax.engine.step import Step
from l4jax.engine.warmup import early_loads, preparations
from l4jax.request import Request
from l4jax.text.tokenizer import Tokenizer

NOT_FINITE_ADVICE = (
    "the model's logits are not finite; expected numbers, not NaN or infinity: its values overflow (float16 does first: load with "
    'dtype="float32" or "bfloat16"), or its weights are damaged (`l4jax show --verify` checks them)'
)
Planned = tuple[Step, dict[int, Request]]
"""A step to dispatch, and the requests that it names."""


class Engine:
    """All requests of a model share it. Any thread may ``add`` one, and cancel it by its handle; one thread at a time runs ``step``."""

    def __init__(self, runner: Runner, memory: CacheMemory, shape: CacheShape, options: Options, tokenizer: Tokenizer | None) -> None:
        self.runner, self.options, self.shape = runner, options, shape
        self._memory = memory
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(options)
        self._in_flight: deque[tuple[Dispatched, float]] = deque()
        self._held: Planned | None = None  # planned, but to be dispatched in the next iteration
        self._handles: dict[int, Handle] = {}
        self._calls: deque[int] = deque()  # numbers of requests to add, negated of those to cancel
        self._commands = Commands()
        self._numbers = 0
        self._started = False
        self._clock = BurstClock(runner.platform, options.short_steps)
        self._meter = Meter()
        self._turn = threading.Condition()
        self._driver: int | None = None
        self._queue: list[object] = []  # of threads that wait for a turn of their own
        self._only_driver: threading.Thread | None = None  # on several hosts

    def check(self, request: Request, kind: type[Handle]) -> None:
        """Raise ValueError if the cache could never hold the request."""
        length = len(request.token_ids)
        self.options.check_fits(length, length + kind._most_new(request))

    def add[H: Handle](self, request: Request, kind: type[H]) -> H:
        """Take a request; what it is for, the kind of handle says. See :meth:`check`."""
        self.check(request, kind)
        with self._turn:
            self._numbers += 1
            handle = kind(self._numbers, request, self._tokenizer, lambda number: self._call(-number))
            self._handles[handle._number] = handle
            self._call(handle._number)
            self._turn.notify_all()
        return handle

    def _call(self, number: int) -> None:
        if self._commands.decides:
            self._calls.append(number)

    def run_until(self, over: Callable[[], bool], check: Callable[[], None]) -> None:
        """Drive the engine until ``over()``, calling ``check`` after each step. Waits while another thread drives the engine."""
        while not over():
            advanced = self._take_turn(self._advance, unless=over)
            assert advanced is not False or over(), "a request is lost"
            check()

    def step(self) -> bool:
        """Drive the engine for one step; False, at once, if there is nothing to do."""
        return bool(self._take_turn(self._advance))

    @property
    def kv_tokens(self) -> int:
        """The tokens that one data rank's cache holds: the most that one sequence can have there."""
        return self.shape.full_pages * self.options.shape.block

    @property
    def state(self) -> EngineState:
        """What is under way, and counts since the engine was made. To be read by the thread that drives it."""
        return self._meter.state(self._scheduler)

    def warm_up(self, longest: int) -> Iterator[tuple[int, int]]:
        """Compile, or load, every program that requests of up to ``longest`` tokens can need; yields (ready, all) after each."""
        self._take_turn(self._start)
        # Shapes and not the cache itself, because a step that fails in another thread may drop the cache.
        every = self.runner, self.options, self._memory.abstract(self.shape), longest
        calls = preparations(*every)
        pool = ThreadPoolExecutor()
        try:
            for load in early_loads(*every, pool):
                self._take_turn(load)
            for done, call in enumerate(calls, start=1):
                self._take_turn(call)
                yield done, len(calls)
        finally:
            pool.shutdown(cancel_futures=True)

    def discard(self) -> None:
        """Free the cache and forget all prefixes, unless a request is under way. The next request allocates the cache again."""

        def discard() -> None:
            self._commands.settle(self._take_in(), [], self._scheduler)
            if not self._handles:
                self._restart()

        self._take_turn(discard)

    def _take_turn[Result](self, act: Callable[[], Result], unless: Callable[[], bool] | None = None) -> Result | None:
        """Wait until no other thread has the turn, then ``act``; if ``unless()`` holds by then, do nothing and return None.

        Threads that need a turn of their own, for they have no ``unless``, get it before those that another thread can serve, in the order
        in which they came. Raises RuntimeError on several hosts if another thread, which still runs, has had a turn.
        """
        me, place, mine = threading.get_ident(), object(), False
        needless = unless or (lambda: False)

        def free() -> bool:
            return self._driver in (None, me) and (not self._queue if unless else self._queue[0] is place)

        try:
            with self._turn:
                self._check_driver()
                try:
                    if unless is None:
                        self._queue.append(place)
                    # If Ctrl-C has kept this thread from giving its last turn back, it still has the turn.
                    self._turn.wait_for(lambda: needless() or free())
                finally:
                    if place in self._queue:
                        self._queue.remove(place)
                        self._turn.notify_all()
                if needless():
                    return None
                mine, self._driver = True, me
            return act()
        finally:
            if mine:
                self._driver = None  # at once: while this thread waits to tell the others, a second Ctrl-C may come
                with self._turn:
                    self._turn.notify_all()

    def _check_driver(self) -> None:
        """On several hosts let one thread drive. With two, a command could reach the thread that waits for another one's requests."""
        if not self._commands.several:
            return
        if self._only_driver is None or not self._only_driver.is_alive():
            self._only_driver = threading.current_thread()
        if self._only_driver is not threading.current_thread():
            raise RuntimeError(
                f'on several hosts one thread computes, and "{self._only_driver.name}" has before; generate, step, warm up and read '
                "streams there (this thread may add requests if no other one does)"
            )

    def _start(self) -> None:
        """Allocate the cache, if there is none."""
        if not self._started:
            self.runner.start(self._memory, self.shape)
            self._started = True

    def _fail(self, error: BaseException) -> None:
        """End all requests: a program may have been given the state on the devices (donated), and have returned nothing."""
        why = f"failed: {type(error).__name__}: {error}" if isinstance(error, Exception) else "was interrupted"
        with self._turn:
            for handle in self._handles.values():
                handle.error = RuntimeError(f"a step that this request shared with others {why}; make the request again")
                handle.error.__cause__ = error
                handle.over = True
            self._handles.clear()
            self._calls.clear()
        self._restart()

    def _restart(self) -> None:
        self._started = False
        self._meter.restart(self._scheduler)
        self._scheduler = Scheduler(self.options)
        self._in_flight.clear()
        self._held = None
        self.runner.stop()  # last, because it takes longest, and another Ctrl-C may come

    def _advance(self) -> bool:
        """One iteration. If it raises, every request under way ends with an error, and the next one begins with an empty cache."""
        try:
            return self._iterate()
        except BaseException as error:
            self._fail(error)
            raise

    def _iterate(self) -> bool:
        self._meter.begin(finished=bool(self._in_flight) and self._in_flight[-1][0].is_ready)
        command = self._take_in()
        planned = self._plan(command)
        self._commands.settle(command, [step for step, _ in planned], self._scheduler)
        if not planned and not self._in_flight:
            assert self._scheduler.idle, "requests wait, and there is nothing to do for any of them"
            self._meter.end(idle=True, finished=True)
            return False
        self._start()
        for each in planned:
            self._in_flight.append((self.runner.dispatch(*each, next_masks(each[0], self._handles)), time.perf_counter()))
            self._note_dispatch(each[0])
        dispatched, dispatched_at = self._in_flight.popleft()
        waited = not dispatched.is_ready
        reading = time.perf_counter()
        results, outputs = dispatched.read()
        self._meter.read(time.perf_counter() - reading)
        self._clock.measure(results, outputs, dispatched_at, waited=waited)
        for row in dispatched.step.pieces:
            if row is not None and row.first and row.request in self._handles:
                self._handles[row.request]._restart()
        for news in self._scheduler.finish(dispatched.step, results):
            handle = self._handles[news.sequence.request]
            self._deliver(handle, news.tokens, outputs.get(news.sequence.request, RowOutput()))
        self._meter.end(idle=self._scheduler.idle, finished=not self._in_flight or self._in_flight[-1][0].is_ready)
        return True

    def _note_dispatch(self, step: Step) -> None:
        self._meter.dispatched(step.burst)
        for row in step.pieces:
            # A step may have been planned before its request was cancelled.
            if row is not None and row.first and (handle := self._handles.get(row.request)) is not None:
                if handle._sequence.scope is not None:
                    self._meter.prefilled(handle._sequence.target, row.start)
                handle._begin()

    def _take_in(self) -> Command:
        """Take in the calls since the last iteration."""
        command = self._commands.begin(self._calls, self._clock.most_steps)
        for number in command.calls:
            if number > 0:
                self._commands.await_request(number, self._handles, self._turn)
                self._scheduler.add(self._handles[number]._sequence)
            elif (handle := self._handles.get(-number)) is not None:
                self._scheduler.cancel(handle._sequence)
                self._end(handle, RuntimeError(handle._cancelled))
        return command

    def _plan(self, command: Command) -> list[Planned]:
        """The steps to dispatch now."""
        found: list[Planned] = []
        while (planned := self._held or self._next(command.most_steps)) is not None:
            # Results in flight are read before a program is compiled: an answer's first token may be among them.
            is_new = bool(self._in_flight or found) and not self.runner.is_ready_for(planned[0])
            holds = is_new if command.dispatched is None else len(found) == command.dispatched
            self._held = planned if holds else None
            if holds:
                break
            found.append(planned)
        return found

    def _next(self, most_steps: int) -> Planned | None:
        step = self._scheduler.next(most_steps)
        return None if step is None else (step, {number: self._handles[number].request for number in _named(step)})

    def _end(self, handle: Handle, error: Exception | None = None) -> None:
        handle.error, handle.over = error, True
        del self._handles[handle._number]

    def _deliver(self, handle: Handle, tokens: tuple[int, ...], output: RowOutput) -> None:
        sequence = handle._sequence
        if output.rounds is not NO_ROUNDS and handle._matcher is None:  # with a guide nothing is drafted
            self._meter.speculated(output.rounds)
        if sequence.state is State.FAILED:
            self._end(handle, ValueError(NOT_FINITE_ADVICE))
            return
        if handle._take(tokens, output):
            self._scheduler.cancel(sequence)
        if handle._matcher is not None and not sequence.state.is_over:
            handle._matcher.take(tokens)
            if not handle._matcher.allowed().any():
                self._scheduler.cancel(sequence)
                self._end(handle, GuideError())
                return
        if sequence.state.is_over:
            handle._complete()
            self._end(handle)


def _named(step: Step) -> set[int]:
    return {row.request for row in (*step.pieces, *step.rows) if row is not None}
