"""The command `mlsys`: run as its users do, as a process, and where it says no in this one."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder
from typer.testing import CliRunner, Result

from mlsys.local import LocalServers
from service import cli
from tests.conftest import Client, Cloud
from tests.service.support import PATIENCE, server_that_says

MLSYS = str(Path(sys.executable).with_name("mlsys"))


# A wide terminal without colours.
PLAIN = {"COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(autouse=True)
def plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles look for colours once, when they are made."""
    plain = Console(stderr=True, width=200, no_color=True, force_terminal=False)
    monkeypatch.setattr(cli, "_console", plain)


def mlsys(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MLSYS, *arguments],
        env=os.environ | PLAIN | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def mlsys_here(*arguments: str, **env: str) -> Result:
    """The same in this process, which has imported already all that it needs."""
    return CliRunner().invoke(cli.app, arguments, env=PLAIN | env)


@pytest.fixture(scope="module")
def scored(cloud: Cloud) -> tuple[str, str]:
    """An input table of ten rows and the name of a model that doubles `x`."""
    rows = pa.table({"id": range(10), "x": [float(i) for i in range(10)]})
    frame = rows.select(["x"]).to_pandas()
    return cloud.put(rows), cloud.publish(LinearRegression().fit(frame, frame["x"] * 2))


def test_the_demo_predicts_every_passenger_and_leaves_nothing_running() -> None:
    done = mlsys("demo")

    assert done.returncode == 0, done.stderr
    assert "262 rows predicted by titanic-survival v1" in done.stdout
    assert "262/262 rows" in done.stdout
    assert re.search(r"1048 │ male +│ +38 │ +3 │ +no │ +0\.\d\d", done.stdout)
    assert re.search(r"all +│ +│ +262 │ +\d\d%", done.stdout)
    [url] = re.findall(r"(http://\S+)/docs", done.stdout)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


def test_local_prints_settings_that_work_and_stops_with_all_it_started() -> None:
    with subprocess.Popen(
        [MLSYS, "local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            exports = [process.stdout.readline() for _ in LocalServers("", "", "").env]
            printed = dict(re.findall(r"export (\w+)=(\S+)", "".join(exports)))
            servers = LocalServers(
                bigquery=printed["BIGQUERY_EMULATOR_HOST"],
                bigquery_storage=printed["BIGQUERY_STORAGE_EMULATOR_HOST"],
                storage=printed["STORAGE_EMULATOR_HOST"],
            )
            assert servers.env == printed
            started = psutil.Process(process.pid).children(recursive=True)
            tables = httpx2.get(
                f"{servers.bigquery}/bigquery/v2/projects/mlsys-local/datasets/mlsys_dev/tables",
                timeout=60,
            ).json()
            objects = httpx2.get(
                f"{servers.storage}/storage/v1/b/mlsys-models-dev/o", timeout=60
            ).json()
        finally:
            process.send_signal(signal.SIGINT)
        told = process.stderr.read().splitlines()
        assert process.wait(timeout=30) == 0

    names = {table["tableReference"]["tableId"] for table in tables["tables"]}
    assert {"titanic_train", "titanic_test"} <= names
    assert {f"  mlsys-local.mlsys_dev.{name}" for name in names} <= set(told)
    assert "titanic-survival/v1/model.pkl" in {item["name"] for item in objects["items"]}
    assert started
    assert not [child for child in started if child.is_running()]


def test_predict_prints_the_result_as_json(
    service: Client, cloud: Cloud, scored: tuple[str, str]
) -> None:
    table, model = scored
    output = cloud.new_table()

    done = mlsys(
        "predict",
        table,
        output,
        f"--model={model}",
        f"--url={service.base_url}",
        "--where=id < 5",
        "--id-column=id",
        "--run-id=from-the-cli",
        "--json",
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["rows"], result["run_id"]) == (5, "from-the-cli")
    assert [row["Prediction"] for row in cloud.rows(output, order_by="id")] == pytest.approx(
        [0, 2, 4, 6, 8]
    )


def test_predict_tells_people_what_was_done(
    service: Client, cloud: Cloud, scored: tuple[str, str]
) -> None:
    table, model = scored

    done = mlsys_here(
        "predict", table, cloud.new_table(), f"--model={model}", MLSYS_URL=str(service.base_url)
    )

    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert f"✓ 10 rows predicted by {model} v1" in done.stderr


def test_predict_fails_with_the_problem_and_status_1(
    service: Client, cloud: Cloud, scored: tuple[str, str]
) -> None:
    table, _ = scored

    done = mlsys_here(
        "predict", table, cloud.new_table(), "--model=nobody", f"--url={service.base_url}"
    )

    assert done.exit_code == 1
    assert "✗ Not found: gs://mlsys-models-dev has no model named nobody." in done.stderr


def test_predict_refuses_a_malformed_name_before_it_calls() -> None:
    done = mlsys_here("predict", "not a table", "a.b.c", "--model=m", "--url=http://127.0.0.1:1")

    assert done.exit_code == 1
    assert "✗ input_table: 'not a table' is not a table path." in done.stderr


def test_predict_asks_to_be_tried_again_where_there_is_no_service() -> None:
    done = mlsys_here(
        "predict",
        "my-project.data.input",
        "my-project.data.output",
        "--model=m",
        "--url=http://127.0.0.1:1",
    )

    assert done.exit_code == 75
    assert "✗ No answer from http://127.0.0.1:1 (ConnectError). Is it up?" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "my-project.data.input", "my-project.data.output", "--model=m"],
        ["runs"],
        ["runs", "nightly-7"],
        ["register"],
    ],
)
@pytest.mark.parametrize(
    ("answer", "exit_code", "told"),
    [
        ((200, "text/html", b"<html>Sign in</html>"), 1, "answered 200 OK (text/html)"),
        ((200, "text/event-stream", b"data: hi\n\n"), 1, "answered 200 OK (text/event-stream)"),
        ((403, "text/html", b"<html>Forbidden</html>"), 1, "with --token or MLSYS_TOKEN"),
        ((502, "text/html", b"<html>Bad Gateway</html>"), 75, "502 Bad Gateway (text/html)"),
    ],
)
def test_what_answers_and_is_not_the_service_is_told(
    command: list[str], answer: tuple[int, str, bytes], exit_code: int, told: str
) -> None:
    with server_that_says(*answer) as url:
        done = mlsys_here(*command, f"--url={url}")

    assert done.exit_code == exit_code
    assert done.stderr.strip().startswith(f"✗ {url}/")
    assert told in done.stderr


