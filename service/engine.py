"""What carries runs out, whoever asks for them: an HTTP request, or the command line itself."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import anyio
import structlog

from mlsys.clients import Clients, open_clients
from mlsys.errors import (
    AccessDenied,
    InvalidRequest,
    MlsysError,
    ModelUnusable,
    NotFound,
    Unavailable,
    UnderWay,
)
from mlsys.names import Environment, TableRef, shown
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.contract import (
    ModelUsed,
    PredictRequest,
    PredictResult,
    Problem,
    ProgressEvent,
    RegistryScan,
    RunInfo,
    RunPage,
    RunsRequest,
)
from service.forks import let_children_end
from service.journal import Journal, Pins, RunRecord
from service.memory import Memory, peak_memory_bytes, reuse_memory
from service.model import ModelCache, load_estimator
from service.once import Lease, write_once
from service.pipeline import Job, append, commit, prepare
from service.problems import problem_of
from service.registry import FoundModel, scan
from service.runs import Run, Runs

_log = structlog.get_logger(__name__)


class Engine:
    """The clients, the models and the runs of one process.

    Args:
        opened: where clients are opened, and closed by whoever made it.
    """

    def __init__(
        self,
        settings: Settings,
        runs: Runs,
        models: ModelCache,
        memory: Memory,
        opened: AsyncExitStack,
    ) -> None:
        self.settings = settings
        self.runs = runs
        self.memory = memory
        self.models = models
        self.limiter = anyio.CapacityLimiter(settings.predict_threads)
        self._opened = opened
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
            return await self._opened.enter_async_context(open_clients(self.settings))
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
        except Exception as error:
            _log.error("clients not opened yet", exc_info=error)

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
            UnderWay, RunMismatch, TooManyRuns: see `Runs.start`.
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
                await self.models.make_room(found.blob)
                try:
                    await load_estimator(clients.objects, found.blob, found.metadata)
                except ModelUnusable as error:
                    return str(error)
            return None

        return await scan(clients, self.settings, env, verify)

    async def find_run(self, run_id: str, env: Environment | None) -> RunInfo:
        """A run as its journal tells of it.

        Args:
            env: whose run; None: this deployment's, or where it answers for all, any.

        Raises:
            NotFound: there is no such run.
        """
        for journal in await self._journals(env):
            if (entry := await journal.read(run_id)) is not None:
                return entry.record.info()
        raise NotFound(f"There is no run {shown(run_id)}. Runs are kept for a limited time.")

    async def list_runs(self, wanted: RunsRequest) -> RunPage:
        """Runs of an environment, newest first; by default of this deployment's.

        Raises:
            InvalidRequest: no environment is named, and this deployment answers for all.
            AccessDenied: see `check_env`.
        """
        env = wanted.env or self.settings.mlsys_env
        if env is None:
            raise InvalidRequest(
                "env: is required, as this deployment answers for every environment. "
                "Name dev, staging or prod."
            )
        [journal] = await self._journals(env)
        runs, next_page = await journal.runs(
            state=wanted.state, before=wanted.page, most=wanted.limit
        )
        return RunPage(runs=runs, next_page=next_page)

    async def _journals(self, env: Environment | None) -> list[Journal]:
        own = env or self.settings.mlsys_env
        if own is not None:
            self.check_env(own)
        clients = await self.clients()
        return [self._journal(clients, each) for each in ([own] if own else Environment)]

    def _journal(self, clients: Clients, env: Environment) -> Journal:
        return Journal(
            clients.objects,
            self.settings.runs_bucket(env),
            try_seconds=self.settings.lease_seconds / 3,
        )

    async def _work(self, run: Run) -> PredictResult:
        clients = await self.clients()
        return await write_once(
            self._journal(clients, run.request.env),
            _Prediction(self, clients, run),
            run.request,
            run.id,
            Lease(self.settings.lease_seconds, _SystemClock()),
        )


class _SystemClock:
    """The clock of this machine."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class _Prediction:
    """A prediction as the protocol sees it: the `Work` of `write_once`."""

    def __init__(self, engine: Engine, clients: Clients, run: Run) -> None:
        self._engine = engine
        self._clients = clients
        self._run = run
        self._job: Job | None = None

    async def plan(self, pins: Pins | None) -> Pins:
        job = await prepare(
            self._run.request,
            run_id=self._run.id,
            now=datetime.now(UTC),
            pins=pins,
            clients=self._clients,
            cache=self._engine.models,
            settings=self._engine.settings,
        )
        self._job = job
        self._run.rows_total = job.plan.rows
        self._run.relieve = job.sizes.shrink
        return pins or Pins(
            predicted_at=job.plan.predicted_at,
            snapshot_time=datetime.now(UTC),
            model_version=job.model.version,
            model=job.model.blob,
            metadata=job.model.metadata_blob,
        )

    def begun(self, record: RunRecord) -> None:
        # Those of a record that is to be committed; a new attempt counts anew.
        self._run.begin(record.rows_total, record.rows or 0)

    async def append(self) -> tuple[tuple[str, ...], int]:
        return await append(
            self._job,
            clients=self._clients,
            settings=self._engine.settings,
            limiter=self._engine.limiter,
            fits=self._engine.memory.fits,
            progress=self._run.advance,
        )

    async def commit(self, record: RunRecord) -> bool:
        try:
            return await commit(
                self._clients,
                self._engine.settings,
                TableRef.parse(record.request.output_table),
                record.streams,
                rows=record.rows,
                predicted_at=record.pins.predicted_at,
            )
        except Unavailable as error:
            raise Unavailable(
                "BigQuery did not say whether it committed the rows. Ask again with "
                f"run_id={record.run_id}: that finds out, and never writes them twice.",
                run_id=record.run_id,
            ) from error

    def progress(self) -> tuple[int, int | None]:
        return self._run.rows_done, self._run.rows_total

    def result(self, record: RunRecord) -> PredictResult:
        request, pins = record.request, record.pins
        now = datetime.now(UTC)
        seconds = (now - record.started_at).total_seconds()
        return PredictResult(
            message=f"{record.rows:,} rows predicted by {request.model_name} "
            f"{pins.model_version} and appended to {request.output_table}.",
            run_id=record.run_id,
            rows=record.rows,
            input_table=request.input_table,
            output_table=request.output_table,
            model=ModelUsed(
                name=request.model_name,
                version=pins.model_version,
                uri=f"gs://{pins.model.bucket}/{pins.model.path}",
                generation=pins.model.generation,
            ),
            started_at=record.started_at,
            ended_at=now,
            seconds=round(seconds, 3),
            rows_per_second=round(record.rows / max(seconds, 1e-3), 1),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def problem(self, error: BaseException) -> Problem:
        if isinstance(error, Exception):
            return problem_of(error, self._run.id)
        return problem_of(self._run.ending, self._run.id)


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """An engine for as long as the block lasts; at its end, what still runs is ended."""
    reuse_memory()
    let_children_end()
    # What was opened is closed when all runs have ended: a commit under way is seen through, and
    # one that was cut off leaves word of it in the journal.
    async with _closed_by_all_means() as opened, task_group() as tasks:
        memory = Memory.of(settings)
        models = ModelCache(settings.model_cache_bytes, tasks, memory)
        runs = Runs(tasks, settings.max_runs, memory, spare=models.clear)
        engine = Engine(settings, runs, models, memory, opened)
        tasks.start_soon(engine.warm_up)
        try:
            yield engine
        finally:
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def _closed_by_all_means() -> AsyncIterator[AsyncExitStack]:
    """A stack that is also unwound, to its end, where the block is cancelled."""
    stack = AsyncExitStack()
    try:
        yield stack
    finally:
        with anyio.CancelScope(shield=True):
            await stack.aclose()


async def predict_here(
    settings: Settings, request: PredictRequest, progress: Callable[[ProgressEvent], None]
) -> PredictResult:
    """Carries a run out in this process, without a service, and waits for its end.

    Where somebody else has the run, the end of his lease is waited for, once: he may be the try of
    a job before this one, which was killed. SIGTERM ends the run, which leaves word of it.

    Raises:
        MlsysError: what the service would answer as a problem.
    """
    waiting = anyio.CancelScope()

    async def heed_sigterm(engine: Engine) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as told:
            async for _ in told:
                engine.runs.cancel_all("this process was told to end")
                waiting.cancel()

    async def carry_out(engine: Engine) -> PredictResult:
        run = engine.start(request)
        while not run.ended.is_set():
            with anyio.move_on_after(settings.progress_seconds):
                await run.ended.wait()
            progress(run.progress())
        if run.error is not None:
            raise run.error
        return run.result

    async with open_engine(settings) as engine, task_group() as tasks:
        tasks.start_soon(heed_sigterm, engine)
        try:
            result = await carry_out(engine)
        except UnderWay as error:
            with waiting:
                await anyio.sleep(error.retry_after)
            if waiting.cancelled_caught:
                raise
            result = await carry_out(engine)
        tasks.cancel_scope.cancel()
    return result


async def runs_here(settings: Settings, wanted: RunsRequest) -> RunPage:
    """The runs of an environment, from its journal."""
    async with open_engine(settings) as engine:
        return await engine.list_runs(wanted)


async def run_here(settings: Settings, run_id: str, env: Environment) -> RunInfo:
    """One run, from its journal; raises NotFound where there is none."""
    async with open_engine(settings) as engine:
        return await engine.find_run(run_id, env)


async def register_here(settings: Settings, env: Environment) -> RegistryScan:
    """Scans the model bucket of `env` in this process; raises as `scan` does."""
    async with open_engine(settings) as engine:
        return await engine.register(env)
