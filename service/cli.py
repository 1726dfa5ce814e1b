"""The command `mlsys`."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlsys.errors import MlsysError
from mlsys.names import Environment
from service.contract import RunInfo, RunState

app = typer.Typer(
    name="mlsys",
    help="Batch predictions: a BigQuery table in, a scikit-learn model, a BigQuery table out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str | None,
    typer.Option(
        help="Where the service is; without it, this process does it.", envvar="MLSYS_URL"
    ),
]
Token = Annotated[
    str | None, typer.Option(help="An identity token for Cloud Run.", envvar="MLSYS_TOKEN")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

# For schedulers: what may succeed if it is tried again (sysexits.h calls it EX_TEMPFAIL).
_TRY_AGAIN = 75

# As a shell says that a command could not be run, is not there, or was ended by a signal.
# https://pubs.opengroup.org/onlinepubs/9799919799/utilities/V3_chap02.html#tag_19_08_02
_NOT_RUN, _NOT_FOUND, _SIGNALLED = 126, 127, 128

# What a person reads goes to stderr, what a program reads to stdout.
_console = Console(stderr=True)
_DONE, _NOTED, _FAILED = "[green]✓[/]", "[yellow]![/]", "[red]✗[/]"
# Of a table that is not for a terminal, so that no name in it is cut into lines.
_WIDE = 1000


def _say(mark: str, text: str) -> None:
    """One line, however long: a log entry or a match of grep is a line."""
    _console.print(f"{mark} {escape(text)}", highlight=False, soft_wrap=True)


def _show(table: Table) -> None:
    console = Console()
    console.print(table, width=None if console.is_terminal else _WIDE, crop=console.is_terminal)


def _plain_errors[**P, T](command: Callable[P, T]) -> Callable[P, T]:
    """Ends a command with a message: status 75 where trying again may help, else 1."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                where = ".".join(map(str, each["loc"]))
                _say(_FAILED, f"{where}: {each['msg'].removeprefix('Value error, ')}")
        except MlsysError as error:
            told = " ".join([str(error), *getattr(error, "__notes__", [])])
            _say(_FAILED, told)
            if getattr(error, "retry_after", None) is not None:
                raise typer.Exit(_TRY_AGAIN) from None
        raise typer.Exit(1)

    return wrapped


@_plain_errors
def _own_env() -> Environment:
    # Of `.env` as well, which an option's `envvar` does not know.
    from mlsys.settings import Settings

    return Settings().mlsys_env or Environment.DEV


Env = Annotated[
    Environment,
    typer.Option(
        help="Whose models.", default_factory=_own_env, show_default="MLSYS_ENV, else dev"
    ),
]


@app.command()
@_plain_errors
def demo() -> None:
    """See Titanic passengers predicted, from table to table, on local servers."""
    from service.demo import demo

    demo(Console())


@app.command(context_settings={"ignore_unknown_options": True})
@_plain_errors
def local(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="Run this instead of waiting, with the service up as well."),
    ] = None,
) -> None:
    """Keep the local servers up, with the sample tables and model in them, until Ctrl-C.

    Prints the settings to export on stdout. With a command, such as `mlsys local -- jupyter lab`,
    that runs with the settings exported and the service at MLSYS_URL, gets the signals, and ends it
    all with its status.
    """
    import anyio

    from mlsys.local import load_samples, local_servers
    from service.demo import running_service, train, upload

    # Or SIGTERM would end this process at once, and leave what it has started behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(_SIGNALLED + number))
    with local_servers() as servers:
        settings = servers.settings()
        tables = anyio.run(load_samples, settings)
        uri = upload(settings, train())
        if command:
            with running_service(servers) as url:
                environ = servers.environ() | {"MLSYS_URL": url}
                raise typer.Exit(_status(command, environ))
        told_to_stop = _on_signal()
        for name, value in servers.env.items():
            print(f"export {name}={value}", flush=True)
        _console.print("\nLoaded:", *map(str, tables), uri, sep="\n  ", highlight=False)
        _console.print("\nExport the settings above in another terminal. Ctrl-C stops the servers.")
        told_to_stop.wait()
        _console.print("Stopping.")


