"""Models that start processes of their own by forking this one, as `multiprocessing` does on Linux.

A fork takes along how this process heeds signals: `Pool.terminate` would not end a child that
passes SIGTERM over to a server it does not have, and the call that waits for it would never return.
It would take along gRPC's own handlers, which end a child where calls are under way: they are left
out as the package is imported, before gRPC is.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import cache

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@cache
def let_children_end() -> None:
    """Has every child that is forked from now on heed signals as a program does that knows none."""
    before = threading.local()

    # A signal that comes in between would be lost.
    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def forget() -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=forget)
