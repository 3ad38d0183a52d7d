"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model runs."""
    parser.add_argument("--mesh", default="tensor=1", help="devices to run on, such as tensor=4,expert=2, or a .json file (default: one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="hold weights and cache in this (default: as stored)")
    parser.add_argument("--drafter", help="the folder of a drafter made for the model (default: the one in its folder, if there is one)")
    parser.add_argument(
        "--speculation",
        default="auto",
        help="off, chain:5, tree:eagle26, dynamic:steps=5,topk=4,nodes=16, or auto (the default: what the drafter says)",
    )
    parser.add_argument(
        "--beyond-training",
        choices=("window", "stop"),
        default="window",
        help="what a drafter does with texts longer than it was trained on",
    )
