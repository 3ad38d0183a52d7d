"""``l4jax convert``: turn a published checkpoint into one that l4jax loads."""

from __future__ import annotations

import argparse
import sys


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a Hugging Face, Meta or GGUF checkpoint, or an EAGLE head, into one that l4jax loads",
        description="Turn a Hugging Face folder, a Meta folder or a GGUF file into a checkpoint that l4jax loads; or, with --target, an "
        "EAGLE head into a drafter for that model. "
        "After an interruption, the same command continues where the conversion stopped.",
    )
    parser.add_argument("source", help="a folder with safetensors or consolidated.*.pth, or a .gguf file")
    parser.add_argument("destination", help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype to store the weights in (default: the source's)")
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="leave tokenizer and chat template out: the model takes token ids instead of text"
    )
    parser.add_argument("--target", help="for an EAGLE head: the model it was trained for, a folder made by l4jax convert")
    parser.add_argument(
        "--trained-length", type=int, metavar="N", help="if a head's files leave it open: the length that it was trained at, in tokens"
    )
    parser.add_argument(
        "--aux-layers", type=_layers, metavar="I,J,K", help="if a head's files leave it open: the target's layers whose input it reads"
    )
    for name, what in (("residual", "takes its residual after the norm"), ("fed-back", "feeds its normed state back")):
        option = "--norm-before-residual" if name == "residual" else "--norm-fed-back"
        parser.add_argument(option, choices=("yes", "no"), help=f"if a head's files leave it open: whether it {what}")
    parser.add_argument("--dry-run", action="store_true", help="check the source and print the tensors of each weight; write nothing")
    parser.set_defaults(run=run)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers; expected numbers, as in 2,16,29") from error


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a progress bar on stderr; or print the mapping."""
    from l4jax.bar import Bar
    from l4jax.checkpoints.convert import convert, open_checked
    from l4jax.checkpoints.partial import check_destination
    from l4jax.config_formats.eagle import NO_ANSWERS, HeadAnswers

    yes = {None: None, "yes": True, "no": False}
    if arguments.trained_length is not None and arguments.trained_length < 1:
        raise ValueError(f"--trained-length is {arguments.trained_length}; expected at least 1")
    answers = HeadAnswers(arguments.trained_length, arguments.aux_layers, yes[arguments.norm_before_residual], yes[arguments.norm_fed_back])
    if arguments.target is None and answers != NO_ANSWERS:
        raise ValueError(
            "--trained-length, --aux-layers, --norm-before-residual and --norm-fed-back are for EAGLE heads; give the "
            "head's model as --target"
        )
    if arguments.dry_run:
        check_destination(arguments.destination)
        source = open_checked(arguments.source, arguments.target, answers, without_tokenizer=arguments.without_tokenizer)
        for line in source.notes:
            print(line, file=sys.stderr)
        for name, recipe in source.recipes.items():
            parts = ", ".join(f"{key} {list(source.tensors[key].shape)} {source.tensors[key].dtype.name}" for key in recipe.keys)
            print(f"{name} <- {parts}: {recipe.description}")
        for key in sorted(source.ignored):
            print(f"(not used) {key}")
        return 0
    with Bar() as bar:
        convert(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            target=arguments.target,
            answers=answers,
            without_tokenizer=arguments.without_tokenizer,
            progress=bar.update,
            note=bar.say,
        )
    print(f"{arguments.destination} is complete and verified")
    return 0
