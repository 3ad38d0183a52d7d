"""Compile, or load, every program that requests can need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from l4jax.engine.options import Options
from l4jax.engine.runner import Runner
from l4jax.engine.step import Burst, Plan, Prefill
from l4jax.program_inputs import Resident


def preparations(runner: Runner, options: Options, resident: Resident, longest: int) -> list[Callable[[], object]]:
    """Functions that each compile or load one program, together all for requests of up to ``longest`` tokens.

    ``resident`` may be abstract.
    """
    small: list[Callable[[], object]] = [call.prepare for call in runner.small_calls(resident, saves=options.deterministic)]
    return small + [functools.partial(runner.prepare, part, resident, padding) for part, padding in _parts(runner, options, longest)]


def early_loads(runner: Runner, options: Options, resident: Resident, longest: int, pool: Executor) -> list[Callable[[], None]]:
    """Functions that each let the pool load one of these programs, if it is kept: several at a time, which :func:`preparations` do not."""
    if not runner.programs.are_kept:
        return []

    def load(part: Prefill | Burst, padding: tuple[int, bool] | None) -> None:
        runner.call(part, resident, padding).load_early(pool)

    small: list[Callable[[], None]] = [
        functools.partial(call.load_early, pool) for call in runner.small_calls(resident, saves=options.deterministic)
    ]
    return small + [functools.partial(load, part, padding) for part, padding in _parts(runner, options, longest)]


def _parts(runner: Runner, options: Options, longest: int) -> Iterator[tuple[Prefill | Burst, tuple[int, bool] | None]]:
    """An example of each prefill and burst, and the ``padding`` of :meth:`Runner.prefill_call`."""
    for prefill in example_prefills(options):
        for padding in runner.spreads(prefill.length, longest):
            yield prefill, padding
    for burst in example_bursts(options, longest):
        yield burst, None


def program_bytes(runner: Runner, options: Options, resident: Resident, longest: int) -> int:
    """Bytes on a device that programs need beside weights and cache.

    That is the code of all programs, estimated as the largest one's for each, and the temporaries and results of the largest one.
    Results count twice, because two steps may be in flight.
    """
    kinds = [[prefill for prefill in example_prefills(options) if prefill.scores is scores] for scores in (False, True)]
    largest = [max(kind, key=lambda prefill: len(prefill.rows) * prefill.length) for kind in kinds]
    infos = [runner.call(prefill, resident, runner.spreads(prefill.length, longest)[-1]).info() for prefill in largest]
    slots = options.slots * options.data_ranks
    infos += [runner.call(burst, resident).info() for burst in example_bursts(options, longest) if len(burst.rows) == slots]
    programs = len(preparations(runner, options, resident, longest))
    return max(info.temporaries + 2 * info.results for info in infos) + max(info.code for info in infos) * programs


def example_prefills(options: Options) -> Iterator[Prefill]:
    """A prefill, of padding alone, for each size, scored and not."""
    for scores in (False, True):
        for length in options.scored_lengths if scores else options.piece_lengths:
            for rows in options.piece_rows:
                if rows <= options.most_piece_rows(length):
                    yield Prefill(length, (None,) * (rows * options.data_ranks), scores)


def example_bursts(options: Options, longest: int) -> Iterator[Burst]:
    """A burst, of padding alone, for each size and plan."""
    plans: dict[Plan | None, set[int]] = {}
    for rows in range(1, options.slots + 1):
        bucket = next(bucket for bucket in options.row_buckets if bucket >= rows)
        plans.setdefault(options.plan(rows), set()).add(bucket)
        if longest > options.drafts_up_to and not options.deterministic:  # a burst that can draft for no row has no plan
            plans.setdefault(None, set()).add(bucket)
    for plan, sizes in plans.items():
        for rows in sorted(sizes):
            yield Burst(1, plan, (None,) * (rows * options.data_ranks))
