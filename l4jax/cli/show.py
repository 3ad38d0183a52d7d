"""``l4jax show``: every value of a model's configuration and where it came from, its weights, tokenizer and chat template."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharding.words import counted

if TYPE_CHECKING:
    from l4jax.checkpoints.source import ModelSource
    from l4jax.checkpoints.store import Checkpoint, DrafterCheckpoint
    from l4jax.config import DrafterConfig, ModelConfig

Row = tuple[str, ...]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "show",
        help="print a model's configuration and where each value came from",
        description="Print every value of a model's configuration and where it came from, its weights, tokenizer and chat template.",
    )
    parser.add_argument(
        "checkpoint",
        help="a folder made by l4jax convert, a source that it converts, a config.json, or the name of a shipped configuration",
    )
    parser.add_argument("--verify", action="store_true", help="for a converted checkpoint: read all weights and compare their checksums")
    parser.add_argument(
        "--programs",
        action="store_true",
        help="for a converted checkpoint: compile, or load, every program that the model may run, and print their sizes",
    )
    parser.add_argument("--mesh", help="with --programs: devices to run on, as for l4jax generate (default: one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="with --programs: as for l4jax generate")
    parser.add_argument("--max-batch", type=int, help="with --programs: prompts decoded together (default: 8 for each data rank)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print tables on a terminal, aligned text elsewhere."""
    if not arguments.programs and (arguments.mesh, arguments.dtype, arguments.max_batch) != (None, None, None):
        raise ValueError("--mesh, --dtype and --max-batch need --programs; add it or leave them out")
    about, config = _describe(arguments.checkpoint)
    programs = _programs(arguments, config) if arguments.programs else []
    _print("Checkpoint", ("", ""), about)
    _print("Configuration", *_configuration(config))
    if arguments.verify:
        from l4jax.checkpoints.store import open_checkpoint, open_drafter
        from l4jax.config import DrafterConfig

        opened = open_drafter if isinstance(config, DrafterConfig) else open_checkpoint
        opened(arguments.checkpoint).verify()
        print("every weight is what was written")
    if arguments.programs:
        _print("Programs", ("kind", "sizes", "code", "temporaries", "arguments", "donated", "results"), programs)
    return 0


def _programs(arguments: argparse.Namespace, config: ModelConfig | DrafterConfig) -> list[Row]:
    import l4jax
    from l4jax.checkpoints.manifest import MANIFEST
    from l4jax.config import DrafterConfig

    if isinstance(config, DrafterConfig) or not (Path(arguments.checkpoint) / MANIFEST).exists():
        raise ValueError(f"--programs with {arguments.checkpoint}; expected the folder of a model that l4jax convert made")
    mesh = arguments.mesh or "tensor=1"
    llm = l4jax.load(arguments.checkpoint, mesh=mesh, dtype=arguments.dtype, max_batch=arguments.max_batch)
    llm.warmup(progress=sys.stderr.isatty())
    programs = llm.programs()
    rows = []
    for p in programs:
        size_texts = [f"{size / 1e6:,.1f} MB" for size in (p.temporaries, p.arguments, p.donated, p.results)]
        # XLA does not say it of a CPU's programs.
        rows.append((p.kind, p.sizes, f"{p.code / 1e6:,.1f} MB" if p.code else "unknown", *size_texts))
    return [*rows, (counted(len(programs), "program"), *[""] * 6)]


def _describe(name: str) -> tuple[list[Row], ModelConfig | DrafterConfig]:
    """The rows about the checkpoint, and its configuration."""
    from l4jax.checkpoints.files import absent
    from l4jax.checkpoints.manifest import MAKE_AGAIN, MANIFEST
    from l4jax.checkpoints.open import open_source
    from l4jax.checkpoints.store import open_checkpoint, open_drafter
    from l4jax.data import configs_path
    from l4jax.files import read_json

    path = Path(name)
    shipped = configs_path() / "models" / f"{name}.json"
    if not path.exists() and shipped.exists():
        path = shipped
    if not path.exists():
        raise absent(path, f"the folder of a converted checkpoint, what l4jax convert reads, a config.json, or {_names(name)}")
    if path.is_file() and path.suffix == ".json":
        config = _read_config(path)
        return [("path", str(path)), ("format", "Hugging Face config.json"), *_decoder(config)], config
    if (path / MANIFEST).exists():
        if "drafter" in read_json(path / MANIFEST, MAKE_AGAIN):
            drafter = open_drafter(path)
            return _describe_drafter(drafter), drafter.config
        checkpoint = open_checkpoint(path)
        return _describe_checkpoint(checkpoint), checkpoint.config
    source = open_source(path)
    return _describe_source(path, source), source.config


def _names(like: str) -> str:
    """The shipped configurations to choose from: those with a name like this one, or all."""
    from l4jax.data import configs_path

    names = sorted(file.stem for file in (configs_path() / "models").glob("*.json"))
    close = difflib.get_close_matches(like.lower(), names)
    which = f"did you mean {' or '.join(close)}?" if close else ", ".join(names)
    return f"the name of a shipped configuration ({which})"


def _describe_checkpoint(checkpoint: Checkpoint) -> list[Row]:
    from l4jax.checkpoints.store import is_vision

    weights = checkpoint.weights.items()
    return [
        ("path", str(checkpoint.directory)),
        ("format", f"l4jax checkpoint, converted from {checkpoint.source_format}"),
        *_decoder(checkpoint.config),
        *_vision([weight.shape for name, weight in weights if is_vision(name)]),
        ("dtypes", _counts([weight.dtype for _, weight in weights])),
        *_text(checkpoint.directory, checkpoint.config),
    ]


