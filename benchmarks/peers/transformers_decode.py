"""A worker (see ``worker.py``) that times Hugging Face transformers on the CPU.

Needs torch and transformers, in an environment of their own::

    torchenv/bin/python benchmarks/peers/transformers_decode.py MODEL_FOLDER --dtype float32

The loop is written out, with a dynamic cache, one-token steps and logits for the last position only: faster than ``generate``.
"""

from __future__ import annotations

import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from worker import Ready, Repetition, Work, argument_parser, serve


@torch.inference_mode()
def main() -> None:
    """Load the model and serve repetitions."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights, activations and cache")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()

    def repeat(work: Work) -> Repetition:
        ids_BT = torch.tensor(work.prompts)
        cache = DynamicCache(config=model.config)
        chosen = []

        def step(ids_BT: torch.Tensor) -> torch.Tensor:
            logits_B1V = model(ids_BT, past_key_values=cache, logits_to_keep=1).logits
            chosen.append(logits_B1V.argmax(-1))
            return chosen[-1]

        start = time.perf_counter()
        token_B1 = step(ids_BT)
        prefilled = time.perf_counter()
        for _ in range(work.new_tokens):
            token_B1 = step(token_B1)
        end = time.perf_counter()
        return Repetition(prefilled - start, end - prefilled, torch.cat(chosen, 1).tolist())

    library = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    serve(Ready(library, arguments.dtype, arguments.dtype, weight_bytes), repeat)


if __name__ == "__main__":
    main()
