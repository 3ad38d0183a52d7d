"""Makes prompts of four kinds to train a drafter with, from Python's own documentation and from word lists.

    pip install wonderwords        # lists of English words, MIT licence
    python benchmarks/drafter_prompts.py 4000 > prompts.jsonl

Texts to summarise and functions to write come from the docstrings of Python's standard library (PSF licence); the subjects of chats and
stories come from the word lists. The same count and seed give the same prompts. Only prompts are made: the drafter's target answers them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TEMPERATURES = (0.8, 0.0)
"""The temperatures of the answers, in turn: sampled answers, as users get them, and greedy answers."""
CHAT = [
    "What is {a_noun}?",
    "What is the difference between {a_noun} and {a_noun2}?",
    "Give me five tips for buying {a_noun}.",
    "Why do people like {a_noun}?",
    "How would you explain {a_noun} to a child?",
    "I want to learn about {a_noun}. Where should I start?",
    "Write a short email to my boss about {a_noun}.",
    "What are the advantages and disadvantages of {a_noun}?",
    "Make a list of ten things that are {adjective}.",
    "Is it a good idea to {verb} {a_noun}? Why or why not?",
    "How do I {verb} {a_noun} safely?",
    "Tell me an interesting fact about {a_noun}.",
    "Who invented {a_noun}, and when?",
    "Describe {a_noun} in three sentences.",
    "What would happen if there were no {noun} in the world?",
    "Help me plan a {adjective} weekend with {a_noun}.",
    "What does the word {adjective} mean? Use it in a sentence.",
    "Compare {a_noun} with {a_noun2} in a table.",
    "Write a slogan for a company that sells {a_noun}.",
    "What questions should I ask before I {verb} {a_noun}?",
]
STORY = [
    "Write a short story about {a_adjective} {noun} and {a_noun2}.",
    "Write a poem about {a_adjective} {noun}.",
    "Tell me a bedtime story in which {a_noun} wants to {verb}.",
    "Begin a mystery novel with {a_adjective} {noun} in an empty house.",
    "Write a dialogue between {a_noun} and {a_noun2}.",
    "Write a fairy tale that ends with {a_adjective} {noun}.",
    "Describe a journey to a {adjective} island where nobody has ever seen {a_noun}.",
    "Write a diary entry of somebody who has lost {a_noun}.",
    "Continue this story: Once upon a time there was {a_adjective} {noun} that could {verb}.",
    "Write a letter from {a_noun} to {a_noun2}.",
]
CODE = [
    "Write a Python function called {name} that does this: {what}",
    "Write a Python function. {what}",
    "Show me a short example of how to use {module}.{name} in Python.",
    "What does the Python function {module}.{name} do?\n\n{what}",
    "Write a unit test for a Python function {name}. It is documented like this: {what}",
    "Write a Python class {noun_class} with the methods {name} and {verb}.",
    "How can I {verb} a list of {noun} objects in Python? Give me the code.",
    "Explain this Python signature: {name}{signature}",
]
SUMMARY = [
    "Summarize the following text in two sentences.\n\n{passage}",
    "What is the main point of this text?\n\n{passage}",
    "Explain this in simple words:\n\n{passage}",
    "Make a list of the most important points of this text.\n\n{passage}",
    "Rewrite this text so that it is shorter.\n\n{passage}",
]


def main() -> None:
    """Print the prompts, one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="number of prompts, a quarter of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for prompt in itertools.islice(prompts(arguments.seed), arguments.count):
        json.dump(prompt, sys.stdout, ensure_ascii=False)
        print()


def prompts(seed: int) -> Iterator[dict[str, object]]:
    """Yield distinct prompts without end, the kinds in turn."""
    rng = random.Random(seed)
    words = {kind: _words(kind) for kind in ("nouns", "verbs", "adjectives")}
    functions, passages = _documentation()
    seen = set()
    for kind in itertools.cycle(("chat", "code", "summarising", "story")):
        noun, noun2 = rng.sample(words["nouns"], 2)
        adjective, verb = rng.choice(words["adjectives"]), rng.choice(words["verbs"])
        module, name, signature, what = rng.choice(functions)
        fields = {
            "noun": noun,
            "a_noun": _with_article(noun),
            "a_noun2": _with_article(noun2),
            "verb": verb,
            "noun_class": noun.title(),
            "adjective": adjective,
            "a_adjective": _with_article(adjective),
            "passage": rng.choice(passages),
            "module": module,
            "name": name,
            "signature": signature,
            "what": what,
        }
        template = rng.choice({"chat": CHAT, "code": CODE, "summarising": SUMMARY, "story": STORY}[kind])
        text = template.format(**fields)
        if text not in seen:
            seen.add(text)
            yield {"kind": kind, "messages": [{"role": "user", "content": text}], "temperature": TEMPERATURES[len(seen) // 4 % 2]}


def _words(kind: str) -> list[str]:
    """The entries of one list that are single words."""
    import wonderwords

    folder = Path(inspect.getfile(wonderwords)).parent / "assets"
    (file,) = folder.glob(f"{kind.rstrip('s')}*list.txt")
    return [word for word in file.read_text(encoding="utf-8").split("\n") if re.fullmatch("[a-z]{3,14}", word)]


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _documentation() -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """Functions of the standard library (module, name, signature, first paragraph), and paragraphs of 50 to 150 words."""
    functions, passages = [], []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (node for node in ast.walk(tree) if isinstance(node, documented)):
            paragraphs = [" ".join(paragraph.split()) for paragraph in (ast.get_docstring(node) or "").split("\n\n")]
            passages += [text for text in paragraphs if 50 <= len(text.split()) <= 150 and ">>>" not in text and "--" not in text]
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and 6 <= len(paragraphs[0].split()) <= 40:
                functions.append((file.stem, node.name, f"({ast.unparse(node.args)})", paragraphs[0]))
    return functions, sorted(set(passages))


if __name__ == "__main__":
    main()
