#!/usr/bin/env python3
"""Puts an image into service, or leaves everything as it was.

    TOKEN=… release.py --project my-project --region us-central1 --env dev [--image …@sha256:…]

    deploy without traffic → smoke test → move the traffic → smoke test → the job → tidy up
                              ↓ fails                          ↓ fails
                              nothing has moved                the traffic moves back

Without --image the running one gets a new revision: that is how a change of the service's settings,
which Terraform made, is tested before it takes calls.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import smoke

TAG = "candidate"
DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")


class Gcloud:
    """`gcloud run` in one project and region."""

    def __init__(self, project: str, region: str) -> None:
        self._where = [f"--project={project}", f"--region={region}", "--quiet"]

    def __call__(self, *arguments: str) -> str:
        command = ["gcloud", "run", *arguments, *self._where]
        print("+", *command, file=sys.stderr, flush=True)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def describe(self, service: str) -> dict[str, Any]:
        """What Cloud Run says of a service; `status.traffic` names the revisions."""
        return json.loads(self("services", "describe", service, "--format=json"))

    def running_image(self, service: str) -> str:
        """The image of the revision that takes most calls: not that of a candidate that failed."""
        shares = serving_revisions(self.describe(service))
        revision = max(shares, key=shares.__getitem__)
        answer = self("revisions", "describe", revision, "--format=json")
        return json.loads(answer)["spec"]["containers"][0]["image"]


@dataclass(frozen=True)
class Release:
    """One image on its way into one environment."""

    gcloud: Gcloud
    project: str
    env: str

    @property
    def service(self) -> str:
        return f"mlsys-{self.env}"

    def carry_out(self, image: str | None) -> None:
        """Raises smoke.Failed where the image does not work; what ran before then still does."""
        running = self.gcloud.running_image(self.service)
        if image is None and not DIGEST.fullmatch(running):
            print(f"Nothing has been deployed yet: {self.service} runs {running}.")
            return
        image = image or running
        if not DIGEST.fullmatch(image):
            sys.exit(f"{image} has no digest: what it names may change.")
        before = self.gcloud.describe(self.service)
        serving = serving_revisions(before)
        self.gcloud("deploy", self.service, f"--image={image}", "--no-traffic", f"--tag={TAG}")
        try:
            revision = self.try_out(before["status"]["url"], serving)
        finally:
            self.gcloud("services", "update-traffic", self.service, f"--remove-tags={TAG}")
        self.gcloud("jobs", "update", f"mlsys-predict-{self.env}", f"--image={image}")
        print(f"{revision} serves {image}")

    def try_out(self, url: str, serving: dict[str, int]) -> str:
        """Moves the traffic to the candidate if it works; returns its name."""
        traffic = self.gcloud.describe(self.service)["status"]["traffic"]
        candidate = next(each for each in traffic if each.get("tag") == TAG)
        revision = candidate["revisionName"]
        self.check(candidate["url"], f"{revision}-candidate")
        self.route({revision: 100})
        try:
            self.check(url, f"{revision}-live")
        except BaseException:
            self.route(serving)
            raise
        return revision

    def check(self, url: str, name: str) -> None:
        told = smoke.check(url, project=self.project, env=self.env, run_id=f"smoke-{name}")
        print(f"smoke test of {url} passed: {told['message']}")

    def route(self, revisions: dict[str, int]) -> None:
        shares = ",".join(f"{name}={percent}" for name, percent in revisions.items())
        self.gcloud("services", "update-traffic", self.service, f"--to-revisions={shares}")


def serving_revisions(service: dict[str, Any]) -> dict[str, int]:
    """Names of the revisions that take calls, and their share in percent."""
    shares = service["status"]["traffic"]
    return {each["revisionName"]: each["percent"] for each in shares if each.get("percent")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--project", "--region", "--env"):
        parser.add_argument(name, required=True)
    parser.add_argument("--image", help="With its digest.")
    parser.add_argument("--show", action="store_true", help="Print the running image, and end.")
    told = parser.parse_args()
    release = Release(Gcloud(told.project, told.region), told.project, told.env)
    if told.show:
        print(release.gcloud.running_image(release.service))
        return
    try:
        release.carry_out(told.image or None)
    except (smoke.Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"{release.service} was not released: {error}")


if __name__ == "__main__":
    main()