def test_where_another_try_may_help_it_is_told_with_which_run_id() -> None:
    tables = ["my-project.data.input", "my-project.data.output"]

    with server_that_says(502, "text/html", b"") as url:
        done = mlsys_here("predict", *tables, "--model=m", f"--url={url}", "--run-id=nightly-7")

    assert "Ask again with the run id nightly-7: that never writes twice." in done.stderr


def test_a_url_without_a_scheme_is_not_worth_another_try() -> None:
    tables = ["my-project.data.input", "my-project.data.output"]

    done = mlsys_here("predict", *tables, "--model=m", "--url=127.0.0.1:18765")

    assert done.exit_code == 1
    assert "✗ '127.0.0.1:18765' is not the URL of a service. Write it with its" in done.stderr


@pytest.mark.usefixtures("cloud")  # Which makes the buckets.
def test_a_command_is_for_the_environment_of_the_settings_unless_told_otherwise(
    servers: LocalServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MLSYS_ENV=prod\n")
    monkeypatch.delenv("MLSYS_ENV", raising=False)

    unset = mlsys_here("models", **servers.env)
    by_variable = mlsys_here("models", **servers.env, MLSYS_ENV="staging")
    by_option = mlsys_here("models", "--env=dev", **servers.env, MLSYS_ENV="staging")
    monkeypatch.chdir(tmp_path)
    by_file = mlsys_here("models", **servers.env)
    wrong = mlsys_here("models", **servers.env, MLSYS_ENV="qa")

    buckets = [
        re.findall(r"gs://(\S+)", done.stdout) for done in (unset, by_variable, by_option, by_file)
    ]
    assert buckets == [[f"mlsys-models-{env}"] for env in ("dev", "staging", "dev", "prod")]
    assert wrong.exit_code == 1
    assert "✗ mlsys_env: Input should be 'dev', 'staging' or 'prod'" in wrong.stderr


@pytest.mark.parametrize("command", ["predict", "runs", "register", "publish", "models"])
def test_every_command_with_an_environment_has_the_same_default(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLSYS_ENV", "staging")
    context = typer.Context(typer.main.get_command(cli.app).commands[command])
    [option] = [each for each in context.command.params if each.name == "env"]

    assert option.get_default(context) == "staging"


def test_predict_needs_no_service(
    servers: LocalServers, cloud: Cloud, scored: tuple[str, str]
) -> None:
    table, model = scored
    output = cloud.new_table()

    done = mlsys("predict", table, output, f"--model={model}", "--json", **servers.env)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 10
    assert cloud.count(output) == 10


def test_the_tries_of_a_cloud_run_job_are_one_run(
    servers: LocalServers, cloud: Cloud, scored: tuple[str, str]
) -> None:
    execution = {"CLOUD_RUN_EXECUTION": "mlsys-predict-dev-x7k2p"}

    done = mlsys(
        "predict",
        scored[0],
        cloud.new_table(),
        f"--model={scored[1]}",
        "--json",
        **servers.env,
        **execution,
    )

    assert json.loads(done.stdout)["run_id"] == execution["CLOUD_RUN_EXECUTION"]


def test_predict_without_a_service_fails_like_one_with_it(
    servers: LocalServers, cloud: Cloud, scored: tuple[str, str]
) -> None:
    done = mlsys("predict", scored[0], cloud.new_table(), "--model=nobody", **servers.env)

    assert done.returncode == 1
    assert "gs://mlsys-models-dev has no model named nobody." in done.stderr
    assert "Traceback" not in done.stderr


def test_publish_then_models_lists_it(servers: LocalServers, cloud: Cloud, tmp_path: Path) -> None:
    rows = pa.table({"x": [1.0, 2.0, 3.0]})
    frame = rows.to_pandas()
    (tmp_path / "model.pkl").write_bytes(
        pickle.dumps(LinearRegression().fit(frame, frame["x"] * 2))
    )
    pq.write_table(rows, tmp_path / "rows.parquet")
    name = cloud.name("cli").replace("_", "-")
    arguments = [str(tmp_path / "model.pkl"), name, f"--rows={tmp_path / 'rows.parquet'}"]

    published = mlsys("publish", *arguments, "--target=double", "--json", **servers.env)
    again = mlsys_here("publish", *arguments, **servers.env)
    listed = mlsys("models", "--json", **servers.env)
    shown = mlsys_here("models", **servers.env)

    assert published.returncode == 0, published.stderr
    assert json.loads(published.stdout)["target"] == "double"
    assert f"✓ Published as gs://mlsys-models-dev/{name}/v2/model.pkl." in again.stderr
    assert json.loads(listed.stdout)[name] == ["v1", "v2"]
    assert re.search(rf"{name} +│ v2 +│ v1, v2", shown.stdout)


def test_publish_refuses_a_version_that_exists(
    servers: LocalServers, cloud: Cloud, tmp_path: Path
) -> None:
    (tmp_path / "model.pkl").write_bytes(
        pickle.dumps(LinearRegression().fit(pa.table({"x": [1.0, 2.0]}).to_pandas(), [1, 2]))
    )
    (tmp_path / "rows.csv").write_text("x\n1.5\n")
    name = cloud.name("cli").replace("_", "-")
    arguments = [
        str(tmp_path / "model.pkl"),
        name,
        f"--rows={tmp_path / 'rows.csv'}",
        "--version=v3",
    ]

    assert mlsys_here("publish", *arguments, **servers.env).exit_code == 0
    again = mlsys_here("publish", *arguments, **servers.env)

    assert again.exit_code == 1
    assert f"gs://mlsys-models-dev/{name}/v3/model.pkl exists" in again.stderr


def test_what_a_csv_lacks_is_null_in_the_golden_rows(
    servers: LocalServers, cloud: Cloud, tmp_path: Path
) -> None:
    frame = pa.table({"port": ["S", None, "C"], "x": [1.0, 2.0, None]}).to_pandas()
    model = make_pipeline(OrdinalEncoder(), HistGradientBoostingRegressor()).fit(frame, [1, 2, 3])
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    (tmp_path / "rows.csv").write_text("port,x\nS,1\n,2\nC,\n")
    name = cloud.name("cli").replace("_", "-")

    done = mlsys_here(
        "publish",
        str(tmp_path / "model.pkl"),
        name,
        f"--rows={tmp_path / 'rows.csv'}",
        "--json",
        **servers.env,
    )

    assert done.exit_code == 0, done.stderr
    golden = json.loads(done.stdout)["golden"]["rows"]
    assert [row["port"] for row in golden] == ["S", None, "C"]


@pytest.mark.parametrize(
    ("model", "rows", "told"),
    [
        (b"not a pickle", b"x\n1.5\n", "model.pkl can't be unpickled"),
        (b"", b"x\n1.5\n", "model.pkl can't be unpickled"),
        (pickle.dumps(LinearRegression()), b"", "rows.csv can't be read"),
        (pickle.dumps(LinearRegression()), b"x,y\n1\n", "rows.csv can't be read"),
        (pickle.dumps(LinearRegression()), b"\xff\xfe,y\n1,2\n", "rows.csv can't be read"),
    ],
)
def test_publish_says_which_file_is_damaged(
    tmp_path: Path, model: bytes, rows: bytes, told: str
) -> None:
    (tmp_path / "model.pkl").write_bytes(model)
    (tmp_path / "rows.csv").write_bytes(rows)
    paths = [str(tmp_path / "model.pkl"), "some-model", f"--rows={tmp_path / 'rows.csv'}"]

    done = mlsys_here("publish", *paths)

    assert done.exit_code == 1
    assert done.stderr.startswith(f"✗ {told}")


def test_local_runs_a_command_with_everything_up_and_ends_with_its_status() -> None:
    script = (
        "import os, sys, httpx2; "
        "print(httpx2.get(os.environ['MLSYS_URL'] + '/health').json()); sys.exit(7)"
    )

    done = mlsys("local", "--", sys.executable, "-c", script)

    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == "{'status': 'ok'}"


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        ("no-such-command", 127, "✗ no-such-command: No such file or directory"),
        ("/", 126, "✗ /: Permission denied"),
    ],
)
def test_a_command_that_could_not_be_run_is_told(
    capsys: pytest.CaptureFixture[str], command: str, status: int, told: str
) -> None:
    assert cli._status([command], os.environ) == status
    assert capsys.readouterr().err.splitlines() == [told]