def _describe_drafter(drafter: DrafterCheckpoint) -> list[Row]:
    config = drafter.config
    return [
        ("path", str(drafter.directory)),
        ("format", f"l4jax drafter, from {drafter.source_format}"),
        ("parameters", f"{sum(math.prod(weight.shape) for weight in drafter.weights.values()):,}"),
        ("dtypes", _counts([weight.dtype for weight in drafter.weights.values()])),
        (
            "for",
            f"a model of {counted(config.target_layers, 'layer')}, width {config.target_hidden_size}, {config.decoder.vocab_size:,} tokens",
        ),
        *(
            (f"speculation in {dtype}", ", ".join(f"{rows} or more rows: {how}" for rows, how in by_rows.items()))
            for dtype, by_rows in drafter.speculation.items()
        ),
    ]


def _describe_source(path: Path, source: ModelSource) -> list[Row]:
    from l4jax.checkpoints.store import is_vision
    from l4jax.checkpoints.text import tokenizer_files_of

    vision = [key for name, recipe in source.recipes.items() if is_vision(name) for key in recipe.keys]
    rows = [
        ("path", str(path)),
        ("format", f"{source.format}, not converted"),
        *_decoder(source.config),
        *_vision([source.tensors[key].shape for key in vision]),
        *(("note", note) for note in source.notes),
        ("dtypes as read", _counts([str(tensor.dtype) for tensor in source.tensors.values()])),
    ]
    try:
        with tokenizer_files_of(source, path) as directory:
            text = _text(directory, source.config)
    except ValueError as error:
        return [*rows, ("tokenizer", f"not usable: {error}")]
    return [*rows, *(tuple(cell.replace(str(directory), str(path)) for cell in row) for row in text)]


def _read_config(path: Path) -> ModelConfig:
    from l4jax.config_formats import config_from_hf
    from l4jax.files import read_json, read_json_if_there

    return config_from_hf(read_json(path), read_json_if_there(path.with_name("generation_config.json")))


def _decoder(config: ModelConfig) -> list[Row]:
    from l4jax.model.llama import Llama
    from l4jax.model.weights import weight_specs

    return [("parameters", f"{sum(spec.size for spec in weight_specs(Llama(config)).values()):,}")]


def _vision(shapes: Sequence[tuple[int, ...]]) -> list[Row]:
    return [("vision parameters", f"{sum(map(math.prod, shapes)):,}")] if shapes else []


def _counts(dtypes: Sequence[str]) -> str:
    return ", ".join(f"{dtype} ({counted(count, 'tensor')})" for dtype, count in Counter(dtypes).most_common())


def _text(directory: Path, config: ModelConfig) -> list[Row]:
    """Tokenizer and chat template in ``directory``."""
    from l4jax.text.load import Text, load_text

    text = load_text(directory, config)
    tokenizer, chat_format = text.tokenizer, text.chat_format
    if tokenizer is None:
        return [("tokenizer", "none" if text.no_tokenizer == Text.no_tokenizer else f"not usable: {text.no_tokenizer}")]
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}

    def word(token_id: int | None) -> str:
        return "none" if token_id is None else f"{token_id} {names.get(token_id, '')}".rstrip()

    before = ", put before a plain prompt" if tokenizer.prepends_bos else ""
    rows = [
        ("tokenizer", f"{tokenizer.vocab_size:,} tokens, {len(names):,} of them special"),
        ("begin token", word(tokenizer.bos_id) + before),
    ]
    if chat_format is None:
        return [*rows, ("chat template", "none" if text.no_chat == Text.no_chat else f"not usable: {text.no_chat}")]
    return [
        *rows,
        ("chat template", chat_format.origin.removeprefix(f"{directory}/")),
        ("end of a turn", ", ".join(map(word, chat_format.stop_token_ids)) or "none"),
    ]


def _configuration(config: ModelConfig | DrafterConfig) -> tuple[Row, list[Row]]:
    """The header and rows of the configuration; without a column of sources if the checkpoint has none."""
    from l4jax.config import flat_fields

    sources, fields = dict(config.sources), flat_fields(config)
    if sources.keys().isdisjoint(fields):
        return ("field", "value"), [(name, _value(value)) for name, value in fields.items()]
    return ("field", "value", "source"), [(name, _value(value), sources.get(name, "unknown")) for name, value in fields.items()]


def _value(value: Any) -> str:
    """``value`` as short text; a pattern that repeats over the layers is printed once."""
    if not isinstance(value, tuple):
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    for period in range(1, len(value) // 2 + 1):
        if len(value) % period == 0 and value == value[:period] * (len(value) // period):
            return f"({', '.join(map(_value, value[:period]))}) x {len(value) // period}"
    return ", ".join(map(_value, value)) or "none"


def _print(title: str, header: Row, rows: Sequence[Row]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title, title_style="bold", title_justify="left", show_header=any(header), show_edge=False, box=None, pad_edge=False
        )
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            # As Text: brackets in values are not markup.
            table.add_row(*map(Text, row))
        Console().print(table, "")
        return
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(row[i]) for row in lines) for i in range(len(header))]
    print(title)
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
