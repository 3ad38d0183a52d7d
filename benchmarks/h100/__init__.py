"""Everything that is to be measured on an H100, in one command: ``python -m benchmarks.h100 --minutes 4 --out DIR``.

It needs the repository, JAX with CUDA, flax, numpy and jaxtyping, and nothing else; the packages that it compares with are used where
they are installed. ``docs/h100.md`` says what each item measures. ``python -m benchmarks.h100.report`` prints the tables.
"""
