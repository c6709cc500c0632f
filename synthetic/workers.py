"""Work done in several processes and handed back in order, without running far ahead of whoever takes it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import joblib

Result = TypeVar("Result")
AHEAD = 32  # pieces a worker may be ahead of the taker: joblib itself would make everything at once and let it pile up


def in_order(
    make: Callable[..., Result], items: Sequence[tuple[Any, ...]], workers: int
) -> Generator[Result, None, None]:
    """``make(*item)`` of every item, in order, through whichever joblib backend is in force."""
    window = AHEAD * workers
    with joblib.Parallel(n_jobs=min(workers, len(items)), return_as="generator") as parallel:
        for start in range(0, len(items), window):
            jobs = (joblib.delayed(make)(*item) for item in items[start : start + window])
            with closing(parallel(jobs)) as results:
                yield from results
