"""A progress bar for whoever waits: in a terminal or a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
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
    TimeElapsedColumn,
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
    columns = MofNCompleteColumn(), _RowsPerSecond(), TimeRemainingColumn()
    with _bar(what, columns, console, keep) as progress:

        def show(done: int, total: int | None = None) -> None:
            progress.update(progress.task_ids[0], completed=done, total=total)

        yield show


@contextmanager
def wait_bar(what: str, *, console: Console | None = None) -> Iterator[None]:
    """Draws a bar that tells only of time, while the block runs. Arguments are as of `row_bar`."""
    with _bar(what, (TimeElapsedColumn(),), console, keep=False):
        yield


@contextmanager
def _bar(
    what: str, columns: Sequence[ProgressColumn], console: Console | None, keep: bool
) -> Iterator[Progress]:
    on = console or Console(stderr=True)
    columns = TextColumn("  {task.description}", markup=False), BarColumn(), *columns
    if on.is_jupyter:
        with _notebook_bar(what, columns, keep) as progress:
            yield progress
        return
    unseen = console is None and not on.is_terminal
    with Progress(
        *columns,
        console=on,
        disable=unseen,
        # Or what the block prints into a file or a pipe would go to the terminal.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        progress.add_task(what, total=None)
        try:
            yield progress
        finally:
            progress.live.transient = not (keep and _moved(progress))


def _moved(progress: Progress) -> bool:
    """Whether a bar has anything to show: a run that is refused, or replayed, tells of no rows."""
    return any(task.completed or task.total is not None for task in progress.tasks)


@contextmanager
def _notebook_bar(what: str, columns: Sequence[ProgressColumn], keep: bool) -> Iterator[Progress]:
    # Rich's own display needs ipywidgets, whose outputs are lost with the kernel, and warns in the
    # middle of the notebook where they are not installed. So rich draws, and IPython displays.
    paper = Console(file=io.StringIO(), force_jupyter=False, color_system=None, width=80)
    progress = Progress(*columns, console=paper, auto_refresh=False)
    progress.add_task(what, total=None)
    handle: Any = None
    over = threading.Event()

    def draw() -> None:
        nonlocal handle
        with paper.capture() as drawn:
            paper.print(progress)
        handle = _put({"text/plain": drawn.get().rstrip()}, handle)

    def draw_while_it_takes() -> None:
        wait = _NOTEBOOK_SECONDS
        while not over.wait(wait):
            draw()
            wait = _REDRAW_SECONDS

    # A thread, as the block may wait for something that tells of no progress.
    drawing = threading.Thread(target=draw_while_it_takes, daemon=True)
    drawing.start()
    try:
        yield progress
    finally:
        over.set()
        drawing.join()
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
