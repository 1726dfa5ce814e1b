"""A bar where somebody waits: in a terminal or a notebook, and nowhere else."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from mlsys.progress import row_bar, wait_bar
from tests.service.support import process_environment

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PATIENCE = 30


class Terminal:
    """A pseudo-terminal, and what appears on it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._ours, 65536):
                self._seen += data
        except OSError:
            pass  # The last one who had it open has closed it.

    def shown(self) -> str:
        """All that was written, once everybody has closed it."""
        os.close(self.theirs)
        self._reader.join()
        os.close(self._ours)
        return self._seen.decode()


BAR = """
import sys
from mlsys.progress import row_bar

with row_bar("reading") as show:
    show(500, 1000)
    print("a line of mine")
    print("a complaint of mine", file=sys.stderr)
"""


def test_a_bar_on_a_terminal_is_seen_and_gone_again_at_the_end() -> None:
    terminal = Terminal()
    env = process_environment(TERM="xterm", COLUMNS="100")
    subprocess.run(
        [sys.executable, "-c", BAR], env=env, stdout=terminal.theirs, stderr=terminal.theirs
    )

    shown = terminal.shown()
    assert "reading" in shown
    assert "500/1000" in shown
    # What the loop's body says stands on lines of its own.
    lines = [CONTROL.sub("", line).strip() for line in re.split(r"[\r\n]+", shown)]
    assert "a line of mine" in lines
    assert "a complaint of mine" in lines
    # The line of the bar is erased.
    assert re.search(r"\x1b\[2K\W*$", shown)


def test_what_a_loop_prints_into_a_file_stays_out_of_the_terminal() -> None:
    terminal = Terminal()
    env = process_environment(TERM="xterm", COLUMNS="100")
    done = subprocess.run(
        [sys.executable, "-c", BAR], env=env, stdout=subprocess.PIPE, stderr=terminal.theirs
    )

    assert done.stdout == b"a line of mine\n"
    shown = terminal.shown()
    assert "500/1000" in shown
    assert "a line of mine" not in shown


def test_where_nobody_looks_nothing_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BAR], env=process_environment(TERM="xterm"), capture_output=True
    )

    assert done.stdout == b"a line of mine\n"
    assert done.stderr == b"a complaint of mine\n"


def test_bars_may_be_open_at_once_and_closed_in_any_order() -> None:
    code = """
from mlsys.progress import row_bar

first, second = row_bar("first"), row_bar("second")
show_first, show_second = first.__enter__(), second.__enter__()
show_first(1, 2)
show_second(3, 4)
first.__exit__(None, None, None)
show_second(4, 4)
second.__exit__(None, None, None)
with row_bar("third") as show:
    show(5, 6)
print("done")
"""
    terminal = Terminal()
    env = process_environment(TERM="xterm", COLUMNS="100")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=terminal.theirs
    )

    assert done.returncode == 0
    assert done.stdout == b"done\n"
    shown = terminal.shown()
    for bar in ("first", "second", "third"):
        assert bar in shown


def test_a_bar_that_has_not_moved_is_not_kept() -> None:
    paper = io.StringIO()
    with row_bar("predicting", console=Console(file=paper, width=100), keep=True):
        pass

    assert "0/?" not in paper.getvalue()


def test_a_bar_tells_what_is_done_of_what_and_may_stay() -> None:
    paper = io.StringIO()
    with row_bar("writing", console=Console(file=paper, width=100), keep=True) as show:
        show(0)
        show(1234, 5000)

    assert "writing" in paper.getvalue()
    assert "1234/5000" in paper.getvalue()


def test_who_waits_without_rows_sees_how_long() -> None:
    paper = io.StringIO()
    with wait_bar("publishing", console=Console(file=paper, width=100, force_terminal=True)):
        pass

    assert "publishing" in paper.getvalue()
    assert "0:00:00" in paper.getvalue()


def test_the_number_of_rows_may_be_unknown() -> None:
    paper = io.StringIO()
    with row_bar("reading", console=Console(file=paper, width=100), keep=True) as show:
        show(1234, None)

    assert "1234/?" in paper.getvalue()


def test_an_exception_comes_through_and_ends_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    before = threading.enumerate()

    with pytest.raises(ZeroDivisionError), row_bar("reading", console=console) as show:
        show(1, 2)
        raise ZeroDivisionError

    for thread in threading.enumerate():
        if thread not in before:
            thread.join(PATIENCE)
            assert not thread.is_alive()


# Runs its input in a real kernel, and tells what that displays.
KERNEL = """
import json, subprocess, sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)
told = []

def note(message):
    if message["msg_type"] in ("stream", "display_data", "update_display_data", "error"):
        content = message["content"]
        told.append([message["msg_type"], content.get("text") or content.get("data")])

try:
    client.execute_interactive(sys.stdin.read(), output_hook=note, timeout=100)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
print(json.dumps(told))
"""
IN_A_NOTEBOOK = """
import time, warnings
warnings.simplefilter("error")
from mlsys import progress

with progress.row_bar("reading") as show:
    show(1, 2)
progress._NOTEBOOK_SECONDS = 0.1
with progress.row_bar("writing") as show:
    show(500, 1000)
    time.sleep(1)
print("done")
with progress.wait_bar("listing"):
    time.sleep(1)
"""


def test_in_a_notebook_a_bar_is_displayed_where_one_waits_and_emptied_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=IN_A_NOTEBOOK,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    told = json.loads(done.stdout)
    at = told.index(["stream", "done\n"])
    rows, time_alone = (told[:at], "writing", "500/1000"), (told[at + 1 :], "listing", "0:00:0")
    for shown, what, how_far in (rows, time_alone):
        (first, bar), *updates = shown
        assert first == "display_data"
        assert what in bar["text/plain"]
        assert how_far in bar["text/plain"]
        assert len(updates) > 1  # It goes on while nothing is told.
        assert updates[-1] == ["update_display_data", {}]