def _status(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command to its end, with signals handed on; its status as a shell has it."""
    try:
        process = subprocess.Popen(command, env=environ)
    except OSError as error:
        _say(_FAILED, f"{command[0]}: {error.strerror}")
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUN
    at_a_terminal = sys.stdin.isatty()

    def hand_on(number: int, _: FrameType | None) -> None:
        # Of Ctrl-C at a terminal the command knows already.
        if number != signal.SIGINT or not at_a_terminal:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    status = process.wait()
    return status if status >= 0 else _SIGNALLED - status


def _on_signal() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set from now on, instead of interrupting what runs."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    return told


@app.command()
@_plain_errors
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65_535)] = 8080,
) -> None:
    """Serve predictions over HTTP, with the settings of the environment or `.env`."""
    import uvicorn

    from mlsys.settings import Settings

    Settings()  # Or what is wrong with them would be told from inside the server.
    uvicorn.run("service.app:create_app", factory=True, host=host, port=port, log_config=None)


@app.command()
@_plain_errors
def predict(
    input_table: Annotated[str, typer.Argument(help="project.dataset.table to read.")],
    output_table: Annotated[str, typer.Argument(help="project.dataset.table to append to.")],
    model: Annotated[str, typer.Option(help="The model's name.")],
    env: Env,
    version: Annotated[str, typer.Option(help="v1, v2, … or latest.")] = "latest",
    # The tries of a Cloud Run job have the execution's name in common, and nothing else.
    run_id: Annotated[
        str | None, typer.Option(help="Your name for this run.", envvar="CLOUD_RUN_EXECUTION")
    ] = None,
    id_column: Annotated[
        list[str] | None, typer.Option(help="A column to carry to the output; repeatable.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="A row filter in SQL.")] = None,
    chunk_rows: Annotated[int | None, typer.Option(help="Rows a predict call gets.")] = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Predict a table, through a running service or in this process, with a progress bar."""
    from mlsys.progress import row_bar
    from service.contract import PredictRequest, ProgressEvent

    wanted = PredictRequest(
        env=env,
        input_table=input_table,
        output_table=output_table,
        model_name=model,
        model_version=version,
        run_id=run_id,
        id_columns=id_column,
        where=where,
        chunk_rows=chunk_rows,
    )
    with row_bar("predicting", console=_console, keep=True) as show:

        def progress(event: ProgressEvent) -> None:
            show(event.rows_done, event.rows_total)

        if url is not None:
            from service.client import predict

            result = predict(url, wanted, progress=progress, token=token)
        else:
            result = _here("predict_here", wanted, progress)
    _answer(result, result.message, as_json)


@app.command()
@_plain_errors
def runs(
    env: Env,
    run_id: Annotated[str | None, typer.Argument(help="This one; by default the latest.")] = None,
    state: Annotated[RunState | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show the latest runs, or one with its result or its error."""
    from service import client
    from service.contract import RunPage, RunsRequest

    if run_id is not None:
        here = url is None
        one = _here("run_here", run_id, env) if here else client.run(url, run_id, env, token=token)
        page = RunPage(runs=[one])
    else:
        wanted = RunsRequest(env=env, state=state, limit=limit)
        page = _here("runs_here", wanted) if url is None else client.runs(url, wanted, token=token)
    if as_json:
        print(page.model_dump_json())
        return
    _show(_runs_table(page.runs))
    for each in page.runs if run_id else ():
        if each.error is not None:
            _say(_FAILED, each.error.detail)


def _runs_table(found: Sequence[RunInfo]) -> Table:
    table = Table()
    table.add_column("Run", no_wrap=True)
    for header in ("State", "Model", "Output", "Rows", "Started (UTC)"):
        table.add_column(header, overflow="fold")  # A name that is cut short can't be copied.
    for each in found:
        table.add_row(
            each.run_id,
            f"{each.state}, abandoned" if each.abandoned else each.state,
            f"{each.request.model_name} {each.model_version}",
            each.request.output_table,
            f"{each.result.rows if each.result else each.rows_done:,}",
            f"{each.started_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
        )
    return table


def _here(function: str, *arguments: Any) -> Any:
    """Runs an asynchronous function of the engine with the settings of the environment."""
    import anyio

    from mlsys.settings import Settings
    from service import engine
    from service.logs import configure_logging

    configure_logging("ERROR")
    return anyio.run(getattr(engine, function), Settings(), *arguments)


def _answer(result: BaseModel, message: str, as_json: bool) -> None:
    if as_json:
        print(result.model_dump_json())
    else:
        _say(_DONE, message)


@app.command()
@_plain_errors
def register(env: Env, url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Bring the registry table up to date with an environment's bucket."""
    if url is not None:
        from service.client import register

        result = register(url, env, token=token)
    else:
        result = _here("register_here", env)
    for each in result.registered:
        if each.problem is not None:
            _say(_NOTED, f"{each.name} {each.version}: {each.problem}")
    for each in result.skipped:
        _say(_NOTED, f"{each.path}: {each.reason}")
    counts = result.counts
    told = f"{counts.registered} models registered in {result.table}, {counts.deleted} gone."
    _answer(result, told, as_json)


@app.command()
@_plain_errors
def publish(
    model: Annotated[Path, typer.Argument(help="The pickle of a fitted estimator.", exists=True)],
    name: Annotated[str, typer.Argument(help="The model's name.")],
    rows: Annotated[
        Path,
        typer.Option(help="A few rows of its features, as .parquet or .csv.", exists=True),
    ],
    env: Env,
    version: Annotated[str, typer.Option(help="v1, v2, … or next.")] = "next",
    target: Annotated[
        list[str] | None, typer.Option(help="The prediction's name; repeatable.")
    ] = None,
    id_column: Annotated[
        list[str] | None, typer.Option(help="A column that the output carries; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a model with a complete metadata.json. Loads the pickle, so trust it first."""
    from mlsys.publish import publish_model

    published = publish_model(
        _estimator(model),
        name,
        version,
        rows=_rows(rows),
        target=target[0] if target and len(target) == 1 else target,
        id_columns=id_column,
        env=env,
    )
    _answer(published.metadata, f"Published as {published.uri}.", as_json)


def _estimator(path: Path) -> Any:
    import joblib

    from mlsys.errors import InvalidRequest, redacted

    try:
        return joblib.load(path)
    except Exception as error:  # A pickle may raise anything.
        said = redacted(f"{type(error).__name__}: {error}")
        raise InvalidRequest(
            f"{path.name} can't be unpickled ({said}). Save a fitted estimator with pickle or "
            "joblib, of the versions that are installed here; classes of your own belong in a "
            "package that is installed here and in the service."
        ) from error


def _rows(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from mlsys.errors import InvalidRequest, redacted
    from mlsys.frame import FrameKind, to_arrow, to_frame

    # As BigQuery loads a file: what is not there is NULL, whatever the column's type.
    nulls = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
    readers = {
        ".csv": partial(pyarrow.csv.read_csv, convert_options=nulls),
        ".parquet": pyarrow.parquet.read_table,
    }
    if path.suffix not in readers:
        raise InvalidRequest(f"{path.name} is neither .parquet nor .csv.")
    try:
        read = readers[path.suffix](path)
        _ = read.column_names  # They are decoded only now.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path.name} can't be read: {redacted(str(error))}.") from error
    return to_frame(to_arrow(read), FrameKind.PANDAS)


@app.command()
@_plain_errors
def models(env: Env, as_json: AsJson = False) -> None:
    """List the models in an environment's bucket."""
    import json

    from mlsys.gcs import gcs_list_blobs
    from mlsys.names import parse_artifact_path, version_number
    from mlsys.settings import Settings

    bucket = Settings().model_bucket(env)
    found: dict[str, list[str]] = {}
    for parsed in map(parse_artifact_path, gcs_list_blobs(bucket)):
        if parsed is not None:
            found.setdefault(parsed[0], []).append(parsed[1])
    versions = {name: sorted(each, key=version_number) for name, each in sorted(found.items())}
    if as_json:
        print(json.dumps(versions))
        return
    table = Table("Model", "Latest", "Versions", title=f"gs://{bucket}", title_justify="left")
    for name, each in versions.items():
        table.add_row(name, each[-1], ", ".join(each))
    _show(table)
