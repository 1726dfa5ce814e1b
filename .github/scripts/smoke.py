#!/usr/bin/env python3
"""Whether a deployment works: it answers /health, and predicts a table of 262 passengers.

    TOKEN=… smoke.py URL --project my-project --env dev --run-id smoke-1

TOKEN is an identity token for the service. infra/README.md says where the table and the model come
from. The run id makes it safe to repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlencode

HEALTH_SECONDS = 120
PREDICT_SECONDS = 300


class Failed(Exception):
    """The deployment does not work; the message says how."""


def check(url: str, *, project: str, env: str, run_id: str) -> dict[str, object]:
    """Asks a deployment for its health and for predictions; returns its answer.

    Raises:
        Failed: it does not answer, or not well.
    """
    wait_until_healthy(url)
    dataset = f"{project}.mlsys_{env}"
    wanted = {
        "env": env,
        "input_table": f"{dataset}.titanic_test",
        "output_table": f"{dataset}.smoke_output",
        "model_name": "titanic-survival",
        "model_version": "latest",
        "run_id": run_id,
    }
    result = call(f"{url}/predict?{urlencode(wanted)}", PREDICT_SECONDS)
    if result.get("status") != "succeeded" or not result.get("rows"):
        raise Failed(f"/predict answered {result}")
    return result


def wait_until_healthy(url: str) -> None:
    """Returns once /health answers; a new revision and its address take a moment to be there."""
    deadline = time.monotonic() + HEALTH_SECONDS
    while True:
        try:
            call(f"{url}/health", 10)
            return
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def call(url: str, seconds: float) -> dict[str, object]:
    """GETs JSON with the token."""
    headers = {"Authorization": f"Bearer {os.environ['TOKEN']}"} if "TOKEN" in os.environ else {}
    path = url.partition("?")[0]
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise Failed(f"{path} answered {error.code}: {error.read(2000).decode()}") from error
    except (OSError, ValueError) as error:
        raise Failed(f"{path} did not answer: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    for name in ("--project", "--env", "--run-id"):
        parser.add_argument(name, required=True)
    told = parser.parse_args()
    try:
        result = check(told.url, project=told.project, env=told.env, run_id=told.run_id)
    except Failed as error:
        sys.exit(f"smoke test failed: {error}")
    print(f"smoke test passed: {result['message']}")


if __name__ == "__main__":
    main()
