"""``l4jax serve``: an HTTP server with OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import argparse
import os

from l4jax.cli.options import add_model_options

_KEY_VARIABLE = "L4JAX_API_KEY"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP, with OpenAI's and Anthropic's APIs",
        description="Serve a model over HTTP, with OpenAI's and Anthropic's APIs.",
    )
    parser.add_argument("checkpoint", help="a folder made by l4jax convert")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any free one (default: %(default)s)")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"let in only requests with this key; may be given several times (default: those in {_KEY_VARIABLE}, split at commas)",
    )
    add_model_options(parser)
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="the most tokens of prompt and answer (default: what fits)")
    parser.add_argument("--slots", type=int, help="requests that are decoded together (default: 8 for each data rank)")
    parser.add_argument("--kv-tokens", type=int, metavar="TOKENS", help="tokens that the KV cache holds (default: what fits)")
    parser.add_argument(
        "--deterministic", action="store_true", help="give a request the same tokens whatever else runs, at the cost of some speed"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="REQUESTS",
        help="requests that may wait for a slot; further ones get status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds", type=int, default=60, metavar="SECONDS", help="time for running requests at SIGTERM (default: %(default)s)"
    )
    parser.add_argument(
        "--stalled-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="/ready answers 503 when requests wait and no step has ended for this long (default: %(default)s)",
    )
    parser.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="auto: the default temperature and top_p are those of the checkpoint's generation_config.json; none: both are 1",
    )
    parser.add_argument("--ignore-unknown-fields", action="store_true", help="log parameters that no route knows instead of refusing them")
    parser.add_argument("--no-page", action="store_true", help="without the page to chat with at /")
    parser.add_argument("--log", metavar="FILE", help="append a JSON object about each request to this file; -: to standard error")
    parser.add_argument("--log-texts", action="store_true", help="with --log: also what clients write and get")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from l4jax.serving.front import ServeOptions, serve

    bounds = {
        "port": (0, 65535),
        "slots": (1, 2**20),
        "kv_tokens": (1, 2**50),
        "max_waiting": (0, 100_000),
        "drain_seconds": (0, 86_400),
        "stalled_seconds": (0.1, 86_400),
    }
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {least} to {most}")
    if args.log_texts and args.log is None:
        raise ValueError("--log-texts needs --log FILE, where the texts are to be written")
    keys = args.api_key
    if keys is None:
        keys = os.environ[_KEY_VARIABLE].split(",") if _KEY_VARIABLE in os.environ else []
    if not all(key and key.isascii() and key.isprintable() and key.strip() == key for key in keys):
        raise ValueError(
            "an API key is empty, begins or ends with a space, or is not printable ASCII; correct --api-key, or "
            f"{_KEY_VARIABLE} (keys with commas between them, without spaces)"
        )
    arguments = {
        **{
            name: getattr(args, name)
            for name in ("mesh", "dtype", "drafter", "speculation", "beyond_training", "kv_tokens", "deterministic")
        },
        "max_batch": args.slots,
    }
    return serve(
        ServeOptions(
            checkpoint=args.checkpoint,
            arguments=arguments,
            host=args.host,
            port=args.port,
            name=args.served_model_name,
            keys=keys,
            max_model_len=args.max_model_len,
            max_waiting=args.max_waiting,
            stalled_seconds=args.stalled_seconds,
            drain_seconds=args.drain_seconds,
            ignore_unknown=args.ignore_unknown_fields,
            use_generation_config=args.generation_config == "auto",
            page=not args.no_page,
            log=args.log,
            log_texts=args.log_texts,
        )
    )