# Ends by itself when it is told to, with a status of its own, or does not and is killed by it.
WAITS = """
import signal, sys, time
if sys.argv[1] == "heeds":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(40 + number))
else:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
print("runs", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "how", "base"), [(signal.SIGINT, "heeds", 40), (signal.SIGTERM, "does not", 128)]
)
def test_local_hands_signals_on_to_its_command_and_leaves_nothing_running(
    number: signal.Signals, how: str, base: int
) -> None:
    with subprocess.Popen(
        [MLSYS, "local", "--", sys.executable, "-c", WAITS, how],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "runs\n"
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=30) == base + number

    assert len(started) >= 4
    assert not [child for child in started if child.is_running()]


def test_local_that_is_terminated_at_its_start_leaves_nothing_running() -> None:
    with subprocess.Popen([MLSYS, "local"], stdout=subprocess.PIPE) as process:
        parent = psutil.Process(process.pid)
        while not (started := parent.children(recursive=True)):
            time.sleep(0.01)  # A process has no event for "I have a child now".
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM

    # One that was being started just then is ended by the system, which takes its time.
    _, left = psutil.wait_procs(started, timeout=PATIENCE)
    assert not left


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ((), {"MLSYS_ENV": "production"}, "✗ mlsys_env: Input should be 'dev', 'staging' or"),
        ((), {"MAX_RUNS": "0"}, "✗ max_runs: Input should be greater than"),
        (("--port=80800",), {}, "less than or equal to 65535"),
    ],
)
def test_a_service_that_can_not_be_set_up_is_told_in_a_line(
    arguments: tuple[str, ...], settings: dict[str, str], told: str
) -> None:
    done = mlsys("serve", *arguments, **settings)

    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_register_counts_the_same_with_a_service_and_without(
    service: Client, servers: LocalServers, scored: tuple[str, str]
) -> None:
    with_it = mlsys_here("register", "--json", f"--url={service.base_url}")
    without = mlsys("register", "--json", **servers.env)

    assert (with_it.exit_code, without.returncode) == (0, 0), with_it.stderr + without.stderr
    first, second = json.loads(with_it.stdout), json.loads(without.stdout)
    assert scored[1] in {model["name"] for model in first["registered"]}
    assert second["registered"] == first["registered"]


def test_runs_are_listed_with_a_service_and_without(
    servers: LocalServers, service: Client, cloud: Cloud, scored: tuple[str, str]
) -> None:
    table, model = scored
    run_id = cloud.name("run")
    assert service.predict(table, cloud.new_table(), model, run_id=run_id).status_code == 200

    here = mlsys("runs", run_id, "--json", **servers.env)
    there = mlsys_here("runs", run_id, "--json", f"--url={service.base_url}")
    listed = mlsys_here("runs", "--state=committed", "--limit=1", f"--url={service.base_url}")
    nobody = mlsys_here("runs", "nobody", f"--url={service.base_url}")
    table_of_all = mlsys("runs", **servers.env).stdout

    assert here.returncode == 0, here.stderr
    assert json.loads(here.stdout) == json.loads(there.stdout)
    [run] = json.loads(here.stdout)["runs"]
    assert (run["run_id"], run["state"]) == (run_id, "committed")
    assert "committed" in listed.stdout
    # A line for each, in which nothing is cut: for grep.
    [line] = [line for line in table_of_all.splitlines() if run_id in line]
    assert run["request"]["output_table"] in line
    assert nobody.exit_code == 1
    assert "no run 'nobody'" in nobody.stderr
