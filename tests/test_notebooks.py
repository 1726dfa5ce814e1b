"""The notebooks: they run, they are fit to be committed, and the library keeps them clean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from rich.console import Console
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.tree import DecisionTreeClassifier
from traitlets.config import Config

from mlsys import progress
from mlsys.errors import InvalidRequest
from mlsys.names import check_model_name
from mlsys.publish import publish_model

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 1_000_000
PATIENCE = 30
RUN_SECONDS = 600

# Where people's files are, and servers that are up for as long as one run.
OF_ONE_MACHINE = re.compile(r"/(?:home|Users|root|tmp)/|site-packages|\.venv|127\.0\.0\.1:\d+")

for_each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(path: Path) -> Iterator[Any]:
    for cell in nbformat.read(path, as_version=4).cells:
        yield from cell.get("outputs", ())


def shown_text(output: Any) -> str:
    texts = [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *texts])


def check_clean(path: Path) -> None:
    for output in outputs(path):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert "Warning" not in shown_text(output)
        assert not OF_ONE_MACHINE.search(shown_text(output))


@for_each_notebook
def test_a_notebook_is_named_for_its_model_and_its_purpose(path: Path) -> None:
    assert check_model_name(path.stem).count("-") >= 1


@for_each_notebook
def test_a_notebook_is_committed_with_outputs_and_nothing_else_of_its_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert any(outputs(path)), "Run it and keep the outputs."
    assert path.stat().st_size < MOST_BYTES
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert cell.get("execution_count") is None
    check_clean(path)


@for_each_notebook
def test_a_notebook_runs_from_top_to_bottom_on_local_servers(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    mlsys = [sys.executable, "-c", "from service.cli import app; app()"]
    # The copy lies outside of the project, so its pytest options don't apply.
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:bqemulator", "-p", "no:cacheprovider"]
    # Counting the lines that a notebook runs says nothing, and takes as long as the notebook.
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    run = subprocess.run(
        [*mlsys, "local", "--", *pytest_, "--nbmake", "--overwrite", str(copy)],
        cwd=ROOT,
        env=unmeasured,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    check_clean(copy)


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """IPython as in a notebook: what is displayed is kept in `display_pub.outputs`."""
    config = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell.instance(config=config, display_pub_class=CapturingDisplayPublisher)
    yield shell
    InteractiveShell.clear_instance()


def test_a_short_wait_leaves_nothing_in_a_notebook(shell: InteractiveShell) -> None:
    with progress.row_bar("reading", console=Console(force_jupyter=True)) as show:
        show(5, 10)
    assert shell.display_pub.outputs == []


def test_a_long_wait_shows_a_bar_in_a_notebook_and_takes_it_away(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_NOTEBOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0.01)
    outputs = shell.display_pub.outputs

    def wait_for(told: str) -> None:
        end = time.monotonic() + PATIENCE
        while not any(told in each["data"].get("text/plain", "") for each in list(outputs)):
            assert time.monotonic() < end, f"{told} was not displayed"
            time.sleep(0.01)

    with progress.row_bar("reading", console=Console(force_jupyter=True)) as show:
        show(5, 10)
        wait_for("5/10 rows")
        show(6, 10)
        wait_for("6/10 rows")
    first, *updates = outputs
    assert not first.get("update")
    assert all(each["update"] for each in updates)
    assert updates[-1]["data"] == {}
    assert len({each["transient"]["display_id"] for each in outputs}) == 1


def test_a_bar_that_is_kept_stands_in_the_notebook(shell: InteractiveShell) -> None:
    with progress.row_bar("writing", console=Console(force_jupyter=True), keep=True) as show:
        show(10, 10)
    [bar] = shell.display_pub.outputs
    assert "10/10 rows" in bar["data"]["text/plain"]


def of_a_notebook(rows: Any) -> Any:
    return rows


def unnamed(rows: Any) -> Any:
    return rows


of_a_notebook.__module__ = unnamed.__module__ = "__main__"
unnamed.__qualname__ = "<lambda>"


@pytest.mark.parametrize("step", [of_a_notebook, unnamed], ids=["a function", "a lambda"])
def test_a_model_that_only_the_notebook_could_load_is_not_published(step: Any) -> None:
    rows = pd.DataFrame({"Age": [1.0, 2.0]})
    model = make_pipeline(FunctionTransformer(step), DecisionTreeClassifier()).fit(rows, [0, 1])
    with pytest.raises(InvalidRequest, match=f"needs {re.escape(step.__qualname__)}, which only"):
        publish_model(model, "some-model", rows=rows)


def test_a_model_that_can_not_be_pickled_is_refused_in_plain_words() -> None:
    rows = pd.DataFrame({"Age": [1.0, 2.0]})
    model = DecisionTreeClassifier().fit(rows, np.array([0, 1]))
    model.notes_ = (each for each in "ab")
    with pytest.raises(InvalidRequest, match="can't be pickled: cannot pickle 'generator' object"):
        publish_model(model, "some-model", rows=rows)
