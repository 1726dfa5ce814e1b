"""The engine of the service, imported and opened while the port already listens.

Arrow, pandas, gRPC and Google's clients take several times as long to import as what answers
`/health`. So they are imported in a thread once the server is up, and scikit-learn after them, so
that the first run finds all of it there. Who needs the engine before that waits for it: modules
that import each other fail where two threads import them at once, and to unpickle is to import.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import structlog

from mlsys.errors import Unavailable
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.logs import log_retries

if TYPE_CHECKING:
    from service.engine import Engine

_log = structlog.get_logger(__name__)

# A server binds its port after its application says that it is ready, and nothing tells the
# application when. This is many times what that takes; whoever asks for the engine cuts it short.
_HEAD_START_SECONDS = 0.1

# Most models are made of these, and unpickling one imports what it is made of.
_MODELS = (
    "pandas",
    "sklearn.pipeline",
    "sklearn.compose",
    "sklearn.preprocessing",
    "sklearn.impute",
    "sklearn.linear_model",
    "sklearn.ensemble",
)


class Startup:
    """An engine that is there soon, with what models are made of."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wanted = anyio.Event()
        self._settled = anyio.Event()
        self._engine: Engine | None = None
        self._failure: Exception | None = None
        self._ended_because = ""

    async def engine(self) -> Engine:
        """The engine, once it is open and nothing more is imported.

        Raises:
            Unavailable: the service is told to end.
            RuntimeError: the engine can't be imported; the log says why.
        """
        self._wanted.set()
        await self._settled.wait()
        if self._ended_because:
            raise Unavailable(f"Not begun: {self._ended_because}. Nothing was written.")
        if self._engine is None:
            raise RuntimeError("the engine can't be opened") from self._failure
        return self._engine

    def end(self, because: str) -> None:
        """Ends the runs under way, and sends away whoever waits for the engine."""
        self._ended_because = because
        self._settled.set()
        if self._engine is not None:
            self._engine.runs.cancel_all(because)

    async def run(self) -> None:
        """Opens the engine, then imports what models are made of; lasts until it is cancelled."""
        begun = anyio.current_time()
        with anyio.move_on_after(_HEAD_START_SECONDS):
            await self._wanted.wait()
        try:
            await _import("service.engine")
        except Exception as error:
            _log.error("engine not imported: no run can start", exc_info=error)
            self._failure = error
            self._settled.set()
            return
        from service.engine import open_engine

        log_retries()
        async with open_engine(self._settings) as self._engine:
            await _warm_up(_MODELS)
            await anyio.to_thread.run_sync(_predict_once, abandon_on_cancel=True)
            # What is imported stays. To look through it for garbage takes 0.2 seconds, in which
            # nobody is answered.
            self._engine.memory.leave_alone()
            self._settled.set()
            _log.info("warmed up", seconds=round(anyio.current_time() - begun, 3))
            await anyio.sleep_forever()


async def _warm_up(modules: Iterable[str]) -> None:
    for module in modules:
        try:
            await _import(module)
        except Exception as error:
            _log.warning("not imported ahead of the first run", module=module, exc_info=error)


def _predict_once() -> None:
    """What scikit-learn finds out once: 40 ms, to look for other packages that know frames."""
    with suppress(Exception):  # It was not imported, and that is logged.
        from sklearn.linear_model import LinearRegression

        LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]).predict([[0.5]])


async def _import(module: str) -> None:
    # A module at a time: who is told to end waits for one at most.
    await anyio.to_thread.run_sync(import_module, module, abandon_on_cancel=True)


@asynccontextmanager
async def starting(settings: Settings) -> AsyncIterator[Startup]:
    """An engine to be, for as long as the block lasts; at its end, what still runs is ended."""
    async with task_group() as tasks:
        startup = Startup(settings)
        tasks.start_soon(startup.run)
        try:
            yield startup
        finally:
            tasks.cancel_scope.cancel()
