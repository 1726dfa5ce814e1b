"""Starts services in no time: a process that has imported everything, and forks.

A service takes seconds to import what it needs, and a schedule of kills needs many of them. Each is
a process of its own all the same, with a process id, signals and memory of its own.

It is given one JSON object a line, the environment of a service, and answers with one, the port and
the process id. The port takes connections at once: they wait until the service accepts them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import warnings

# The setting that makes a service a mutant: one of `tests/faults/mutants.py`.
MUTANT = "MLSYS_FAULT_MUTANT"

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Forks a service for each line of stdin, until there are no more."""
    _import_all()
    # Nobody asks for the status of a service that has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        listener = socket.create_server(("127.0.0.1", 0))
        pid = _fork(listener, json.loads(line))
        print(json.dumps({"pid": pid, "port": listener.getsockname()[1]}), flush=True)
        listener.close()


def _import_all() -> None:
    import sklearn.linear_model  # noqa: F401

    import tests.faults.models
    import tests.faults.mutants  # noqa: F401


def _fork(listener: socket.socket, env: dict[str, str]) -> int:
    with warnings.catch_warnings():
        # The threads are OpenBLAS's, which makes them anew in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        _serve(listener, env)
    finally:
        os._exit(1)


def _serve(listener: socket.socket, env: dict[str, str]) -> None:
    import uvicorn

    from service.app import create_app
    from tests.faults.mutants import mutated

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(env)
    mutant = os.environ.pop(MUTANT, "")
    os.chdir("/")  # A place without an .env.
    with mutated(mutant):
        uvicorn.Server(uvicorn.Config(create_app, factory=True)).run(sockets=[listener])


if __name__ == "__main__":
    main()
