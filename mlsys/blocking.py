"""Asynchronous code for callers that block: scripts, and notebooks with a loop of their own."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager

from anyio.from_thread import BlockingPortal, start_blocking_portal

from mlsys.clients import Clients, open_clients
from mlsys.settings import Settings

# Once polars is imported, Ctrl-C ends no wait but one with a limit.
_FOREVER = threading.TIMEOUT_MAX


class Loop:
    """An event loop in a thread of its own, as the thread that waits for it sees it."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal

    def call[*Args, T](self, work: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Awaits `work(*args)` on the loop. An interrupt of the caller cancels it there first."""
        ended = threading.Event()

        async def run() -> T:
            try:
                return await work(*args)
            finally:
                ended.set()

        future = self._portal.start_task_soon(run)
        try:
            return future.result(_FOREVER)
        except KeyboardInterrupt:
            # Or the clients would be closed under work that still goes on.
            future.cancel()
            ended.wait(_FOREVER)
            raise

    def enter[T](self, context: AbstractAsyncContextManager[T]) -> AbstractContextManager[T]:
        """An asynchronous context manager as a blocking one, entered and left on the loop."""
        return self._portal.wrap_async_context_manager(context)


@contextmanager
def blocking(settings: Settings | None) -> Iterator[tuple[Loop, Clients, Settings]]:
    """Opens the clients on an event loop in a thread of its own, for as long as the block lasts.

    Args:
        settings: by default those of the environment and `.env`, read now.

    Yields:
        The loop; the clients; the settings.
    """
    settings = settings or Settings()
    with start_blocking_portal(name="mlsys") as portal:
        loop = Loop(portal)
        with loop.enter(open_clients(settings)) as clients:
            yield loop, clients, settings
