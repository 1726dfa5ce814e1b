"""What carries runs out, whoever asks for them: an HTTP request, or the command line itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import anyio
import structlog

from mlsys.clients import Clients, open_clients
from mlsys.errors import AccessDenied, MlsysError, ModelUnusable
from mlsys.names import Environment
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.contract import PredictRequest, PredictResult, ProgressEvent, RegistryScan
from service.model import ModelCache, load_estimator
from service.pipeline import execute, prepare
from service.registry import FoundModel, scan
from service.runs import Run, Runs

_log = structlog.get_logger(__name__)


class Engine:
    """The clients, the models and the runs of one process."""

    def __init__(self, settings: Settings, runs: Runs, models: ModelCache) -> None:
        self.settings = settings
        self.runs = runs
        self.models = models
        self._limiter = anyio.CapacityLimiter(settings.predict_threads)
        self._open = AsyncExitStack()
        self._opening = anyio.Lock()
        self._clients: Clients | None = None
        self._looks = 0
        self._refusal: MlsysError | None = None

    async def clients(self) -> Clients:
        """Google's clients, opened on first use: `/health` needs none, nor credentials.

        To look for credentials may take seconds, so whoever waits is told what that look gave.

        Raises:
            AccessDenied: there are no credentials.
        """
        looks = self._looks
        async with self._opening:
            if self._clients is None and self._looks > looks:
                raise self._refusal
            if self._clients is None:
                self._clients = await self._look()
            return self._clients

    async def _look(self) -> Clients:
        try:
            return await self._open.enter_async_context(open_clients(self.settings))
        except MlsysError as error:
            self._looks += 1
            self._refusal = error
            raise

    async def warm_up(self) -> None:
        """Opens the clients before the first run asks for them."""
        try:
            await self.clients()
        except MlsysError as error:
            _log.warning("clients not opened yet", detail=str(error))

    async def close(self) -> None:
        """Closes what was opened."""
        await self._open.aclose()

    def check_env(self, env: Environment) -> None:
        """Raises AccessDenied where this deployment answers for another environment."""
        own = self.settings.mlsys_env
        if own not in (None, env):
            raise AccessDenied(
                f"This deployment answers for env={own} only. Call the service of {env}."
            )

    def start(self, request: PredictRequest) -> Run:
        """Starts a run.

        Raises:
            AccessDenied: see `check_env`.
            Conflict, TooManyRuns: see `Runs.start`.
        """
        self.check_env(request.env)
        return self.runs.start(request, self._work)

    async def register(self, env: Environment) -> RegistryScan:
        """Scans the model bucket of `env`, and brings the registry table up to date.

        Raises:
            AccessDenied: see `check_env`.
            NotFound, TableMismatch, Unavailable: see `scan`.
        """
        self.check_env(env)
        clients = await self.clients()
        one_by_one = anyio.Lock()

        async def verify(found: FoundModel) -> str | None:
            # Not through the cache, where it would push out models that are in use.
            async with one_by_one:
                try:
                    await load_estimator(clients.objects, found.blob, found.metadata)
                except ModelUnusable as error:
                    return str(error)
            return None

        return await scan(clients, self.settings, env, verify)

    async def _work(self, run: Run) -> int:
        clients = await self.clients()
        job = await prepare(
            run.request,
            run_id=run.id,
            now=datetime.now(UTC),
            clients=clients,
            cache=self.models,
            settings=self.settings,
        )
        run.plan(job)
        return await execute(
            job,
            clients=clients,
            settings=self.settings,
            limiter=self._limiter,
            progress=run.advance,
        )


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """An engine for as long as the block lasts; at its end, what still runs is ended."""
    async with task_group() as tasks:
        runs = Runs(tasks, settings.max_runs)
        engine = Engine(settings, runs, ModelCache(settings.model_cache_bytes, tasks))
        tasks.start_soon(engine.warm_up)
        try:
            yield engine
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await engine.close()


async def predict_here(
    settings: Settings, request: PredictRequest, progress: Callable[[ProgressEvent], None]
) -> PredictResult:
    """Carries a run out in this process, without a service, and waits for its end.

    Raises:
        MlsysError: what the service would answer as a problem.
    """
    async with open_engine(settings) as engine:
        run = engine.start(request)
        while not run.ended.is_set():
            with anyio.move_on_after(settings.progress_seconds):
                await run.ended.wait()
            progress(run.progress())
        if run.error is not None:
            raise run.error
        return run.result


async def register_here(settings: Settings, env: Environment) -> RegistryScan:
    """Scans the model bucket of `env` in this process; raises as `scan` does."""
    async with open_engine(settings) as engine:
        return await engine.register(env)
