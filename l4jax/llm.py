"""The Python interface of a loaded model: compute logits, generate, stream, chat."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Unpack

import jax
import numpy as np

from l4jax import arguments
from l4jax.answer import Answer
from l4jax.arguments import Prompt
from l4jax.batch import Batch
from l4jax.config import ModelConfig
from l4jax.decoding.generate import BURST
from l4jax.decoding.params import SamplingParams
from l4jax.decoding.plan import Speculation
from l4jax.decoding.speculate import BeyondTraining
from l4jax.interrupts import kept_interrupts
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import H100_RING
from l4jax.request import Completion, Message, Request, RequestMaker
from l4jax.runner import Runner, Speculator
from l4jax.speculator import LoadedDrafter, choose_speculation
from l4jax.text.chat import ChatFormat, ChatOptions
from l4jax.text.load import Text
from l4jax.text.tokenizer import Tokenizer
from sharding import hosts
from sharding.mesh import ONE_DEVICE, MeshSpec
from sharding.select import RingHardware


class Stream(Iterator[str]):
    """Text as it is generated: an iterator of strings, empty ones left out. ``completion`` is set once it has ended."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        # Short bursts first: the reader sees text soon, and throughput loses little.
        self._pieces = run.bursts(lambda burst: min(BURST, 4 << burst))
        self.completion: Completion | None = None

    def __next__(self) -> str:
        """The next piece. Raises RuntimeError if the generation failed earlier, or while another thread is using the LLM."""
        with self._run.llm._alone() as check_interrupts:
            for (text,) in self._pieces:
                check_interrupts()
                if text:
                    return text
            if not self._run.finished:
                raise RuntimeError("this stream failed before it had ended; start it again")
            self.completion = self._run.completions()[0]
        raise StopIteration


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an LLM is made of, checked, with everything decided: where its weights go, and how it speculates, if at all."""

    config: ModelConfig
    placement: Placement
    weights: Mapping[str, jax.Array]
    speculator: Speculator | None
    text: Text
    max_batch: int | None
    prefill_lengths: Sequence[int] | None
    ring_hardware: RingHardware


class LLM:
    """A loaded model, for one call at a time: a call that begins while another thread's runs raises RuntimeError."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, jax.Array],
        *,
        mesh: str | MeshSpec = ONE_DEVICE,
        drafter: LoadedDrafter | None = None,
        speculation: str = "auto",
        beyond_training: BeyondTraining = "window",
        tokenizer: Tokenizer | None = None,
        chat_format: ChatFormat | None = None,
        no_tokenizer: str = Text.no_tokenizer,
        no_chat: str = Text.no_chat,
        max_batch: int | None = None,
        prefill_lengths: Sequence[int] | None = None,
        ring_hardware: RingHardware = H100_RING,
    ) -> None:
        """``weights`` by the names of ``l4jax.model.weights.weight_specs``; the other arguments are those of :func:`l4jax.load`.

        ``no_tokenizer``, ``no_chat``: why there is none, for the errors of calls that need one.
        """
        arguments.check_kind("the configuration", config, ModelConfig, "an l4jax.ModelConfig")
        arguments.check_kind("the value of weights", weights, Mapping, "a mapping from names to arrays")
        arguments.check_kind("the drafter", drafter, LoadedDrafter | None, "an l4jax.speculator.LoadedDrafter, or load with drafter=PATH")
        arguments.check_kind("the tokenizer", tokenizer, Tokenizer | None, "an l4jax.text.tokenizer.Tokenizer")
        arguments.check_kind("the chat format", chat_format, ChatFormat | None, "an l4jax.text.chat.ChatFormat")
        arguments.check_kind("ring_hardware", ring_hardware, RingHardware, "a sharding.select.RingHardware")
        prefill_lengths = None if prefill_lengths is None else arguments.piece_lengths(prefill_lengths)
        max_batch = None if max_batch is None else arguments.batch_size(max_batch)
        placement = Placement.on(config, mesh)
        trained, own = (None, None) if drafter is None else (drafter.config, drafter.table)
        choice = choose_speculation(config, trained, own, speculation, beyond_training)
        speculator = None
        if choice is not None and drafter is not None:
            speculator = choice.speculator(DrafterPlacement(drafter.config, placement.mesh), drafter.weights)
        text = Text(tokenizer, chat_format, no_tokenizer, no_chat)
        self._begin(Parts(config, placement, weights, speculator, text, max_batch, prefill_lengths, ring_hardware))

    @classmethod
    def of(cls, parts: Parts) -> LLM:
        """Make an LLM of parts that are checked already, as :func:`l4jax.load` does."""
        llm = cls.__new__(cls)
        llm._begin(parts)
        return llm

    def _begin(self, parts: Parts) -> None:
        self.config = parts.config
        self.placement = parts.placement
        self.tokenizer = parts.text.tokenizer
        self.chat_format = parts.text.chat_format
        self.max_batch = 8 * parts.placement.spec.data if parts.max_batch is None else parts.max_batch
        self._in_use = threading.Lock()
        self.runner = Runner(
            parts.placement,
            parts.weights,
            speculator=parts.speculator,
            prefill_lengths=parts.prefill_lengths,
            ring_hardware=parts.ring_hardware,
        )
        asked_for = parts.speculator is not None and parts.speculator.asked_for
        self.requests = RequestMaker(parts.config, parts.text, drafts_up_to=self.runner.drafts_up_to if asked_for else math.inf)

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The weights by name, as they lie on the mesh."""
        return self.runner.weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each counted once; KV heads that a mesh repeats, as often as it does."""
        return self.runner.weight_bytes

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the configuration's, the tokenizer's and the chat template's."""
        return self.requests.stop_token_ids

    def logits(self, prompts: Prompt | Sequence[Prompt]) -> list[np.ndarray]:
        """Next-token logits at every position of each prompt: float32 [T, vocab_size] each."""
        with self._alone() as check_interrupts:
            encoded = [self.requests.encode(p) for p in arguments.several(prompts)]
            _check_agreed(encoded)
            logits_of_each = []
            for group in _groups(encoded, self.max_batch):
                logits_of_each += self.runner.logits(group)
                check_interrupts()
            return logits_of_each

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue each prompt (text or token ids). One ``params`` serves all prompts, or there is one for each."""
        each = arguments.several(prompts)
        params_of_each = arguments.sampling_params_of_each(params, len(each))
        with self._alone() as check_interrupts:
            make = self.requests
            requests = _agreed([make.request(make.encode(prompt), p) for prompt, p in zip(each, params_of_each, strict=True)])
            completions = []
            for group in _groups(requests, self.max_batch):
                run = _Run(self, group)
                for _ in run.bursts(lambda _: BURST):
                    check_interrupts()
                completions += run.completions()
            return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt, giving out text as it comes."""
        return self._stream(self.requests.encode(prompt), arguments.one_sampling_params(params))

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation: a list of ``{"role": ..., "content": ...}``, put in the model's chat format with :class:`ChatOptions`."""
        return self.generate([self.requests.encode_chat(messages, options)], arguments.one_sampling_params(params))[0]

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatOptions]) -> Stream:
        """Answer a conversation as :meth:`chat` does, returning text as it comes."""
        return self._stream(self.requests.encode_chat(messages, options), arguments.one_sampling_params(params))

    def warmup(self, *, max_length: int, max_batch: int | None = None) -> None:
        """Compile everything that requests of up to ``max_length`` tokens (prompt and output) and this batch size need.

        Covers greedy and sampled requests; penalties, biases and logprobs compile on first use. Where tokens are spread over
        ranks it prefills prompts of up to ``max_length`` tokens, for programs depend on how much is cached.
        """
        max_batch = arguments.batch_size(self.max_batch if max_batch is None else max_batch)
        context = self.config.max_position_embeddings
        max_length = arguments.whole("max_length", max_length, f"2 (a prompt and a token) to {context}, the model's context", 2, context)
        with self._alone() as check_interrupts:
            self._warmup(max_length, max_batch, check_interrupts)

    def _warmup(self, max_length: int, max_batch: int, check_interrupts: Callable[[], None]) -> None:
        self.runner.reserve(max_batch, max_length)
        sizes_of: dict[Speculation | None, set[int]] = {}
        for rows in range(1, max_batch + 1):
            plans = {self.runner.speculation(rows, length) for length in (1, max_length - 1)}
            # A row that grows longer than its drafter drafts for is decoded to its end without it.
            for plan in plans | ({None} if self.runner.drafts_up_to < max_length else set()):
                sizes_of.setdefault(plan, set()).add(self.runner.row_bucket(rows))

        def run(prompt: list[int], tokens: int, rows: int, plan: Speculation | None) -> None:
            for temperature in (0.0, 1.0):
                params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=0, ignore_eos=True)
                Batch(self.runner, [Request(prompt, params, 0, ())] * min(rows, max_batch), plan=plan).run_to_end()
                check_interrupts()

        for plan, sizes in sizes_of.items():
            # Pieces of prompts have the rows of any smaller batch; and whether they are drafted for, but not how, decides on a program.
            for rows in sorted({self.runner.row_bucket(n) for n in range(1, max(sizes) + 1)}):
                for length in self.runner.warmup_lengths(int(min(max_length - 1, self.runner.drafts_up_to if plan else math.inf))):
                    run([0] * length, 1, rows, plan)
            for rows in sorted(sizes):
                run([0], 2, rows, plan)

    @contextmanager
    def _alone(self) -> Iterator[Callable[[], None]]:
        """While the context lasts the caller has the model to itself, and no Ctrl-C is lost (:func:`l4jax.interrupts.kept_interrupts`).

        Raises RuntimeError, at once, if another call has the model.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "this LLM is in use by another thread's call; it takes one call at a time: make the calls one after the other, or hold a "
                "lock of your own around each call and each step of a stream"
            )
        try:
            with kept_interrupts() as check_interrupts:
                yield check_interrupts
                check_interrupts()
        finally:
            self._in_use.release()

    def _stream(self, token_ids: list[int], params: SamplingParams) -> Stream:
        self.requests.check_streams()
        with self._alone():
            return Stream(_Run(self, _agreed([self.requests.request(token_ids, params)])))


class _Run:
    """One batch from prompts to completions."""

    def __init__(self, llm: LLM, requests: Sequence[Request]) -> None:
        self.llm = llm
        self._requests = requests
        self._answers = [Answer(llm.tokenizer, r) for r in requests]
        self.finished = False

    def bursts(self, steps: Callable[[int], int]) -> Iterator[list[str]]:
        """Run to the end; after each burst, the new text of every row. ``steps(i)``: tokens in the i-th burst at most."""
        started = time.perf_counter()
        batch = Batch(self.llm.runner, self._requests)
        burst = 0
        while True:
            new = batch.step(steps(burst - 1) if burst else 1)
            elapsed = time.perf_counter() - started
            for answer, rounds in zip(self._answers, batch.rounds, strict=True):
                answer.rounds = rounds
            yield [answer.extend(tokens, batch.done[i], elapsed) for i, (answer, tokens) in enumerate(zip(self._answers, new, strict=True))]
            for i, answer in enumerate(self._answers):
                if answer.stopped and not batch.done[i]:
                    batch.finish(i)
            if all(batch.done):
                self.finished = True
                return
            burst += 1

    def completions(self) -> list[Completion]:
        return [answer.completion() for answer in self._answers]


def _check_agreed(prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] = ()) -> None:
    """Raise ValueError unless every process is asked for the same: they compute one thing together."""
    if hosts.process_count() > 1:
        asked = {"what is asked for": hashlib.sha256(repr((prompts, params)).encode()).hexdigest()}
        hosts.check_same(asked, "call every process with the same prompts and sampling params")


def _agreed(requests: Sequence[Request]) -> Sequence[Request]:
    """The requests with the seeds that process 0 has drawn."""
    _check_agreed([r.token_ids for r in requests], [r.params for r in requests])
    seeds: list[int] = json.loads(hosts.share(json.dumps([r.seed for r in requests]))[0])
    return [dataclasses.replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]


def _groups[Item](items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))
