"""A progress bar for whoever waits: in a terminal or a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

type ShowRows = Callable[[int, int | None], None]

# In a notebook a bar appears only where one really waits: what is once displayed leaves a trace in
# the notebook's file.
_NOTEBOOK_SECONDS = 2.0
_REDRAW_SECONDS = 0.2


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"rows, {speed:,.0f} a second" if speed else "rows")


@contextmanager
def row_bar(what: str, *, console: Console | None = None, keep: bool = False) -> Iterator[ShowRows]:
    """Draws a bar of rows while the block runs.

    Args:
        what: what is being done, such as `reading`.
        console: where to draw, whoever looks; by default stderr, and only if somebody does.
        keep: leave the bar standing at the end, if it has moved.

    Yields:
        A function to call with the rows done, and the rows in all or None where that is unknown.
    """
    on = console or Console(stderr=True)
    if on.is_jupyter:
        with _notebook_bar(what, keep) as show:
            yield show
        return
    unseen = console is None and not on.is_terminal
    with Progress(
        *_columns(),
        console=on,
        disable=unseen,
        # Or what the block prints into a file or a pipe would go to the terminal.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task(what, total=None)

        def show(done: int, total: int | None = None) -> None:
            progress.update(task, completed=done, total=total)

        try:
            yield show
        finally:
            progress.live.transient = not (keep and _moved(progress))


def _moved(progress: Progress) -> bool:
    """Whether a bar has anything to show: a run that is refused, or replayed, tells of no rows."""
    return any(task.completed or task.total is not None for task in progress.tasks)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RowsPerSecond(),
        TimeRemainingColumn(),
    )


@contextmanager
def _notebook_bar(what: str, keep: bool) -> Iterator[ShowRows]:
    # Rich's own display needs ipywidgets, whose outputs are lost with the kernel, and warns in the
    # middle of the notebook where they are not installed. So rich draws, and IPython displays.
    paper = Console(file=io.StringIO(), force_jupyter=False, color_system=None, width=80)
    progress = Progress(*_columns(), console=paper, auto_refresh=False)
    task = progress.add_task(what, total=None)
    handle: Any = None
    due = time.monotonic() + _NOTEBOOK_SECONDS

    def draw() -> None:
        nonlocal handle, due
        due = time.monotonic() + _REDRAW_SECONDS
        with paper.capture() as drawn:
            paper.print(progress)
        handle = _put({"text/plain": drawn.get().rstrip()}, handle)

    def show(done: int, total: int | None = None) -> None:
        progress.update(task, completed=done, total=total)
        if time.monotonic() >= due:
            draw()

    try:
        yield show
    finally:
        if keep and _moved(progress):
            draw()
        elif handle is not None:
            _put({}, handle)


def _put(bundle: dict[str, str], handle: Any) -> Any:
    """Displays a bundle, in the place of what `handle` displays where there is one."""
    from IPython.display import display

    if handle is None:
        return display(bundle, raw=True, display_id=True)
    handle.update(bundle, raw=True)
    return handle
