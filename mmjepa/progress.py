"""Progress on standard error: a bar with count, rate and time left, so that standard output stays free for results."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False)
Item = TypeVar("Item")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "-/s", style="progress.data.speed")


@contextmanager
def bar(label: str, total: int | None) -> Iterator["Bar"]:
    """A progress bar over ``total`` items. Without a terminal it prints one line at the start and one at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False, refresh_per_second=4) as progress:
        yield Bar(progress, progress.add_task(label, total=total, note=""))


class Bar:
    """Handle of one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Move on by ``n`` items; ``note`` is shown behind the time left."""
        self._progress.update(self._task, advance=n)
        if note is not None:
            self._progress.update(self._task, note=note)


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar."""
    with bar(label, total if total is not None else (len(items) if hasattr(items, "__len__") else None)) as handle:  # type: ignore[arg-type]
        for item in items:
            yield item
            handle.advance()


def say(line: str) -> None:
    """One line to a person, on standard error."""
    console.print(line, markup=False, soft_wrap=True)
