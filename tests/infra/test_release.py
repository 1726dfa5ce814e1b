"""The release script against a `gcloud` that keeps a service's revisions in a file, and a service
whose revisions answer over HTTP."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / ".github/scripts/release.py"
OLD, NEW = (f"repo/mlsys@sha256:{digit * 64}" for digit in "ab")
# As much of gcloud as the script uses: revisions, traffic and tags of one service.
GCLOUD = """#!{python}
import json, pathlib, sys
place = pathlib.Path({place!r})
state = json.loads((place / "state.json").read_text())
group, verb, name, *flags = sys.argv[2:] if sys.argv[2] != "deploy" else ["services", *sys.argv[2:]]
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
with (place / "calls").open("a") as calls:
    print(group, verb, name, *sorted(flags), file=calls)
assert (flags["project"], flags["region"]) == ("my-project", "us-central1")
if verb == "describe" and group == "services":
    print(json.dumps({{"status": {{"url": {url!r}, "traffic": [
        {{"revisionName": r, "percent": p}} for r, p in state["traffic"].items()
    ] + [
        {{"revisionName": r, "tag": t, "url": {url!r} + "/" + t}} for t, r in state["tags"].items()
    ]}}}}))
elif verb == "describe":
    print(json.dumps({{"spec": {{"containers": [{{"image": state["revisions"][name]}}]}}}}))
elif verb == "deploy":
    revision = f"rev-{{len(state['revisions']) + 1}}"
    state["revisions"][revision] = flags["image"]
    state["tags"][flags["tag"]] = revision
    assert "no-traffic" in flags
elif verb == "update-traffic" and "to-revisions" in flags:
    shares = (share.split("=") for share in flags["to-revisions"].split(","))
    state["traffic"] = {{revision: int(percent) for revision, percent in shares}}
elif verb == "update-traffic":
    del state["tags"][flags["remove-tags"]]
elif group == "jobs":
    state["job"] = flags["image"]
(place / "state.json").write_text(json.dumps(state))
"""


@dataclass
class Cloud:
    """A service in the cloud; `broken` are the paths below which it answers 500."""

    place: Path
    broken: set[str] = field(default_factory=set)
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.place / "state.json").read_text())

    def release(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ["--project=my-project", "--region=us-central1", "--env=dev"]
        path = f"{self.place}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, SCRIPT, *where, *arguments],
            env=os.environ | {"PATH": path, "TOKEN": "token"},
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cloud.requests.append((self.path, self.headers["Authorization"]))
            path = self.path.partition("?")[0]
            self.send_response(500 if path in cloud.broken else 200)
            self.end_headers()
            answer = {"status": "succeeded", "rows": 262, "message": "262 rows predicted."}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        url = f"http://127.0.0.1:{server.server_port}"
        gcloud = tmp_path / "gcloud"
        gcloud.write_text(GCLOUD.format(python=sys.executable, place=str(tmp_path), url=url))
        gcloud.chmod(0o755)
        state = {"traffic": {"rev-1": 100}, "tags": {}, "revisions": {"rev-1": OLD}, "job": OLD}
        (tmp_path / "state.json").write_text(json.dumps(state))
        yield cloud
        server.shutdown()


def test_an_image_that_works_takes_the_calls(cloud: Cloud) -> None:
    done = cloud.release(f"--image={NEW}")

    assert done.returncode == 0, done.stderr
    assert cloud.state == {
        "traffic": {"rev-2": 100},
        "tags": {},
        "revisions": {"rev-1": OLD, "rev-2": NEW},
        "job": NEW,
    }
    asked = [path.partition("?")[0] for path, _ in cloud.requests]
    assert asked == ["/candidate/health", "/candidate/predict", "/health", "/predict"]
    assert {token for _, token in cloud.requests} == {"Bearer token"}
    assert "run_id=smoke-rev-2-candidate" in cloud.requests[1][0]
    assert "input_table=my-project.mlsys_dev.titanic_test" in cloud.requests[1][0]


def test_an_image_that_does_not_work_never_takes_a_call(cloud: Cloud) -> None:
    cloud.broken = {"/candidate/predict"}

    done = cloud.release(f"--image={NEW}")

    assert done.returncode == 1
    assert "/candidate/predict answered 500" in done.stderr
    assert (cloud.state["traffic"], cloud.state["tags"]) == ({"rev-1": 100}, {})
    assert cloud.state["job"] == OLD
    assert "to-revisions" not in (cloud.place / "calls").read_text()


def test_traffic_moves_back_where_the_service_fails_with_it(cloud: Cloud) -> None:
    cloud.broken = {"/predict"}

    done = cloud.release(f"--image={NEW}")

    assert done.returncode == 1
    assert (cloud.state["traffic"], cloud.state["tags"]) == ({"rev-1": 100}, {})
    assert cloud.state["job"] == OLD
    assert (cloud.place / "calls").read_text().count("to-revisions") == 2


def test_new_settings_are_tried_out_with_the_image_that_serves(cloud: Cloud) -> None:
    cloud.broken = {"/candidate/predict"}
    cloud.release(f"--image={NEW}")
    cloud.broken = set()

    done = cloud.release()

    assert done.returncode == 0, done.stderr
    assert cloud.state["traffic"] == {"rev-3": 100}
    assert cloud.state["revisions"]["rev-3"] == OLD


def test_the_image_that_serves_can_be_asked_for(cloud: Cloud) -> None:
    assert cloud.release("--show").stdout == f"{OLD}\n"


def test_the_sample_container_is_not_released(cloud: Cloud) -> None:
    state = cloud.state | {"revisions": {"rev-1": "us-docker.pkg.dev/cloudrun/container/hello"}}
    (cloud.place / "state.json").write_text(json.dumps(state))

    done = cloud.release()

    assert done.returncode == 0, done.stderr
    assert "Nothing has been deployed yet" in done.stdout
    assert cloud.state == state


def test_an_image_without_a_digest_is_refused(cloud: Cloud) -> None:
    done = cloud.release("--image=repo/mlsys:latest")

    assert done.returncode == 1
    assert "no digest" in done.stderr
    assert cloud.state["revisions"] == {"rev-1": OLD}
