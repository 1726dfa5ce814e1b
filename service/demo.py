"""The whole product on a laptop: Titanic passengers from one table, their survival in another."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
from rich.console import Console
from rich.table import Table

from mlsys.clients import open_clients
from mlsys.errors import Unavailable
from mlsys.frame import FrameKind, to_frame
from mlsys.local import (
    DATASET,
    PROJECT,
    LocalServers,
    ends_with_us,
    free_ports,
    load_samples,
    local_servers,
    sample,
)
from mlsys.names import Environment
from mlsys.progress import row_bar
from mlsys.publish import publish_model
from mlsys.settings import Settings
from service.client import predict
from service.contract import PredictRequest

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

MODEL = "titanic-survival"
FEATURES = ["Pclass", "Sex", "Age", "SibSp", "Parch", "Fare", "Embarked"]
_START_SECONDS = 60


def train() -> Pipeline:
    """Fits the sample model on `titanic_train`: impute, scale, one-hot, random forest."""
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    passengers = to_frame(sample("titanic_train"), FrameKind.PANDAS)
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    # One imputer a type: integers and strings in one would have none that fills in both.
    columns = make_column_transformer(
        (numbers, ["Age", "SibSp", "Parch", "Fare"]),
        (_categories(), ["Pclass"]),
        (_categories(), ["Sex", "Embarked"]),
    )
    forest = RandomForestClassifier(n_estimators=200, min_samples_leaf=3, random_state=0)
    # The labels' own dtype is what the predictions have: plain integers, not nullable ones.
    return make_pipeline(columns, forest).fit(
        passengers[FEATURES], passengers["Survived"].astype("int64")
    )


def _categories() -> Pipeline:
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    return make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
    )


def upload(settings: Settings, model: Pipeline) -> str:
    """Publishes the sample model in dev's bucket; returns where."""
    published = publish_model(
        model,
        MODEL,
        rows=to_frame(sample("titanic_train"), FrameKind.PANDAS),
        target="Survived",
        id_columns=["PassengerId"],
        settings=settings,
    )
    return published.uri


@contextmanager
def running_service(servers: LocalServers) -> Iterator[str]:
    """The service as its own process on a free port, by the documented command; yields its URL."""
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            ends_with_us([*command, "--port", str(port)]),
            env=servers.environ(),
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, or for the command that it runs.
        ) as process,
    ):
        try:
            _wait_until_healthy(url, process, log)
            yield url
        finally:
            process.terminate()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            httpx2.get(f"{url}/health", timeout=5).raise_for_status()
        except httpx2.HTTPError:
            time.sleep(0.05)  # A process has no event for "I listen now".
        else:
            return
    log.seek(0)
    raise Unavailable(f"The service did not start:\n{log.read().decode()[-2000:]}")


def request() -> PredictRequest:
    """The demo's call: the 262 passengers that the model has not seen."""
    return PredictRequest(
        env=Environment.DEV,
        input_table=f"{PROJECT}.{DATASET}.titanic_test",
        output_table=f"{PROJECT}.{DATASET}.titanic_scored",
        model_name=MODEL,
        model_version="latest",
    )


def demo(console: Console) -> None:
    """Runs the demo from the empty laptop to the printed predictions; leaves nothing running."""
    begun = time.monotonic()
    with local_servers() as servers:
        settings = servers.settings()
        _done(console, "BigQuery and Cloud Storage are up", servers.bigquery, servers.storage)
        tables = anyio.run(load_samples, settings)
        _done(console, "Titanic is loaded", *map(str, tables))
        uri = upload(settings, train())
        _done(console, "A random forest is trained and uploaded", uri)
        with running_service(servers) as url:
            _done(console, "The service is up", f"{url}/docs")
            wanted = request()
            console.print(f"\n[bold]GET {url}/predict[/]")
            for name, value in wanted.model_dump(mode="json", exclude_none=True).items():
                console.print(f"    {name} = {value}", style="cyan", highlight=False)
            with row_bar("predicting", console=console, keep=True) as show:
                result = predict(url, wanted, progress=lambda e: show(e.rows_done, e.rows_total))
        console.print(f"  {result.message}\n")
        anyio.run(_show, console, settings, wanted)
    console.print(f"Done in {time.monotonic() - begun:.0f} s; nothing is left running.\n")
    console.print(_NEXT)


def _done(console: Console, what: str, *details: str) -> None:
    console.print(f"[green]✓[/] {what}")
    for detail in details:
        console.print(f"    {detail}", style="dim", highlight=False)


async def _show(console: Console, settings: Settings, wanted: PredictRequest) -> None:
    async with open_clients(settings) as clients:

        def rows(sql: str) -> list[Any]:
            return list(clients.bigquery.query(sql).result())

        joined = f"`{wanted.output_table}` JOIN `{wanted.input_table}` USING (PassengerId)"
        passengers = await anyio.to_thread.run_sync(
            rows,
            "SELECT PassengerId, Sex, Age, Pclass, Survived, PredictionProbability "
            f"FROM {joined} ORDER BY PassengerId LIMIT 8",
        )
        rates = await anyio.to_thread.run_sync(
            rows,
            "SELECT Sex, Pclass, COUNT(*) AS n, AVG(Survived) AS rate "
            f"FROM {joined} GROUP BY Sex, Pclass ORDER BY Sex, Pclass",
        )
    console.print(_passengers(passengers))
    console.print(_rates(rates))


def _passengers(rows: list[Any]) -> Table:
    table = Table(title="The first passengers", title_justify="left")
    for name in ("Passenger", "Sex", "Age", "Class", "Survived", "Probability"):
        table.add_column(name, justify="left" if name == "Sex" else "right")
    for row in rows:
        age = "" if row.Age is None else f"{row.Age:.0f}"
        survived = "[green]yes[/]" if row.Survived else "[red]no[/]"
        table.add_row(
            str(row.PassengerId),
            row.Sex,
            age,
            str(row.Pclass),
            survived,
            f"{row.PredictionProbability:.2f}",
        )
    return table


def _rates(rows: list[Any]) -> Table:
    table = Table(title="Predicted survival", title_justify="left", show_footer=True)
    total = sum(row.n for row in rows)
    survived = sum(row.n * row.rate for row in rows)
    table.add_column("Sex", footer="all")
    table.add_column("Class", justify="right")
    table.add_column("Passengers", justify="right", footer=str(total))
    table.add_column("Survive", justify="right", footer=f"{survived / total:.0%}")
    for row in rows:
        table.add_row(row.Sex, str(row.Pclass), str(row.n), f"{row.rate:.0%}")
    return table


_NEXT = """[bold]What to try next[/]
  make local             the same servers kept up, with the tables and the model
  make serve             the service on port 8080, on what `make local` prints
  mlsys predict --help   any table and any model, from the command line
  README.md              the rest"""
