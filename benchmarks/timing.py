"""Medians of functions timed in turn, so that a drifting machine hits all of them alike."""

import statistics
import time
from collections.abc import Callable

import jax


def medians(
    functions: dict[str, Callable[[], object]], repeats: int = 7, least: bool = False
) -> dict[str, float]:
    """Median milliseconds of each function, called in turn after one warm-up.

    What a function has as `prepare` is called before it, and not timed. With `least`, the least
    time in place of the median, for a machine on which other programs run.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            getattr(function, "prepare", lambda: None)()
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if round_:
                times[name].append(1e3 * (time.perf_counter() - begin))
    one = min if least else statistics.median
    return {name: one(values) for name, values in times.items()}
