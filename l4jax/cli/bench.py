"""``l4jax bench``: measure a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its subcommands."""
    parser = subparsers.add_parser("bench", help="measure a server under load", description="Measure a server under load.")
    _register_serve(parser.add_subparsers(dest="what", metavar="WHAT", required=True))


def _register_serve(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "measure any server with OpenAI's API: latencies, throughput and goodput of streamed requests"
    parser = subparsers.add_parser("serve", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("--url", required=True, help="where the server listens, as http://HOST:PORT")
    parser.add_argument("--model", metavar="NAME", default="", help="the model to ask for (default: the one that is served)")
    parser.add_argument("--api-key", metavar="KEY", help="send this key")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions", help="the route (default: %(default)s)")
    when = parser.add_argument_group("when requests are sent")
    either = when.add_mutually_exclusive_group()
    either.add_argument(
        "--clients", type=int, metavar="N", help="clients, each of which waits for an answer before it asks again (default: 1)"
    )
    either.add_argument(
        "--rate", type=float, metavar="R", help="requests a second that arrive at random (a Poisson process), answered or not"
    )
    until = when.add_mutually_exclusive_group()
    until.add_argument("--requests", type=int, metavar="N", help="requests that are measured (default: 100)")
    until.add_argument("--seconds", type=float, metavar="S", help="send requests for this long; those under way are waited for")
    when.add_argument("--warmup", type=int, default=0, metavar="N", help="requests before those, which do not count (default: 0)")
    when.add_argument("--cancel", type=float, default=0.0, metavar="SHARE", help="cancel this share of the requests, 0 to 1 (default: 0)")
    when.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds after which a request fails (default: 600)")
    what = parser.add_argument_group("what is sent (a range is LOW:HIGH, log-uniform, or one number)")
    what.add_argument(
        "--prompt-tokens", metavar="RANGE", help="lengths of random prompts: of token ids, or for chat of words (default: 512)"
    )
    what.add_argument("--max-tokens", metavar="RANGE", default="128", help="the most tokens of an answer (default: %(default)s)")
    what.add_argument("--ignore-eos", action="store_true", help="ask for exactly that many tokens; vLLM, llama.cpp and l4jax can")
    what.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    what.add_argument("--token-ids", metavar="RANGE", help="token ids of random prompts, drawn evenly (default: 1000:30000)")
    what.add_argument("--shared-prefix", type=float, metavar="SHARE", help="put the same prefix before this share of the random prompts")
    what.add_argument("--shared-prefix-tokens", type=int, metavar="N", help="the length of that prefix")
    what.add_argument("--prompts", metavar="FILE", help='take prompts in turn from lines {"prompt": ...} or {"messages": [...]} instead')
    what.add_argument("--seed", type=int, default=0, help="draw other requests (default: %(default)s)")
    shown = parser.add_argument_group("what is reported")
    shown.add_argument("--goodput", metavar="LIMITS", help="how many requests are within limits in ms, as ttft:500,tpot:50 (also e2e)")
    shown.add_argument("--out", metavar="FILE", help="write all figures, with a row for each request, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the options and the server, measure, and print a table."""
    import uvloop

    from l4jax.bench.client import Server
    from l4jax.bench.load import Pattern
    from l4jax.bench.report import check_writable, parse_goodput
    from l4jax.bench.requests import Content, Range, read_prompts
    from l4jax.bench.serve import Benchmark

    _check_bounds(args)
    server = Server.parse(args.url, args.api_key)
    if (args.shared_prefix is None) != (args.shared_prefix_tokens is None):
        raise ValueError("one of --shared-prefix and --shared-prefix-tokens is given; expected both or neither")
    random_only = ("prompt_tokens", "token_ids", "shared_prefix")
    given = [_option(name) for name in random_only if getattr(args, name) is not None]
    if args.prompts is not None and given:
        raise ValueError(f"--prompts and {given[0]} are given; expected one of them: prompts of a file are sent as they are")
    if args.api == "chat" and args.token_ids is not None:
        raise ValueError("--token-ids is given with --api chat, whose random prompts are words; leave it out, or use --api completions")
    content = Content(
        api=args.api,
        model=args.model,
        seed=args.seed,
        prompt_tokens=Range.parse(args.prompt_tokens or "512", "--prompt-tokens"),
        max_tokens=Range.parse(args.max_tokens, "--max-tokens"),
        token_ids=Range.parse(args.token_ids or "1000:30000", "--token-ids", least=0),
        shared_prefix=args.shared_prefix or 0.0,
        shared_prefix_tokens=args.shared_prefix_tokens or 0,
        prompts=None if args.prompts is None else read_prompts(Path(args.prompts), args.api),
        cancel=args.cancel,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
    )
    pattern = Pattern(
        clients=1 if args.clients is None and args.rate is None else args.clients,
        rate=args.rate,
        requests=100 if args.requests is None and args.seconds is None else args.requests,
        seconds=args.seconds,
        warmup=args.warmup,
        timeout_s=args.timeout,
    )
    goodput = {} if args.goodput is None else parse_goodput(args.goodput)
    out = None if args.out is None else Path(args.out)
    if out is not None:
        check_writable(out)
    uvloop.run(Benchmark(server, content, pattern, goodput, out).run())
    return 0


_BOUNDS: dict[str, tuple[float, float]] = {
    "clients": (1, 10_000),
    "rate": (1e-3, 1e5),
    "requests": (1, 10_000_000),
    "seconds": (0.1, 1e6),
    "warmup": (0, 1_000_000),
    "cancel": (0, 1),
    "timeout": (0.1, 1e6),
    "temperature": (0, 100),
    "shared_prefix": (0, 1),
    "shared_prefix_tokens": (1, 10_000_000),
}


def _check_bounds(args: Any) -> None:
    for name, (least, most) in _BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{_option(name)} is {value}; expected {least:g} to {most:,.0f}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
