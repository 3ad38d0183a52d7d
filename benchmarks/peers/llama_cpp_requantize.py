"""Write a GGUF file's weights in another type, by llama.cpp's own quantiser, for ``llama_cpp_decode.py``.

lcpp/bin/python benchmarks/peers/llama_cpp_requantize.py MODEL.gguf OUT.gguf {F32,BF16}
"""

from __future__ import annotations

import argparse

import llama_cpp as lib

# enum llama_ftype
TYPES = {"F32": 0, "BF16": 32}


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("type", choices=list(TYPES))
    arguments = parser.parse_args()
    params = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[arguments.type]
    params.allow_requantize = True
    status = lib.llama_model_quantize(arguments.source.encode(), arguments.destination.encode(), params)
    if status != 0:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
