"""Time of forms on a CPU, none of which pays for the threads of another."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

PAUSE = 0.05  # seconds: OpenBLAS's threads spin for about 40 ms after a product of theirs
CALLS = 3


def medians(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each, in turn, so that a drifting machine hits all of them alike.

    In its turn each is called a few times in a row, as in a network that has this form alone.

    Args:
      runs: that compute in NumPy: what they return is there.
      repeats: turns of each.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            time.sleep(PAUSE)
            run()
            for _ in range(CALLS):
                begin = time.perf_counter()
                run()
                found.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(found) for found in times]
