"""The image, by the steps of its Dockerfile, in an empty folder and without a Docker daemon.

Every `RUN`, `ENV`, `COPY --from` and `CMD` is taken from the Dockerfile. Only the paths differ, and
the Python, which the base images bring along.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from mlsys.local import LocalServers, free_ports, sample
from service.demo import train
from tests.conftest import Cloud
from tests.infra.support import ROOT, uv

MB = 10**6
LARGEST = 700 * MB
PATIENCE = 60
# A base image's own; the rest of the environment is what the Dockerfile sets.
BASE_PATH = "/usr/local/bin:/usr/bin:/bin"


def instructions() -> Iterator[tuple[str, str]]:
    """Instructions of the Dockerfile, each with its arguments on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, arguments = line.split(maxsplit=1)
            yield name, arguments


@dataclass
class Build:
    """Carries out instructions below `root`; what a stage leaves is kept below `stages`."""

    root: Path
    stages: Path
    stage: str = ""
    env: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def carry_out(self, name: str, arguments: str) -> None:
        getattr(self, f"do_{name.lower()}", self.skip)(arguments)

    def skip(self, arguments: str) -> None:
        """EXPOSE, USER and the like need a container."""

    def do_from(self, arguments: str) -> None:
        base, _, self.stage = arguments.partition(" AS ")
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        if base in {path.name for path in self.stages.iterdir()}:
            self.copy(self.stages / base, self.root)
        else:
            self.env = {"PATH": BASE_PATH}

    def do_workdir(self, arguments: str) -> None:
        self.here(arguments).mkdir(exist_ok=True)

    def do_env(self, arguments: str) -> None:
        for pair in shlex.split(arguments):
            name, value = pair.split("=", 1)
            self.env[name] = self.moved(value).replace("$PATH", self.env["PATH"])

    def do_run(self, arguments: str) -> None:
        mounts = re.findall(r"--mount=type=bind,source=(\S+),target=(\S+)", arguments)
        for source, target in mounts:
            assert Path(target).is_absolute(), target
            assert_sent_to_the_builder(source)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
            copy(ROOT / source, self.here(target))
        command = self.moved(re.sub(r"--mount=\S+", "", arguments).strip())
        subprocess.run(["sh", "-c", command], cwd=self.here("/app"), env=self.tools(), check=True)
        for _, target in mounts:
            path = self.here(target)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.stages / self.stage, ignore_errors=True)
        self.copy(self.root, self.stages / self.stage)

    def do_copy(self, arguments: str) -> None:
        stage, source, target = re.fullmatch(r"--from=(\S+) (\S+) (\S+)", arguments).groups()
        self.copy(self.stages / stage / source.lstrip("/"), self.here(target))

    def do_cmd(self, arguments: str) -> None:
        self.command = json.loads(arguments)

    def here(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def moved(self, text: str) -> str:
        """Text with the image's paths replaced by those below `root`."""
        return re.sub(r"(?<![\w.*])/(?=(app|code)\b)", f"{self.root}/", text)

    def copy(self, source: Path, target: Path) -> None:
        # Links, since a stage has hundreds of megabytes that nobody changes.
        subprocess.run(["cp", "-al", f"{source}/.", target], check=True)

    def tools(self) -> dict[str, str]:
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "VIRTUAL_ENV"))}
        path = os.pathsep.join([str(Path(uv()).parent), os.environ["PATH"]])
        # The builder's cache is a mount; here it is that of whoever runs the tests.
        told = {name: value for name, value in self.env.items() if name != "UV_CACHE_DIR"}
        return outside | told | {"PATH": path, "UV_PYTHON": sys._base_executable}


def assert_sent_to_the_builder(source: str) -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{source}", f"!{source}/"} & set(sent), f"{source} is not in .dockerignore"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Build:
    place = tmp_path_factory.mktemp("image")
    (place / "stages").mkdir()
    build = Build(place / "root", place / "stages")
    for name, arguments in instructions():
        build.carry_out(name, arguments)
    shutil.rmtree(build.stages)
    return build


def test_the_image_holds_the_environment_and_nothing_else(image: Build) -> None:
    assert [path.name for path in image.here("/app").iterdir()] == [".venv"]
    installed = {path.name for path in image.here("/app").glob(".venv/lib/python3.12/*/*")}
    assert {"mlsys", "service", "uvicorn"} <= installed
    assert not {"pytest", "ruff", "bqemulator", "ipykernel", "pre_commit"} & installed
    for needed in ("service/registry_schema.json", "mlsys/samples/titanic_test.csv"):
        assert list(image.here("/app").glob(f".venv/lib/python3.12/site-packages/{needed}"))


def test_the_image_is_under_700_mb(image: Build, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(path.lstat().st_blocks * 512 for path in image.root.rglob("*"))

    with capsys.disabled():
        print(f"\nThe image holds {size / MB:.0f} MB beside its base.")
    assert size < LARGEST


def test_the_image_answers_with_an_empty_environment(
    image: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [port] = free_ports(1)
    command = [str(port) if word == "8080" else word for word in image.command]
    env = ["env", "-i", *(f"{name}={value}" for name, value in image.env.items())]
    begun = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*env, *command], cwd=image.here("/app"), stdout=log, stderr=log)
    try:
        answer = wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        seconds = time.monotonic() - begun
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)

    with capsys.disabled():
        print(f"\nThe image answers /health after {seconds:.1f} s.")
    assert answer.json() == {"status": "ok"}


def test_the_image_predicts_as_a_job(image: Build, servers: LocalServers, cloud: Cloud) -> None:
    table = cloud.put(sample("titanic_test"))
    model = cloud.publish(train(), id_columns=["PassengerId"])
    output = cloud.new_table()
    variables = image.env | servers.env
    env = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]

    done = subprocess.run(
        [*env, "mlsys", "predict", table, output, f"--model={model}", "--json"],
        cwd=image.here("/app"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == cloud.count(output) == 262


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> httpx2.Response:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return httpx2.get(url)
        except httpx2.ConnectError:
            time.sleep(0.05)  # A process has no event for "I listen now".
    pytest.fail(f"The image did not start:\n{log.read_text()}")
