"""transformers' Llama 3.1 8B with random weights: a decode step of one row, as ``generate`` runs it without compilation."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.h100.errors import NotHere
from benchmarks.h100.rivals_torch import TorchBench, import_torch

STEPS = 16
CONFIG = Path(__file__).parents[2] / "configs" / "models" / "llama-3.1-8b.json"
# Our names of the replaced fields, and transformers' names.
_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def measure(bench: TorchBench, record: Callable[[str, dict[str, Any]], None]) -> None:
    """Milliseconds a step at each context: the median over STEPS steps after a prefill."""
    torch = import_torch(bench)
    if importlib.util.find_spec("transformers") is None:
        raise NotHere("transformers is not installed")
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    values = json.loads(CONFIG.read_text(encoding="utf-8"))
    values |= {_NAMES[name]: value for name, value in bench.sizes.model.items() if name in _NAMES}
    for name in ("bos_token_id", "eos_token_id", "torch_dtype", "dtype", "architectures"):
        values.pop(name, None)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(bench.device):
        model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    with torch.inference_mode():
        for context in bench.sizes.contexts:
            cache = DynamicCache()
            token = torch.ones((1, context), dtype=torch.long, device=bench.device)
            seconds = []
            for _ in range(STEPS + 1):
                started = time.perf_counter()
                logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                token = logits[:, -1:].argmax(-1)
                token.cpu()
                seconds.append(time.perf_counter() - started)
            steps = sorted(seconds[1:])
            times = {"ms": statistics.median(steps) * 1e3, "least_ms": steps[0] * 1e3, "most_ms": steps[-1] * 1e3}
            record(f"context {context}", times | {"repetitions": STEPS})
