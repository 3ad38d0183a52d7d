"""``l4jax export``: write a checkpoint in a published format."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as Hugging Face safetensors, or a drafter as a published EAGLE head",
        description="Write a checkpoint as a Hugging Face folder; if it was converted from one, every weight is the same bit for bit. "
        "A drafter is written as an EAGLE head that SafeAILab's code or speculators can read.",
    )
    parser.add_argument("checkpoint", help="a folder made by l4jax convert")
    parser.add_argument("destination", help="the folder to make; it must not exist")
    parser.add_argument("--to", choices=("hf", "eagle", "speculators"), required=True, help="hf: a model; eagle, speculators: a drafter")
    parser.add_argument(
        "--without-head",
        action="store_true",
        help="leave out a drafter's output head if it is its target's; l4jax convert fills it in again",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the destination."""
    from l4jax.checkpoints.export import export

    export(arguments.checkpoint, arguments.destination, to=arguments.to, without_head=arguments.without_head)
    print(f"{arguments.destination} is complete")
    return 0
