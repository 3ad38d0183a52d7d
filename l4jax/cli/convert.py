"""``l4jax convert``: turn a published checkpoint into one that l4jax loads."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a Hugging Face, Meta or GGUF checkpoint into one that l4jax loads",
        description="Turn a Hugging Face folder, a Meta folder or a GGUF file into a checkpoint that l4jax loads. "
        "An interrupted conversion goes on where it stopped when the same command is given again.",
    )
    parser.add_argument("source", help="a folder with safetensors or consolidated.*.pth, or a .gguf file")
    parser.add_argument("destination", help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="store the weights in this (default: as the source)")
    parser.add_argument("--dry-run", action="store_true", help="check the source and print which tensors make which weight; write nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a progress bar on stderr; or print the mapping."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from l4jax.checkpoints.convert import check_complete, convert
    from l4jax.checkpoints.open import open_source

    if arguments.dry_run:
        source = open_source(arguments.source)
        check_complete(source)
        for name, recipe in source.recipes.items():
            parts = ", ".join(f"{key} {list(source.tensors[key].shape)} {source.tensors[key].dtype.name}" for key in recipe.keys)
            print(f"{name} <- {parts}: {recipe.description}")
        for key in sorted(source.ignored):
            print(f"(not used) {key}")
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("converting", total=None)
        convert(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            progress=lambda stage, done, total: bar.update(task, completed=done, total=total, description=stage),
        )
    print(f"{arguments.destination} is complete and verified")
    return 0
