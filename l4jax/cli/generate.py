"""``l4jax generate``: continue a prompt, or answer it in the model's chat format."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any

from l4jax.cli.options import add_model_options
from sharding.words import counted


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt, or answer it with --chat",
        description="Continue a prompt, or answer it in the model's chat format.",
    )
    parser.add_argument("checkpoint", help="a folder made by l4jax convert")
    parser.add_argument(
        "-p", "--prompt", required=True, help="text to continue; - reads it from standard input, without the newline at its end"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt in the model's chat format, as a user's message")
    parser.add_argument("--system", help="with --chat: a system message before it")
    parser.add_argument(
        "--chat-template-kwargs", metavar="JSON", help='with --chat: variables of the chat template, such as {"enable_thinking": false}'
    )
    add_model_options(parser)
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, to run as one of several processes; auto: by Slurm, Kubernetes or MPI"
    )
    parser.add_argument("--processes", type=int, help="with --coordinator: the number of processes")
    parser.add_argument("--process-id", type=int, help="with --coordinator: which of them this is, from 0; only 0 prints the text")
    parser.add_argument(
        "--coordinator-timeout", type=float, metavar="SECONDS", help="with --coordinator: how long to wait for the others (default: 300)"
    )
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument(
        "--min-tokens",
        type=int,
        default=0,
        help="the answer's first tokens, this many of them, are no end tokens, and stop strings are looked for after them",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--frequency-penalty", type=float, default=0.0)
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    parser.add_argument(
        "--stop-token-id",
        type=int,
        action="append",
        default=[],
        dest="stop_token_ids",
        help="end at this token id; may be given several times",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="continue past the model's end tokens")
    parser.add_argument("--seed", type=int, help="reproduce a sampled answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the text as it is generated on standard output, and the speed on standard error."""
    import l4jax
    from l4jax.cli import print_pieces
    from sharding import hosts

    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat; without it the prompt is continued as it is")
    if args.chat_template_kwargs is not None and not args.chat:
        raise ValueError("--chat-template-kwargs needs --chat; without it the prompt is continued as it is")
    variables = _json_object(args.chat_template_kwargs)
    if args.coordinator is not None:
        _keep_stdout_for_text()
        timeout_seconds = 300 if args.coordinator_timeout is None else args.coordinator_timeout
        hosts.join(args.coordinator, args.processes, args.process_id, timeout_seconds=timeout_seconds)
    elif (args.processes, args.process_id, args.coordinator_timeout) != (None, None, None):
        raise ValueError(
            "--processes, --process-id and --coordinator-timeout need --coordinator HOST:PORT, where process 0 listens; or leave them out"
        )
    names = {field.name for field in dataclasses.fields(l4jax.SamplingParams)}
    params = l4jax.SamplingParams(**{name: value for name, value in vars(args).items() if name in names})
    speculation = {"drafter": args.drafter, "speculation": args.speculation, "beyond_training": args.beyond_training}
    prompt = _shared_stdin() if args.prompt == "-" else args.prompt
    llm = l4jax.load(args.checkpoint, mesh=args.mesh, dtype=args.dtype, max_batch=1, **speculation)
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        stream = llm.stream_chat([*system, {"role": "user", "content": prompt}], params, chat_template_kwargs=variables)
    else:
        stream = llm.stream(prompt, params)
    if hosts.process_id() != 0:
        for _ in stream:
            pass
        return 0
    print_pieces(stream)
    completion = stream.completion
    assert completion is not None
    stats = completion.stats
    print(
        f"{counted(stats.prompt_tokens, 'prompt token')}, first token after {stats.first_token_seconds:.2f} s; "
        f"{counted(stats.output_tokens, 'token')}, {stats.decode_tokens_per_second:.1f} tokens/s; "
        f"finished by {completion.finish_reason}, seed {completion.seed}"
        + (f"; {counted(stats.rounds, 'round')} of speculation, acceptance length {stats.acceptance_length:.2f}" if stats.rounds else ""),
        file=sys.stderr,
    )
    return 0


def _shared_stdin() -> str:
    """What process 0 reads, for all: launchers give the others an empty standard input."""
    from sharding import hosts

    try:
        text = sys.stdin.read() if hosts.process_id() == 0 else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {sys.stdin.encoding} text ({error}); expected the prompt") from error
    except OSError as error:
        raise ValueError(f"standard input cannot be read ({error.strerror}); expected the prompt") from error
    # Shells and editors end the last line: a newline there is not part of the text.
    return hosts.share(text.removesuffix("\n"))[0]


def _json_object(text: str | None) -> dict[str, Any]:
    """Read ``--chat-template-kwargs``."""
    from l4jax.files import parse_json

    values = parse_json(text or "{}", "--chat-template-kwargs", "expected a JSON object")
    if not isinstance(values, dict):
        raise ValueError(f"--chat-template-kwargs is a {type(values).__name__}; expected a JSON object")
    return values


def _keep_stdout_for_text() -> None:
    """Send what libraries write on standard output to standard error: Gloo greets there."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)
