"""``l4jax train-drafter``: distil an EAGLE drafter from a model, for speculative decoding."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

_SHAPE = ("version", "layers", "intermediate_size", "draft_vocab", "target_head")
"""Arguments that say what drafter to make."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "train-drafter",
        help="train a drafter for a model's speculative decoding",
        description="Let a model answer prompts, and train an EAGLE drafter on the answers. "
        "After an interruption, the same command continues where the run stopped.",
    )
    parser.add_argument("target", help="the model: a folder made by l4jax convert")
    parser.add_argument(
        "--data",
        required=True,
        help='JSONL with {"messages": [...]} or {"prompt": "..."} on each line, or the answers.jsonl of another run',
    )
    parser.add_argument("--out", required=True, help="the run's folder; the drafter is written to its subfolder drafter")
    parser.add_argument("--start", metavar="DRAFTER", help="the folder of a drafter to train further, instead of random weights")
    parser.add_argument("--version", choices=("eagle3", "eagle1"), help="version of EAGLE that the drafter follows (default: eagle3)")
    parser.add_argument("--layers", type=int, help="layers of an EAGLE-1 drafter (default: 1)")
    parser.add_argument(
        "--intermediate-size", type=int, metavar="N", help="width of the drafter's feed-forward blocks (default: the target's)"
    )
    parser.add_argument("--draft-vocab", type=int, help="EAGLE-3: size of the vocabulary that it guesses from (default: 8192)")
    parser.add_argument(
        "--target-head",
        action="store_true",
        default=None,
        help="EAGLE-3: guess with the target's output head, cut to the draft vocabulary, and do not train it",
    )
    parser.add_argument(
        "--ttt-steps",
        type=int,
        default=7,
        help="EAGLE-3: training passes, each but the first over the drafter's own output; also the length of the chains with which "
        "both kinds are evaluated (default: 7)",
    )
    parser.add_argument("--length", type=int, default=2048, help="most tokens of a prompt and its answer (default: 2048)")
    parser.add_argument("--batch", type=int, default=8, help="rows of --length tokens in a step (default: 8)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-4, help="highest learning rate (default: 1e-4)")
    parser.add_argument("--warmup", type=int, default=100, help="steps until the highest learning rate is reached (default: 100)")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the prompts kept for evaluation (default: 0.02)")
    parser.add_argument("--temperature", type=float, default=0.8, help="temperature of the answers (default: 0.8)")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of answers, batches and new weights (default: 0)")
    parser.add_argument("--report-every", type=int, default=20, metavar="STEPS")
    parser.add_argument(
        "--save-every", type=int, default=200, metavar="STEPS", help="steps between saved states, each measured on the held-out prompts"
    )
    parser.add_argument("--answer-batch", type=int, default=32, help="prompts answered together (default: 32)")
    parser.add_argument("--keep-states", action="store_true", help="keep the target's states in memory: only the first epoch computes them")
    parser.add_argument("--mesh", default="data=1", help="devices, as data=N: a batch's rows are divided among them (default: one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype to hold the target in (default: as stored)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and report on stderr."""
    import l4jax
    from l4jax.bar import Bar
    from l4jax.checkpoints.store import open_checkpoint
    from l4jax.speculator import open_fitting_drafter
    from l4jax.training.data import check_readable
    from l4jax.training.run import Settings, train_drafter

    if args.start is not None:
        for name in _SHAPE:
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is given together with --start, whose drafter already has its shape; leave out --{option}")
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names and value is not None})
    for name in ("report_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    check_readable(Path(args.data))  # before the target is loaded, which takes long
    target = open_checkpoint(args.target)
    start = open_fitting_drafter(args.start, target)
    llm = l4jax.load(args.target, mesh=args.mesh, dtype=args.dtype, max_batch=args.answer_batch)
    with Bar() as bar:
        drafter = train_drafter(
            llm,
            Path(args.data),
            Path(args.out),
            settings,
            target_digest=target.digest,
            target_tokenizer=target.tokenizer_digest,
            report_every=args.report_every,
            save_every=args.save_every,
            keep_states=args.keep_states,
            log=bar.say,
            progress=lambda done, total: bar.update("answers", done, total),
            start=start,
            target_directory=target.directory,
        )
    print(f"{drafter} is complete")
    return 0
