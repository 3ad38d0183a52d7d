"""One command that measures everything on an H100: ``python -m benchmarks.h100 --minutes 4 --out DIR``.

It needs the repository, JAX with CUDA, flax, numpy and jaxtyping, and nothing else; it compares with other packages if they are
installed. ``docs/h100.md`` says what each item measures. ``python -m benchmarks.h100.report`` prints the tables.
"""
