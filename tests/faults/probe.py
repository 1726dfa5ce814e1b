"""Asks a service for /health again and again, and tells how long that took: a process of its own.

    python -m tests.faults.probe http://127.0.0.1:8080

It goes on until its stdin is closed, and then writes the times, in milliseconds, as JSON.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from urllib.parse import urlsplit

EVERY_SECONDS = 0.02


def main() -> None:
    """Probes until stdin ends."""
    connection = http.client.HTTPConnection(urlsplit(sys.argv[1]).netloc, timeout=30)
    times = []
    while not select.select([sys.stdin], [], [], EVERY_SECONDS)[0]:
        start = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        times.append((time.perf_counter() - start) * 1000)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
