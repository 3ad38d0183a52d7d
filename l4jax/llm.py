"""The Python interface of a loaded model: compute logits, generate, stream, chat."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

import jax
import numpy as np

from l4jax import arguments
from l4jax.arguments import Prompt
from l4jax.bar import bar_if
from l4jax.calls import agreed, run
from l4jax.compiled import ProgramInfo
from l4jax.config import ModelConfig
from l4jax.decoding.params import MAX_LOGPROBS, SamplingParams
from l4jax.decoding.speculate import BeyondTraining
from l4jax.engine.build import Parts, Settings, build_engine
from l4jax.engine.handle import Handle
from l4jax.engine.scores import ScoresHandle
from l4jax.interrupts import kept_interrupts
from l4jax.parallel.placement import DrafterPlacement, Placement
from l4jax.parallel.spread import H100_RING
from l4jax.request import Completion, Message, Request, RequestMaker, TokenLogprob
from l4jax.speculator import LoadedDrafter, choose_speculation
from l4jax.stream import Stream
from l4jax.text.chat import ChatFormat, ChatOptions
from l4jax.text.load import Text
from l4jax.text.tokenizer import Tokenizer
from sharding.mesh import ONE_DEVICE, MeshSpec
from sharding.select import RingHardware


class LLM:
    """A loaded model. Its methods may be called from any thread, also at the same time: each call serves all requests under way."""

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
        kv_tokens: int | None = None,
        prefill_lengths: Sequence[int] | None = None,
        deterministic: bool = False,
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
        settings = Settings.checked(max_batch, kv_tokens, prefill_lengths, deterministic, ring_hardware)
        placement = Placement.on(config, mesh)
        trained, own = (None, None) if drafter is None else (drafter.config, drafter.table)
        choice = choose_speculation(config, trained, own, speculation, beyond_training)
        speculator = None
        if choice is not None and drafter is not None:
            speculator = choice.speculator(DrafterPlacement(drafter.config, placement.mesh), drafter.weights)
        text = Text(tokenizer, chat_format, no_tokenizer, no_chat)
        self._begin(Parts(config, placement, weights, speculator, text, settings))

    @classmethod
    def of(cls, parts: Parts) -> LLM:
        """Make an LLM of checked parts, as :func:`l4jax.load` does."""
        llm = cls.__new__(cls)
        llm._begin(parts)
        return llm

    def _begin(self, parts: Parts) -> None:
        self.config = parts.config
        self.placement = parts.placement
        self.tokenizer = parts.text.tokenizer
        self.chat_format = parts.text.chat_format
        self.engine = build_engine(parts)
        self.max_batch = self.engine.options.slots * parts.placement.spec.data
        asked_for = parts.speculator is not None and parts.speculator.asked_for
        self.requests = RequestMaker(parts.config, parts.text, drafts_up_to=self.engine.options.drafts_up_to if asked_for else math.inf)
        self._stepping_lock = threading.Lock()
        self._stepping_thread: threading.Thread | None = None

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The weights by name, as they lie on the mesh."""
        return self.engine.runner.weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights over all devices: replicas count once, but KV heads as often as the mesh repeats them."""
        return sum(leaf.nbytes for leaf in self.engine.runner.all_weights)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the configuration's, the tokenizer's and the chat template's."""
        return self.requests.stop_token_ids

    def logits(self, prompts: Prompt | Sequence[Prompt], *, progress: bool = False) -> list[np.ndarray]:
        """Next-token logits at every position of each prompt: float32 [T, vocab_size] each. ``progress``: show a bar on stderr."""
        return [handle.logits for handle in self._scored(prompts, None, progress=progress)]

    def score(self, prompts: Prompt | Sequence[Prompt], *, top: int = 0, progress: bool = False) -> list[list[TokenLogprob]]:
        """Log-probabilities of each prompt's tokens after the first, each with those of the ``top`` likeliest tokens there (at most 20).

        ``progress``: show a bar on stderr.
        """
        top = arguments.whole("top", top, f"a whole number from 0 to {MAX_LOGPROBS}", 0, MAX_LOGPROBS)
        return [handle.logprobs for handle in self._scored(prompts, top, progress=progress)]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue each prompt (text or token ids). One ``params`` serves all prompts, or there is one for each.

        ``progress``: show a bar on stderr.
        """
        each = arguments.several(prompts)
        params_of_each = arguments.sampling_params_of_each(params, len(each))
        requests = agreed(arguments.of_each_prompt(self._request, each, params_of_each))
        completions = [handle.completion for handle in run(self.engine, requests, Handle, progress=progress)]
        return [completion for completion in completions if completion is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt, returning text as it comes."""
        return self._stream(self.requests.encode(prompt), params)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation: a list of ``{"role": ..., "content": ...}``, put in the model's chat format with :class:`ChatOptions`."""
        return self.generate([self.requests.encode_chat(messages, options)], arguments.one_sampling_params(params))[0]

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatOptions]) -> Stream:
        """Answer a conversation as :meth:`chat` does, returning text as it comes."""
        return self._stream(self.requests.encode_chat(messages, options), params)

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Handle:
        """Add a prompt to those under way. It is computed while :meth:`step`, or any other call, runs."""
        return self.engine.add(agreed([self._request(prompt, arguments.one_sampling_params(params))])[0], Handle)

    def step(self) -> bool:
        """Run one step for all requests under way; False, at once, if there are none.

        It belongs to the first thread that calls it, for as long as that thread lives; in another it raises RuntimeError.
        """
        me = threading.current_thread()
        with self._stepping_lock:
            if self._stepping_thread is None or not self._stepping_thread.is_alive():
                self._stepping_thread = me
        if self._stepping_thread is not me:
            raise RuntimeError("llm.step() was called from another thread before; call it from that one, or use generate, stream or add")
        with kept_interrupts() as check_interrupts:
            stepped = self.engine.step()
            check_interrupts()
        return stepped

    def warmup(self, *, max_length: int | None = None, progress: bool = False) -> None:
        """Compile, or load, every program that requests of up to ``max_length`` tokens (prompt and output) can need.

        ``max_length`` (default: what the context and the cache hold) matters only on meshes whose ranks share a sequence's tokens, where
        programs depend on how much is cached. ``progress``: show a bar on stderr.
        """
        context = min(self.config.max_position_embeddings, self.engine.kv_tokens)
        wanted = f"2 (a prompt and a token) to {context}, what the context and the cache hold"
        longest = context if max_length is None else arguments.whole("max_length", max_length, wanted, 2, context)
        with kept_interrupts() as check_interrupts, bar_if(arguments.truth("progress", progress)) as show:
            for done, total in self.engine.warm_up(longest):
                show("programs", done, total)
                check_interrupts()

    def programs(self) -> list[ProgramInfo]:
        """The programs that are compiled or loaded so far, with their bytes; after :meth:`warmup`, all programs."""
        return self.engine.runner.programs.compiled()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return self.requests.request(self.requests.encode(prompt), params)

    def _scored(self, prompts: Prompt | Sequence[Prompt], top: int | None, *, progress: bool) -> list[ScoresHandle]:
        requests = arguments.of_each_prompt(lambda one: self.requests.scoring(self.requests.encode(one), top), arguments.several(prompts))
        return run(self.engine, agreed(requests), ScoresHandle, progress=progress)

    def _stream(self, token_ids: list[int], params: SamplingParams | None) -> Stream:
        params = arguments.one_sampling_params(params)
        self.requests.check_streams()
        return Stream(self.engine, agreed([self.requests.request(token_ids, params)])[0])
