"""A worker (see ``worker.py``) that times llama.cpp on the CPU, through the C interface of llama-cpp-python.

Build it for this machine, in an environment of its own::

    CMAKE_ARGS="-DGGML_NATIVE=ON" lcpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    lcpp/bin/python benchmarks/peers/llama_cpp_decode.py MODEL.gguf

Flash attention is off: left to itself llama.cpp turns it on, which halves its decode speed on a CPU. Every sequence has its own
part of the cache (``kv_unified`` off): otherwise each row of a batch also computes attention over all the other rows' keys.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import llama_cpp as lib
import numpy as np
from worker import Ready, Repetition, Work, argument_parser, serve

# enum ggml_type
CACHE_TYPES = {"f32": 0, "f16": 1}


class Llama:
    """A model and its context, for ``batch`` sequences of ``capacity`` tokens each."""

    def __init__(self, path: str, *, batch: int, capacity: int, step_tokens: int, threads: int, cache: str) -> None:
        # The callback must outlive the library's use of it.
        self._silent = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._silent, None)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}; expected a GGUF file")
        params = lib.llama_context_default_params()
        params.n_ctx = capacity * batch
        params.n_seq_max = batch
        params.n_batch = step_tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHE_TYPES[cache]
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = False
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp cannot make a context of {params.n_ctx} tokens for {path}")
        self._batch = lib.llama_batch_init(step_tokens, 0, 1)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.weight_bytes = lib.llama_model_size(self._model)

    def clear(self) -> None:
        """Forget all sequences."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def step(self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[int], wanted: Sequence[int]) -> list[int]:
        """Feed tokens at their positions of their rows; the most likely next token after each index in ``wanted``."""
        self._batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
            self._batch.token[i], self._batch.pos[i] = token, position
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, row
            self._batch.logits[i] = 0
        for i in wanted:
            self._batch.logits[i] = 1
        status = lib.llama_decode(self._context, self._batch)
        if status != 0:
            sys.exit(f"llama_decode returned {status}")
        return [int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i), (self.vocab_size,)).argmax()) for i in wanted]


def main() -> None:
    """Load the model and serve repetitions."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cache", choices=list(CACHE_TYPES), default="f16", help="type of the KV cache (default: llama.cpp's own, f16)")
    arguments = parser.parse_args()
    llama = Llama(
        arguments.model,
        batch=arguments.batch,
        capacity=arguments.capacity,
        step_tokens=max(arguments.capacity, arguments.batch),
        threads=arguments.threads,
        cache=arguments.cache,
    )

    def repeat(work: Work) -> Repetition:
        ids, batch, length = work.prompts, len(work.prompts), len(work.prompts[0])
        llama.clear()
        start = time.perf_counter()
        chosen = [llama.step(ids[row], range(length), [row] * length, [length - 1]) for row in range(batch)]
        prefilled = time.perf_counter()
        for i in range(work.new_tokens):
            tokens = llama.step([row[-1] for row in chosen], [length + i] * batch, range(batch), range(batch))
            for row, token in zip(chosen, tokens, strict=True):
                row.append(token)
        end = time.perf_counter()
        return Repetition(prefilled - start, end - prefilled, chosen)

    weights = arguments.model.rpartition("/")[-1]
    serve(Ready(f"llama-cpp-python {lib.__version__}", weights, arguments.cache, llama.weight_bytes), repeat)


if __name__ == "__main__":
    main()
